/* SPDX-License-Identifier: BSD-3-Clause */

/* The locks by which qemu and this filter keep off each other's images.
 *
 * Whoever uses an image has shared locks on single bytes of its file: one for each
 * thing that it does to the image, and one for each thing that others must not do
 * meanwhile.  The numbers of the bytes are those of qemu (block/file-posix.c).  What
 * the bytes hold does not matter.
 *
 * The locks belong to the open file (F_OFD_SETLK): they stay when the process forks,
 * and go with its last descriptor.
 */

#ifndef COW_IMAGELOCK_H
#define COW_IMAGELOCK_H

#include <stdbool.h>

enum image_use {
  IMAGE_UNUSED,
  IMAGE_READ, /* nobody else may write it */
  IMAGE_WRITE, /* nobody else may use it, but for those who take what they get, as
                * "qemu-img info -U" does */
};

/* Change the locks that the open file of FD has, which must be open for reading.  At no
 * moment there are fewer than before and after need.  Returns 0, also where the file
 * system has no such locks: then *WORKS becomes false.  -1 and errno if that fails, with the
 * locks as they were; EAGAIN if somebody else uses the image in a way that USE does
 * not allow, or forbids USE.
 */
extern int imagelock_change (int fd, enum image_use from, enum image_use use,
                             bool *works);

#endif /* COW_IMAGELOCK_H */
