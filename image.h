/* SPDX-License-Identifier: BSD-3-Clause */

/* A qcow2 image of a map that does not change any more.
 *
 * It is had in two ways: the overlay file is made into one where it lies, or an
 * image in the order of the disk is planned, of which every byte can then be read.
 * In both, allocated blocks are data clusters, zero blocks are zero clusters, and
 * holes are not allocated.
 */

#ifndef COW_IMAGE_H
#define COW_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "map.h"
#include "qcow2.h"
#include "store.h"
#include "tables.h"

/* What an image is made of. */
struct image_source {
  const struct map *map; /* changed by nobody */
  struct store *store;
  struct qcow2_geometry geometry;
  const char *backing_file;   /* NULL: none */
  const char *backing_format; /* NULL: not said */
};

/* Make the overlay file of SOURCE, which is laid out by TABLES, into an image,
 * complete but not synced.  Nothing of the data is moved.  -1 and errno; then the
 * overlay can still be read.
 */
extern int image_finish (const struct image_source *source,
                         struct tables *tables);

/* An image in the order of the disk: header, tables, data clusters.  Every offset
 * is known before a byte is read.
 */
struct image;

/* Plan it.  SOURCE is copied; what it points to must live as long as the image.
 * Where the image is too long for its format, extended L2 entries are used.  NULL
 * and errno: ENOMEM, or EFBIG if it is too long for any.
 */
extern struct image *image_plan (const struct image_source *source);
extern void image_free (struct image *image);

/* Its length in bytes. */
extern uint64_t image_size (const struct image *image);

/* Read COUNT bytes at OFFSET, which are inside the image.  Any number of threads
 * may.  -1 and errno.
 */
extern int image_read (const struct image *image, void *buf, size_t count,
                       uint64_t offset);

#endif /* COW_IMAGE_H */
