/* SPDX-License-Identifier: BSD-3-Clause */

/* Which export gets which overlay, and how long it lives. */

#ifndef COW_OVERLAYS_H
#define COW_OVERLAYS_H

#include <stdbool.h>
#include <stdint.h>

#include "base.h"
#include "blk.h"
#include "server/viewers.h"
#include "server/views.h"

struct loads;
struct overlays;
struct overlay_entry;
struct save;

enum scope {
  SCOPE_EXPORT,     /* one overlay for each export name, as long as we run */
  SCOPE_CONNECTION, /* one for each connection, gone when it ends */
};

struct overlays_options {
  enum scope scope;
  uint64_t max;         /* overlays at a time */
  uint64_t max_moments; /* that have a name, of each */
  struct overlay_options
    overlay;         /* its dir, cleaner and fate are not looked at */
  struct save *save; /* NULL: they are thrown away */
  struct loads *loads;
  const char *base_id;      /* what the user calls the base; NULL: nothing */
  bool views;               /* whether there are any */
  struct view_options view; /* of the images of views */
};

/* The set of all overlays of a server.  It owns OPTIONS->save and loads from now
 * on, also when this fails.  Checks that overlay files can be made.  NULL if the
 * server is not to start, which was reported.
 */
extern struct overlays *overlays_new (const struct overlays_options *options);
extern void overlays_free (struct overlays *overlays);

/* To be called when the command of --run has been started, which would inherit
 * what this does to the process, and nbdkit has become the user of option -u.
 * -1 if the server is not to go on, which was reported.
 */
extern int overlays_start (const struct overlays *overlays);

/* The overlay for a connection to the export NAME, whose base is BASE.  It stays
 * until overlays_put; what that then keeps depends on the scope and on whether
 * something was written.  Loads what there is for the export.  NULL if the
 * connection is to be refused, which was reported.
 */
extern struct overlay_entry *overlays_get (struct overlays *overlays,
                                           const char *name,
                                           const struct base *base);
extern void overlays_put (struct overlays *overlays,
                          struct overlay_entry *entry);

/* What overlays_get got. */
extern struct overlay *overlay_of (const struct overlay_entry *entry);

/* A view of what overlays_get got, for the connection that is just made.  It stays until
 * overlays_put_view, and OVERLAYS_PUT must come after that.  NULL if the connection is to
 * be refused, which was reported.
 */
extern struct viewer *overlays_get_view (struct overlays *overlays,
                                         struct overlay_entry *entry,
                                         const struct view_name *name);
extern void overlays_put_view (struct overlay_entry *entry,
                               struct viewer *viewer);

/* The name of the plugin's default export; "" is one too.  overlays_default_name
 * returns a copy that the caller frees.  As long as the name is not known that is "",
 * or NULL, which was reported, if there are overlays but none for "": one of them may
 * be the default export's.
 */
extern void overlays_set_default_name (struct overlays *overlays,
                                       const char *name);
extern bool overlays_know_default_name (struct overlays *overlays);
extern char *overlays_default_name (struct overlays *overlays);

/* Add to EXPORTS the names that have an overlay and are not in it, while there is room.
 * -1 if there is no memory, which was reported.
 */
extern int overlays_list (struct overlays *overlays,
                          struct nbdkit_exports *exports);

/* The server ends: freeze all overlays, refuse new connections, and save what is
 * to be saved.  Clients may still be connected, and requests be under way.  To be
 * called once.  -1 if something could not be saved, which was reported.
 */
extern int overlays_save (struct overlays *overlays);

/* Is there an image still to be saved, of a base that nobody ever connected to? */
extern bool overlays_want_base (const struct overlays *overlays);

/* Save it.  -1 if that failed, which was reported. */
extern int overlays_save_base (struct overlays *overlays,
                               const struct base *base);

#endif /* COW_OVERLAYS_H */
