/* SPDX-License-Identifier: BSD-3-Clause */

/* A change to an overlay, which is there wholly or, if it fails, not at all (see
 * change.h).
 *
 * Of the rules in HACKING that keep acknowledged writes safe these are kept here:
 *
 *  1 data first, then state          change_commit, slot_store
 *  2 state changes under slot lock   change_begin
 *  6 what died waits                 change_commit, change_end
 *  7 one hold of the request lock    change_begin .. change_end
 *
 * A block that becomes allocated gets a fresh address, and so does one that is written to
 * while a frozen map has it at the same address; of that one, what the request leaves
 * out is brought along (change_bring), in the same hold in which "shared" was looked
 * at.
 *
 * Locks, in the order in which they are taken: slot locks (stripes by slot
 * number, ascending), the request lock (shared), a map node's lock or
 * the log's lock.  No slot lock is waited for while the request lock is held.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "common/lock.h"
#include "overlay/change.h"
#include "overlay/private.h"

/* Written with no look at whether the overlay is open still. */
#define ZEROES_AT_ONCE (UINT64_C (64) << 10)

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

/* Caller has made the changes, or undone them. */
static void
change_unlock (struct change *c)
{
  request_end (c->o, c->ticket);
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
      s->step.found = slot_load (slot);
      s->shared = map_shared_blocks (&o->map, nr, s->step.found);
    }
  }
  return 0;
}

void
change_init (struct change *c, struct overlay *o, enum log_effort effort)
{
  c->o = o;
  c->effort = effort;
  c->count = c->nr_prepared = c->nr_dead = 0;
  c->runs = c->few_runs;
  c->nr_runs = 0;
  c->max_runs = sizeof c->few_runs / sizeof c->few_runs[0];
  c->nr_addresses = 0;
  c->used_runs = c->used_of_next = 0;
  c->slots = c->few_slots;
  c->to = c->few_to;
}

/* Nobody has seen these addresses.  Once the file belongs to the one who saves, they are
 * left where they are: he takes what no map has for unused, and somebody else may be using
 * the image already.
 */
static void
give_back_addresses (struct change *c)
{
  if (c->nr_runs == 0)
    return;

  HOLD_SHARED (&c->o->view_lock);
  const bool cut = views_are_cut (c->o);

  for (; c->nr_runs > 0; --c->nr_runs)
    if (!cut)
      log_give_back (&c->o->log, c->runs[c->nr_runs - 1]);
  c->nr_addresses = 0;
}

void
change_free (struct change *c)
{
  give_back_addresses (c);
  if (c->runs != c->few_runs)
    free (c->runs);
  if (c->slots != c->few_slots)
    free (c->slots);
  if (c->to != c->few_to)
    free (c->to);
}

int
change_begin (struct change *c, uint64_t offset, uint64_t end,
              uint64_t zero_start, uint64_t zero_end)
{
  struct overlay *o = c->o;
  int err;

  assert_none_held_from (RANK_RELEASE);
  c->first = offset >> o->slot_shift;
  c->last = (end - 1) >> o->slot_shift;

  const size_t nr_slots = (size_t) (c->last - c->first + 1);

  c->stripes = stripes_of (c->first, nr_slots);
  if (nr_slots > FEW_SLOTS) {
    c->slots = malloc (nr_slots * sizeof *c->slots);
    if (!c->slots)
      return ENOMEM;
  }

  overlay_lock_stripes (o, c->stripes);
  c->ticket = request_begin (o);
  err = is_closed (o) ? ESHUTDOWN : find_slots (c, zero_start, zero_end);
  if (err)
    change_unlock (c);
  return err;
}

/* The block at OFFSET in its slot, as a bit. */
static uint32_t
bit_of (const struct overlay *o, uint64_t offset)
{
  return bitmap_mask (block_in_slot (o, offset), 1);
}

enum block_state
change_found (const struct change *c, uint64_t offset)
{
  return bitmap_state (change_at (c, offset)->step.found.state,
                       block_in_slot (c->o, offset));
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
                            & bitmap_holes (c->slots[i].step.found.state);
}

void
change_allocate_provided (struct change *c, uint64_t start, uint64_t end)
{
  for (size_t i = index_of (c, start); i <= index_of (c, end - 1); ++i) {
    struct slot_change *s = &c->slots[i];
    const uint32_t blocks = blocks_in_slot (c->o, s->nr, start, end);

    s->allocate |= blocks;
    s->provided |= blocks;
  }
}

void
change_make_zero (struct change *c, uint64_t block)
{
  struct slot_change *s = change_at (c, block);
  const uint32_t bit = bit_of (c->o, block);

  s->zero |= bit;
  s->allocate &= ~bit;
}

/*----------------------------------------------------------------------
 * What must be there before anything is written
 */

/* The allocated blocks that the slot is going to own no longer, at their addresses. */
static uint32_t
dying_blocks (const struct slot_change *s)
{
  return bitmap_allocated (s->step.found.state) & (s->step.fresh | s->zero);
}

/* Say what each slot becomes.  Returns how many blocks need a fresh address. */
static uint64_t
plan_slots (struct change *c)
{
  uint64_t nr_fresh = 0;

  for (size_t i = 0; i < c->count; ++i) {
    struct slot_change *s = &c->slots[i];
    const uint64_t found = s->step.found.state;

    s->step.fresh
      = s->provided | (s->allocate & (~bitmap_allocated (found) | s->shared));
    s->step.state
      = bitmap_set_allocated (bitmap_set_zero (found, s->zero), s->allocate);
    nr_fresh += (unsigned) __builtin_popcount (s->step.fresh);
  }
  return nr_fresh;
}

/* Have at least WANTED fresh addresses.  0 or an errno value. */
static int
take_addresses (struct change *c, uint64_t wanted)
{
  while (c->nr_addresses < wanted) {
    if (c->nr_runs == c->max_runs) {
      const size_t max = 4 * c->max_runs;
      struct log_run *runs = malloc (max * sizeof *runs);

      if (!runs)
        return ENOMEM;
      memcpy (runs, c->runs, c->nr_runs * sizeof *runs);
      if (c->runs != c->few_runs)
        free (c->runs);
      c->runs = runs;
      c->max_runs = max;
    }
    struct log_run *run = &c->runs[c->nr_runs];

    if (log_take (&c->o->log, wanted - c->nr_addresses, c->effort,
                  c->o->max_blocks, run)
        == -1)
      return errno;
    c->nr_runs++;
    c->nr_addresses += run->count;
  }
  return 0;
}

/* Write zeroes to blocks that nobody has seen. */
static int
write_zeroes (struct overlay *o, struct log_run run)
{
  uint64_t at = log_offset (&o->log, run.first);
  const uint64_t end = at + ((uint64_t) run.count << o->block_shift);

  for (uint64_t next; at < end; at = next) {
    if (atomic_load (&o->life) != OVERLAY_OPEN)
      return ESHUTDOWN; /* the one who saves does not wait for all of it */
    next = MIN (at + ZEROES_AT_ONCE, end);
    if (store_write_zeroes (&o->store, at, next - at) == -1)
      return errno;
  }
  return 0;
}

/* The view lock keeps away the one who saves: no request lock is held. */
static int
provide (struct change *c, uint64_t count, bool fast)
{
  struct overlay *o = c->o;

  HOLD_SHARED (&o->view_lock);
  int err = views_are_cut (o) ? ESHUTDOWN : take_addresses (c, count);

  for (size_t i = 0; i < c->nr_runs && !err; ++i) {
    const struct log_run run = c->runs[i];

    if (store_zero_range (&o->store, log_offset (&o->log, run.first),
                          (uint64_t) run.count << o->block_shift)
        == 0)
      continue;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
      err = errno;
    else
      err = fast ? ENOTSUP : write_zeroes (o, run);
  }
  return err;
}

int
change_provide (struct change *c, uint64_t count, bool fast)
{
  assert_none_held_from (RANK_RELEASE);

  const int err = provide (c, count, fast);

  if (err)
    give_back_addresses (c);
  return err;
}

/* Set space aside for the tables of an image, where there will be one.  0 or an errno
 * value.
 */
static int
reserve_tables (struct change *c, uint64_t nr_fresh)
{
  struct overlay *o = c->o;
  const uint64_t per_l2 = o->tables.geometry.slots_per_l2;
  uint64_t last = UINT64_MAX;

  if (!has_tables (o))
    return 0;
  for (size_t i = 0; i < c->count; ++i) {
    struct slot_change *s = &c->slots[i];
    const uint64_t l2 = s->nr / per_l2;
    int r = 0;

    if (!s->slot && per_l2 <= LEAF_SLOTS)
      r = tables_reserve_zero_l2 (&o->tables, l2, LEAF_SLOTS / per_l2);
    else if (l2 != last && s->step.state != s->step.found.state) {
      last = l2; /* not asked for twice, as by two requests */
      r = tables_reserve_l2 (&o->tables, l2);
    }
    if (r == -1)
      return errno;
    s->reserved = r > 0;
  }

  /* What takes no address makes the file no longer, and so wants nothing. */
  if (nr_fresh > 0 && tables_reserve_refcounts (&o->tables) == -1)
    return errno;
  return 0;
}

/* Room in the dead list for what the live map is going to own no longer, and the newest
 * frozen one does.  0 or an errno value.
 */
static int
reserve_dead (struct change *c)
{
  size_t count = 0;

  for (size_t i = 0; i < c->count; ++i)
    count += (unsigned) __builtin_popcount (dying_blocks (&c->slots[i])
                                            & c->slots[i].shared);
  if (count == 0)
    return 0;

  HOLD (&c->o->dead_lock);
  if (dead_reserve (&c->o->map.dead, count) == -1)
    return errno;
  c->nr_dead = count;
  return 0;
}

/* The next fresh address. */
static uint32_t
next_address (struct change *c)
{
  const struct log_run *run = &c->runs[c->used_runs];
  const uint32_t address = run->first + c->used_of_next;

  if (++c->used_of_next == run->count) {
    c->used_runs++;
    c->used_of_next = 0;
  }
  return address;
}

/* Say of each block that is written to where it lies, and get the nodes for that.  0 or
 * an errno value.
 */
static int
place_blocks (struct change *c)
{
  size_t nr_written = 0;
  uint32_t *to;

  for (size_t i = 0; i < c->count; ++i)
    nr_written += c->slots[i].allocate != 0;
  if (nr_written > FEW_SLOTS) {
    c->to = malloc (nr_written * SLOT_BLOCKS * sizeof *c->to);
    if (!c->to)
      return ENOMEM;
  }
  to = c->to;

  for (size_t i = 0; i < c->count; ++i) {
    struct slot_change *s = &c->slots[i];

    if (s->allocate) {
      for (uint32_t left = s->allocate; left; left &= left - 1) {
        const unsigned block = (unsigned) __builtin_ctz (left);

        to[block] = s->step.fresh >> block & 1
                      ? next_address (c)
                      : slot_address (s->step.found, block);
      }
      s->step.to = to;
      to += SLOT_BLOCKS;
    }
    if (s->slot && slot_prepare (&c->o->map, &s->step) == -1)
      return errno;
    c->nr_prepared = i + 1;
  }
  return 0;
}

/* Bring along the bytes of the block at BLOCK, if it was shared and gets a fresh address.
 * What was shared does not change, so that it can be copied while others read it.  0
 * or an errno value.
 */
static int
bring_block (const struct change *c, uint64_t block)
{
  const struct overlay *o = c->o;
  const struct slot_change *s = change_at (c, block);
  const unsigned nr = block_in_slot (o, block);

  if (!(dying_blocks (s) & s->allocate & ~s->provided & bit_of (o, block)))
    return 0;
  return store_copy (&o->store,
                     log_offset (&o->log, slot_address (s->step.found, nr)),
                     log_offset (&o->log, s->step.to[nr]), block_size (o))
             == -1
           ? errno
           : 0;
}

/* The same of the blocks at the ends of the request, OFFSET .. END-1, if it does not
 * cover them.  (The block that ends the disk is never covered: the request has no bytes
 * for what lies behind the end.)
 */
static int
change_bring (const struct change *c, uint64_t offset, uint64_t end)
{
  const uint64_t bs = block_size (c->o);
  const uint64_t head = ROUND_DOWN (offset, bs);
  const uint64_t tail = ROUND_DOWN (end - 1, bs);
  int err = 0;

  if (offset > head || end < head + bs)
    err = bring_block (c, head);
  if (!err && tail != head && end < tail + bs)
    err = bring_block (c, tail);
  return err;
}

int
change_prepare (struct change *c, uint64_t offset, uint64_t end)
{
  const uint64_t nr_fresh = plan_slots (c);
  int err = take_addresses (c, nr_fresh);

  if (!err)
    err = reserve_tables (c, nr_fresh);
  if (!err)
    err = reserve_dead (c);
  if (!err)
    err = place_blocks (c);
  return err || nr_fresh == 0 ? err : change_bring (c, offset, end);
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

/* Where the byte at OFFSET of the disk is written to; false: it is not. */
static bool
written_at (const struct change *c, uint64_t offset, uint64_t *at)
{
  const struct slot_change *s = change_at (c, offset);

  if (!(s->allocate & bit_of (c->o, offset)))
    return false;
  *at = file_offset (c->o, s->step.to[block_in_slot (c->o, offset)], offset);
  return true;
}

int
change_write (const struct change *c, const struct iovec *parts, int nr_parts,
              uint64_t offset)
{
  const uint64_t bs = block_size (c->o);
  uint64_t end = offset;

  for (int i = 0; i < nr_parts; ++i)
    end += parts[i].iov_len;

  for (uint64_t pos = offset, next; pos < end; pos = next) {
    struct iovec iov[MAX_PARTS];
    uint64_t at, next_at;
    const bool write = written_at (c, pos, &at);

    next = MIN (ROUND_DOWN (pos, bs) + bs, end);
    if (!write)
      continue;
    while (next < end && written_at (c, next, &next_at)
           && next_at == at + (next - pos))
      next = MIN (next + bs, end);

    const int nr_iov
      = slice_parts (parts, nr_parts, pos - offset, next - offset, iov);
    if (store_writev (&c->o->store, iov, nr_iov, at) == -1)
      return errno;
  }
  return 0;
}

/*----------------------------------------------------------------------
 * The end
 */

/* Blocks of one slot on their way out. */
struct dying {
  struct {
    unsigned block; /* the first, in the slot */
    bool shared;
    struct log_run run;
  } runs[SLOT_BLOCKS];
  unsigned nr;
};

/* Note the addresses of what dies, before the slot loses them. */
static void
find_dying (const struct slot_change *s, struct dying *d)
{
  uint32_t left = dying_blocks (s);

  d->nr = 0;
  while (left) {
    const unsigned block = (unsigned) __builtin_ctz (left);
    const bool shared = s->shared >> block & 1;
    const uint32_t alike = left & (shared ? s->shared : ~s->shared);
    uint32_t address;
    const unsigned count = slot_in_row (
      s->step.found, block, bitmap_run_of_ones (alike, block), &address);

    d->runs[d->nr].block = block;
    d->runs[d->nr].shared = shared;
    d->runs[d->nr++].run = (struct log_run) { address, count };
    left &= ~bitmap_mask (block, count);
  }
}

/* What died goes on the dead list if the newest frozen map owns it; else nobody does, and
 * it waits.  Returns whether the cleaner is to be told.
 */
static bool
let_die (struct change *c, uint64_t slot, const struct dying *d)
{
  struct overlay *o = c->o;
  bool tell = false;

  for (unsigned i = 0; i < d->nr; ++i)
    if (d->runs[i].shared) {
      HOLD (&o->dead_lock);
      dead_add (&o->map.dead, (struct dead_run) {
                                .block = slot * SLOT_BLOCKS + d->runs[i].block,
                                .address = d->runs[i].run.first,
                                .count = d->runs[i].run.count });
      c->nr_dead--;
    }
    else
      tell |= log_wait (&o->log, d->runs[i].run);
  return tell;
}

/* What blocks were given is theirs now. */
static void
keep_unused (struct change *c)
{
  size_t count = 0;

  for (size_t i = c->used_runs; i < c->nr_runs; ++i) {
    const struct log_run run = c->runs[i];
    const uint32_t used = i == c->used_runs ? c->used_of_next : 0;

    c->runs[count++] = (struct log_run) { run.first + used, run.count - used };
  }
  c->nr_runs = count;
}

/* Make the changes visible.  All their bytes are in the file (rules 1, 7).  Returns whether
 * the cleaner is to be told.
 */
static bool
change_commit (struct change *c)
{
  struct overlay *o = c->o;
  bool tell = false;

  assert_held (&o->request_lock);
  /* No request that is under way has another generation. */
  if (atomic_load_explicit (&o->changed_in, memory_order_relaxed)
      != o->map.generation)
    atomic_store (&o->changed_in, o->map.generation);
  VERBOSE ("changing %" PRIu64 " slots from offset %" PRIu64,
           c->last - c->first + 1, c->first << o->slot_shift);

  for (size_t i = 0; i < c->count; ++i) {
    const struct slot_change *s = &c->slots[i];
    struct dying dying;

    if (!s->slot) {
      map_zero_leaf (&o->map, s->nr);
      continue;
    }
    assert_slot_held (o, s->nr);
    find_dying (s, &dying);
    if (s->step.state != s->step.found.state || s->step.fresh)
      slot_store (s->slot, &s->step);
    /* Rule 6: not before.  Whoever counts itself in from now on cannot find them, and
     * grace waits for all others.
     */
    tell |= let_die (c, s->nr, &dying);
  }

  keep_unused (c);
  return tell;
}

static void
change_undo (struct change *c)
{
  for (size_t i = 0; i < c->nr_prepared; ++i)
    if (c->slots[i].slot)
      slot_cancel (&c->slots[i].step);
  for (size_t i = 0; i < c->count; ++i)
    if (c->slots[i].reserved)
      tables_cancel_l2 (&c->o->tables,
                        c->slots[i].nr / c->o->tables.geometry.slots_per_l2);
}

int
change_end (struct change *c, int err)
{
  bool tell = false;

  if (err)
    change_undo (c);
  else
    tell = change_commit (c);
  if (c->nr_dead > 0) {
    HOLD (&c->o->dead_lock);
    dead_unreserve (&c->o->map.dead, c->nr_dead);
  }
  change_unlock (c);

  if (tell)
    cleaner_wake (&c->o->cleaning);
  give_back_addresses (c);
  return err;
}
