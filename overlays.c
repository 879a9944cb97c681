/* SPDX-License-Identifier: BSD-3-Clause */

/* Which export gets which overlay (see overlays.h).
 *
 * The set has one lock, which is held for the bookkeeping only, never while an
 * overlay is used or thrown away.  An overlay that has a user is not freed; one
 * without is freed at once, unless it was changed and belongs to an export.
 */

#include <config.h>

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

#include "blk.h"
#include "cleanup.h"
#include "debug.h"
#include "overlays.h"
#include "store.h"

/* An overlay and those who use it. */
struct overlay_entry {
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

static void
report_directory (const char *dir)
{
  nbdkit_error ("cow: cannot make a file in %s, the directory for overlays: "
                "%m; set TMPDIR to one that can be written",
                dir);
}

/* An overlay keeps its file open, a connection its socket, and the base may want
 * files of its own.
 */
static void
warn_of_file_limit (uint64_t max_overlays)
{
  const uint64_t others = 64, limit = store_file_limit ();

  if (max_overlays > limit || limit - max_overlays < others)
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: the limit on open files, %" PRIu64
                    " (ulimit -Hn), cannot hold cow-max-overlays=%" PRIu64
                    " overlays: raise the one or lower the other\n",
                    limit, max_overlays);
}

struct overlays *
overlays_new (enum scope scope, uint64_t max, uint32_t block_size)
{
  const char *name;
  CLEANUP_FREE char *dir = store_find_dir (&name);
  struct overlays *s;

  if (!dir) {
    report_directory (name);
    return NULL;
  }
  s = calloc (1, sizeof *s);
  if (!s) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  s->scope = scope;
  s->max = max;
  s->block_size = block_size;
  s->dir = dir;
  dir = NULL;
  pthread_mutex_init (&s->lock, NULL);
  warn_of_file_limit (max);
  return s;
}

int
overlays_start (const struct overlays *s)
{
  store_raise_file_limit ();
  store_ignore_file_size_signal ();
  if (store_check_dir (s->dir) == -1) {
    report_directory (s->dir);
    return -1;
  }
  return 0;
}

static void
free_entry (void *pointer)
{
  struct overlay_entry *entry = pointer;

  if (entry) {
    overlay_free (entry->overlay);
    free (entry->name);
    free (entry);
  }
}

void
overlays_free (struct overlays *s)
{
  if (!s)
    return;
  tdestroy (s->by_name, free_entry);
  pthread_mutex_destroy (&s->lock);
  free (s->dir);
  free (s);
}

static int
compare_names (const void *a, const void *b)
{
  const struct overlay_entry *entry_a = a, *entry_b = b;

  return strcmp (entry_a->name, entry_b->name);
}

static struct overlay_entry *
new_entry (const struct overlays *s, const char *name, uint64_t size)
{
  struct overlay_entry *entry = calloc (1, sizeof *entry);

  if (!entry)
    return NULL;
  entry->name = strdup (name);
  entry->overlay = overlay_new (size, s->block_size, s->dir);
  if (!entry->name || !entry->overlay) {
    free_entry (entry);
    errno = ENOMEM;
    return NULL;
  }
  return entry;
}

/* A client's name for an export as it may stand in a log: in one line. */
struct printable {
  char text[128];
};

static struct printable
printable (const char *name)
{
  struct printable p;
  size_t i;

  for (i = 0; name[i] && i < sizeof p.text - 1; ++i) {
    const char c = name[i];

    p.text[i] = (char) (iscntrl ((unsigned char) c) ? '?' : c);
  }
  p.text[i] = '\0';
  return p;
}

/* Caller holds the lock.  NULL: there is none. */
static struct overlay_entry *
find (struct overlays *s, const char *name)
{
  const struct overlay_entry key = { .name = (char *) name };
  void *node = tfind (&key, &s->by_name, compare_names);

  return node ? *(struct overlay_entry **) node : NULL;
}

/* Add an overlay to the set.  Caller holds the lock. */
static struct overlay_entry *
add (struct overlays *s, const char *name, uint64_t size)
{
  struct overlay_entry *entry;

  if (s->count >= s->max) {
    nbdkit_error ("cow: export \"%s\" refused: there are as many overlays as "
                  "cow-max-overlays=%" PRIu64 " allows; start the server with "
                  "a larger value",
                  printable (name).text, s->max);
    return NULL;
  }
  entry = new_entry (s, name, size);
  if (!entry
      || (s->scope == SCOPE_EXPORT
          && !tsearch (entry, &s->by_name, compare_names))) {
    nbdkit_error ("cow: export \"%s\" refused: out of memory",
                  printable (name).text);
    free_entry (entry);
    return NULL;
  }
  s->count++;
  VERBOSE ("made an overlay for export \"%s\", now %" PRIu64, name, s->count);
  return entry;
}

struct overlay_entry *
overlays_get (struct overlays *s, const char *name, uint64_t size)
{
  LOCK_FOR_SCOPE (&s->lock);

  struct overlay_entry *entry
    = s->scope == SCOPE_EXPORT ? find (s, name) : NULL;

  if (entry && overlay_size (entry->overlay) != size) {
    nbdkit_error ("cow: export \"%s\" refused: the size of its base has "
                  "changed from %" PRIu64 " to %" PRIu64 " bytes, which the "
                  "changes made so far do not fit; restart the server",
                  printable (name).text, overlay_size (entry->overlay), size);
    return NULL;
  }
  if (!entry)
    entry = add (s, name, size);
  if (entry)
    entry->users++;
  return entry;
}

void
overlays_put (struct overlays *s, struct overlay_entry *entry)
{
  {
    LOCK_FOR_SCOPE (&s->lock);

    if (--entry->users > 0
        || (s->scope == SCOPE_EXPORT && overlay_is_changed (entry->overlay)))
      return;
    if (s->scope == SCOPE_EXPORT)
      tdelete (entry, &s->by_name, compare_names);
    s->count--;
  }
  VERBOSE ("throwing away the overlay for export \"%s\"", entry->name);
  free_entry (entry);
}

struct overlay *
overlay_of (const struct overlay_entry *entry)
{
  return entry->overlay;
}
