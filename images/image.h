/* SPDX-License-Identifier: BSD-3-Clause */

/* A qcow2 image of a map that does not change any more.
 *
 * It is had in two ways: the overlay file is made into one where it lies, or an
 * image in the order of the disk is planned, of which every byte can then be read.
 * In both, allocated blocks are data clusters, zero blocks are zero clusters, and
 * holes are not allocated.  A full image can only be planned: in it holes where the
 * base has data are data clusters too.
 */

#ifndef COW_IMAGE_H
#define COW_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "overlay/map.h"
#include "format/qcow2.h"
#include "overlay/store.h"
#include "overlay/tables.h"

/* Where the base has data, in blocks, in the order of the disk; no two of them touch. */
struct image_data {
  struct image_data_run {
    uint64_t start, end;
  } * runs;
  size_t nr_runs, max_runs;
};

/* Add a range of bytes that lies behind all others, or touches the last.  -1 and
 * ENOMEM.
 */
extern int image_data_add (struct image_data *data, uint32_t block_size,
                           uint64_t offset, uint64_t count);

/* What an image is made of. */
struct image_source {
  const struct map *map; /* changed by nobody */
  struct store *store;   /* for image_finish only */
  struct qcow2_geometry geometry;
  const char *backing_file;         /* NULL: none */
  const char *backing_format;       /* NULL: not said */
  const struct image_data *of_base; /* for a full image; NULL: a diff */
};

/* Name the backing file as the parameters cow-save-backing (NULL: the default) and
 * -format say.  *MADE_UP is what the caller has to free when SOURCE is not used any
 * more.  -1 and ENOMEM.
 */
extern int image_set_backing (struct image_source *source, const char *backing,
                              const char *format, char **made_up);

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

/* Plan it.  SOURCE is copied; what it points to must live as long as the image, but
 * for the backing file.
 * Where the image is too long for its format, extended L2 entries are used.  NULL
 * and errno: ENOMEM, or EFBIG if it is too long for any.
 */
extern struct image *image_plan (const struct image_source *source);
extern void image_free (struct image *image);

/* Its length in bytes. */
extern uint64_t image_size (const struct image *image);

/* Where the data of a planned image comes from.  Both get ranges of whole blocks, or
 * parts of them; -1 and errno.
 */
struct image_reader {
  int (*read_file) (void *opaque, void *buf, uint64_t count, uint64_t offset);

  /* For a full image; behind the end of the disk there are zeroes. */
  int (*read_base) (void *opaque, void *buf, uint64_t count, uint64_t offset);
  void *opaque;
};

/* Read COUNT bytes at OFFSET, which are inside the image.  Any number of threads
 * may.  -1 and errno.
 */
extern int image_read (const struct image *image,
                       const struct image_reader *reader, void *buf,
                       size_t count, uint64_t offset);

#endif /* COW_IMAGE_H */
