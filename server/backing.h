/* SPDX-License-Identifier: BSD-3-Clause */

/* Backing files: the one that is given to what is saved, and those of what is loaded. */

#ifndef COW_BACKING_H
#define COW_BACKING_H

#include <stdbool.h>
#include <stddef.h>

#include "server/names.h"

/* Where a backing file that is called NAME is for an image in the directory DIR (NULL: in
 * none): an absolute path without symbolic links, in memory that the caller frees.  NULL
 * if it is not there, or no file, as in nbd: and json:, or there is no memory.  *MISSING
 * tells that it is the name of a file, and that is not there.  It is not opened.
 */
extern char *backing_find (const char *name, const char *dir, bool *missing);

/* Are backing file NAME of an image in the directory DIR and the file PATH the same? */
extern bool backing_is (const char *name, const char *dir, const char *path);

/* Check cow-save-backing=NAME with cow-save-backing-format=FORMAT (NULL: it was not
 * given), for images in the directory DIR (NULL: who knows).  Warns if it is not there.
 * -1 if it cannot be meant, which was reported.
 */
extern int backing_check (const char *name, const char *format,
                          const char *dir);

/* The image that is called IMAGE, and is to be loaded, has this BACKING file.  Warns if
 * the base is another file, as far as the parameters tell which file that is.
 */
extern void backing_compare (const char *image, const char *backing,
                             const struct parameter *others, size_t nr_others);

#endif /* COW_BACKING_H */
