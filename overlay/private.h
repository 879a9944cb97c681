/* SPDX-License-Identifier: BSD-3-Clause */

/* What an overlay is made of: for the files of this directory and for blk*.c.  All
 * others use overlay.h.
 */

#ifndef COW_OVERLAY_PRIVATE_H
#define COW_OVERLAY_PRIVATE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/lock.h"
#include "overlay/map.h"
#include "overlay/overlay.h"
#include "overlay/places.h"
#include "overlay/store.h"
#include "overlay/tables.h"

/* As many as a word has bits.  (The deadlock detector of gcc's thread sanitizer
 * breaks down where a thread holds more than 64 locks of any kind.)
 */
#ifndef __SANITIZE_THREAD__
#define NR_STRIPES 64
#else
#define NR_STRIPES 32
#endif

/* The life of an overlay.  It goes on from one state to the next, and never back. */
enum overlay_life {
  /* Requests change it, views are made and released. */
  OVERLAY_OPEN,

  /* Nothing changes it any more, and no view is made.  Set under the exclusive request
   * lock.
   */
  OVERLAY_CLOSED,

  /* Views do not read its file any more, and nothing in it is given back: it belongs to
   * the one who saves.  Set under the release lock and the exclusive view lock.
   */
  OVERLAY_CUT,
};

struct overlay {
  uint64_t size;          /* of the disk, in bytes; constant */
  unsigned block_shift;   /* log2 of the block size; constant */
  unsigned slot_shift;    /* log2 of the slot size; constant */
  bool detect_zeroes;     /* constant */
  enum overlay_fate fate; /* constant */
  struct tables tables;   /* if has_tables; has its own lock */
  struct store store;     /* the file; has its own lock */
  struct places places;   /* in it; has its own lock */

  /* Who holds the request lock knows whether it is open, who holds the release lock or
   * the view lock whether views are cut off.
   */
  _Atomic (enum overlay_life) life;
  bool had_views;      /* when they were cut off; then constant */
  atomic_bool changed; /* set before the first change of a slot */

  /* Looked at under the request lock; slots are changed under their slot lock too. */
  struct map map;
  struct frozen_map last; /* if closed: as it is to be saved */

  struct mutex release_lock; /* held while a frozen map is released */
  struct mutex slot_locks[NR_STRIPES];
  struct rwlock request_lock;
  struct rwlock view_lock; /* held shared by views while they read the file */
};

static inline uint64_t
block_size (const struct overlay *o)
{
  return UINT64_C (1) << o->block_shift;
}

static inline uint64_t
slot_size (const struct overlay *o)
{
  return UINT64_C (1) << o->slot_shift;
}

/* Where the byte at OFFSET of the disk lies in the file, its slot being at
 * PLACE.
 */
static inline uint64_t
file_offset (const struct overlay *o, uint64_t place, uint64_t offset)
{
  return (place << o->slot_shift) + (offset & (slot_size (o) - 1));
}

/* Is the overlay to become an image? */
static inline bool
has_tables (const struct overlay *o)
{
  return o->fate != OVERLAY_THROWN_AWAY;
}

/* Does nothing change the overlay any more?  Caller holds the request lock. */
static inline bool
is_closed (const struct overlay *o)
{
  assert_held (&o->request_lock);
  return atomic_load (&o->life) != OVERLAY_OPEN;
}

/* As much of the file is punched at once, and with locks held. */
#define PUNCH_BYTES (16u << 20)

/* Punch these blocks of the slot at PLACE. */
extern void overlay_punch_blocks (const struct overlay *overlay,
                                  uint64_t place, uint32_t blocks);

/* Take the slot locks that have a bit in STRIPES, in ascending order. */
extern void overlay_lock_stripes (struct overlay *overlay, uint64_t stripes);
extern void overlay_unlock_stripes (struct overlay *overlay, uint64_t stripes);

/* Caller holds the slot lock of slot NR. */
static inline void
assert_slot_held (const struct overlay *o, uint64_t nr)
{
  assert_held (&o->slot_locks[nr % NR_STRIPES]);
}

/* The bit of the slot lock of slot NR. */
static inline uint64_t
stripe_of (uint64_t nr)
{
  return UINT64_C (1) << nr % NR_STRIPES;
}

#endif /* COW_OVERLAY_PRIVATE_H */
