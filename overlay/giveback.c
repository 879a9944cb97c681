/* SPDX-License-Identifier: BSD-3-Clause */

/* Giving back what an overlay file has too much (see giveback.h).
 *
 * To punch is quick, but what was freed is often only given to the disk ("discard") when
 * the file is synced, and that can take a millisecond for each of many small pieces.  So
 * the file is synced first, with all that is in it.  Then pieces are freed in batches,
 * each with a sync of its own: a few at first, and twice as many each time, as long as
 * the time will do for that.
 */

#include <config.h>

#include <errno.h>
#include <stdbool.h>
#include <time.h>

#include "common/cleanup.h"
#include "overlay/giveback.h"
#include "overlay/private.h"

#define FIRST_BATCH 16

struct giveback {
  struct store *store;
  int64_t *left;  /* nanoseconds */
  int64_t since;  /* when this batch began */
  unsigned batch; /* how many pieces are freed before the next sync */
  unsigned nr;    /* how many were */
  int err;        /* of a sync */
};

static int64_t
now (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The batch has been freed.  False if there is no time for another one. */
static bool
end_batch (struct giveback *g)
{
  if (store_sync (g->store) == -1) {
    g->err = errno;
    return false;
  }
  const int64_t took = now () - g->since;

  g->since += took;
  *g->left -= took;
  g->batch *= 2;
  g->nr = 0;
  return *g->left > 2 * took;
}

static bool
punch (void *opaque, uint64_t offset, uint64_t count)
{
  struct giveback *g = opaque;

  store_punch (g->store, offset, count);
  return ++g->nr < g->batch || end_batch (g);
}

/* Cut the file off at END.  A batch is so many places. */
static void
cut_off (struct giveback *g, uint64_t place_size, uint64_t end)
{
  uint64_t size;
  bool go_on = store_size (g->store, &size) == 0;

  while (go_on && size > end) {
    size -= MIN (g->batch * place_size, size - end);
    go_on = store_truncate (g->store, size) == 0 && end_batch (g);
  }
}

int
giveback (struct overlay *o, uint64_t end, int64_t *nanoseconds_left)
{
  struct store *store = overlay_store (o);
  struct giveback g
    = { .store = store, .left = nanoseconds_left, .batch = FIRST_BATCH };

  if (!overlay_had_views (o)) {
    (void) store_truncate (store, end);
    return 0;
  }
  if (store_sync (store) == -1)
    return -1;
  if (*nanoseconds_left <= 0)
    return 0;

  g.since = now ();
  cut_off (&g, o->places.size, end);
  if (!g.err && *g.left > 0)
    overlay_find_unused (o, punch, &g);
  if (!g.err)
    (void) end_batch (&g);
  errno = g.err;
  return g.err ? -1 : 0;
}
