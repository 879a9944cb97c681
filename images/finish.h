/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay file that becomes an image where it lies. */

#ifndef COW_FINISH_H
#define COW_FINISH_H

#include "images/source.h"
#include "overlay/tables.h"

/* Make the overlay file of SOURCE, which is laid out by TABLES, into an image,
 * complete but not synced.  Nothing of the data is moved.  The image ends at *END,
 * where the file may be cut off.  -1 and errno; then the overlay can still be read.
 */
extern int image_finish (const struct image_source *source,
                         struct tables *tables, uint64_t *end);

#endif /* COW_FINISH_H */
