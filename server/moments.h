/* SPDX-License-Identifier: BSD-3-Clause */

/* Moments of overlays that have a name. */

#ifndef COW_MOMENTS_H
#define COW_MOMENTS_H

#include <stddef.h>
#include <stdio.h>

#include "server/overlays.h"

/* Why a command failed. */
struct refusal {
  char text[512];
};

/* Give the moment that is now, one for all of them, a NAME in COUNT exports; forget the
 * moment of that name of all of them.  All or nothing.  -1 and REFUSAL.
 */
extern int moments_make (struct overlays *overlays, const char *name,
                         char *const *exports, size_t count,
                         struct refusal *refusal);
extern int moments_forget (struct overlays *overlays, const char *name,
                           char *const *exports, size_t count,
                           struct refusal *refusal);

/* Throw away what was written to an export, and its moments.  -1 and REFUSAL, also if a
 * client uses it.
 */
extern int moments_drop (struct overlays *overlays, const char *export,
                         struct refusal *refusal);

/* Describe an export, or all (NULL), in lines of KEY=VALUE to STREAM.  -1 and REFUSAL. */
extern int moments_describe (struct overlays *overlays, const char *export,
                             FILE *stream, struct refusal *refusal);

/* Add to EXPORTS the named moments of all overlays, while there is room.  -1 if there is no
 * memory, which was reported.
 */
extern int moments_list (struct overlays *overlays,
                         struct nbdkit_exports *exports);

#endif /* COW_MOMENTS_H */
