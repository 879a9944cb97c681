/* SPDX-License-Identifier: BSD-3-Clause */

/* Connections and their views (see viewers.h). */

#include <config.h>

#include <stdbool.h>
#include <stdlib.h>

#include "common/clock.h"
#include "server/viewers.h"

/* So long after a connection is ready, its program may make one that belongs to it. */
#define TOGETHER INT64_C (1000000000)

struct viewer *
viewer_new (void)
{
  struct viewer *v = malloc (sizeof *v);

  if (!v)
    return NULL;
  *v = (struct viewer) { .peer = peer_of_connection () };
  atomic_init (&v->has_read, false);
  atomic_init (&v->ready, clock_now ());
  return v;
}

void
viewer_is_ready (struct viewer *v)
{
  atomic_store (&v->ready, clock_now ());
}

/* Have both the same view, through the same program? */
static bool
are_of_one (const struct viewer *v, const struct viewer *other)
{
  return v->view == other->view && peer_is_same (&v->peer, &other->peer);
}

/* Has the program read anything through the view, with any connection in the list? */
static bool
program_has_read (const struct viewer *list, const struct viewer *v)
{
  for (; list; list = list->next)
    if (are_of_one (list, v) && atomic_load (&list->has_read))
      return true;
  return false;
}

/* Did the same program make both, one soon after the other? */
static bool
belong_together (const struct viewer *list, const struct viewer *v,
                 const struct viewer *new)
{
  return peer_is_same (&v->peer, &new->peer)
         && clock_now () - atomic_load (&v->ready) < TOGETHER
         && !program_has_read (list, v);
}

/* Was nothing changed since? */
static bool
is_current (const struct view_source *source)
{
  return !overlay_is_changed_since (moment_overlay (source->what),
                                    moment_frozen (source->what));
}

struct view *
viewers_find (struct viewer *list, const struct viewer *new,
              const struct view_source *source)
{
  struct view *current = NULL;

  for (struct viewer *v = list; v; v = v->next) {
    const struct view_source *theirs = view_source (v->view);

    if (theirs->form != source->form || theirs->from != source->from)
      continue;
    if (!new->now) {
      if (theirs->what == source->what)
        return v->view;
    }
    else if (theirs->what) {
      /* What the program has already comes first: another one's view may be newer. */
      if (v->now && belong_together (list, v, new))
        return v->view;
      if (!current && is_current (theirs))
        current = v->view;
    }
  }
  return current;
}

void
viewers_add (struct viewer **list, struct viewer *viewer)
{
  viewer->next = *list;
  *list = viewer;
}

struct view *
viewers_remove (struct viewer **list, struct viewer *viewer)
{
  struct viewer **link = list;

  while (*link != viewer)
    link = &(*link)->next;
  *link = viewer->next;
  /* What was read stays so when the connection has gone. */
  for (struct viewer *v = *list; v && atomic_load (&viewer->has_read);
       v = v->next)
    if (are_of_one (v, viewer))
      atomic_store (&v->has_read, true);
  for (const struct viewer *v = *list; v; v = v->next)
    if (v->view == viewer->view)
      return NULL;
  return viewer->view;
}
