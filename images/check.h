/* SPDX-License-Identifier: BSD-3-Clause */

/* The check of an image, when it is opened. */

#ifndef COW_CHECK_H
#define COW_CHECK_H

#include "images/walk.h"

/* Check all but the header, which was decoded, and fill in image->checked.  -1 if
 * the image is not to be loaded, which was reported.
 */
extern int check_image (struct loaded *image);

#endif /* COW_CHECK_H */
