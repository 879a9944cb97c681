/* SPDX-License-Identifier: BSD-3-Clause */

/* The base: what lies below the filter, asked only in the way it allows.
 *
 * It never changes, and is only read: inside its size, in blocks that it
 * accepts, and in requests no longer than it takes.
 */

#ifndef COW_BASE_H
#define COW_BASE_H

#include <stdbool.h>
#include <stdint.h>

#include <nbdkit-filter.h>

struct base {
  nbdkit_next *next;
  uint64_t size;        /* of the disk, in bytes */
  uint32_t min_request; /* power of two: offsets and lengths are multiples
                            * of it, but for the end of the disk */
  uint32_t max_request; /* longest read, a multiple of min_request */
  uint32_t preferred;   /* block size that it likes; 0: it did not say */
  bool can_extents;
  int can_cache; /* NBDKIT_CACHE_* */
};

/* Ask the next layer for all that must be asked before it is used.  To be
 * called from .prepare.  -1 if it fails, which was reported.
 */
extern int base_init (struct base *base, nbdkit_next *next);

/* Read COUNT bytes at OFFSET, inside the disk.  Caller holds no lock that an
 * operation on an overlay takes (rule 3).  -1 if it fails, which was reported, and *ERR.
 */
extern int base_read (const struct base *base, void *buf, uint64_t count,
                      uint64_t offset, int *err);

/* Let the base prefetch COUNT bytes at OFFSET, if it can.  Same conditions. */
extern int base_cache (const struct base *base, uint64_t count,
                       uint64_t offset, int *err);

/* Add to EXTENTS what the base says of OFFSET .. OFFSET+COUNT-1 when it is asked
 * once; that may be just the beginning.  *COVERED becomes the number of bytes that
 * were added, at least one.  Same conditions; base->can_extents.
 */
extern int base_extents (const struct base *base, uint64_t count,
                         uint64_t offset, uint32_t flags,
                         struct nbdkit_extents *extents, uint64_t *covered,
                         int *err);

#endif /* COW_BASE_H */
