/* SPDX-License-Identifier: BSD-3-Clause */

/* Block operations on an overlay: one writable disk on top of a base.
 *
 * The disk's size is the base's.  All offsets and counts are in bytes, any
 * alignment, inside the disk, counts not 0.  All functions may be called by
 * any number of threads at once, and take no lock that they still hold while
 * the base is read.  They return 0, or -1 with a positive errno value in *ERR
 * after reporting the reason with nbdkit_error.
 */

#ifndef COW_BLK_H
#define COW_BLK_H

#include <stdbool.h>
#include <stdint.h>

#include <nbdkit-filter.h>

#include "base.h"
#include "overlay/overlay.h"

/* An error of the overlay file or of memory, reported, as that of the request: what NBD
 * has a name for, else EIO.  The client would see EINVAL, and on ENOTSUP nbdkit would
 * abort.
 */
extern int blk_error (const struct overlay *overlay, int err);

/* What a read does with bytes that it had to get from the base. */
enum on_read {
  ON_READ_PASS, /* nothing */
  ON_READ_KEEP, /* their blocks are kept in the overlay (cow-on-read) */
};

/* Read COUNT bytes at OFFSET into BUF.  Of a frozen disk nothing is kept. */
extern int blk_read (struct disk disk, const struct base *base,
                     enum on_read on_read, void *buf, uint32_t count,
                     uint64_t offset, int *err);

/* Write COUNT bytes of BUF at OFFSET.  When it fails, blocks that were holes or
 * zero are so still; others may hold part of the new bytes.
 */
extern int blk_write (struct overlay *overlay, const struct base *base,
                      const void *buf, uint32_t count, uint64_t offset,
                      int *err);

/* How much a zero may do. */
enum zero_effort {
  ZERO_ANY,  /* whatever it needs */
  ZERO_FAST, /* ENOTSUP, silently, where it would have to read the base */
};

/* What becomes of the space of blocks that a zero covers. */
enum zero_space {
  ZERO_GIVES_BACK, /* it is not needed any more */
  ZERO_HAS_SPACE, /* they have some, so that writing to them cannot fail for want of
                      * it (NBD_CMD_FLAG_NO_HOLE) */
};

/* Make a range read as zeroes; this is what trim does as well.  With ZERO_FAST and
 * ZERO_HAS_SPACE also ENOTSUP, silently, where the space takes time.
 */
extern int blk_zero (struct overlay *overlay, const struct base *base,
                     enum zero_effort effort, enum zero_space space,
                     uint32_t count, uint64_t offset, int *err);

/* What a prefetch does with blocks that are holes. */
enum on_cache {
  ON_CACHE_PASS, /* lets the base prefetch them, if it can */
  ON_CACHE_KEEP, /* reads them into the overlay (cow-on-cache) */
};

extern int blk_cache (struct overlay *overlay, const struct base *base,
                      enum on_cache on_cache, uint32_t count, uint64_t offset,
                      int *err);

/* Add to EXTENTS the states of a range: exact at the block, holes as the base
 * describes them.  With NBDKIT_FLAG_REQ_ONE in FLAGS possibly only the first
 * extent, and asks the base at most once.
 */
extern int blk_extents (struct disk disk, const struct base *base,
                        uint32_t count, uint64_t offset, uint32_t flags,
                        struct nbdkit_extents *extents, int *err);

#endif /* COW_BLK_H */
