/* SPDX-License-Identifier: BSD-3-Clause */

/* A qcow2 image in the order of the disk: header, tables, data clusters.  Every offset
 * is known before a byte is read.  (finish.h has the other way to make one.)
 */

#ifndef COW_IMAGE_H
#define COW_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#include "images/source.h"

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
