/* SPDX-License-Identifier: BSD-3-Clause */

/* A moment of an overlay: a frozen map, and those who hold it. */

#ifndef COW_MOMENT_H
#define COW_MOMENT_H

#include <stddef.h>

#include "overlay/overlay.h"

struct moment;

/* Freeze COUNT overlays at one moment (as overlay_freeze_all), into MOMENTS, each of which
 * has one holder.  -1 and errno.
 */
extern int moments_new (struct overlay *const *overlays, size_t count,
                        struct moment **moments);

/* One holder more, which is returned; one less, which may be NULL.  The last one gives
 * back what only the moment has.
 */
extern struct moment *moment_hold (struct moment *moment);
extern void moment_let_go (struct moment *moment);

extern struct overlay *moment_overlay (const struct moment *moment);
extern struct frozen_map *moment_frozen (const struct moment *moment);

#endif /* COW_MOMENT_H */
