/* SPDX-License-Identifier: BSD-3-Clause */

/* Which locks a thread holds, in builds with --enable-debug (see lock.h). */

#include <config.h>

#include "common/lock.h"

#ifdef COW_DEBUG

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static const char *const names[NR_RANKS] = {
  [RANK_SET] = "the set's lock",
  [RANK_ENTRY] = "an entry's lock",
  [RANK_PLAN] = "a view's own lock",
  [RANK_ROUND] = "the lock of a round of the cleaner",
  [RANK_RELEASE] = "the release lock",
  [RANK_SLOT] = "a slot lock",
  [RANK_REQUEST] = "the request lock",
  [RANK_VIEW] = "the view lock",
  [RANK_NODE] = "a node's lock",
  [RANK_DEAD] = "the dead lock",
  [RANK_TABLES] = "the tables' lock",
  [RANK_LOG] = "the log's lock",
  [RANK_STORE] = "the store's lock",
  [RANK_WRITE_BACK] = "write-back's lock",
  [RANK_CLEANER] = "the cleaner's lock",
  [RANK_FILE_LOCKS] = "the lock of the list of locked files",
};

/* All slot locks and one of each other kind; or those of as many overlays as tests freeze
 * at one moment.
 */
#define MAX_HELD (256 + NR_RANKS)

struct held {
  const void *lock;
  enum lock_rank rank;
  enum lock_hold how;
};

/* Of this thread, in the order in which they were taken. */
static _Thread_local struct held all_held[MAX_HELD];
static _Thread_local unsigned nr_held;

__attribute__ ((format (printf, 1, 2), noreturn)) static void
misused (const char *format, ...)
{
  va_list args;

  va_start (args, format);
  (void) fprintf (stderr, "cow: locks: ");
  (void) vfprintf (stderr, format, args);
  (void) fprintf (stderr, "\n");
  va_end (args);
  abort ();
}

static const struct held *
find_held (const void *lock)
{
  for (unsigned i = nr_held; i-- > 0;)
    if (all_held[i].lock == lock)
      return &all_held[i];
  return NULL;
}

void
lock_is_taken (const void *lock, enum lock_rank rank, enum lock_hold how)
{
  for (unsigned i = 0; i < nr_held; ++i) {
    const struct held *h = &all_held[i];

    if (h->rank == RANK_SET || h->rank > rank
        || (h->rank == rank && h->lock >= lock))
      misused ("%s is taken while %s is held", names[rank], names[h->rank]);
  }
  if (nr_held == MAX_HELD)
    misused ("too many are held");
  all_held[nr_held++]
    = (struct held) { .lock = lock, .rank = rank, .how = how };
}

void
lock_is_let_go (const void *lock)
{
  const struct held *h = find_held (lock);

  if (!h)
    misused ("one is let go that this thread does not hold");
  for (unsigned i = (unsigned) (h - all_held) + 1; i < nr_held; ++i)
    all_held[i - 1] = all_held[i];
  nr_held--;
}

void
lock_assert_held (const void *lock, const char *where)
{
  if (!find_held (lock))
    misused ("%s: a lock is not held", where);
}

void
lock_assert_held_exclusively (const void *lock, const char *where)
{
  const struct held *h = find_held (lock);

  if (!h || h->how != HOLD_EXCLUSIVELY)
    misused ("%s: a lock is not held exclusively", where);
}

void
lock_assert_either_held (const void *const locks[2], const char *where)
{
  if (!find_held (locks[0]) && !find_held (locks[1]))
    misused ("%s: neither lock is held", where);
}

void
lock_assert_none_from (enum lock_rank rank, const char *where)
{
  for (unsigned i = 0; i < nr_held; ++i)
    if (all_held[i].rank >= rank)
      misused ("%s: %s is held", where, names[all_held[i].rank]);
}

#else

/* ISO C wants something in each file. */
typedef int nothing_to_know;

#endif
