/* SPDX-License-Identifier: BSD-3-Clause */

/* Block operations on an overlay (overlay.h has the object itself).
 *
 * A disk is cut into blocks, 32 of them are a slot.  The map says of each slot
 * where its bytes lie in the overlay file (its place) and in which state each
 * of its blocks is: a hole (read the base), allocated (read the file) or zero.
 * A block never becomes a hole again.
 *
 * Reading walks over the runs of one state.  Everything that changes the map
 * goes through a struct change: it takes the locks, finds the slots, gives them
 * places, writes all bytes, and only then stores the new states, so that a
 * request is there wholly or, if it fails, not at all.
 *
 * The rules that keep acknowledged writes safe (HACKING has them in full) and
 * where they are kept:
 *
 *  1 data first, then state          change_commit, slot_store
 *  2 state changes under slot lock   change_begin
 *  3 base read holding no lock       edges_read, fetch; looked at again after
 *  4 allocated blocks need no slot
 *    lock, checked before writing    blk_write
 *  5 allocated is written whole      blk_write, blk_zero, keep
 *  6 zero and trim only change
 *    state, and punch afterwards     blk_zero, punch_zeroed
 *  7 one hold of the request lock    change_begin .. change_end
 *  8 one block, one read             edges_read, find_run
 *
 * A slot whose place a frozen map has too is not written to there: it gets a fresh
 * place, and what of the old one it still needs is brought along (change_bring), in
 * the same hold in which "shared" was looked at.
 *
 * Locks, in the order in which they are taken: slot locks (stripes by slot
 * number, ascending), the request lock (shared), a map node's lock or
 * the store's lock.  No slot lock is waited for while the request lock is held.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bitmap.h"
#include "blk.h"
#include "common/cleanup.h"
#include "common/debug.h"

/* Where the byte at OFFSET of the disk lies in the file, its slot being at
 * PLACE.
 */
static uint64_t
file_offset (const struct overlay *o, uint64_t place, uint64_t offset)
{
  return (place << o->slot_shift) + (offset & (slot_size (o) - 1));
}

int
blk_error (const struct overlay *o, int err)
{
  if (err == ESHUTDOWN) /* nothing is wrong: the server ends */
    return err;

  errno = err;
  if (err == ENOMEM)
    nbdkit_error ("cow: out of memory for the map of an overlay");
  else
    nbdkit_error ("cow: overlay file in %s: %m; what was written before can "
                  "be read, and trimming some of it makes room",
                  o->store.dir);

  switch (err) {
  case EPERM:
  case EROFS:
  case ENOMEM:
  case ENOSPC:
  case EDQUOT:
  case EFBIG:
    return err;
  default:
    return EIO;
  }
}

/*----------------------------------------------------------------------
 * Looking
 */

/* Bytes of the disk that are in one state, and if that is allocated, lie one
 * behind the other in the file.
 */
struct run {
  enum block_state state;
  uint64_t length;      /* in bytes */
  uint64_t file_offset; /* if allocated */
};

/* The run of MAP that starts at OFFSET, as far as END (> OFFSET) at the most.  Caller
 * holds the request lock, or the frozen map.
 */
static struct run
find_run_of (const struct overlay *o, const struct map *map, uint64_t offset,
             uint64_t end)
{
  struct run run = { .state = BLOCK_HOLE };
  uint64_t pos = offset;

  while (pos < end) {
    const uint64_t nr = pos >> o->slot_shift;
    const struct slot *slot = map_find (map, nr);
    enum block_state state = BLOCK_HOLE;
    uint64_t place_offset = 0, piece_end;

    if (slot) {
      const struct slot_pair pair = slot_load (slot);
      const unsigned block = pos >> o->block_shift & (SLOT_BLOCKS - 1);
      const unsigned last = block + bitmap_run (pair.state, block);

      state = bitmap_state (pair.state, block);
      place_offset = file_offset (o, pair.place, pos);
      piece_end = (nr << o->slot_shift) + ((uint64_t) last << o->block_shift);
    }
    else
      piece_end = map_next (map, nr) << o->slot_shift;

    if (pos == offset) {
      run.state = state;
      run.file_offset = place_offset;
    }
    else if (state != run.state
             || (state == BLOCK_ALLOCATED
                 && place_offset != run.file_offset + (pos - offset)))
      break;
    pos = MIN (piece_end, end);
  }

  run.length = pos - offset;
  return run;
}

/* The same of the live map.  Caller holds the request lock. */
static struct run
find_run (const struct overlay *o, uint64_t offset, uint64_t end)
{
  return find_run_of (o, &o->map, offset, end);
}

static enum block_state
state_at (const struct overlay *o, uint64_t offset)
{
  return find_run (o, offset, offset + 1).state;
}

static bool
all_allocated (const struct overlay *o, uint64_t offset, uint64_t end)
{
  while (offset < end) {
    const struct run run = find_run (o, offset, end);

    if (run.state != BLOCK_ALLOCATED)
      return false;
    offset += run.length;
  }
  return true;
}

/* Has a frozen map a place of these slots too? */
static bool
any_shared (const struct overlay *o, uint64_t offset, uint64_t end)
{
  if (!o->map.newest)
    return false;
  for (uint64_t nr = offset >> o->slot_shift; nr <= (end - 1) >> o->slot_shift;
       ++nr) {
    const struct slot *slot = map_find (&o->map, nr);

    if (slot && map_is_shared (&o->map, nr, slot_load (slot).place))
      return true;
  }
  return false;
}

/*----------------------------------------------------------------------
 * Changing
 */

/* What a request does to one slot; or, if SLOT is NULL, to all slots of a leaf, which
 * have no places and become zero.
 */
struct slot_change {
  uint64_t nr;            /* of the slot, or the first one of the leaf */
  struct slot *slot;      /* good between change_begin and change_end */
  struct slot_pair found; /* under the slot lock */
  bool shared;            /* with a frozen map: its place is not written to */
  uint64_t place;         /* where its bytes go; 0: it needs no place */
  uint32_t allocate; /* blocks that are written to: they become allocated, or
                           * stay so */
  uint32_t zero;     /* blocks that become zero, or stay so */
};

/* A request's changes, from change_begin to change_end. */
struct change {
  struct overlay *o;
  uint64_t first; /* numbers of the first and the last slot */
  uint64_t last;
  size_t count;      /* of slots or leaves in SLOTS */
  uint64_t stripes;  /* slot locks held, one bit each */
  uint64_t nr_l2;    /* L2 tables that space was set aside for */
  uint64_t nr_fresh; /* slots that get a fresh place */
  struct slot_change *slots;
  struct slot_change few[17]; /* enough for 2 MiB in blocks of 4 KiB */
};

static void
cleanup_change (struct change *c)
{
  if (c->slots != c->few)
    free (c->slots);
}

#define CLEANUP_CHANGE __attribute__ ((cleanup (cleanup_change)))

/* The slot locks of COUNT slots from FIRST on. */
static uint64_t
stripes_of (uint64_t first, size_t count)
{
  uint64_t stripes = 0;

  if (count >= NR_STRIPES)
    return UINT64_MAX >> (64 - NR_STRIPES);
  for (size_t i = 0; i < count; ++i)
    stripes |= stripe_of (first + i);
  return stripes;
}

/* Which of the slots has the byte at OFFSET.  Where there may be whole leaves, which is
 * where something becomes zero, only the first and the last one are asked for.
 */
static size_t
index_of (const struct change *c, uint64_t offset)
{
  const uint64_t nr = offset >> c->o->slot_shift;

  return nr == c->last ? c->count - 1 : (size_t) (nr - c->first);
}

static void
change_unlock (struct change *c)
{
  pthread_rwlock_unlock (&c->o->request_lock);
  overlay_unlock_stripes (c->o, c->stripes);
}

/* The blocks of START .. END-1, both block aligned, that are in slot NR. */
static uint32_t
blocks_in_slot (const struct overlay *o, uint64_t nr, uint64_t start,
                uint64_t end)
{
  const uint64_t slot_start = nr << o->slot_shift;
  const uint64_t from = MAX (start, slot_start);
  const uint64_t to = MIN (end, slot_start + slot_size (o));

  if (from >= to)
    return 0;
  return bitmap_mask ((unsigned) ((from - slot_start) >> o->block_shift),
                      (unsigned) ((to - from) >> o->block_shift));
}

/* Who zeroes a whole leaf has the locks of all slots: so nobody else makes that leaf, or
 * changes a slot of it, between the look and the change (rule 2).
 */
_Static_assert(LEAF_SLOTS >= NR_STRIPES, "a leaf has slots of each lock");

/* Look at the slots; where a leaf becomes zero that nobody has touched, at all of it at
 * once.  0 or an errno value.
 */
static int
find_slots (struct change *c, uint64_t zero_start, uint64_t zero_end)
{
  struct overlay *o = c->o;

  for (uint64_t nr = c->first; nr <= c->last;) {
    const uint64_t row_end = MIN (nr + map_in_row (&o->map, nr), c->last + 1);

    if (row_end - nr == LEAF_SLOTS && nr << o->slot_shift >= zero_start
        && row_end << o->slot_shift <= zero_end
        && map_ready_leaf (&o->map, nr)) {
      c->slots[c->count++]
        = (struct slot_change) { .nr = nr, .zero = UINT32_MAX };
      nr = row_end;
      continue;
    }

    struct slot *slot = map_touch (&o->map, nr);

    if (!slot)
      return ENOMEM;
    for (; nr < row_end; ++nr, ++slot) {
      struct slot_change *s = &c->slots[c->count++];

      *s = (struct slot_change) { .nr = nr, .slot = slot };
      s->zero = blocks_in_slot (o, nr, zero_start, zero_end);
      s->found = slot_load (slot);
      s->place = s->found.place;
      s->shared = map_is_shared (&o->map, nr, s->place);
    }
  }
  return 0;
}

/* Lock the slots of the disk's bytes OFFSET .. END-1 and look at them.
 * ZERO_START .. ZERO_END-1 of these, both block aligned, are to become zero.  0, and
 * the locks are held until change_end; or an errno value, and they are not:
 * ENOMEM, or ESHUTDOWN when the overlay was closed.  C is to be declared with
 * CLEANUP_CHANGE.
 */
static int
change_begin (struct change *c, struct overlay *o, uint64_t offset,
              uint64_t end, uint64_t zero_start, uint64_t zero_end)
{
  int err;

  c->o = o;
  c->first = offset >> o->slot_shift;
  c->last = (end - 1) >> o->slot_shift;

  const size_t nr_slots = (size_t) (c->last - c->first + 1);

  c->stripes = stripes_of (c->first, nr_slots);
  c->nr_l2 = 0;
  c->nr_fresh = 0;
  c->count = 0;
  c->slots = c->few;
  if (nr_slots > sizeof c->few / sizeof c->few[0]) {
    c->slots = malloc (nr_slots * sizeof *c->slots);
    if (!c->slots)
      return ENOMEM;
  }

  overlay_lock_stripes (o, c->stripes);
  pthread_rwlock_rdlock (&o->request_lock);
  err = o->closed ? ESHUTDOWN : find_slots (c, zero_start, zero_end);
  if (err)
    change_unlock (c);
  return err;
}

/* Does this slot get a place that it did not have? */
static bool
has_fresh_place (const struct slot_change *s)
{
  return s->place != s->found.place;
}

static bool
needs_place (const struct slot_change *s)
{
  return s->allocate && (s->place == 0 || s->shared);
}

/* Has a slot a block that is no hole? */
static bool
is_touched (const struct overlay *o, uint64_t nr)
{
  const struct slot *slot
    = nr < o->map.nr_slots ? map_find (&o->map, nr) : NULL;

  return slot && slot_load (slot).state != 0;
}

/* Has any slot of the L2 table of slot NR?  Most often a neighbour has. */
static bool
l2_table_is_touched (const struct overlay *o, uint64_t nr)
{
  const uint64_t per_l2 = o->tables.geometry.slots_per_l2;
  const uint64_t start = ROUND_DOWN (nr, per_l2), end = start + per_l2;

  if (nr > start && is_touched (o, nr - 1))
    return true;
  for (uint64_t i = map_next (&o->map, start); i < end && i < o->map.nr_slots;
       i = map_next (&o->map, i + 1))
    if (is_touched (o, i))
      return true;
  return false;
}

/* Set space aside for the tables of an image, where the change is the first in an
 * L2 table.  A table with a block that is no hole has its space, for that
 * was set aside before the block was changed, and no block becomes a hole again.
 * Two requests that are both the first set it aside twice.  0 or an errno value.
 */
static int
change_reserve_tables (struct change *c)
{
  struct overlay *o = c->o;
  const uint64_t per_l2 = o->tables.geometry.slots_per_l2;
  uint64_t last_l2 = UINT64_MAX;

  if (!o->has_tables)
    return 0;
  for (size_t i = 0; i < c->count; ++i) {
    const struct slot_change *s = &c->slots[i];
    const uint64_t last = s->slot ? s->nr : s->nr + LEAF_SLOTS - 1;
    uint64_t l2 = s->nr / per_l2;

    if (s->found.state != 0 || !(s->allocate | s->zero) || l2 == last_l2
        || l2_table_is_touched (o, s->nr))
      continue;
    /* A leaf may have several, all of them touched or none. */
    for (; l2 <= last / per_l2; ++l2) {
      if (tables_reserve_l2 (&o->tables, l2) == -1)
        return errno;
      c->nr_l2++;
      last_l2 = l2;
    }
  }

  /* What takes no place makes the file no longer, and so wants nothing. */
  if (c->nr_fresh > 0 && tables_reserve_refcounts (&o->tables) == -1)
    return errno;
  return 0;
}

/* Give a place to every slot that needs one, and set aside what an image will need
 * for the change.  0 or an errno value.
 */
static int
change_take_places (struct change *c)
{
  uint64_t place = 0, got = 0, wanted;

  for (size_t i = 0; i < c->count; ++i)
    c->nr_fresh += needs_place (&c->slots[i]);

  wanted = c->nr_fresh;
  for (size_t i = 0; i < c->count && wanted + got > 0; ++i) {
    if (!needs_place (&c->slots[i]))
      continue;
    if (got == 0) {
      got = store_take (&c->o->store, wanted, &place);
      if (got == 0)
        return errno;
      wanted -= got;
    }
    c->slots[i].place = place++;
    got--;
  }
  return change_reserve_tables (c);
}

/* To the fresh place of a slot that was shared, bring along the bytes of those
 * allocated blocks that the request, OFFSET .. END-1, neither covers wholly nor makes
 * zero.  (That goes for the block that ends the disk too, as the request has no bytes
 * for what lies behind the end.)  What was shared does not change, so that they can be
 * copied while others read them.  0 or an errno value.
 */
static int
change_bring (const struct change *c, uint64_t offset, uint64_t end)
{
  const struct overlay *o = c->o;
  const uint64_t covered_start = ROUND_UP (offset, block_size (o));
  const uint64_t covered_end = ROUND_DOWN (end, block_size (o));

  for (size_t i = 0; i < c->count; ++i) {
    const struct slot_change *s = &c->slots[i];
    uint32_t bring = bitmap_allocated (s->found.state) & ~s->zero;

    if (!has_fresh_place (s) || s->found.place == 0)
      continue;
    bring &= ~(s->allocate
               & blocks_in_slot (o, s->nr, covered_start, covered_end));
    while (bring) {
      const unsigned first = (unsigned) __builtin_ctz (bring);
      const unsigned count = bitmap_run_of_ones (bring, first);
      const uint64_t at = (uint64_t) first << o->block_shift;

      if (store_copy (&c->o->store, (s->found.place << o->slot_shift) + at,
                      (s->place << o->slot_shift) + at,
                      (uint64_t) count << o->block_shift)
          == -1)
        return errno;
      bring &= ~bitmap_mask (first, count);
    }
  }
  return 0;
}

/* Everything that must be there before the bytes of the request, OFFSET .. END-1, are
 * written.  0 or an errno value.
 */
static int
change_prepare (struct change *c, uint64_t offset, uint64_t end)
{
  const int err = change_take_places (c);

  if (err || c->nr_fresh == 0)
    return err;
  return change_bring (c, offset, end);
}

/* Of the NR_PARTS pieces of memory, which lie one behind the other, those that
 * hold bytes START .. END-1.  Returns how many, in IOV.
 */
static int
slice (const struct iovec *parts, int nr_parts, uint64_t start, uint64_t end,
       struct iovec *iov)
{
  uint64_t part_start = 0;
  int nr_iov = 0;

  for (int i = 0; i < nr_parts; ++i) {
    const uint64_t part_end = part_start + parts[i].iov_len;
    const uint64_t from = MAX (start, part_start), to = MIN (end, part_end);

    if (from < to) {
      iov[nr_iov].iov_base = (char *) parts[i].iov_base + (from - part_start);
      iov[nr_iov].iov_len = to - from;
      nr_iov++;
    }
    part_start = part_end;
  }
  return nr_iov;
}

/* Parts of one write at the most: bytes before, of, and behind the request. */
#define MAX_PARTS 3

/* Write NR_PARTS pieces of memory one behind the other from OFFSET of the disk
 * on, to the places of their slots.  0 or an errno value.
 */
static int
change_write (const struct change *c, const struct iovec *parts, int nr_parts,
              uint64_t offset)
{
  const struct overlay *o = c->o;
  uint64_t pos = offset, end = offset;

  for (int i = 0; i < nr_parts; ++i)
    end += parts[i].iov_len;

  while (pos < end) {
    const size_t i = index_of (c, pos);
    size_t next = i + 1;
    struct iovec iov[MAX_PARTS];

    while (next < c->count
           && c->slots[next].place == c->slots[i].place + (next - i))
      next++;

    const uint64_t run_end
      = MIN (end, (c->slots[i].nr + (next - i)) << o->slot_shift);
    const int nr_iov
      = slice (parts, nr_parts, pos - offset, run_end - offset, iov);
    if (store_writev (&o->store, iov, nr_iov,
                      file_offset (o, c->slots[i].place, pos))
        == -1)
      return errno;
    pos = run_end;
  }
  return 0;
}

/* Make the changes visible.  All their bytes are in the file (rules 1, 7). */
static void
change_commit (struct change *c)
{
  atomic_store (&c->o->changed, true);
  VERBOSE ("changing %" PRIu64 " slots from offset %" PRIu64,
           c->last - c->first + 1, c->first << c->o->slot_shift);

  for (size_t i = 0; i < c->count; ++i) {
    const struct slot_change *s = &c->slots[i];
    struct slot_pair pair = { .place = s->place, .state = s->found.state };

    if (!s->slot) {
      map_zero_leaf (&c->o->map, s->nr);
      continue;
    }
    pair.state = bitmap_set_zero (pair.state, s->zero);
    pair.state = bitmap_set_allocated (pair.state, s->allocate);
    if (pair.state != s->found.state || pair.place != s->found.place)
      slot_store (s->slot, pair);
  }
}

/* Give back what a request took that failed: its fresh places, and in the other
 * slots what it may have written to blocks that it was going to allocate.
 * Caller holds the slot locks, so nobody else has begun to use those.
 */
static void
change_give_back (struct change *c)
{
  struct overlay *o = c->o;

  if (c->nr_l2 > 0)
    tables_cancel_l2 (&o->tables, c->nr_l2);

  /* From the last one down, so that the end of the file moves back. */
  for (size_t i = c->count; i-- > 0;) {
    const struct slot_change *s = &c->slots[i];
    const uint32_t blocks = s->allocate & ~bitmap_allocated (s->found.state);

    if (has_fresh_place (s))
      store_give_back (&c->o->store, s->place, 1);
    else if (s->place != 0 && !s->shared) /* else nothing was written */
      overlay_punch_blocks (o, s->place, blocks);
  }
}

/* Let go: with ERR 0 the changes are made, else undone.  Returns ERR. */
static int
change_end (struct change *c, int err)
{
  if (err)
    change_give_back (c);
  else
    change_commit (c);
  change_unlock (c);
  return err;
}

static struct slot_change *
change_at (struct change *c, uint64_t offset)
{
  return &c->slots[index_of (c, offset)];
}

/* Is the block at OFFSET one that becomes allocated, or stays so? */
static bool
change_allocates (const struct change *c, uint64_t offset)
{
  return c->slots[index_of (c, offset)].allocate
           >> (offset >> c->o->block_shift & (SLOT_BLOCKS - 1))
         & 1;
}

/* The state of the block at OFFSET as it was found. */
static enum block_state
found_state (struct change *c, uint64_t offset)
{
  return bitmap_state (change_at (c, offset)->found.state,
                       offset >> c->o->block_shift & (SLOT_BLOCKS - 1));
}

/*----------------------------------------------------------------------
 * Giving space back
 */

/* The blocks of a slot that were allocated and that the change made zero. */
static uint32_t
zeroed_blocks (const struct slot_change *s)
{
  return bitmap_allocated (s->found.state) & s->zero;
}

/* A range of the file with nothing in it that counts. */
struct gap {
  uint64_t start, end;
  bool worth_punching; /* there may be bytes to give back */
};

static void
punch_gap (const struct overlay *o, struct gap *gap)
{
  if (gap->worth_punching) {
    VERBOSE ("punching %" PRIu64 " bytes", gap->end - gap->start);
    store_punch (&o->store, gap->start, gap->end - gap->start);
  }
  gap->worth_punching = false;
}

/* Punch what is not allocated of the blocks PIECE in the places of COUNT slots,
 * which lie one behind the other, in one short hold of both locks (rule 6): the
 * zero blocks, and the holes between them, so that fewer and longer ranges are
 * punched.  What a frozen map has allocated there is left; it is punched when the last
 * such map is released.  Whoever is about to write to any of these blocks needs the
 * slot lock.
 */
static void
punch_slots (struct overlay *o, const struct slot_change *slots, size_t count,
             uint32_t piece)
{
  struct gap gap = { .worth_punching = false };
  uint64_t stripes = 0;

  for (size_t i = 0; i < count; ++i)
    stripes |= stripe_of (slots[i].nr);
  overlay_lock_stripes (o, stripes);
  pthread_rwlock_rdlock (&o->request_lock);

  /* Once the overlay is closed, its file may have been saved, and be somebody
   * else's.
   */
  if (o->closed)
    count = 0;
  for (size_t i = 0; i < count; ++i) {
    const struct slot_pair pair = slot_load (map_find (&o->map, slots[i].nr));
    uint32_t unused = ~(bitmap_allocated (pair.state)
                        | map_frozen_blocks (&o->map, slots[i].nr, pair.place))
                      & piece;

    while (unused) {
      const unsigned first = (unsigned) __builtin_ctz (unused);
      const uint32_t run
        = bitmap_mask (first, bitmap_run_of_ones (unused, first));
      const uint64_t start
        = (pair.place << o->slot_shift) + ((uint64_t) first << o->block_shift);

      if (start != gap.end) {
        punch_gap (o, &gap);
        gap.start = start;
      }
      gap.end
        = start + ((uint64_t) __builtin_popcount (run) << o->block_shift);
      gap.worth_punching |= (zeroed_blocks (&slots[i]) & run) != 0;
      unused &= ~run;
    }
  }
  punch_gap (o, &gap);

  pthread_rwlock_unlock (&o->request_lock);
  overlay_unlock_stripes (o, stripes);
}

static int
compare_places (const void *a, const void *b)
{
  const struct slot_change *slot_a = a, *slot_b = b;

  return (slot_a->place > slot_b->place) - (slot_a->place < slot_b->place);
}

/* Give back the bytes of the blocks that C has turned from allocated to zero,
 * so much at a time that others wait a millisecond or two: in one piece nobody
 * else could use the file meanwhile, in small ones it takes several times as
 * long.  C's locks
 * were let go.
 */
static void
punch_zeroed (struct change *c)
{
  const struct overlay *o = c->o;
  const size_t slots_at_once = MAX (PUNCH_BYTES >> o->slot_shift, 1);
  const unsigned blocks_at_once
    = MIN (MAX (PUNCH_BYTES >> o->block_shift, 1), SLOT_BLOCKS);
  size_t count = 0, since_pause = 0;

  for (size_t i = 0; i < c->count; ++i)
    if (zeroed_blocks (&c->slots[i]))
      c->slots[count++] = c->slots[i];
  qsort (c->slots, count, sizeof *c->slots, compare_places);

  for (size_t i = 0, next; i < count; i = next) {
    next = i + 1;
    while (next < count && next - i < slots_at_once
           && c->slots[next].place == c->slots[i].place + (next - i))
      next++;
    for (unsigned block = 0; block < SLOT_BLOCKS; block += blocks_at_once)
      punch_slots (c->o, &c->slots[i], next - i,
                   bitmap_mask (block, blocks_at_once));

    /* Whoever waits for the file's lock in the kernel gets it now; without a
     * pause, only after some milliseconds.
     */
    since_pause += next - i;
    if (since_pause >= slots_at_once) {
      usleep (1);
      since_pause = 0;
    }
  }
}

/*----------------------------------------------------------------------
 * The blocks at the two ends of a request that it does not cover wholly
 */

/* Of the block that ends the disk, what lies past the disk's end is nobody's:
 * a request that goes as far as the end covers that block.
 */
struct edges {
  uint64_t offset, end;   /* the request */
  uint64_t head, tail;    /* offsets of its first and last block: the same
                           * one, or neighbours, or not */
  uint64_t before, after; /* bytes of these blocks it leaves out */
  bool need_before;       /* they are the base's: head is a hole */
  bool need_after;        /* the same of tail, and inside the disk */
  char *bytes;            /* of the head block, then, if it is another, of the
                           * tail block; only what is left out is filled in */
};

static void
cleanup_edges (struct edges *e)
{
  free (e->bytes);
}

#define CLEANUP_EDGES __attribute__ ((cleanup (cleanup_edges)))

/* Caller holds the request lock (this is the first look of rule 3). */
static void
edges_look (struct edges *e, const struct overlay *o, uint32_t count,
            uint64_t offset)
{
  const uint64_t bs = block_size (o);

  e->offset = offset;
  e->end = offset + count;
  e->head = ROUND_DOWN (offset, bs);
  e->tail = ROUND_DOWN (e->end - 1, bs);
  e->before = offset - e->head;
  e->after = e->tail + bs - e->end;
  e->need_before = e->before > 0 && state_at (o, e->head) == BLOCK_HOLE;
  e->need_after
    = e->after > 0 && e->end < o->size && state_at (o, e->tail) == BLOCK_HOLE;
  e->bytes = NULL;
}

/* The memory for the tail block. */
static char *
tail_bytes (const struct edges *e, const struct overlay *o)
{
  return e->tail == e->head ? e->bytes : e->bytes + block_size (o);
}

/* Get the memory, and read what is needed of the base: each byte once, and in
 * one request where the two blocks touch.  The rest is zero.  Caller holds no
 * lock (rule 3).
 */
static int
edges_read (struct edges *e, const struct overlay *o, const struct base *base,
            int *err)
{
  const uint64_t bs = block_size (o);
  const uint64_t tail_end = MIN (e->tail + bs, o->size);

  if (e->before == 0 && e->after == 0)
    return 0;
  e->bytes = calloc (e->tail == e->head ? 1 : 2, bs);
  if (!e->bytes) {
    *err = errno;
    nbdkit_error ("calloc: %m");
    return -1;
  }

  if (e->need_before && e->need_after && e->tail - e->head <= bs)
    return base_read (base, e->bytes, tail_end - e->head, e->head, err);
  if (e->need_before
      && base_read (base, e->bytes, e->before, e->head, err) == -1)
    return -1;
  if (e->need_after
      && base_read (base, tail_bytes (e, o) + (e->end - e->tail),
                    tail_end - e->end, e->end, err)
           == -1)
    return -1;
  return 0;
}

/*----------------------------------------------------------------------
 * Keeping bytes of the base
 */

/* What is kept of the base is read in whole blocks, and in whole blocks of the
 * base, so that nothing is read twice.
 */
static uint64_t
unit_to_keep (const struct overlay *o, const struct base *base)
{
  return MAX (block_size (o), base->min_request);
}

/* Read blocks START .. END-1 of the base, END being block aligned or the end of
 * the disk, and fill up the last one with zeroes.  The caller frees them, and
 * holds no lock (rule 3).  NULL if it failed, which was reported, and *ERR.
 */
static char *
fetch (const struct overlay *o, const struct base *base, uint64_t start,
       uint64_t end, int *err)
{
  const uint64_t padded = ROUND_UP (end, block_size (o)) - start;
  char *bytes = malloc (padded);

  if (!bytes) {
    *err = errno;
    nbdkit_error ("malloc: %m");
    return NULL;
  }
  if (base_read (base, bytes, end - start, start, err) == -1) {
    free (bytes);
    return NULL;
  }
  memset (bytes + (end - start), 0, padded - (end - start));
  return bytes;
}

/* Put BYTES, which fetch read, into those of their blocks that are holes still
 * (the second look of rule 3).  0 or an errno value; reports nothing.
 */
static int
keep (struct overlay *o, char *bytes, uint64_t start, uint64_t end)
{
  CLEANUP_CHANGE struct change c;
  int err;

  end = ROUND_UP (end, block_size (o));
  err = change_begin (&c, o, start, end, 0, 0);
  if (err)
    return err;
  for (size_t i = 0; i < c.count; ++i)
    c.slots[i].allocate = bitmap_holes (c.slots[i].found.state)
                          & blocks_in_slot (o, c.slots[i].nr, start, end);
  err = change_prepare (&c, start, end);

  for (uint64_t pos = start; pos < end && !err;) {
    const struct run run = find_run (o, pos, end);
    const struct iovec part
      = { .iov_base = bytes + (pos - start), .iov_len = run.length };

    if (run.state == BLOCK_HOLE)
      err = change_write (&c, &part, 1, pos);
    pos += run.length;
  }
  return change_end (&c, err);
}

/*----------------------------------------------------------------------
 * Requests
 */

/* The disk that a request looks at: as it is, or as it was when it was frozen. */
struct disk {
  struct overlay *o;
  const struct frozen_map *frozen; /* NULL: as it is */
};

/* The run at OFFSET; if BUF is not NULL, its bytes too, where it is allocated.  0 or an
 * errno value.
 *
 * Rule 4: the file is read under the request lock, without slot locks.  Should a
 * block be zeroed and punched meanwhile, the zeroes are as good an answer as what was
 * there.  A frozen map and its bytes do not change.
 */
static int
look (const struct disk *d, uint64_t offset, uint64_t end, struct run *run,
      void *buf)
{
  struct overlay *o = d->o;
  int r = 0;

  if (d->frozen) {
    *run = find_run_of (o, &d->frozen->map, offset, end);
    if (buf && run->state == BLOCK_ALLOCATED)
      r = overlay_read_frozen (o, buf, run->length, run->file_offset);
  }
  else {
    READ_LOCK_FOR_SCOPE (&o->request_lock);
    *run = find_run (o, offset, end);
    if (buf && run->state == BLOCK_ALLOCATED)
      r = store_read (&o->store, buf, run->length, run->file_offset);
  }
  return r == -1 ? errno : 0;
}

/* Read a run of holes and keep them, whole blocks that the client wants, or around
 * what it wants.  -1 if they cannot be read.  Caller holds no lock.
 */
static int
read_and_keep (struct overlay *o, const struct base *base, void *buf,
               uint64_t offset, uint64_t end, int *err)
{
  const uint64_t unit = unit_to_keep (o, base);
  const uint64_t start = ROUND_DOWN (offset, unit);
  const uint64_t stop = MIN (ROUND_UP (end, unit), o->size);
  CLEANUP_FREE char *around = NULL;
  char *bytes = buf;

  if (start == offset && stop == end && stop % block_size (o) == 0) {
    if (base_read (base, buf, end - offset, offset, err) == -1)
      return -1;
  }
  else {
    bytes = around = fetch (o, base, start, stop, err);
    /* What cannot be read around it need not keep the client from what it wants. */
    if (!around)
      return base_read (base, buf, end - offset, offset, err);
    memcpy (buf, around + (offset - start), end - offset);
  }

  /* The client has what it asked for, kept or not. */
  errno = keep (o, bytes, start, stop);
  if (errno)
    VERBOSE ("not kept in the overlay: %s", strerror (errno));
  return 0;
}

/* Read a run of holes.  Caller holds no lock. */
static int
read_holes (struct overlay *o, const struct base *base, enum on_read on_read,
            void *buf, uint64_t offset, uint64_t end, int *err)
{
  return on_read == ON_READ_KEEP
           ? read_and_keep (o, base, buf, offset, end, err)
           : base_read (base, buf, end - offset, offset, err);
}

static int
read_disk (const struct disk *d, const struct base *base, enum on_read on_read,
           void *buf, uint32_t count, uint64_t offset, int *err)
{
  const uint64_t end = offset + count;

  while (offset < end) {
    struct run run;
    const int r = look (d, offset, end, &run, buf);

    if (r) {
      *err = blk_error (d->o, r);
      return -1;
    }
    if (run.state == BLOCK_ZERO)
      memset (buf, 0, run.length);
    else if (run.state == BLOCK_HOLE
             && read_holes (d->o, base, on_read, buf, offset,
                            offset + run.length, err)
                  == -1)
      return -1;

    buf = (char *) buf + run.length;
    offset += run.length;
  }
  return 0;
}

int
blk_read (struct overlay *o, const struct base *base, enum on_read on_read,
          void *buf, uint32_t count, uint64_t offset, int *err)
{
  const struct disk disk = { .o = o };

  return read_disk (&disk, base, on_read, buf, count, offset, err);
}

int
blk_read_frozen (struct overlay *o, const struct frozen_map *frozen,
                 const struct base *base, void *buf, uint32_t count,
                 uint64_t offset, int *err)
{
  const struct disk disk = { .o = o, .frozen = frozen };

  return read_disk (&disk, base, ON_READ_PASS, buf, count, offset, err);
}

/* Write to blocks that were all allocated a moment ago.  Caller holds the
 * request lock, but no slot lock: another request may zero a block meanwhile.
 * That one overlaps this one, and the block is as it would be had it come last;
 * so there is nothing to write.
 */
static int
overwrite (const struct overlay *o, const char *buf, uint64_t offset,
           uint64_t end)
{
  while (offset < end) {
    const struct run run = find_run (o, offset, end);
    struct iovec part = { .iov_base = (char *) buf, .iov_len = run.length };

    if (run.state == BLOCK_ALLOCATED
        && store_writev (&o->store, &part, 1, run.file_offset) == -1)
      return errno;
    buf += run.length;
    offset += run.length;
  }
  return 0;
}

static bool
is_zero (const char *buf, size_t count)
{
  return count == 0 || (buf[0] == 0 && memcmp (buf, buf + 1, count - 1) == 0);
}

/* Do the bytes OFFSET .. END-1 of the disk, in BUF, cover a block of zeroes? */
static bool
has_zero_block (const struct overlay *o, const char *buf, uint64_t offset,
                uint64_t end)
{
  const uint64_t bs = block_size (o);

  for (uint64_t block = ROUND_UP (offset, bs); block + bs <= end; block += bs)
    if (is_zero (buf + (block - offset), bs))
      return true;
  return false;
}

/* Let blocks that would become allocated, or stay so, and of which all bytes are
 * at hand and zero, become zero.  The bytes from OFFSET of the disk on are in
 * PARTS.  Of an allocated block that the request does not cover, not all bytes are
 * at hand.
 */
static void
change_detect_zeroes (struct change *c, const struct iovec *parts,
                      int nr_parts, uint64_t offset)
{
  const struct overlay *o = c->o;
  const uint64_t bs = block_size (o);
  uint64_t end = offset;

  for (int i = 0; i < nr_parts; ++i)
    end += parts[i].iov_len;

  for (uint64_t block = ROUND_UP (offset, bs); block < end; block += bs) {
    struct slot_change *s = change_at (c, block);
    const uint32_t bit
      = bitmap_mask (block >> o->block_shift & (SLOT_BLOCKS - 1), 1);
    struct iovec iov[MAX_PARTS];
    bool zero = block + bs <= end || end == o->size;

    const int nr_iov = slice (parts, nr_parts, block - offset,
                              MIN (block + bs, end) - offset, iov);
    for (int i = 0; i < nr_iov && zero; ++i)
      zero = is_zero (iov[i].iov_base, iov[i].iov_len);
    if (zero) {
      s->zero |= bit;
      s->allocate &= ~bit;
    }
  }
}

/* The same as change_write, but leaves out blocks that become zero. */
static int
change_write_allocated (const struct change *c, const struct iovec *parts,
                        int nr_parts, uint64_t offset)
{
  const struct overlay *o = c->o;
  const uint64_t bs = block_size (o);
  uint64_t end = offset, pos = offset;
  int err = 0;

  for (int i = 0; i < nr_parts; ++i)
    end += parts[i].iov_len;

  while (pos < end && !err) {
    const bool write = change_allocates (c, pos);
    struct iovec iov[MAX_PARTS];
    uint64_t next = ROUND_DOWN (pos, bs) + bs;

    while (next < end && change_allocates (c, next) == write)
      next += bs;
    next = MIN (next, end);
    if (write)
      err = change_write (
        c, iov, slice (parts, nr_parts, pos - offset, next - offset, iov),
        pos);
    pos = next;
  }
  return err;
}

/* Write to blocks of any state.  What the request leaves out of the blocks at
 * its ends is in E.
 */
static int
write_blocks (struct overlay *o, const char *buf, const struct edges *e)
{
  const uint64_t bs = block_size (o);
  CLEANUP_CHANGE struct change c;
  struct iovec before = { .iov_len = 0 }, after = { .iov_len = 0 };
  int err = change_begin (&c, o, e->offset, e->end, 0, 0);

  if (err)
    return err;
  for (size_t i = 0; i < c.count; ++i)
    c.slots[i].allocate
      = blocks_in_slot (o, c.slots[i].nr, e->head, e->tail + bs);

  /* Rule 5.  A block that is allocated gets the request's own bytes and no
   * others, for somebody else may be writing those.  Any other one is written
   * whole: a hole with the base's bytes, which it also was when they were read
   * as it cannot have become one since; a zero block, which may have been a
   * hole then, with zeroes.
   */
  if (e->before > 0 && found_state (&c, e->head) != BLOCK_ALLOCATED) {
    before = (struct iovec) { .iov_base = e->bytes, .iov_len = e->before };
    if (found_state (&c, e->head) == BLOCK_ZERO)
      memset (before.iov_base, 0, before.iov_len);
  }
  if (e->after > 0 && found_state (&c, e->tail) != BLOCK_ALLOCATED) {
    after = (struct iovec) { .iov_base = tail_bytes (e, o) + (bs - e->after),
                             .iov_len = e->after };
    if (found_state (&c, e->tail) == BLOCK_ZERO)
      memset (after.iov_base, 0, after.iov_len);
  }

  const struct iovec parts[MAX_PARTS] = {
    before,
    { .iov_base = (char *) buf, .iov_len = e->end - e->offset },
    after,
  };
  const uint64_t start = e->offset - before.iov_len;

  if (o->detect_zeroes)
    change_detect_zeroes (&c, parts, MAX_PARTS, start);
  err = change_prepare (&c, e->offset, e->end);
  if (!err)
    err = o->detect_zeroes
            ? change_write_allocated (&c, parts, MAX_PARTS, start)
            : change_write (&c, parts, MAX_PARTS, start);

  err = change_end (&c, err);
  if (!err && o->detect_zeroes)
    punch_zeroed (&c);
  return err;
}

int
blk_write (struct overlay *o, const struct base *base, const void *buf,
           uint32_t count, uint64_t offset, int *err)
{
  CLEANUP_EDGES struct edges edges = { .bytes = NULL };
  bool done = false;
  int r = 0;

  /* Rule 4: all blocks are looked at before the first byte is written, and the
   * request lock is held until the bytes are in the file.  Should a block be
   * zeroed between its last look and the write, the bytes count for nothing:
   * whoever allocates it again writes it whole (rule 5).
   */
  {
    READ_LOCK_FOR_SCOPE (&o->request_lock);
    if (o->closed) {
      r = ESHUTDOWN;
      done = true;
    }
    else if (all_allocated (o, offset, offset + count)
             && !any_shared (o, offset, offset + count)
             && !(o->detect_zeroes
                  && has_zero_block (o, buf, offset, offset + count))) {
      r = overwrite (o, buf, offset, offset + count);
      done = true;
    }
    else
      edges_look (&edges, o, count, offset);
  }

  if (!done) {
    if (edges_read (&edges, o, base, err) == -1)
      return -1;
    r = write_blocks (o, buf, &edges);
  }
  if (r) {
    *err = blk_error (o, r);
    return -1;
  }
  return 0;
}

/* Zero the bytes of the request that are in the block at BLOCK, one of those at
 * its ends that it does not cover wholly.
 */
static int
zero_edge (struct change *c, const struct edges *e, uint64_t block)
{
  const uint64_t bs = block_size (c->o);
  const uint64_t from = MAX (e->offset, block);
  const uint64_t to = MIN (e->end, block + bs);
  char *bytes = block == e->head ? e->bytes : tail_bytes (e, c->o);
  struct iovec part = { .iov_base = bytes, .iov_len = bs };

  memset (bytes + (from - block), 0, to - from);

  switch (found_state (c, block)) {
  case BLOCK_HOLE: /* written whole, rule 5 */
    return change_write (c, &part, 1, block);

  case BLOCK_ALLOCATED: /* just the request's own bytes */
    part.iov_base = bytes + (from - block);
    part.iov_len = to - from;
    return change_write (c, &part, 1, from);

  case BLOCK_ZERO:
  default:
    return 0;
  }
}

static int
zero_blocks (struct overlay *o, const struct edges *e)
{
  const uint64_t bs = block_size (o);
  const bool head_partial = e->before > 0;
  const bool tail_partial = e->after > 0 && e->end < o->size;
  const uint64_t whole_start = head_partial ? e->head + bs : e->head;
  const uint64_t whole_end = tail_partial ? e->tail : e->tail + bs;
  uint64_t partial[2];
  unsigned nr_partial = 0;
  CLEANUP_CHANGE struct change c;
  int err = change_begin (&c, o, e->offset, e->end, whole_start, whole_end);

  if (err)
    return err;
  if (head_partial)
    partial[nr_partial++] = e->head;
  if (tail_partial && !(head_partial && e->tail == e->head))
    partial[nr_partial++] = e->tail;

  /* Of these blocks those that are zero stay as they are; the others are written
   * to, and holes become allocated.
   */
  for (unsigned i = 0; i < nr_partial; ++i)
    if (found_state (&c, partial[i]) != BLOCK_ZERO)
      change_at (&c, partial[i])->allocate
        |= bitmap_mask (partial[i] >> o->block_shift & (SLOT_BLOCKS - 1), 1);
  err = change_prepare (&c, e->offset, e->end);
  for (unsigned i = 0; i < nr_partial && !err; ++i)
    err = zero_edge (&c, e, partial[i]);

  err = change_end (&c, err);
  if (!err)
    punch_zeroed (&c);
  return err;
}

int
blk_zero (struct overlay *o, const struct base *base, enum zero_effort effort,
          uint32_t count, uint64_t offset, int *err)
{
  CLEANUP_EDGES struct edges edges = { .bytes = NULL };
  int r;

  {
    READ_LOCK_FOR_SCOPE (&o->request_lock);
    edges_look (&edges, o, count, offset);
  }

  /* Before anything was changed.  A block does not become a hole later. */
  if (effort == ZERO_FAST && (edges.need_before || edges.need_after)) {
    *err = ENOTSUP;
    return -1;
  }

  if (edges_read (&edges, o, base, err) == -1)
    return -1;
  r = zero_blocks (o, &edges);
  if (r) {
    *err = blk_error (o, r);
    return -1;
  }
  return 0;
}

/* Read a run of holes, START .. END-1, into the overlay, in pieces that the
 * base takes.  Caller holds no lock.
 */
static int
prefetch_and_keep (struct overlay *o, const struct base *base, uint64_t start,
                   uint64_t end, int *err)
{
  const uint64_t unit = unit_to_keep (o, base);
  const uint64_t longest = MAX (ROUND_DOWN (base->max_request, unit), unit);

  start = ROUND_DOWN (start, unit);
  end = MIN (ROUND_UP (end, unit), o->size);
  while (start < end) {
    const uint64_t piece_end = MIN (end, start + longest);
    CLEANUP_FREE char *bytes = fetch (o, base, start, piece_end, err);

    if (!bytes)
      return -1;

    const int r = keep (o, bytes, start, piece_end);
    if (r) {
      *err = blk_error (o, r);
      return -1;
    }
    start = piece_end;
  }
  return 0;
}

int
blk_cache (struct overlay *o, const struct base *base, enum on_cache on_cache,
           uint32_t count, uint64_t offset, int *err)
{
  uint64_t pos = ROUND_DOWN (offset, block_size (o));
  const uint64_t end
    = MIN (ROUND_UP (offset + count, block_size (o)), o->size);

  while (pos < end) {
    struct run run;
    int r = 0;

    {
      READ_LOCK_FOR_SCOPE (&o->request_lock);
      run = find_run (o, pos, end);
      if (run.state == BLOCK_ALLOCATED)
        store_prefetch (&o->store, run.file_offset, run.length);
    }
    if (run.state == BLOCK_HOLE && on_cache == ON_CACHE_KEEP)
      r = prefetch_and_keep (o, base, pos, pos + run.length, err);
    else if (run.state == BLOCK_HOLE)
      r = base_cache (base, run.length, pos, err);
    if (r == -1)
      return -1;
    pos += run.length;
  }
  return 0;
}

/* What the base says of a request's holes. */
struct below {
  struct nbdkit_extents *answer; /* NULL: not asked */
  size_t next;    /* the first of its extents that is not behind us */
  uint64_t end;   /* of the last one */
  uint64_t first; /* where it was first asked */
};

static void
cleanup_below (struct below *b)
{
  nbdkit_extents_free (b->answer);
}

#define CLEANUP_BELOW __attribute__ ((cleanup (cleanup_below)))

/* The answer covers at least the beginning of OFFSET .. END-1.  Caller holds no
 * lock.
 */
static int
ask_once (struct below *b, const struct base *base, uint64_t offset,
          uint64_t end, uint32_t flags, int *err)
{
  uint64_t covered;

  cleanup_below (b);
  b->next = 0;
  b->answer = nbdkit_extents_new (offset, base->size);
  if (!b->answer) {
    *err = errno;
    return -1;
  }
  if (base_extents (base, end - offset, offset, flags, b->answer, &covered,
                    err)
      == -1)
    return -1;
  b->end = offset + covered;
  return 0;
}

/* Ask of a run of holes, OFFSET .. RUN_END-1, and of what comes behind it, as far as
 * END.  Caller holds no lock.
 *
 * Each question may make the base search far, and it may have much to say of what the
 * overlay covers, or fail there.  So it is asked of twice what was walked over since
 * the first question: a few times for many holes, and little in vain for few.
 */
static int
ask_below (struct below *b, const struct base *base, uint64_t offset,
           uint64_t run_end, uint64_t end, uint32_t flags, int *err)
{
  uint64_t far;

  if (!b->answer)
    b->first = offset;
  far = MIN (offset + 2 * (offset - b->first), end);
  if (far > run_end && ask_once (b, base, offset, far, flags, err) == 0)
    return 0;
  return ask_once (b, base, offset, run_end, flags, err);
}

/* Add what the answer says of *POS .. END-1, and move *POS behind that. */
static int
add_below (struct below *b, uint64_t *pos, uint64_t end,
           struct nbdkit_extents *extents, int *err)
{
  while (*pos < MIN (end, b->end)) {
    const struct nbdkit_extent e = nbdkit_get_extent (b->answer, b->next);
    const uint64_t e_end = MIN (e.offset + e.length, end);

    if (*pos < e_end) {
      if (nbdkit_add_extent (extents, *pos, e_end - *pos, e.type) == -1) {
        *err = errno;
        return -1;
      }
      *pos = e_end;
    }
    if (e_end == e.offset + e.length)
      b->next++;
  }
  return 0;
}

static int
extents_of_disk (const struct disk *d, const struct base *base, uint32_t count,
                 uint64_t offset, uint32_t flags,
                 struct nbdkit_extents *extents, int *err)
{
  const bool only_one = flags & NBDKIT_FLAG_REQ_ONE;
  const uint64_t end = offset + count;
  CLEANUP_BELOW struct below below = { .answer = NULL };

  /* nbdkit_add_extent merges what touches and is of one kind.  So the first
   * extent is finished when there is a second one.
   */
  while (offset < end && !(only_one && nbdkit_extents_count (extents) > 1)) {
    uint32_t type = 0;
    struct run run;

    (void) look (d, offset, end, &run,
                 NULL); /* reads nothing, so cannot fail */

    if (run.state == BLOCK_HOLE && base->can_extents) {
      const uint64_t run_end = offset + run.length;

      /* Whether the first extent goes on is not worth asking the base. */
      if (only_one && nbdkit_extents_count (extents) > 0)
        break;
      if (offset >= below.end
          && ask_below (&below, base, offset, run_end,
                        only_one ? run_end : end, flags, err)
               == -1)
        return -1;
      if (add_below (&below, &offset, run_end, extents, err) == -1)
        return -1;
      if (only_one && offset < run_end)
        break;
      continue;
    }

    if (run.state == BLOCK_ZERO)
      type = NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO;
    if (nbdkit_add_extent (extents, offset, run.length, type) == -1) {
      *err = errno;
      return -1;
    }
    offset += run.length;
  }
  return 0;
}

int
blk_extents (struct overlay *o, const struct base *base, uint32_t count,
             uint64_t offset, uint32_t flags, struct nbdkit_extents *extents,
             int *err)
{
  const struct disk disk = { .o = o };

  return extents_of_disk (&disk, base, count, offset, flags, extents, err);
}

int
blk_extents_frozen (struct overlay *o, const struct frozen_map *frozen,
                    const struct base *base, uint32_t count, uint64_t offset,
                    uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  const struct disk disk = { .o = o, .frozen = frozen };

  return extents_of_disk (&disk, base, count, offset, flags, extents, err);
}
