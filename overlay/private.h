/* SPDX-License-Identifier: BSD-3-Clause */

/* What an overlay is made of: for the files of this directory and for blk*.c.  All
 * others use overlay.h.
 */

#ifndef COW_OVERLAY_PRIVATE_H
#define COW_OVERLAY_PRIVATE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "overlay/cleaner.h"
#include "overlay/grace.h"
#include "overlay/log.h"
#include "overlay/map.h"
#include "overlay/overlay.h"
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
  uint64_t size;        /* of the disk, in bytes; constant */
  unsigned block_shift; /* log2 of the block size; constant */
  unsigned slot_shift;  /* log2 of the slot size; constant */
  bool detect_zeroes;   /* constant */
  uint64_t
    max_blocks; /* no address for a block of the disk when so many are in use
                        * for anything; constant */
  enum overlay_fate fate;         /* constant */
  struct qcow2_geometry geometry; /* of an image; constant */
  struct tables tables;           /* if has_tables; has its own lock */
  struct store store;             /* the file; has its own lock */
  struct log log;                 /* in it; has its own lock */

  /* Who holds the request lock knows whether it is open, who holds the release lock or
   * the view lock whether views are cut off.
   */
  _Atomic (enum overlay_life) life;
  _Atomic uint64_t
    changed_in; /* the map's generation at the last change; 0: there was none.
                 * Set before a slot is changed, under the request lock */

  /* Looked at under the request lock; slots are changed under their slot lock too. */
  struct map map;
  struct frozen_map last; /* if closed: as it is to be saved */
  struct mutex
    dead_lock; /* guards the dead lists of all these maps, as far as others
                           * can come to them */

  struct grace
    grace; /* of all who hold the request lock and look at the live map */
  struct cleaning cleaning;

  struct mutex release_lock; /* held while a frozen map is released */
  struct mutex slot_locks[NR_STRIPES];
  struct rwlock request_lock;
  struct rwlock
    view_lock; /* held shared by views while they read the file, and by
                            * requests that use it without the request lock */
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

/* The byte at OFFSET of the disk lies in this block of its slot. */
static inline unsigned
block_in_slot (const struct overlay *o, uint64_t offset)
{
  return offset >> o->block_shift & (SLOT_BLOCKS - 1);
}

/* Where the byte at OFFSET of the disk lies in the file, its block being at ADDRESS. */
static inline uint64_t
file_offset (const struct overlay *o, uint32_t address, uint64_t offset)
{
  return log_offset (&o->log, address) + (offset & (block_size (o) - 1));
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

/* Does the file belong to the one who saves, so that nobody else changes it?  Caller holds
 * the view lock or the release lock.
 */
static inline bool
views_are_cut (const struct overlay *o)
{
  assert_either_held (&o->view_lock, &o->release_lock);
  return atomic_load (&o->life) == OVERLAY_CUT;
}

/* A request is under way: it holds the request lock, and is counted, so that addresses
 * that it has found are not given to others (rule 6).
 */
static inline grace_ticket
request_begin (struct overlay *o)
{
  rwlock_lock_shared (&o->request_lock);
  return grace_enter (&o->grace);
}

static inline void
request_end (struct overlay *o, grace_ticket ticket)
{
  grace_leave (ticket);
  rwlock_unlock (&o->request_lock);
}

struct request_hold {
  struct overlay *o;
  grace_ticket ticket;
};

static inline void
cleanup_request (struct request_hold *hold)
{
  request_end (hold->o, hold->ticket);
}

/* The same, until the scope is left. */
#define HOLD_REQUEST(o)                                                       \
  __attribute__ ((cleanup (cleanup_request), unused)) struct request_hold     \
  COW_CONCAT (held_, __LINE__)                                                \
    = { (o), request_begin (o) }

/* A round of the cleaner, by hand. */
static inline void
overlay_clean (struct overlay *o)
{
  cleaning_round (&o->cleaning);
}

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
