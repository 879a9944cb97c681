/* SPDX-License-Identifier: BSD-3-Clause */

/* Looking at the states of a disk's bytes.  For overlay/ and blk*.c.
 *
 * Offsets are bytes of the disk; ranges are not empty and inside the disk.
 */

#ifndef COW_LOOK_H
#define COW_LOOK_H

#include <stdbool.h>
#include <stdint.h>

#include "bitmap.h"
#include "overlay/overlay.h"

/* Bytes of the disk that are in one state, and if that is allocated, lie one
 * behind the other in the file.
 */
struct run {
  enum block_state state;
  uint64_t length;      /* in bytes */
  uint64_t file_offset; /* if allocated */
};

/* The run at OFFSET, as far as END at the most; if BUF is not NULL, its bytes too, where
 * it is allocated.  0 or an errno value.  Caller holds no lock of the overlay.
 */
extern int look (struct disk disk, uint64_t offset, uint64_t end,
                 struct run *run, void *buf);

/* These are of the live disk.  Caller holds the request lock. */
extern struct run find_run (const struct overlay *overlay, uint64_t offset,
                            uint64_t end);
extern enum block_state state_at (const struct overlay *overlay,
                                  uint64_t offset);
extern bool all_allocated (const struct overlay *overlay, uint64_t offset,
                           uint64_t end);

/* Has a frozen map any of these blocks at the same address too?  They are all allocated,
 * or were a moment ago.
 */
extern bool any_shared (const struct overlay *overlay, uint64_t offset,
                        uint64_t end);

#endif /* COW_LOOK_H */
