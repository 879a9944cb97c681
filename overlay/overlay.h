/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay: one writable disk on top of a base, and the moments at which it was
 * frozen.  What requests do to it is in blk.h.
 */

#ifndef COW_OVERLAY_H
#define COW_OVERLAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "format/qcow2.h"

struct cleaner;
struct frozen_map;
struct map;
struct store;
struct tables;

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
  uint64_t
    max_bytes;     /* that blocks of the disk may take in the file; 0: any */
  const char *dir; /* where their files are made; must live as long as they */
  struct cleaner *cleaner; /* the same; NULL: rounds are done by hand */
  enum overlay_fate fate;
  enum qcow2_l2_format format; /* of the image */
};

struct overlay;

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

/* Its max_bytes, in whole blocks; 0: any.  What would need more gets EDQUOT. */
extern uint64_t overlay_max_bytes (const struct overlay *overlay);

/* Was the disk ever changed, that is, is there a block that is not a hole? */
extern bool overlay_is_changed (const struct overlay *overlay);

/* Was anything changed, or is just being changed, that is not in FROZEN, which is held?
 * Whatever was acknowledged before the call counts.
 */
extern bool overlay_is_changed_since (const struct overlay *overlay,
                                      const struct frozen_map *frozen);

/* Freeze the disk as it is at this moment: what was acknowledged is in it, and of a
 * request that is under way, all or nothing.  What is frozen stays so until
 * overlay_release.  NULL and errno: ENOMEM, or ESHUTDOWN if the overlay is closed.
 * Caller holds no lock of the overlay, here and below.
 */
extern struct frozen_map *overlay_freeze (struct overlay *overlay);

/* The same of COUNT overlays, all different and in ascending order of their addresses, at
 * one moment: into FROZEN, one for each, or none.  -1 and errno.
 */
extern int overlay_freeze_all (struct overlay *const *overlays, size_t count,
                               struct frozen_map **frozen);

/* Nobody looks at what was frozen any more: give back what only it has. */
extern void overlay_release (struct overlay *overlay,
                             struct frozen_map *frozen);

/* How many bytes of the file does nobody have but FROZEN, which is held, so that its
 * release would give them back?  Takes time with what was changed between it and its next
 * newer neighbour.  -1 and ENOMEM.
 */
extern int overlay_taken_by (struct overlay *overlay,
                             const struct frozen_map *frozen, uint64_t *bytes);

/* The disk that somebody looks at: as it is, or as it was when it was frozen. */
struct disk {
  struct overlay *overlay;
  const struct frozen_map *frozen; /* which is held; NULL: as it is */
};

static inline struct disk
live_disk (struct overlay *overlay)
{
  return (struct disk) { .overlay = overlay };
}

static inline struct disk
frozen_disk (struct overlay *overlay, const struct frozen_map *frozen)
{
  return (struct disk) { .overlay = overlay, .frozen = frozen };
}

/* Was it closed? */
extern bool overlay_is_closed (struct overlay *overlay);

/* Freeze the disk for good: what was acknowledged is in it, and whatever would
 * change it from now on fails with ESHUTDOWN.
 */
extern void overlay_close (struct overlay *overlay);

/* Let those who read frozen maps do so no longer: they get ESHUTDOWN where they need
 * the file.  The overlay must be closed.
 */
extern void overlay_cut_views (struct overlay *overlay);

/* Bytes of the file at OFFSET, for who holds a frozen map that has them.  -1 and
 * errno; ESHUTDOWN when views were cut off.
 */
extern int overlay_read_frozen (struct overlay *overlay, void *buf,
                                uint64_t count, uint64_t offset);

/* What an image of the overlay is made of, and how its file is laid out: in the form that
 * was asked for, but that the geometry of its tables is the portable one wherever the disk
 * allows that.  The overlay must be closed and not THROWN_AWAY.
 */
extern const struct map *overlay_map (const struct overlay *overlay);
extern struct store *overlay_store (struct overlay *overlay);
extern struct tables *overlay_tables (struct overlay *overlay);
extern const struct qcow2_geometry *
overlay_geometry (const struct overlay *overlay);

#endif /* COW_OVERLAY_H */
