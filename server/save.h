/* SPDX-License-Identifier: BSD-3-Clause */

/* Where overlays are saved, and saving them (cow-save). */

#ifndef COW_SAVE_H
#define COW_SAVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blk.h"
#include "server/loads.h"
#include "format/qcow2.h"
#include "server/target.h"

/* What the parameters say. */
struct save_options {
  const char *target;         /* cow-save; NULL: overlays are thrown away */
  const char *backing;        /* NULL: the default; "none": none */
  const char *backing_format; /* NULL: raw */
  bool compact;
  enum qcow2_l2_format format;
};

/* Do they name a file that is to be below what is saved? */
extern bool save_names_backing (const struct save_options *options);

/* Do they make sense?  -1 if not, which was reported. */
extern int save_check_options (const struct save_options *options);

struct save;

/* Look at the target and check all that can be checked.  To be called in
 * .get_ready: there the descriptors of a stream are still open.  All that OPTIONS
 * and OTHERS point to is only used now, but for the texts of OPTIONS.  NULL if the
 * server is not to start, which was reported.
 */
extern struct save *save_new (const struct save_options *options,
                              const struct loads *loads,
                              const struct parameter *others,
                              size_t nr_others);
extern void save_free (struct save *save);

/* Where the overlay files are to be made; NULL: it does not matter. */
extern const char *save_directory (const struct save *save);

/* What is to become of overlays. */
extern enum overlay_fate save_fate (const struct save *save);

/* Can the target still be written?  To be asked again when nbdkit has become the
 * user of option -u.  -1 if not, which was reported.
 */
extern int save_check_again (const struct save *save,
                             const struct loads *loads);

/* Is there a file for each export in which something was written?  Else there is
 * one image, of one export, in any case.
 */
extern bool save_is_per_export (const struct save *save);

/* Is the target just what overlays are loaded from? */
extern bool save_is_what_is_loaded (const struct save *save,
                                    const struct loads *loads);

/* The target as the user gave it. */
extern const char *save_name (const struct save *save);

/* Check that this export can be saved, and lock the file that it is going to replace, if
 * there is one: *LOCK is to be given back when its overlay is freed.  -1 if it is to be
 * refused, which was reported.
 */
extern int save_check_export (const struct save *save,
                              const struct loads *loads,
                              const char *export_name,
                              struct file_lock **lock);

/* Save an overlay, which is closed, and whose views were cut off.  BASE is what the image
 * is to say of its base.  -1 if that failed; then the overlay was kept elsewhere if that
 * was possible at all, and all was reported.
 */
extern int save_overlay (struct save *save, const struct loads *loads,
                         const char *export_name, struct overlay *overlay,
                         const struct qcow2_base *base);

#endif /* COW_SAVE_H */
