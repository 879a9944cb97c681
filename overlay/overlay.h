/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay: one writable disk on top of a base, and the moments at which it was
 * frozen.  What requests do to it is in blk.h.
 */

#ifndef COW_OVERLAY_H
#define COW_OVERLAY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "overlay/map.h"
#include "format/qcow2.h"
#include "overlay/store.h"
#include "overlay/tables.h"

/* What is to become of overlays. */
enum overlay_fate {
  OVERLAY_THROWN_AWAY,
  OVERLAY_SAVED,          /* as an image */
  OVERLAY_SAVED_IN_PLACE, /* as an image, which the overlay file becomes */
};

/* What all overlays of a server have in common. */
struct overlay_options {
  uint32_t block_size; /* a power of two */
  bool
    detect_zeroes; /* blocks of zeroes that are written become zero blocks */
  const char *dir; /* where their files are made; must live as long as they */
  enum overlay_fate fate;
  enum qcow2_l2_format format; /* of the image */
};

/* As many as a word has bits.  (The deadlock detector of gcc's thread sanitizer
 * breaks down where a thread holds more than 64 locks of any kind.)
 */
#ifndef __SANITIZE_THREAD__
#define NR_STRIPES 64
#else
#define NR_STRIPES 32
#endif

/* For blk.c; others use the functions below. */
struct overlay {
  uint64_t size;          /* of the disk, in bytes; constant */
  unsigned block_shift;   /* log2 of the block size; constant */
  unsigned slot_shift;    /* log2 of the slot size; constant */
  bool detect_zeroes;     /* constant */
  bool has_tables;        /* constant */
  enum overlay_fate fate; /* constant */
  struct tables tables;   /* if has_tables: for its image; has its own lock */
  atomic_bool changed;    /* set before the first change of a slot */
  bool closed;            /* nothing changes any more; set under the exclusive
                            * request lock */
  struct map map;         /* looked at under the request lock; slots are
                            * changed under their slot lock too */
  struct frozen_map last; /* if closed: as it is to be saved */
  struct store store;     /* has its own lock */
  pthread_mutex_t release_lock; /* held while a frozen map is released */
  pthread_mutex_t slot_locks[NR_STRIPES];
  pthread_rwlock_t request_lock;
  pthread_rwlock_t
    view_lock; /* held shared by views while they read the file */
  bool
    views_are_cut; /* they do not read it any more, and nothing is given back;
                       * set under the release lock and the exclusive view lock */
};

/* Make an overlay for a disk of SIZE bytes.  Allocates next to nothing until
 * something is written.  NULL and errno: ENOMEM, or EFBIG if no image can be that
 * large.
 */
extern struct overlay *overlay_new (uint64_t size,
                                    const struct overlay_options *options);

/* Throw an overlay away.  No request may be under way, and no frozen map be held.
 * NULL is allowed.
 */
extern void overlay_free (struct overlay *overlay);

/* The size it was made with. */
extern uint64_t overlay_size (const struct overlay *overlay);

/* Was the disk ever changed, that is, is there a block that is not a hole? */
extern bool overlay_is_changed (const struct overlay *overlay);

/* Freeze the disk as it is at this moment: what was acknowledged is in it, and of a
 * request that is under way, all or nothing.  What is frozen stays so until
 * overlay_release.  NULL and errno: ENOMEM, or ESHUTDOWN if the overlay is closed.
 * Caller holds no lock of the overlay, here and below.
 */
extern struct frozen_map *overlay_freeze (struct overlay *overlay);

/* Nobody looks at what was frozen any more: give back what only it has. */
extern void overlay_release (struct overlay *overlay,
                             struct frozen_map *frozen);

/* Was it closed? */
extern bool overlay_is_closed (struct overlay *overlay);

/* Freeze the disk for good: what was acknowledged is in it, and whatever would
 * change it from now on fails with ESHUTDOWN.
 */
extern void overlay_close (struct overlay *overlay);

/* Let those who read frozen maps do so no longer (they get ESHUTDOWN where they need
 * the file), and punch what only those have.  The overlay must be closed.
 */
extern void overlay_cut_views (struct overlay *overlay);

/* Bytes of the file at OFFSET, for who holds a frozen map that has them.  -1 and
 * errno; ESHUTDOWN when views were cut off.
 */
extern int overlay_read_frozen (struct overlay *overlay, void *buf,
                                uint64_t count, uint64_t offset);

/* What an image of the overlay is made of, and how its file is laid out.  The
 * overlay must be closed and not THROWN_AWAY.
 */
extern const struct map *overlay_map (const struct overlay *overlay);
extern struct store *overlay_store (struct overlay *overlay);
extern struct tables *overlay_tables (struct overlay *overlay);

/*----------------------------------------------------------------------
 * For blk.c and overlay.c
 */

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

/* As much of the file is punched at once, and with locks held. */
#define PUNCH_BYTES (16u << 20)

/* Punch these blocks of the slot at PLACE. */
extern void overlay_punch_blocks (const struct overlay *overlay,
                                  uint64_t place, uint32_t blocks);

/* Take the slot locks that have a bit in STRIPES, in ascending order. */
extern void overlay_lock_stripes (struct overlay *overlay, uint64_t stripes);
extern void overlay_unlock_stripes (struct overlay *overlay, uint64_t stripes);

/* The bit of the slot lock of slot NR. */
static inline uint64_t
stripe_of (uint64_t nr)
{
  return UINT64_C (1) << nr % NR_STRIPES;
}

#endif /* COW_OVERLAY_H */
