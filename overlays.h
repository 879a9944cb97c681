/* SPDX-License-Identifier: BSD-3-Clause */

/* Which export gets which overlay, and how long it lives. */

#ifndef COW_OVERLAYS_H
#define COW_OVERLAYS_H

#include <stdint.h>

struct overlay;
struct overlays;
struct overlay_entry;

enum scope {
  SCOPE_EXPORT,     /* one overlay for each export name, as long as we run */
  SCOPE_CONNECTION, /* one for each connection, gone when it ends */
};

/* The set of all overlays of a server, at most MAX at a time.  Their blocks
 * have BLOCK_SIZE bytes.  Checks that overlay files can be made.  NULL if the
 * server is not to start, which was reported.
 */
extern struct overlays *overlays_new (enum scope scope, uint64_t max,
                                      uint32_t block_size);
extern void overlays_free (struct overlays *overlays);

/* To be called when the command of --run has been started, which would inherit
 * what this does to the process, and nbdkit has become the user of option -u.
 * -1 if the server is not to go on, which was reported.
 */
extern int overlays_start (const struct overlays *overlays);

/* The overlay for a connection to the export NAME, whose base has SIZE bytes.
 * It stays until overlays_put; what that then keeps depends on the scope and on
 * whether something was written.  NULL if the connection is to be refused,
 * which was reported.
 */
extern struct overlay_entry *overlays_get (struct overlays *overlays,
                                           const char *name, uint64_t size);
extern void overlays_put (struct overlays *overlays,
                          struct overlay_entry *entry);

/* What overlays_get got. */
extern struct overlay *overlay_of (const struct overlay_entry *entry);

#endif /* COW_OVERLAYS_H */
