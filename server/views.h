/* SPDX-License-Identifier: BSD-3-Clause */

/* Views: what can be seen of an overlay besides the live disk.  They are read only. */

#ifndef COW_VIEWS_H
#define COW_VIEWS_H

#include <stdbool.h>
#include <stdint.h>

#include <nbdkit-filter.h>

#include "base.h"
#include "blk.h"
#include "format/qcow2.h"
#include "server/moment.h"
#include "server/viewname.h"

/* What images are made of, as in struct save_options. */
struct view_options {
  uint32_t block_size;
  enum qcow2_l2_format format;
  const char *backing;
  const char *backing_format;
};

/* What a view shows; NULL is the base.  Both moments are of one log. */
struct view_source {
  enum view_form form;
  struct moment *from; /* of a diff: what it is over */
  struct moment *what;
};

struct view;

/* Make a view, which holds both moments.  IDENTITY, which is copied, is what a diff is to
 * say of its base (NULL: nothing).  The view can be used by several connections at once;
 * BASE below is that of the connection.  OPTIONS must live as long.  NULL if there is no
 * memory, which was reported.
 */
extern struct view *view_new (const struct view_source *source,
                              const struct qcow2_base *identity,
                              const struct view_options *options);
extern void view_free (struct view *view);

/* What it was made with. */
extern const struct view_source *view_source (const struct view *view);

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
