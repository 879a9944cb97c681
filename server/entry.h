/* SPDX-License-Identifier: BSD-3-Clause */

/* What the set of overlays is made of: for overlays.c and moments.c.  All others use
 * overlays.h and moments.h.
 */

#ifndef COW_ENTRY_H
#define COW_ENTRY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/lock.h"
#include "format/qcow2.h"
#include "server/history.h"
#include "server/overlays.h"
#include "server/save.h"
#include "server/viewers.h"

/* An overlay and those who use it. */
struct overlay_entry {
  char *name;              /* of the export; constant */
  struct overlay *overlay; /* constant */
  uint64_t users;          /* connections, and commands; guarded by the set's
                            * lock, as is the next one */
  bool dropped;            /* it is in the set no more */
  struct save_target
    target;               /* what it replaces; constant when READY, as is... */
  struct qcow2_base base; /* if that is wanted */
  struct mutex
    lock; /* held while it is made ready; guards what follows, and once it
                      * is READY is held for no longer than that takes */
  struct viewer *viewers; /* list */
  struct named_moment *history;
  _Atomic enum entry_state {
    ENTRY_NEW,
    ENTRY_READY,  /* can be saved, and is loaded, if there was something */
    ENTRY_FAILED, /* what is in it is of no use */
  } state;        /* changes once, under lock */
};

struct overlays {
  struct overlays_options options; /* constant */
  char *dir;                       /* constant: of the overlay files */
  struct mutex lock;               /* guards what follows */
  void *by_name;  /* tree (tsearch) of those of SCOPE_EXPORT */
  uint64_t count; /* of all overlays */
  enum {
    SET_OPEN,
    SET_CLOSED, /* to new users: the server ends */
    SET_SAVED,  /* or kept elsewhere, or lost: all that there was */
  } state;
  bool had_user; /* before it was closed, somebody got an overlay, loaded; */
  struct qcow2_base base; /* that was its base */
  char *default_name; /* of the plugin's default export; NULL: nobody asked */
};

/* The overlay of an export.  Caller holds the set's lock.  NULL: there is none. */
extern struct overlay_entry *overlays_find (struct overlays *overlays,
                                            const char *name);

/* Take an overlay out of the set: who connects to the export from now on gets another one.
 * It is thrown away when its last user puts it.  Caller holds the set's lock.
 */
extern void overlays_remove (struct overlays *overlays,
                             struct overlay_entry *entry);

/* A copy of the names that have an overlay: no lock of the set is held while nbdkit is
 * called.  The caller frees all of it.
 */
struct name_list {
  char **names; /* NULL: there was no memory */
  size_t count;
};
extern struct name_list overlays_names (struct overlays *overlays);

#endif /* COW_ENTRY_H */
