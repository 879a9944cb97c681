/* Which export gets which overlay (see overlays.h).
 *
 * The set has one lock, which is held for the bookkeeping only, never while an
 * overlay is used or thrown away.  An overlay that has a user is not freed; one
 * without is freed at once, unless it was changed and belongs to an export.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <search.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

#include "blk.h"
#include "cleanup.h"
#include "overlays.h"

/* An overlay and those who use it. */
struct overlay_user {
  char *name;              /* of the export; constant */
  struct overlay *overlay; /* constant */
  uint64_t users;          /* connections; guarded by the set's lock */
};

struct overlays {
  enum scope scope; /* constant, and so the next three */
  uint64_t max;
  uint32_t block_size;
  char *dir;
  pthread_mutex_t lock;
  void *by_name; /* tree (tsearch) of those of SCOPE_EXPORT; guarded by lock */
  uint64_t count; /* of all overlays; guarded by lock */
};

struct overlays *
overlays_new (enum scope scope, uint64_t max, uint32_t block_size, char *dir)
{
  struct overlays *s = calloc (1, sizeof *s);

  if (!s)
    return NULL;
  s->scope = scope;
  s->max = max;
  s->block_size = block_size;
  s->dir = dir;
  pthread_mutex_init (&s->lock, NULL);
  return s;
}

static void
free_user (void *pointer)
{
  struct overlay_user *user = pointer;

  if (user) {
    overlay_free (user->overlay);
    free (user->name);
    free (user);
  }
}

void
overlays_free (struct overlays *s)
{
  if (!s)
    return;
  tdestroy (s->by_name, free_user);
  pthread_mutex_destroy (&s->lock);
  free (s->dir);
  free (s);
}

static int
compare_names (const void *a, const void *b)
{
  const struct overlay_user *user_a = a, *user_b = b;

  return strcmp (user_a->name, user_b->name);
}

static struct overlay_user *
new_user (const struct overlays *s, const char *name, uint64_t size)
{
  struct overlay_user *user = calloc (1, sizeof *user);

  if (!user)
    return NULL;
  user->name = strdup (name);
  user->overlay = overlay_new (size, s->block_size, s->dir);
  if (!user->name || !user->overlay) {
    free_user (user);
    errno = ENOMEM;
    return NULL;
  }
  return user;
}

/* Caller holds the lock.  NULL: there is none. */
static struct overlay_user *
find (struct overlays *s, const char *name)
{
  const struct overlay_user key = { .name = (char *) name };
  void *node = tfind (&key, &s->by_name, compare_names);

  return node ? *(struct overlay_user **) node : NULL;
}

/* Add an overlay to the set.  Caller holds the lock. */
static struct overlay_user *
add (struct overlays *s, const char *name, uint64_t size)
{
  struct overlay_user *user;

  if (s->count >= s->max) {
    nbdkit_error ("cow: export \"%s\" refused: there are as many overlays as "
                  "cow-max-overlays=%" PRIu64 " allows; start the server with "
                  "a larger value",
                  name, s->max);
    return NULL;
  }
  user = new_user (s, name, size);
  if (!user
      || (s->scope == SCOPE_EXPORT
          && !tsearch (user, &s->by_name, compare_names))) {
    nbdkit_error ("cow: export \"%s\" refused: out of memory", name);
    free_user (user);
    return NULL;
  }
  s->count++;
  return user;
}

struct overlay_user *
overlays_get (struct overlays *s, const char *name, uint64_t size)
{
  LOCK_FOR_SCOPE (&s->lock);

  struct overlay_user *user = s->scope == SCOPE_EXPORT ? find (s, name) : NULL;

  if (user && overlay_size (user->overlay) != size) {
    nbdkit_error ("cow: export \"%s\" refused: the size of its base has "
                  "changed from %" PRIu64 " to %" PRIu64 " bytes, which the "
                  "changes made so far do not fit; restart the server",
                  name, overlay_size (user->overlay), size);
    return NULL;
  }
  if (!user)
    user = add (s, name, size);
  if (user)
    user->users++;
  return user;
}

void
overlays_put (struct overlays *s, struct overlay_user *user)
{
  pthread_mutex_lock (&s->lock);
  const bool last = --user->users == 0;
  const bool drop
    = last
      && (s->scope == SCOPE_CONNECTION || !overlay_is_changed (user->overlay));
  if (drop) {
    if (s->scope == SCOPE_EXPORT)
      tdelete (user, &s->by_name, compare_names);
    s->count--;
  }
  pthread_mutex_unlock (&s->lock);

  if (drop)
    free_user (user);
}

struct overlay *
overlay_of (const struct overlay_user *user)
{
  return user->overlay;
}
