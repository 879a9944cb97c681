/* SPDX-License-Identifier: BSD-3-Clause */

/* Views: what can be seen of an overlay besides the live disk.  They are read only. */

#ifndef COW_VIEWS_H
#define COW_VIEWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <nbdkit-filter.h>

#include "base.h"
#include "blk.h"
#include "format/qcow2.h"

enum view_kind {
  VIEW_BASE,     /* the base as it is below the filter */
  VIEW_SNAPSHOT, /* the disk frozen at a moment */
  VIEW_DIFF,     /* the bytes of the diff of a moment */
  VIEW_FULL,     /* the same with the base's data in it */
  NR_VIEWS,
  VIEW_NONE = NR_VIEWS, /* the live disk */
};

/* Which view is the export NAME?  *LENGTH is that of the name of what it is a view
 * of, which may be 0.  Only the last suffix counts.
 */
extern enum view_kind view_of_name (const char *name, size_t *length);

/* What NBD_OPT_LIST and NBD_OPT_INFO tell of it. */
extern const char *view_description (enum view_kind kind);

/* Add to EXPORTS the views of each name that is in it already, up to LAST, while there
 * is room.  -1 if there is no memory, which was reported.
 */
extern int views_list (struct nbdkit_exports *exports, enum view_kind last);

/* How many names can be in a list. */
#define MAX_EXPORTS 10000

/* What images are made of, as in struct save_options. */
struct view_options {
  uint32_t block_size;
  enum qcow2_l2_format format;
  const char *backing;
  const char *backing_format;
};

struct view;

/* Make a view of what OVERLAY is at this moment (NULL for VIEW_BASE, which needs
 * none).  IDENTITY, which is copied, is what a diff is to say of its base (NULL for
 * VIEW_BASE).  The view can be used by several connections at once; BASE below is that
 * of the connection.  OPTIONS must live as long.  NULL if that is not possible, which
 * was reported.
 */
extern struct view *view_new (enum view_kind kind, struct overlay *overlay,
                              const struct qcow2_base *identity,
                              const struct view_options *options);
extern void view_free (struct view *view);

/* Its size in bytes.  An image is planned when this is called first, and must be
 * before it is read.  -1 if it cannot be made, which was reported.
 */
extern int64_t view_size (struct view *view, const struct base *base);

/* These are like those in blk.h. */
extern int view_read (struct view *view, const struct base *base, void *buf,
                      uint32_t count, uint64_t offset, int *err);
extern bool view_can_extents (const struct view *view,
                              const struct base *base);
extern int view_extents (struct view *view, const struct base *base,
                         uint32_t count, uint64_t offset, uint32_t flags,
                         struct nbdkit_extents *extents, int *err);

#endif /* COW_VIEWS_H */
