/* SPDX-License-Identifier: BSD-3-Clause */

/* Looking at the states of a disk's bytes (see look.h).
 *
 * A disk is walked over in runs of one state.  What is found of the live disk is true as
 * long as the request lock is held (rule 2 of HACKING).
 */

#include <config.h>

#include <errno.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "overlay/look.h"
#include "overlay/private.h"

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
    uint64_t at = 0, piece_end;

    if (slot) {
      const struct slot_pair pair = slot_load (slot);
      const unsigned block = block_in_slot (o, pos);
      unsigned count = bitmap_run (pair.state, block);
      uint32_t address = 0;

      state = bitmap_state (pair.state, block);
      if (state == BLOCK_ALLOCATED)
        count = slot_in_row (pair, block, count, &address);
      at = file_offset (o, address, pos);
      piece_end = (nr << o->slot_shift)
                  + ((uint64_t) (block + count) << o->block_shift);
    }
    else
      piece_end = map_next (map, nr) << o->slot_shift;

    if (pos == offset) {
      run.state = state;
      run.file_offset = at;
    }
    else if (state != run.state
             || (state == BLOCK_ALLOCATED
                 && at != run.file_offset + (pos - offset)))
      break;
    pos = MIN (piece_end, end);
  }

  run.length = pos - offset;
  return run;
}

struct run
find_run (const struct overlay *o, uint64_t offset, uint64_t end)
{
  assert_held (&o->request_lock);
  return find_run_of (o, &o->map, offset, end);
}

enum block_state
state_at (const struct overlay *o, uint64_t offset)
{
  return find_run (o, offset, offset + 1).state;
}

bool
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

bool
any_shared (const struct overlay *o, uint64_t offset, uint64_t end)
{
  const uint64_t first = offset >> o->slot_shift;
  const uint64_t last = (end - 1) >> o->slot_shift;

  assert_held (&o->request_lock);
  if (!o->map.newest)
    return false;
  for (uint64_t nr = first; nr <= last; ++nr) {
    const struct slot *slot = map_find (&o->map, nr);
    const unsigned from = nr == first ? block_in_slot (o, offset) : 0;
    const unsigned to
      = nr == last ? block_in_slot (o, end - 1) : SLOT_BLOCKS - 1;

    if (slot
        && map_shared_blocks (&o->map, nr, slot_load (slot))
             & bitmap_mask (from, to - from + 1))
      return true;
  }
  return false;
}

/* Rule 4: the file is read under the request lock, without slot locks.  Should a
 * block be zeroed meanwhile, or move, its old address is not used again before this
 * request has ended (rule 6).  A frozen map and its bytes do not change.
 */
int
look (struct disk d, uint64_t offset, uint64_t end, struct run *run, void *buf)
{
  struct overlay *o = d.overlay;
  int r = 0;

  assert_none_held_from (RANK_RELEASE);
  if (d.frozen) {
    *run = find_run_of (o, &d.frozen->map, offset, end);
    if (buf && run->state == BLOCK_ALLOCATED)
      r = overlay_read_frozen (o, buf, run->length, run->file_offset);
  }
  else {
    HOLD_REQUEST (o);
    *run = find_run (o, offset, end);
    if (buf && run->state == BLOCK_ALLOCATED)
      r = store_read (&o->store, buf, run->length, run->file_offset);
  }
  return r == -1 ? errno : 0;
}
