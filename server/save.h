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
#include "server/publish.h"
#include "server/target.h"

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

/* What stands where an export is to be saved. */
struct save_target {
  struct target_seen
    seen;                 /* it is not replaced when it is another one later */
  struct file_lock *lock; /* on it; NULL: there is none */
};

/* Check that this export can be saved, before anything is loaded, and look at and lock the
 * file that it is going to replace, if there is one.  *FOUND is to be forgotten when its
 * overlay is freed.  -1 if it is to be refused, which was reported.
 */
extern int save_check_export (const struct save *save,
                              const struct loads *loads,
                              const char *export_name,
                              struct save_target *found);
extern void save_forget_target (struct save_target *found);

/* Save those of COUNT overlays that are to be saved: their views are cut off.  -1 if one
 * could not be; then it was kept elsewhere if that was possible at all, and all was
 * reported.
 */
extern int save_items (struct save *save, const struct loads *loads,
                       const struct save_item *items, size_t count);

/* Save an image in which there is nothing, of a disk over BASE.  As above. */
extern int save_empty (struct save *save, const struct loads *loads,
                       const struct qcow2_base *base,
                       const struct overlay_options *options);

#endif /* COW_SAVE_H */
