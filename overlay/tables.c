/* SPDX-License-Identifier: BSD-3-Clause */

/* Space for the tables of a qcow2 image in an overlay file (see tables.h).
 *
 *   +--------+----------+----------------+---------+---------+---------+--
 *   | header | L1 table | refcount table |  place  |  place  |  place  | ...
 *   +--------+----------+----------------+---------+---------+---------+--
 *    the head, mostly a hole              bytes of slots, and here and there
 *                                         L2 tables and refcount blocks
 *
 * The head has its final layout from the start, for an L1 table must lie in one
 * piece.  Space in it is set aside page by page, as the disk is touched.  A refcount
 * table that gets too long for the head, as that of a file with old versions of the
 * disk does, moves to places in a row.
 *
 * What is needed: one cluster for each L2 table with an entry that is not "hole",
 * and refcount blocks for all of the file.  They are set aside in advance by a few
 * at a time, so that most requests find enough.  Too much is given back by
 * the save; too little cannot be, as change.c asks before it changes a slot.
 *
 * Knows the format and the file, but not the map.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>

#include "common/cleanup.h"
#include "overlay/tables.h"

/* What file systems allocate in. */
#define PAGE UINT64_C (4096)

/* In advance, between these, and a quarter of what there is. */
#define MIN_ADVANCE (UINT64_C (32) << 10)
#define MAX_ADVANCE (UINT64_C (1) << 20)

static uint64_t
l1_size (const struct qcow2_geometry *g)
{
  return g->l1_entries * 8;
}

/* The bytes of the file that a refcount block is for. */
static uint64_t
bytes_per_refcount_block (const struct qcow2_geometry *g)
{
  return qcow2_refcounts_per_block (g) * g->cluster_size;
}

/* Room in the head for the refcount table of a file that holds all of the disk twice. */
static uint64_t
reftable_room (const struct qcow2_geometry *g)
{
  const uint64_t per_block = bytes_per_refcount_block (g);
  const uint64_t blocks = 2 * (g->disk_size / per_block) + 2 + 512;

  return ROUND_UP (MIN (blocks * 8, QCOW2_MAX_REFTABLE_SIZE),
                   (uint64_t) g->cluster_size);
}

static uint64_t
reftable_offset (const struct qcow2_geometry *g)
{
  return (1 + qcow2_clusters (g, l1_size (g))) * g->cluster_size;
}

uint64_t
tables_head_size (const struct qcow2_geometry *g)
{
  return reftable_offset (g) + reftable_room (g);
}

/* Caller holds the lock, or is alone. */
static void
use_reftable (struct tables *t, uint64_t offset, uint64_t room, uint64_t space)
{
  t->reftable_offset = offset;
  t->reftable_room = MIN (room, QCOW2_MAX_REFTABLE_SIZE);
  t->reftable_space = space;
}

int
tables_init (struct tables *t, const struct qcow2_geometry *g,
             struct places *places, enum tables_space space)
{
  const uint64_t nr_pages = l1_size (g) / PAGE + 1;

  *t = (struct tables) {
    .geometry = *g,
    .places = places,
    .space = space,
    .l1_offset = g->cluster_size,
  };
  use_reftable (t, reftable_offset (g), reftable_room (g), 0);
  t->l1_pages = calloc (nr_pages / 64 + 1, sizeof *t->l1_pages);
  if (!t->l1_pages)
    return -1;
  atomic_init (&t->covered, 0);
  mutex_init (&t->lock, RANK_TABLES);
  return 0;
}

void
tables_destroy (struct tables *t)
{
  if (!t->l1_pages)
    return;
  mutex_destroy (&t->lock);
  free (t->runs);
  free (t->l1_pages);
}

/* Write zeroes, for file systems that set no space aside otherwise. */
static int
write_zeroes (struct tables *t, uint64_t offset, uint64_t count)
{
  static const char zeroes[PAGE];

  while (count > 0) {
    const uint64_t n = MIN (count, sizeof zeroes);
    struct iovec iov = { .iov_base = (char *) zeroes, .iov_len = n };

    if (store_writev (t->places->store, &iov, 1, offset) == -1)
      return -1;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
set_aside (struct tables *t, uint64_t offset, uint64_t count)
{
  if (store_set_aside (t->places->store, offset, count) == 0)
    return 0;
  if (errno != EOPNOTSUPP && errno != ENOSYS)
    return -1;
  return write_zeroes (t, offset, count);
}

/* Remember places that were taken.  Caller holds the lock. */
static int
add_run (struct tables *t, uint64_t place, uint64_t count)
{
  assert_held (&t->lock);

  struct place_run *last = t->nr_runs > 0 ? &t->runs[t->nr_runs - 1] : NULL;

  if (last && last->first + last->count == place)
    last->count += count;
  else {
    if (t->nr_runs == t->max_runs) {
      const size_t max = t->max_runs ? 2 * t->max_runs : 4;
      struct place_run *runs = realloc (t->runs, max * sizeof *runs);

      if (!runs)
        return -1;
      t->runs = runs;
      t->max_runs = max;
    }
    t->runs[t->nr_runs++]
      = (struct place_run) { .first = place, .count = count };
  }
  t->nr_clusters += count * t->places->size / t->geometry.cluster_size;
  return 0;
}

/* Have at least WANTED clusters in places.  Caller holds the lock. */
static int
take_places (struct tables *t, uint64_t wanted)
{
  assert_held (&t->lock);

  while (t->nr_clusters < wanted) {
    const uint64_t missing
      = (wanted - t->nr_clusters) * t->geometry.cluster_size;
    uint64_t place;
    const uint64_t count
      = places_take (t->places, (missing - 1) / t->places->size + 1, &place);

    if (count == 0)
      return -1;
    if (add_run (t, place, count) == -1) {
      places_give_back (t->places, place, count);
      return -1;
    }
  }
  return 0;
}

/* A range of the table clusters that lies in one piece. */
struct piece {
  uint64_t offset; /* in the file */
  uint64_t count;  /* of clusters */
};

/* The clusters FIRST .. (< nr_clusters), at the most up to END.  Caller holds the
 * lock, or is alone.
 */
static struct piece
find_piece (const struct tables *t, uint64_t first, uint64_t end)
{
  const uint64_t per_place = t->places->size / t->geometry.cluster_size;
  const struct place_run *run = t->runs;

  while (first >= run->count * per_place) {
    first -= run->count * per_place;
    end -= run->count * per_place;
    run++;
  }
  return (struct piece) {
    .offset = run->first * t->places->size + first * t->geometry.cluster_size,
    .count = MIN (end, run->count * per_place) - first,
  };
}

/* Give back the last places as long as there is no space in them, so that those of
 * the request that fails lie at the end of the file and move it back.  Caller holds
 * the lock.
 */
static void
drop_places_without_space (struct tables *t)
{
  assert_held (&t->lock);

  const uint64_t per_place = t->places->size / t->geometry.cluster_size;

  while (t->nr_clusters >= t->nr_with_space + per_place) {
    struct place_run *last = &t->runs[t->nr_runs - 1];

    last->count--;
    places_give_back (t->places, last->first + last->count, 1);
    t->nr_clusters -= per_place;
    if (last->count == 0)
      t->nr_runs--;
  }
}

/* Have space for at least WANTED clusters.  Caller holds the lock. */
static int
have_space (struct tables *t, uint64_t wanted)
{
  assert_held (&t->lock);

  const uint64_t cluster = t->geometry.cluster_size;
  int r = take_places (t, wanted);

  while (r == 0 && t->nr_with_space < wanted) {
    const struct piece p = find_piece (t, t->nr_with_space, wanted);

    r = set_aside (t, p.offset, p.count * cluster);
    if (r == 0)
      t->nr_with_space += p.count;
  }
  if (r == -1) {
    const int err = errno;

    drop_places_without_space (t);
    errno = err;
  }
  return r;
}

/* The refcount blocks of a file that ends at END, and one more, as places for
 * tables make it longer.
 */
static uint64_t
refcount_blocks (const struct tables *t, uint64_t end)
{
  return end / bytes_per_refcount_block (&t->geometry) + 2;
}

/* The same, and something in advance if that is to be had. */
static int
have_space_in_advance (struct tables *t, uint64_t wanted)
{
  const uint64_t cluster = t->geometry.cluster_size;
  const uint64_t quarter = t->nr_with_space / 4 * cluster;
  const uint64_t advance
    = MIN (MAX (quarter, MIN_ADVANCE), MAX_ADVANCE) / cluster;

  if (have_space (t, wanted + advance) == 0)
    return 0;
  return advance == 0 ? -1 : have_space (t, wanted);
}

/* Move the refcount table to places where SIZE bytes of it fit, and more, so that it
 * moves a few times only.  Where it was is given back.  Caller holds the lock.
 */
static int
move_reftable (struct tables *t, uint64_t size)
{
  assert_held (&t->lock);

  const uint64_t place_size = t->places->size;
  const uint64_t room = MAX (2 * t->reftable_room, size);
  const uint64_t space = ROUND_UP (size, PAGE);
  struct place_run row = { .count = (room - 1) / place_size + 1 };

  if (places_take_row (t->places, row.count, &row.first) == -1)
    return -1;
  if (set_aside (t, row.first * place_size, space) == -1) {
    const int err = errno;

    places_give_back (t->places, row.first, row.count);
    errno = err;
    return -1;
  }
  if (t->reftable_row.count > 0)
    places_give_back (t->places, t->reftable_row.first, t->reftable_row.count);
  else if (t->reftable_space > 0)
    store_punch (t->places->store, t->reftable_offset, t->reftable_space);
  t->reftable_row = row;
  use_reftable (t, row.first * place_size, row.count * place_size, space);
  return 0;
}

/* Have space for SIZE bytes of the refcount table, for which there is room.  Caller
 * holds the lock.
 */
static int
have_reftable_space (struct tables *t, uint64_t size)
{
  const uint64_t wanted = ROUND_UP (size, PAGE);

  if (wanted <= t->reftable_space)
    return 0;
  if (set_aside (t, t->reftable_offset + t->reftable_space,
                 wanted - t->reftable_space)
      == -1)
    return -1;
  t->reftable_space = wanted;
  return 0;
}

/* Have space for what is known to be needed now, and something in advance.  Caller
 * holds the lock.
 */
static int
have_space_for_now (struct tables *t)
{
  uint64_t nr_blocks, reftable;
  int r = 0;

  do {
    nr_blocks = refcount_blocks (t, places_end (t->places));
    /* A file for which that is not enough is copied when it is saved. */
    reftable = MIN (nr_blocks * 8, QCOW2_MAX_REFTABLE_SIZE);

    const uint64_t clusters = t->nr_l2 + nr_blocks;
    if (reftable > t->reftable_room)
      r = move_reftable (t, reftable);
    else if (clusters > t->nr_with_space)
      r = have_space_in_advance (t, clusters);
    else
      break;
  } while (r == 0);

  if (r == -1 || have_reftable_space (t, reftable) == -1)
    return -1;
  atomic_store (&t->covered,
                (nr_blocks - 1) * bytes_per_refcount_block (&t->geometry));
  return 0;
}

/* The same.  Meanwhile others have perhaps taken places without waiting for the lock,
 * as `covered' said that there was enough for them: what it was, not what it became.
 * They take first and look at it then, this stores it first and looks at the end of
 * the file then, so that one of them sees the other.
 */
static int
have_needed_space (struct tables *t)
{
  do
    if (have_space_for_now (t) == -1)
      return -1;
  while (places_end (t->places) > atomic_load (&t->covered));
  return 0;
}

/* Caller holds the lock. */
static int
have_l1_page (struct tables *t, uint64_t l2_nr)
{
  assert_held (&t->lock);

  const uint64_t page = l2_nr * 8 / PAGE;
  const uint64_t bit = UINT64_C (1) << page % 64;

  if (t->l1_pages[page / 64] & bit)
    return 0;
  if (set_aside (t, t->l1_offset + page * PAGE, PAGE) == -1)
    return -1;
  t->l1_pages[page / 64] |= bit;
  return 0;
}

/* The page of the header, which is needed in any case. */
static int
have_header (struct tables *t)
{
  if (t->nr_with_space > 0)
    return 0;
  if (store_make_file (t->places->store) == -1)
    return -1;
  return set_aside (t, 0, PAGE);
}

int
tables_reserve_l2 (struct tables *t, uint64_t nr)
{
  if (t->space == TABLES_UNPLANNED)
    return 0;

  HOLD (&t->lock);

  if (have_header (t) == -1 || have_l1_page (t, nr) == -1)
    return -1;
  t->nr_l2++;
  if (have_needed_space (t) == 0)
    return 0;
  t->nr_l2--;
  return -1;
}

int
tables_reserve_refcounts (struct tables *t)
{
  if (t->space == TABLES_UNPLANNED
      || places_end (t->places) <= atomic_load (&t->covered))
    return 0;

  HOLD (&t->lock);

  return have_needed_space (t);
}

void
tables_cancel_l2 (struct tables *t, uint64_t count)
{
  if (t->space == TABLES_UNPLANNED)
    return;

  HOLD (&t->lock);

  t->nr_l2 -= count;
}

void
tables_take_again (struct tables *t)
{
  HOLD (&t->lock);

  t->nr_used = 0;
}

int
tables_take (struct tables *t, uint64_t *offset)
{
  HOLD (&t->lock);

  if (take_places (t, t->nr_used + 1) == -1)
    return -1;
  *offset = find_piece (t, t->nr_used, t->nr_used + 1).offset;
  t->nr_used++;
  return 0;
}

int
tables_have_refcounts (struct tables *t)
{
  HOLD (&t->lock);

  /* Where no space was set aside, these have it by being written to. */
  t->nr_l2 = MAX (t->nr_l2, t->nr_used);
  t->nr_with_space = MAX (t->nr_with_space, t->nr_used);
  return have_needed_space (t);
}

void
tables_give_back (struct tables *t)
{
  HOLD (&t->lock);

  for (uint64_t i = t->nr_used; i < t->nr_clusters;) {
    const struct piece p = find_piece (t, i, t->nr_clusters);

    store_punch (t->places->store, p.offset,
                 p.count * t->geometry.cluster_size);
    i += p.count;
  }
}
