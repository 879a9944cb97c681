/* SPDX-License-Identifier: BSD-3-Clause */

/* The images that overlays start from: all of what cow-load names. */

#ifndef COW_LOADS_H
#define COW_LOADS_H

#include <stdbool.h>
#include <stddef.h>

#include "base.h"
#include "blk.h"
#include "format/qcow2.h"
#include "server/names.h"

struct loads;

struct loads_options {
  /* A file that is missing counts as empty if this is that file too.  NULL: none. */
  const char *save_name;

  /* Load also what was made over another base. */
  bool any_base;

  /* They may tell which file the base is. */
  const struct parameter *others;
  size_t nr_others;
};

/* Open and check the files and all files of the directories NAMES, of which there
 * are COUNT; later ones will lie on top.  OPTIONS is only used now.  NULL if the server
 * is not to start, which was reported.
 */
extern struct loads *loads_new (const char *const *names, size_t count,
                                const struct loads_options *options);
extern void loads_free (struct loads *loads);

/* Is the file PATH (see names_resolve) one of the names, or an image in a directory
 * that is?  LOADS may be NULL: there is nothing to load.
 */
extern bool loads_has (const struct loads *loads, const char *path);

/* Is it all that is loaded?  Not if it is missing. */
extern bool loads_has_only (const struct loads *loads, const char *path);

/* Does it lie below all others that are loaded? */
extern bool loads_has_first (const struct loads *loads, const char *path);

/* Bring what there is for an export into its overlay, which nobody else uses yet, and
 * whose base is called IDENTITY.  That takes over a name of the base from the lowest
 * image, if it has none.  Caller holds no lock that a request takes.  -1 if the export
 * is to be refused, which was reported.
 */
extern int loads_apply (const struct loads *loads, const char *export_name,
                        struct overlay *overlay, const struct base *base,
                        struct qcow2_base *identity);

#endif /* COW_LOADS_H */
