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

/* How long that may take, for all overlays together. */
#define GIVEBACK_NANOSECONDS INT64_C (500000000)

/* The file of OVERLAY, whose views were cut off, is an image that ends at END: cut it off
 * there, and punch what is not in use, as long as *NANOSECONDS_LEFT lasts, if there were
 * views; the file is synced then.  0, or -1 and errno if that failed.
 */
extern int giveback (struct overlay *overlay, uint64_t end,
                     int64_t *nanoseconds_left);

#endif /* COW_GIVEBACK_H */
