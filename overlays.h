/* Which export gets which overlay, and how long it lives. */

#ifndef COW_OVERLAYS_H
#define COW_OVERLAYS_H

#include <stdint.h>

struct overlay;
struct overlays;
struct overlay_user;

enum scope {
  SCOPE_EXPORT,     /* one overlay for each export name, as long as we run */
  SCOPE_CONNECTION, /* one for each connection, gone when it ends */
};

/* The set of all overlays of a server, at most MAX at a time.  Their blocks
 * have BLOCK_SIZE bytes.  Their files are made in DIR, which is freed with the
 * set.  NULL and errno.
 */
extern struct overlays *overlays_new (enum scope scope, uint64_t max,
                                      uint32_t block_size, char *dir);
extern void overlays_free (struct overlays *overlays);

/* The overlay for a connection to the export NAME, whose base has SIZE bytes.
 * It stays until overlays_put; what that then keeps depends on the scope and on
 * whether something was written.  NULL if the connection is to be refused,
 * which was reported.
 */
extern struct overlay_user *overlays_get (struct overlays *overlays,
                                          const char *name, uint64_t size);
extern void overlays_put (struct overlays *overlays,
                          struct overlay_user *user);

/* What overlays_get got. */
extern struct overlay *overlay_of (const struct overlay_user *user);

#endif /* COW_OVERLAYS_H */
