/* SPDX-License-Identifier: BSD-3-Clause */

/* Giving back what an overlay file has too much, while somebody waits for the file.
 *
 * That is what lies behind the end of the image, and what was free, or only views had.  It
 * can be left where it is: an image says of each cluster whether it is in use.
 */

#ifndef COW_GIVEBACK_H
#define COW_GIVEBACK_H

#include <stdint.h>

#include "overlay/store.h"

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

/* What of a file an image uses. */
struct image_used {
  uint64_t *words; /* a bit for each cluster; none is used behind them */
  uint64_t nr_words;
  uint64_t end; /* where the image ends, in bytes */
};

/* The file in STORE is an image: cut it off behind that, and punch what is not in use, the
 * longest ranges first; no more of it than BUDGET allows.
 */
extern void giveback (struct store *store, uint64_t cluster_size,
                      const struct image_used *used,
                      struct giveback_budget *budget);

#endif /* COW_GIVEBACK_H */
