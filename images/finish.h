/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay file that becomes an image where it lies. */

#ifndef COW_FINISH_H
#define COW_FINISH_H

#include "images/source.h"
#include "overlay/giveback.h"
#include "overlay/tables.h"

/* Make the overlay file of SOURCE, which is laid out by TABLES and not extended, into an
 * image, complete but not synced.  Nothing of the data is moved.  *USED says what the image
 * uses, and where it ends; the caller frees its words.  -1 and errno; then the overlay can
 * still be read, and there are no words.
 */
extern int image_finish (const struct image_source *source,
                         struct tables *tables, struct image_used *used);

#endif /* COW_FINISH_H */
