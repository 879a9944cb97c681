/* SPDX-License-Identifier: BSD-3-Clause */

/* Giving back what an overlay file has too much (see giveback.h).
 *
 * What is not on the disk yet is quickly forgotten, and need not be written then.  What
 * is may take a millisecond or more for each extent, where the file system tells the disk
 * what it does not need any more ("discard"): at once, or when the file is synced.  So
 * extents on the disk are counted, and are freed a few at a time.
 */

#include <config.h>

#include <stdbool.h>
#include <time.h>

#include "common/cleanup.h"
#include "overlay/giveback.h"
#include "overlay/private.h"

/* The file is cut off so many places at a time, or fewer... */
#define CUT_PLACES 256

/* ...if they have more extents on the disk. */
#define CUT_EXTENTS 16

struct giveback {
  struct store *store;
  struct giveback_budget *budget;
  int64_t deadline;
};

static int64_t
now (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

/* How many extents a range has on the disk, or more than MOST. */
static uint64_t
count_extents (const struct giveback *g, uint64_t offset, uint64_t count,
               uint64_t most)
{
  return store_extents_on_disk (g->store, offset, count, most + 1);
}

static bool
punch (void *opaque, uint64_t offset, uint64_t count)
{
  struct giveback *g = opaque;
  const uint64_t left = g->budget->extents;
  const uint64_t extents = count_extents (g, offset, count, left);

  if (extents <= left) {
    store_punch (g->store, offset, count);
    g->budget->extents -= extents;
  }
  return now () < g->deadline;
}

/* Cut the file off at END, in steps from its end on. */
static void
cut_off (struct giveback *g, uint64_t place_size, uint64_t end)
{
  uint64_t size, step = CUT_PLACES * place_size;

  if (store_size (g->store, &size) == -1)
    return;
  while (size > end && now () < g->deadline) {
    const uint64_t left = g->budget->extents;
    const uint64_t count = MIN (step, size - end);
    const uint64_t extents
      = count_extents (g, size - count, count, MIN (left, CUT_EXTENTS));

    if (extents > CUT_EXTENTS && step > place_size)
      step /= 2;
    else if (extents > left || store_truncate (g->store, size - count) == -1)
      return;
    else {
      size -= count;
      g->budget->extents -= extents;
    }
  }
}

void
giveback (struct overlay *o, uint64_t end, struct giveback_budget *budget)
{
  struct giveback g = { .store = overlay_store (o), .budget = budget };

  if (!overlay_had_views (o)) {
    (void) store_truncate (g.store, end);
    return;
  }
  /* The thread that writes back would put more on the disk.  Its error is not lost: it is
   * told again to the one who asks before the file gets its name.
   */
  (void) store_check_early (g.store);

  const int64_t start = now ();
  g.deadline = start + budget->nanoseconds;
  cut_off (&g, o->places.size, end);
  if (now () < g.deadline)
    overlay_find_unused (o, punch, &g);
  budget->nanoseconds -= now () - start;
}
