/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay as an image to its target, or to where it can be kept. */

#ifndef COW_PUBLISH_H
#define COW_PUBLISH_H

#include <stdbool.h>
#include <stdint.h>

#include "format/qcow2.h"
#include "overlay/giveback.h"
#include "overlay/overlay.h"
#include "server/loads.h"
#include "server/target.h"

/* What the parameters say. */
struct save_options {
  const char *target;         /* cow-save; NULL: overlays are thrown away */
  const char *backing;        /* NULL: the default; "none": none */
  const char *backing_format; /* NULL: raw */
  bool compact;
  enum qcow2_l2_format format;
};

/* An overlay that is to be saved, which is closed. */
struct save_item {
  const char *name; /* of its export */
  struct overlay *overlay;
  const struct qcow2_base *base;  /* what the image is to say of its base */
  const struct target_seen *seen; /* by save_check_export */
};

struct publish_order {
  struct target *target;
  const struct loads *loads;
  const struct save_options *options;
  const char *temporary; /* a directory, or NULL */
  struct giveback_budget *giveback;
  const struct save_item *item;
};

/* Save the overlay of ORDER, whose views were cut off, in the file PATH, or NULL for a
 * stream.  -1 if that failed; then it was kept elsewhere if that was possible at all, and
 * all was reported.
 */
extern int publish (const struct publish_order *order, const char *path);

#endif /* COW_PUBLISH_H */
