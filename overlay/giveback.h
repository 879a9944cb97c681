/* SPDX-License-Identifier: BSD-3-Clause */

/* Giving back what an overlay file has too much, while somebody waits for the file.
 *
 * That is what only views had, and what lies behind the end of the image.  It can be
 * left where it is: an image says of each cluster whether it is in use.
 */

#ifndef COW_GIVEBACK_H
#define COW_GIVEBACK_H

#include <stdint.h>

#include "overlay/overlay.h"

/* What may be spent on it, for all overlays together. */
struct giveback_budget {
  int64_t nanoseconds;
  uint64_t extents; /* of files on the disk, which take their time later */
};

#define GIVEBACK_BUDGET                                                       \
  (struct giveback_budget)                                                    \
  {                                                                           \
    .nanoseconds = 800000000, .extents = 1024                                 \
  }

/* The file of OVERLAY, whose views were cut off, is an image that ends at END: cut it off
 * there, and punch what is not in use.  If there were views, no more of that is done than
 * BUDGET allows.
 */
extern void giveback (struct overlay *overlay, uint64_t end,
                      struct giveback_budget *budget);

#endif /* COW_GIVEBACK_H */
