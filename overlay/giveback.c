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

#include "common/cleanup.h"
#include "common/clock.h"
#include "overlay/giveback.h"

/* So many bytes are given back at a time; at the end of the file fewer, but not fewer than
 * these...
 */
#define MOST_AT_ONCE (UINT64_C (64) << 20)
#define LEAST_CUT (UINT64_C (128) << 10)

/* ...if they have more extents on the disk. */
#define CUT_EXTENTS 16

struct giveback {
  struct store *store;
  struct giveback_budget *budget;
  int64_t deadline;
};

/* How many extents a range has on the disk, or more than MOST. */
static uint64_t
count_extents (const struct giveback *g, uint64_t offset, uint64_t count,
               uint64_t most)
{
  return store_extents_on_disk (g->store, offset, count, most + 1);
}

static void
punch (const struct giveback *g, uint64_t offset, uint64_t count)
{
  const uint64_t left = g->budget->extents;
  const uint64_t extents = count_extents (g, offset, count, left);

  if (extents <= left) {
    store_punch (g->store, offset, count);
    g->budget->extents -= extents;
  }
}

/* Cut the file off at END, in steps from its end on.  For the first one there is always
 * time: the file was made longer ahead of its use.
 */
static void
cut_off (const struct giveback *g, uint64_t end)
{
  uint64_t size, step = MOST_AT_ONCE;

  if (store_size (g->store, &size) == -1)
    return;
  for (bool first = true; size > end && (first || clock_now () < g->deadline);
       first = false) {
    const uint64_t left = g->budget->extents;
    const uint64_t count = MIN (step, size - end);
    const uint64_t extents
      = count_extents (g, size - count, count, MIN (left, CUT_EXTENTS));

    if (extents > CUT_EXTENTS && step > LEAST_CUT)
      step /= 2;
    else if (extents > left || store_truncate (g->store, size - count) == -1)
      return;
    else {
      size -= count;
      g->budget->extents -= extents;
    }
  }
}

/* The first cluster from NR on that is in use, or is not; NR_CLUSTERS if there is none
 * before that.
 */
static uint64_t
next_cluster (const struct image_used *u, uint64_t nr, uint64_t nr_clusters,
              bool in_use)
{
  while (nr < nr_clusters) {
    uint64_t word = nr / 64 < u->nr_words ? u->words[nr / 64] : 0;

    word = (in_use ? word : ~word) >> nr % 64;
    if (word)
      return MIN (nr + (unsigned) __builtin_ctzll (word), nr_clusters);
    nr = ROUND_DOWN (nr, UINT64_C (64)) + 64;
  }
  return nr_clusters;
}

/* Punch what is not in use and is SHORTEST to LONGEST bytes long. */
static void
punch_unused (const struct giveback *g, uint64_t cluster_size,
              const struct image_used *u, uint64_t shortest, uint64_t longest)
{
  const uint64_t nr_clusters = u->end / cluster_size;
  uint64_t nr = 0, end;

  for (; (nr = next_cluster (u, nr, nr_clusters, false)) < nr_clusters;
       nr = end) {
    end = next_cluster (u, nr, nr_clusters, true);

    const uint64_t offset = nr * cluster_size;
    const uint64_t length = (end - nr) * cluster_size;

    if (length < shortest || length > longest)
      continue;
    for (uint64_t at = 0; at < length; at += MOST_AT_ONCE) {
      if (clock_now () >= g->deadline)
        return;
      punch (g, offset + at, MIN (length - at, MOST_AT_ONCE));
    }
  }
}

void
giveback (struct store *store, uint64_t cluster_size,
          const struct image_used *used, struct giveback_budget *budget)
{
  static const uint64_t shortest[] = { 1 << 20, 64 << 10, 1 };
  struct giveback g = { .store = store, .budget = budget };
  uint64_t longest = UINT64_MAX;

  /* The thread that writes back would put more on the disk.  Its error is not lost: it is
   * told again to the one who asks before the file gets its name.
   */
  (void) store_check_early (store);

  const int64_t start = clock_now ();
  g.deadline = start + budget->nanoseconds;
  cut_off (&g, used->end);
  for (unsigned i = 0; i < 3; ++i) {
    punch_unused (&g, cluster_size, used, shortest[i], longest);
    longest = shortest[i] - 1;
  }
  budget->nanoseconds -= clock_now () - start;
}
