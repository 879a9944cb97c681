/* SPDX-License-Identifier: BSD-3-Clause */

/* A change to an overlay, which is there wholly or, if it fails, not at all (see
 * change.h).
 *
 * Of the rules in HACKING that keep acknowledged writes safe these are kept here:
 *
 *  1 data first, then state          change_commit, slot_store
 *  2 state changes under slot lock   change_begin
 *  6 punching what is not allocated  change_punch
 *  7 one hold of the request lock    change_begin .. change_end
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
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "common/lock.h"
#include "overlay/change.h"
#include "overlay/private.h"

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

static struct slot_change *
change_at (const struct change *c, uint64_t offset)
{
  return &c->slots[index_of (c, offset)];
}

static void
change_unlock (struct change *c)
{
  rwlock_unlock (&c->o->request_lock);
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

int
change_begin (struct change *c, struct overlay *o, uint64_t offset,
              uint64_t end, uint64_t zero_start, uint64_t zero_end)
{
  int err;

  assert_none_held_from (RANK_RELEASE);
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
  rwlock_lock_shared (&o->request_lock);
  err = is_closed (o) ? ESHUTDOWN : find_slots (c, zero_start, zero_end);
  if (err)
    change_unlock (c);
  return err;
}

/* The block at OFFSET in its slot, as a bit. */
static uint32_t
bit_of (const struct overlay *o, uint64_t offset)
{
  return bitmap_mask (offset >> o->block_shift & (SLOT_BLOCKS - 1), 1);
}

enum block_state
change_found (const struct change *c, uint64_t offset)
{
  return bitmap_state (change_at (c, offset)->found.state,
                       offset >> c->o->block_shift & (SLOT_BLOCKS - 1));
}

void
change_allocate (struct change *c, uint64_t start, uint64_t end)
{
  for (size_t i = index_of (c, start); i <= index_of (c, end - 1); ++i)
    c->slots[i].allocate |= blocks_in_slot (c->o, c->slots[i].nr, start, end);
}

void
change_allocate_holes (struct change *c, uint64_t start, uint64_t end)
{
  for (size_t i = index_of (c, start); i <= index_of (c, end - 1); ++i)
    c->slots[i].allocate |= blocks_in_slot (c->o, c->slots[i].nr, start, end)
                            & bitmap_holes (c->slots[i].found.state);
}

void
change_make_zero (struct change *c, uint64_t block)
{
  struct slot_change *s = change_at (c, block);
  const uint32_t bit = bit_of (c->o, block);

  s->zero |= bit;
  s->allocate &= ~bit;
}

/* Is the block at OFFSET one that becomes allocated, or stays so? */
static bool
change_allocates (const struct change *c, uint64_t offset)
{
  return change_at (c, offset)->allocate & bit_of (c->o, offset);
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

  if (!has_tables (o))
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
      got = places_take (&c->o->places, wanted, &place);
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

int
change_prepare (struct change *c, uint64_t offset, uint64_t end)
{
  const int err = change_take_places (c);

  if (err || c->nr_fresh == 0)
    return err;
  return change_bring (c, offset, end);
}

int
slice_parts (const struct iovec *parts, int nr_parts, uint64_t start,
             uint64_t end, struct iovec *iov)
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

int
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
      = slice_parts (parts, nr_parts, pos - offset, run_end - offset, iov);
    if (store_writev (&o->store, iov, nr_iov,
                      file_offset (o, c->slots[i].place, pos))
        == -1)
      return errno;
    pos = run_end;
  }
  return 0;
}

int
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
        c, iov,
        slice_parts (parts, nr_parts, pos - offset, next - offset, iov), pos);
    pos = next;
  }
  return err;
}

/* Make the changes visible.  All their bytes are in the file (rules 1, 7). */
static void
change_commit (struct change *c)
{
  assert_held (&c->o->request_lock);
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
    assert_slot_held (c->o, s->nr);
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

    assert_slot_held (o, s->nr);
    if (has_fresh_place (s))
      places_give_back (&c->o->places, s->place, 1);
    else if (s->place != 0 && !s->shared) /* else nothing was written */
      overlay_punch_blocks (o, s->place, blocks);
  }
}

int
change_end (struct change *c, int err)
{
  if (err)
    change_give_back (c);
  else
    change_commit (c);
  change_unlock (c);
  return err;
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
  rwlock_lock_shared (&o->request_lock);

  /* Once the overlay is closed, its file may have been saved, and be somebody
   * else's.
   */
  if (is_closed (o))
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

  rwlock_unlock (&o->request_lock);
  overlay_unlock_stripes (o, stripes);
}

static int
compare_places (const void *a, const void *b)
{
  const struct slot_change *slot_a = a, *slot_b = b;

  return (slot_a->place > slot_b->place) - (slot_a->place < slot_b->place);
}

void
change_punch (struct change *c)
{
  assert_none_held_from (RANK_RELEASE);

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
