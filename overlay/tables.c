/* SPDX-License-Identifier: BSD-3-Clause */

/* Space for the tables of a qcow2 image in an overlay file (see tables.h).
 *
 *   +--------+----------+----------------+-------+-------+-------+--
 *   | header | L1 table | refcount table | block | block | block | ...
 *   +--------+----------+----------------+-------+-------+-------+--
 *    the head, mostly a hole              the disk's, and here and there L2 tables
 *                                         and refcount blocks
 *
 * A block of the log is a cluster of the image.
 *
 * The head has its final layout from the start, for an L1 table must lie in one
 * piece.  Space in it is set aside page by page, as the disk is touched.  A refcount
 * table that gets too long for the head, as that of a file with old versions of the
 * disk does, moves to blocks in a row.
 *
 * What is needed: one cluster for each L2 table with an entry that is not "hole", but a few
 * for all those in which every entry is "zero"; and refcount blocks for all of the file.
 * They are set aside in advance by a few at a time, so that most requests find enough.  Too
 * much is given back by the save; too little cannot be, as change.c asks before it
 * changes a slot.
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
tables_init (struct tables *t, const struct qcow2_geometry *g, struct log *log,
             enum tables_space space)
{
  const uint64_t nr_pages = l1_size (g) / PAGE + 1;

  *t = (struct tables) {
    .geometry = *g,
    .log = log,
    .space = space,
    .l1_offset = g->cluster_size,
  };
  use_reftable (t, reftable_offset (g), reftable_room (g), 0);
  t->l1_pages = calloc (nr_pages / 64 + 1, sizeof *t->l1_pages);
  t->l2_words = calloc (g->l1_entries / 32 + 1, sizeof *t->l2_words);
  if (!t->l1_pages || !t->l2_words) {
    free (t->l1_pages);
    free (t->l2_words);
    t->l1_pages = NULL;
    errno = ENOMEM;
    return -1;
  }
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
  free (t->l2_words);
  free (t->l1_pages);
}

/* Nothing was written there since it was taken; but what the log gives out may hold older
 * bytes.  They are punched first: a file system that copies on write (btrfs) takes what is
 * allocated for set aside, and then wants new space for each write to it.  (This is done
 * while a request holds its locks.  It is MAX_ADVANCE at the most, most often a hole, and
 * needed once for many requests.)  Where no space can be set aside, zeroes are written.
 */
static int
set_aside (struct tables *t, uint64_t offset, uint64_t count)
{
  store_punch (t->log->store, offset, count);
  if (store_set_aside (t->log->store, offset, count) == 0)
    return 0;
  if (errno != EOPNOTSUPP && errno != ENOSYS)
    return -1;
  return store_write_zeroes (t->log->store, offset, count);
}

/* Remember clusters that were taken.  Caller holds the lock. */
static int
add_run (struct tables *t, struct log_run run)
{
  assert_held (&t->lock);

  struct log_run *last = t->nr_runs > 0 ? &t->runs[t->nr_runs - 1] : NULL;

  if (last && last->first + last->count == run.first)
    last->count += run.count;
  else {
    if (t->nr_runs == t->max_runs) {
      const size_t max = t->max_runs ? 2 * t->max_runs : 4;
      struct log_run *runs = realloc (t->runs, max * sizeof *runs);

      if (!runs)
        return -1;
      t->runs = runs;
      t->max_runs = max;
    }
    t->runs[t->nr_runs++] = run;
  }
  t->nr_clusters += run.count;
  return 0;
}

/* Have at least WANTED clusters.  Caller holds the lock. */
static int
take_clusters (struct tables *t, uint64_t wanted, enum log_effort effort)
{
  assert_held (&t->lock);

  while (t->nr_clusters < wanted) {
    struct log_run run;

    if (log_take (t->log, wanted - t->nr_clusters, effort, LOG_UNLIMITED, &run)
        == -1)
      return -1;
    if (add_run (t, run) == -1) {
      log_give_back (t->log, run);
      errno = ENOMEM;
      return -1;
    }
  }
  return 0;
}

/* What follows PART in one piece, MOST clusters at the most; PART ends behind it then.
 * There is at least one.  Caller holds the lock.
 */
static struct log_run
next_piece (const struct tables *t, struct tables_part *part, uint64_t most)
{
  assert_held (&t->lock);

  while (part->in_run == t->runs[part->run].count) {
    part->run++;
    part->in_run = 0;
  }

  const struct log_run *run = &t->runs[part->run];
  const struct log_run piece
    = { .first = run->first + part->in_run,
        .count = (uint32_t) MIN (run->count - part->in_run, most) };

  part->nr += piece.count;
  part->in_run += piece.count;
  return piece;
}

/* Give back the last clusters, for which there is no space.  Caller holds the lock.
 * (Others wait for it and for what the request holds while this is punched.  It is not
 * much, and there is nothing in it.)
 */
static void
drop_clusters_without_space (struct tables *t)
{
  assert_held (&t->lock);

  while (t->nr_clusters > t->with_space.nr) {
    struct log_run *last = &t->runs[t->nr_runs - 1];
    const uint32_t count
      = (uint32_t) MIN (last->count, t->nr_clusters - t->with_space.nr);

    last->count -= count;
    log_give_back (t->log,
                   (struct log_run) { last->first + last->count, count });
    t->nr_clusters -= count;
    if (last->count == 0)
      t->nr_runs--;
  }
}

/* Have space for at least WANTED clusters.  Caller holds the lock. */
static int
have_space (struct tables *t, uint64_t wanted, enum log_effort effort)
{
  assert_held (&t->lock);

  int r = take_clusters (t, wanted, effort);

  while (r == 0 && t->with_space.nr < wanted) {
    struct tables_part part = t->with_space;
    const struct log_run piece
      = next_piece (t, &part, wanted - t->with_space.nr);

    r = set_aside (t, log_offset (t->log, piece.first),
                   piece.count * (uint64_t) t->geometry.cluster_size);
    if (r == 0)
      t->with_space = part;
  }
  if (r == -1) {
    const int err = errno;

    drop_clusters_without_space (t);
    errno = err;
  }
  return r;
}

/* The refcount blocks of a file that ends at END, and one more, as clusters for
 * tables make it longer.
 */
static uint64_t
refcount_blocks (const struct tables *t, uint64_t end)
{
  return end / bytes_per_refcount_block (&t->geometry) + 2;
}

/* Have space for at least WANTED clusters, and for some in advance if that is to be had. */
static int
have_space_in_advance (struct tables *t, uint64_t wanted)
{
  const uint64_t cluster = t->geometry.cluster_size;
  const uint64_t quarter = t->with_space.nr / 4 * cluster;
  const uint64_t advance
    = MIN (MAX (quarter, MIN_ADVANCE), MAX_ADVANCE) / cluster;

  if (have_space (t, wanted + advance, LOG_TIDY) == 0)
    return 0;
  return have_space (t, wanted, LOG_ANY);
}

/* Move the refcount table to blocks where SIZE bytes of it fit, and more, so that it
 * moves a few times only.  Where it was is given back, in the head by the one who
 * saves.  Caller holds the lock.
 */
static int
move_reftable (struct tables *t, uint64_t size)
{
  assert_held (&t->lock);

  const uint64_t cluster = t->geometry.cluster_size;
  const uint64_t room = ROUND_UP (MAX (2 * t->reftable_room, size), cluster);
  struct log_run row = { .count = (uint32_t) (room / cluster) };
  const uint64_t space = ROUND_UP (size, cluster);

  if (log_take_row (t->log, row.count, &row) == -1)
    return -1;

  const uint64_t offset = log_offset (t->log, row.first);

  if (set_aside (t, offset, space) == -1) {
    const int err = errno;

    log_give_back (t->log, row);
    errno = err;
    return -1;
  }
  if (t->reftable_row.count > 0)
    log_give_back (t->log, t->reftable_row);
  t->reftable_row = row;
  use_reftable (t, offset, room, space);
  return 0;
}

/* Have space for SIZE bytes of the refcount table, for which there is room.  In the head
 * the rest of its last cluster is a hole; in the log anything may be there, so that it is
 * written too.  Caller holds the lock.
 */
static int
have_reftable_space (struct tables *t, uint64_t size)
{
  const uint64_t unit
    = t->reftable_row.count > 0 ? t->geometry.cluster_size : PAGE;
  const uint64_t wanted = ROUND_UP (size, unit);

  if (wanted <= t->reftable_space)
    return 0;
  if (set_aside (t, t->reftable_offset + t->reftable_space,
                 wanted - t->reftable_space)
      == -1)
    return -1;
  t->reftable_space = wanted;
  return 0;
}

/* L2 tables that are needed: each of those with space has a cluster, and a few clusters
 * are for all that are zero, whose entries in the L1 table have space.  While an image is
 * being made, more may have been taken.
 */
static uint64_t
l2_clusters (const struct tables *t)
{
  const uint64_t entries = t->nr_l1_pages * (PAGE / 8);
  const uint64_t zero = t->some_zero ? entries / QCOW2_MAX_REFCOUNT + 1 : 0;

  return MAX (t->nr_l2 + zero, t->used.nr);
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
    nr_blocks = refcount_blocks (t, log_end (t->log));
    /* A file for which that is not enough is copied when it is saved. */
    reftable = MIN (nr_blocks * 8, QCOW2_MAX_REFTABLE_SIZE);

    const uint64_t clusters = l2_clusters (t) + nr_blocks;
    if (reftable > t->reftable_room)
      r = move_reftable (t, reftable);
    else if (clusters > t->with_space.nr)
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

/* The same.  Meanwhile others have perhaps taken addresses without waiting for the lock,
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
  while (log_end (t->log) > atomic_load (&t->covered));
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
  t->nr_l1_pages++;
  return 0;
}

/* The page of the header, which is needed in any case. */
static int
have_header (struct tables *t)
{
  if (t->with_space.nr > 0)
    return 0;
  if (store_make_file (t->log->store) == -1)
    return -1;
  return set_aside (t, 0, PAGE);
}

/* What is known of each L2 table, in two bits: there is space for it; and that was relied
 * on by a request that did not set it aside itself.  The second one alone means nothing.
 */
#define L2_HAS_SPACE 1
#define L2_RELIED_ON 2

/* The bits of table NR, in their word. */
static uint64_t
l2_bits (uint64_t nr, uint64_t bits)
{
  return bits << 2 * (nr % 32);
}

/* Is there space, which stays then? */
static bool
rely_on_l2 (struct tables *t, uint64_t nr)
{
  _Atomic uint64_t *word = &t->l2_words[nr / 32];
  const uint64_t both = l2_bits (nr, L2_HAS_SPACE | L2_RELIED_ON);
  uint64_t found = atomic_load (word);

  if ((found & both) == both)
    return true;
  /* Both in one step, or who set it aside might give it up between. */
  if (found & l2_bits (nr, L2_HAS_SPACE))
    found = atomic_fetch_or (word, l2_bits (nr, L2_RELIED_ON));
  return found & l2_bits (nr, L2_HAS_SPACE);
}

int
tables_reserve_l2 (struct tables *t, uint64_t nr)
{
  if (t->space == TABLES_UNPLANNED || rely_on_l2 (t, nr))
    return 0;

  HOLD (&t->lock);

  if (rely_on_l2 (t, nr))
    return 0;
  if (have_header (t) == -1 || have_l1_page (t, nr) == -1)
    return -1;
  t->nr_l2++;
  if (have_needed_space (t) == -1) {
    t->nr_l2--;
    return -1;
  }
  atomic_fetch_and (&t->l2_words[nr / 32], ~l2_bits (nr, L2_RELIED_ON));
  atomic_fetch_or (&t->l2_words[nr / 32], l2_bits (nr, L2_HAS_SPACE));
  return 1;
}

void
tables_cancel_l2 (struct tables *t, uint64_t nr)
{
  _Atomic uint64_t *word = &t->l2_words[nr / 32];

  HOLD (&t->lock);

  uint64_t found = atomic_load (word);

  while (!(found & l2_bits (nr, L2_RELIED_ON)))
    if (atomic_compare_exchange_weak (word, &found,
                                      found & ~l2_bits (nr, L2_HAS_SPACE))) {
      t->nr_l2--;
      return;
    }
}

int
tables_reserve_zero_l2 (struct tables *t, uint64_t first, uint64_t count)
{
  if (t->space == TABLES_UNPLANNED)
    return 0;

  HOLD (&t->lock);

  if (have_header (t) == -1)
    return -1;
  for (uint64_t nr = first; nr < first + count; ++nr)
    if (have_l1_page (t, nr) == -1)
      return -1;
  t->some_zero = true;
  return have_needed_space (t);
}

int
tables_reserve_refcounts (struct tables *t)
{
  if (t->space == TABLES_UNPLANNED
      || log_end (t->log) <= atomic_load (&t->covered))
    return 0;

  HOLD (&t->lock);

  return have_needed_space (t);
}

void
tables_take_again (struct tables *t)
{
  HOLD (&t->lock);

  t->used = (struct tables_part) { .nr = 0 };
}

int
tables_take (struct tables *t, uint64_t *offset)
{
  HOLD (&t->lock);

  if (take_clusters (t, t->used.nr + 1, LOG_ANY) == -1)
    return -1;
  *offset = log_offset (t->log, next_piece (t, &t->used, 1).first);
  return 0;
}

int
tables_have_refcounts (struct tables *t)
{
  HOLD (&t->lock);

  /* Where no space was set aside, these have it by being written to. */
  if (t->with_space.nr < t->used.nr)
    t->with_space = t->used;
  return have_needed_space (t);
}
