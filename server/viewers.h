/* SPDX-License-Identifier: BSD-3-Clause */

/* Which connection gets which view of an overlay.
 *
 * One that wants the disk as it is now gets all that was acknowledged before it connected:
 * a view of its own, or one that is the same as a new one, as nothing was changed since.
 * But a program that opens several connections before it reads gets the same view with all
 * of them.
 */

#ifndef COW_VIEWERS_H
#define COW_VIEWERS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "server/peer.h"
#include "server/views.h"

/* A connection that has a view. */
struct viewer {
  struct viewer *next;
  struct view *view; /* constant, as are the next two */
  bool now;          /* not of a named moment */
  struct peer peer;
  atomic_bool has_read;  /* or has asked for extents */
  _Atomic int64_t ready; /* when the client could go on: clock_now */
};

/* One for the connection on behalf of which this is called, without a view.  NULL and
 * ENOMEM.  The caller frees it.
 */
extern struct viewer *viewer_new (void);

/* To be called when the size of the view was found. */
extern void viewer_is_ready (struct viewer *viewer);

/* To be called before anything is read. */
static inline void
viewer_reads (struct viewer *viewer)
{
  if (!atomic_load_explicit (&viewer->has_read, memory_order_relaxed))
    atomic_store (&viewer->has_read, true);
}

/* A list of all viewers of an overlay.  Whoever has it locks it. */

/* A view in the list that NEW can share, who wants to see SOURCE, else NULL.  If NEW->now,
 * SOURCE->what is not known: any moment will do that is as good as now.
 */
extern struct view *viewers_find (struct viewer *list,
                                  const struct viewer *new,
                                  const struct view_source *source);
extern void viewers_add (struct viewer **list, struct viewer *viewer);

/* Returns the view that nobody has any more, else NULL. */
extern struct view *viewers_remove (struct viewer **list,
                                    struct viewer *viewer);

#endif /* COW_VIEWERS_H */
