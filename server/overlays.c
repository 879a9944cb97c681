/* SPDX-License-Identifier: BSD-3-Clause */

/* Which export gets which overlay (see overlays.h).
 *
 * The set has one lock, which is held for the bookkeeping only, never while an
 * overlay is used, loaded, saved or thrown away.  An overlay that has a user is not
 * freed; one without is freed at once, unless it was changed and belongs to an
 * export.
 *
 * The first user of an overlay looks at what the overlay is going to replace, and loads
 * it, under a lock of its own; the others wait for that.  Saving does not wait: what is
 * still being loaded is not saved, as nobody can have written to it.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <search.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

#include "blk.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "common/limits.h"
#include "common/lock.h"
#include "overlay/cleaner.h"
#include "overlay/newfile.h"
#include "server/entry.h"
#include "server/identity.h"
#include "server/loads.h"
#include "server/names.h"
#include "server/overlays.h"
#include "server/save.h"
#include "server/tmpdir.h"

static void
report_directory (const struct save *save, const char *dir)
{
  if (save && save_directory (save))
    nbdkit_error ("cow-save=%s: cannot make a file in %s: %m",
                  save_name (save), dir);
  else
    nbdkit_error ("cow: cannot make a file in %s, the directory for "
                  "overlays: %m; set TMPDIR to one that can be written",
                  dir);
}

/* An overlay keeps its file open and, in a directory, the one that it replaces; a
 * connection its socket, and the base may want files of its own.
 */
static void
warn_of_file_limit (const struct overlays_options *options)
{
  const uint64_t others = 64, limit = limits_open_files ();
  const unsigned each
    = options->save && save_is_per_export (options->save) ? 2 : 1;

  if (limit < others || options->max > (limit - others) / each)
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: the limit on open files, %" PRIu64
                    " (ulimit -Hn), cannot hold cow-max-overlays=%" PRIu64
                    " overlays (open files for each: %u); raise the one or "
                    "lower the other\n",
                    limit, options->max, each);
}

/* The directory for overlay files, which was checked; NULL if there is none, which
 * was reported.
 */
static char *
find_dir (const struct overlays_options *options)
{
  const char *name = options->save ? save_directory (options->save) : NULL;
  char *dir = name ? strdup (name) : tmpdir_find (&name);

  if (!dir)
    report_directory (options->save, name);
  return dir;
}

struct overlays *
overlays_new (const struct overlays_options *options)
{
  struct overlays *s = calloc (1, sizeof *s);

  if (!s) {
    nbdkit_error ("cow: out of memory");
    save_free (options->save);
    loads_free (options->loads);
    return NULL;
  }
  s->options = *options;
  mutex_init (&s->lock, RANK_SET);
  s->options.overlay.cleaner = cleaner_new ();
  s->dir = find_dir (options);
  if (!s->dir || !s->options.overlay.cleaner) {
    if (s->dir)
      nbdkit_error ("cow: out of memory");
    overlays_free (s);
    return NULL;
  }
  s->options.overlay.dir = s->dir;
  s->options.overlay.fate
    = options->save ? save_fate (options->save) : OVERLAY_THROWN_AWAY;
  warn_of_file_limit (options);
  return s;
}

int
overlays_start (const struct overlays *s)
{
  limits_raise_open_files ();
  limits_ignore_file_size_signal ();
  if (s->options.save
      && save_check_again (s->options.save, s->options.loads) == -1)
    return -1;
  if (newfile_check_dir (s->dir) == -1) {
    report_directory (s->options.save, s->dir);
    return -1;
  }
  return 0;
}

static void
free_entry (void *pointer)
{
  struct overlay_entry *entry = pointer;

  if (entry) {
    history_free (entry->history);
    overlay_free (entry->overlay);
    save_forget_target (&entry->target);
    mutex_destroy (&entry->lock);
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
  cleaner_free (s->options.overlay.cleaner);
  mutex_destroy (&s->lock);
  save_free (s->options.save);
  loads_free (s->options.loads);
  free (s->default_name);
  free (s->dir);
  free (s);
}

static int
compare_names (const void *a, const void *b)
{
  const struct overlay_entry *entry_a = a, *entry_b = b;

  return strcmp (entry_a->name, entry_b->name);
}

/* NULL and errno. */
static struct overlay_entry *
new_entry (const struct overlays *s, const char *name, uint64_t size)
{
  struct overlay_entry *entry = calloc (1, sizeof *entry);

  if (!entry)
    return NULL;
  mutex_init (&entry->lock, RANK_ENTRY);
  entry->name = strdup (name);
  if (entry->name)
    entry->overlay = overlay_new (size, &s->options.overlay);
  if (!entry->overlay) {
    const int err = errno;

    free_entry (entry);
    errno = err;
    return NULL;
  }
  return entry;
}

struct overlay_entry *
overlays_find (struct overlays *s, const char *name)
{
  assert_held (&s->lock);

  const struct overlay_entry key = { .name = (char *) name };
  void *node = tfind (&key, &s->by_name, compare_names);

  return node ? *(struct overlay_entry **) node : NULL;
}

static void
report_refusal (const struct overlays *s, const char *name, uint64_t size)
{
  if (errno == EFBIG)
    nbdkit_error ("cow: export \"%s\" refused: a disk of %" PRIu64
                  " bytes is too large for a qcow2 image with blocks of "
                  "cow-block-size=%" PRIu32 "; 64K allow 1 EiB, 2M allow 2 "
                  "EiB",
                  printable (name).text, size, s->options.overlay.block_size);
  else
    nbdkit_error ("cow: export \"%s\" refused: out of memory",
                  printable (name).text);
}

/* May there be an overlay for the export NAME, which has none yet?  Caller holds
 * the lock.  -1 if not, which was reported.
 */
static int
check_new (const struct overlays *s, const char *name)
{
  assert_held (&s->lock);

  const struct save *save = s->options.save;

  if (s->count >= s->options.max) {
    nbdkit_error ("cow: export \"%s\" refused: there are as many overlays as "
                  "cow-max-overlays=%" PRIu64 " allows; start the server with "
                  "a larger value",
                  printable (name).text, s->options.max);
    return -1;
  }
  if (!save)
    return 0;
  if (!save_is_per_export (save) && s->count > 0) {
    nbdkit_error ("cow: export \"%s\" refused: cow-save=%s takes the changes "
                  "of one export, and another one is in use; name a "
                  "directory, as in cow-save=DIR/",
                  printable (name).text, save_name (save));
    return -1;
  }
  return 0;
}

/* Add an overlay to the set.  Caller holds the lock. */
static struct overlay_entry *
add (struct overlays *s, const char *name, uint64_t size)
{
  assert_held (&s->lock);

  struct overlay_entry *entry;

  if (check_new (s, name) == -1)
    return NULL;
  entry = new_entry (s, name, size);
  if (!entry) {
    report_refusal (s, name, size);
    return NULL;
  }
  if (s->options.scope == SCOPE_EXPORT
      && !tsearch (entry, &s->by_name, compare_names)) {
    errno = ENOMEM;
    report_refusal (s, name, size);
    free_entry (entry);
    return NULL;
  }
  s->count++;
  VERBOSE ("made an overlay for export \"%s\", now %" PRIu64, name, s->count);
  return entry;
}

/* Find or make the overlay, and count its user.  NULL if refused, which was
 * reported.
 */
static struct overlay_entry *
find_or_add (struct overlays *s, const char *name, uint64_t size)
{
  HOLD (&s->lock);

  struct overlay_entry *entry
    = s->options.scope == SCOPE_EXPORT ? overlays_find (s, name) : NULL;

  if (s->state != SET_OPEN) {
    nbdkit_debug ("cow: export \"%s\" refused: the server ends", name);
    return NULL;
  }
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

/* Find out what the diff of an overlay is to say of its base. */
static void
learn_base (const struct overlays *s, struct overlay_entry *entry,
            const struct base *base)
{
  int err;

  if (identity_read (&entry->base, base, s->options.base_id, &err) == 0)
    return;
  /* A base of which some bytes cannot be read is served all the same. */
  if (s->options.save)
    nbdkit_error ("cow: warning: export \"%s\": the first bytes of the base "
                  "cannot be read: %s; the diff will have no checksum by "
                  "which it could be told from the diff of another base",
                  printable (entry->name).text, strerror (err));
}

/* See that it can be saved, and load what there is.  Caller holds the entry's lock. */
static enum entry_state
fill_entry (const struct overlays *s, struct overlay_entry *entry,
            const struct base *base)
{
  assert_held (&entry->lock);

  if (s->options.save
      && save_check_export (s->options.save, s->options.loads, entry->name,
                            &entry->target)
           == -1)
    return ENTRY_FAILED;
  /* Now, as a view of the diff is to be opened also while the base does not answer. */
  if (s->options.save || s->options.loads || s->options.views)
    learn_base (s, entry, base);
  if (s->options.loads
      && loads_apply (s->options.loads, entry->name, entry->overlay, base,
                      &entry->base)
           == -1)
    return ENTRY_FAILED;
  return ENTRY_READY;
}

/* The same, if that was not done.  -1 if it failed, which was reported. */
static int
make_ready (const struct overlays *s, struct overlay_entry *entry,
            const struct base *base)
{
  if (entry->state == ENTRY_READY)
    return 0;

  HOLD (&entry->lock);

  if (entry->state == ENTRY_NEW)
    entry->state = fill_entry (s, entry, base);
  return entry->state == ENTRY_READY ? 0 : -1;
}

struct overlay_entry *
overlays_get (struct overlays *s, const char *name, const struct base *base)
{
  struct overlay_entry *entry = find_or_add (s, name, base->size);

  if (!entry)
    return NULL;
  if (make_ready (s, entry, base) == -1) {
    overlays_put (s, entry);
    return NULL;
  }

  HOLD (&s->lock);
  if (s->state == SET_OPEN) {
    s->had_user = true;
    s->base = entry->base;
  }
  return entry;
}

/* Is the overlay worth keeping without a user?  One that has no user is not being
 * loaded.
 */
static bool
is_worth_keeping (const struct overlays *s, const struct overlay_entry *entry)
{
  return s->options.scope == SCOPE_EXPORT && entry->state == ENTRY_READY
         && (overlay_is_changed (entry->overlay) || entry->history);
}

void
overlays_remove (struct overlays *s, struct overlay_entry *entry)
{
  assert_held (&s->lock);

  if (entry->dropped)
    return;
  entry->dropped = true;
  if (s->options.scope == SCOPE_EXPORT)
    tdelete (entry, &s->by_name, compare_names);
  s->count--;
}

void
overlays_put (struct overlays *s, struct overlay_entry *entry)
{
  {
    HOLD (&s->lock);

    if (--entry->users > 0 || (!entry->dropped && is_worth_keeping (s, entry)))
      return;
    overlays_remove (s, entry);
  }
  VERBOSE ("throwing away the overlay for export \"%s\"", entry->name);
  free_entry (entry);
}

struct overlay *
overlay_of (const struct overlay_entry *entry)
{
  return entry->overlay;
}

/*----------------------------------------------------------------------
 * Views
 */

/* What NAME is a view of, as far as that has a name.  Caller holds the entry's lock.  -1 if
 * there is no such moment, which was reported.
 */
static int
find_source (const struct overlay_entry *entry, const struct view_name *name,
             struct view_source *source)
{
  const struct view_end *ends[] = { &name->from, &name->what };
  struct moment *moments[2] = { NULL, NULL };

  for (unsigned i = 0; i < 2; ++i) {
    if (ends[i]->moment != MOMENT_NAMED)
      continue;

    const struct named_moment *named
      = history_find (entry->history, ends[i]->name);

    if (!named) {
      nbdkit_error (
        "cow: export \"%s\" has no moment \"%s\"; make it with the "
        "command \"moment\" of cow-control",
        printable (entry->name).text, ends[i]->name);
      return -1;
    }
    moments[i] = named->moment;
  }
  *source = (struct view_source) {
    .form = name->form,
    .from = moments[0],
    .what = moments[1],
  };
  return 0;
}

/* A view that nobody has yet.  NULL if there is none to be had, which was reported. */
static struct view *
new_view (const struct overlays *s, struct overlay_entry *entry,
          struct view_source *source, bool now)
{
  struct moment *moment = NULL;

  if (now && moments_new (&entry->overlay, 1, &moment) == -1) {
    if (errno == ESHUTDOWN)
      nbdkit_debug ("cow: view refused: the server ends");
    else
      nbdkit_error ("cow: out of memory");
    return NULL;
  }
  if (now)
    source->what = moment;

  struct view *view = view_new (source, &entry->base, &s->options.view);

  moment_let_go (moment); /* the view holds it */
  return view;
}

struct viewer *
overlays_get_view (struct overlays *s, struct overlay_entry *entry,
                   const struct view_name *name)
{
  struct viewer *viewer = viewer_new ();
  struct view_source source;

  if (!viewer) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }

  HOLD (&entry->lock);

  viewer->now = name->what.moment == MOMENT_NOW;
  if (find_source (entry, name, &source) == -1) {
    free (viewer);
    return NULL;
  }
  viewer->view = viewers_find (entry->viewers, viewer, &source);
  if (!viewer->view) {
    viewer->view = new_view (s, entry, &source, viewer->now);
    if (!viewer->view) {
      free (viewer);
      return NULL;
    }
    if (viewer->now)
      VERBOSE ("export \"%s\": frozen for %s", entry->name,
               viewname_description (name));
  }
  viewers_add (&entry->viewers, viewer);
  return viewer;
}

void
overlays_put_view (struct overlay_entry *entry, struct viewer *viewer)
{
  struct view *view;

  {
    HOLD (&entry->lock);
    view = viewers_remove (&entry->viewers, viewer);
  }
  view_free (view);
  free (viewer);
}

void
overlays_set_default_name (struct overlays *s, const char *name)
{
  HOLD (&s->lock);

  if (s->default_name && strcmp (s->default_name, name) == 0)
    return;
  free (s->default_name);
  s->default_name = strdup (name); /* without memory, as if nobody had asked */
}

bool
overlays_know_default_name (struct overlays *s)
{
  HOLD (&s->lock);

  return s->default_name;
}

char *
overlays_default_name (struct overlays *s)
{
  HOLD (&s->lock);

  if (!s->default_name && s->count > 0 && !overlays_find (s, "")) {
    nbdkit_error ("cow: export refused: the name of the default export is not "
                  "known yet; use or list it first, or give its name in front "
                  "of the @");
    return NULL;
  }
  char *name = strdup (s->default_name ? s->default_name : "");
  if (!name)
    nbdkit_error ("cow: out of memory");
  return name;
}

static void
add_name (const void *node, VISIT which, void *list_)
{
  struct name_list *list = list_;

  if (which != postorder && which != leaf)
    return;
  const struct overlay_entry *entry = *(struct overlay_entry *const *) node;
  list->names[list->count] = strdup (entry->name);
  if (list->names[list->count])
    list->count++;
}

struct name_list
overlays_names (struct overlays *s)
{
  struct name_list list = { .count = 0 };

  HOLD (&s->lock);

  list.names = calloc (s->count + 1, sizeof *list.names);
  if (list.names)
    twalk_r (s->by_name, add_name, &list);
  return list;
}

static int
compare_texts (const void *a, const void *b)
{
  return strcmp (*(const char *const *) a, *(const char *const *) b);
}

int
overlays_list (struct overlays *s, struct nbdkit_exports *exports)
{
  struct name_list list = overlays_names (s);
  const size_t nr_known = nbdkit_exports_count (exports);
  CLEANUP_FREE const char **known = calloc (nr_known + 1, sizeof *known);
  int r = 0;

  if (!list.names || !known) {
    nbdkit_error ("cow: out of memory");
    r = -1;
  }
  else {
    for (size_t i = 0; i < nr_known; ++i)
      known[i] = nbdkit_get_export (exports, i).name;
    qsort (known, nr_known, sizeof *known, compare_texts);
  }
  for (size_t i = 0; i < list.count; ++i) {
    const char *name = list.names[i];

    if (r == 0 && nbdkit_exports_count (exports) < MAX_EXPORTS
        && !bsearch (&name, known, nr_known, sizeof *known, compare_texts))
      r = nbdkit_add_export (exports, name, NULL);
    free (list.names[i]);
  }
  free (list.names);
  return r;
}

/*----------------------------------------------------------------------
 * The end
 */

/* A list of all overlays, which count one user more. */
struct entry_list {
  struct overlay_entry **entries;
  uint64_t count;
};

/* Called for each of them (twalk_r, in glibc since 2.30). */
static void
add_to_list (const void *node, VISIT which, void *list_)
{
  struct entry_list *list = list_;

  if (which == postorder || which == leaf) {
    struct overlay_entry *entry = *(struct overlay_entry *const *) node;

    entry->users++;
    list->entries[list->count++] = entry;
  }
}

/* Let nobody in any more, and list who is there.  -1 and ENOMEM. */
static int
close_set (struct overlays *s, struct entry_list *list)
{
  HOLD (&s->lock);

  s->state = SET_CLOSED;
  list->count = 0;
  list->entries = calloc (s->count + 1, sizeof (struct overlay_entry *));
  if (!list->entries)
    return -1;
  twalk_r (s->by_name, add_to_list, list);
  return 0;
}

static struct save_item
item_of (const struct overlay_entry *entry)
{
  return (struct save_item) {
    .name = entry->name,
    .overlay = entry->overlay,
    .base = &entry->base,
    .seen = &entry->target.seen,
  };
}

/* Freeze all of them, as of one moment, and tell in ITEMS what is to be saved.  (One that
 * is being loaded will fail to be, and its client be refused.)  Returns how many.
 */
static size_t
close_entries (const struct entry_list *list, struct save_item *items)
{
  size_t count = 0;

  for (uint64_t i = 0; i < list->count; ++i) {
    overlay_close (list->entries[i]->overlay);
    if (list->entries[i]->state == ENTRY_READY)
      items[count++] = item_of (list->entries[i]);
  }
  return count;
}

int
overlays_save (struct overlays *s)
{
  struct save *save = s->options.save;
  struct entry_list list;
  CLEANUP_FREE struct save_item *items = NULL;
  int r = 0;

  if (!save)
    return 0;
  if (close_set (s, &list) == 0)
    items = calloc (list.count + 1, sizeof *items);
  if (!items) {
    nbdkit_error ("cow-save=%s: cannot save: out of memory", save_name (save));
    free (list.entries);
    return -1;
  }

  const size_t count = close_entries (&list, items);
  free (list.entries);
  if (count > 0)
    r = save_items (save, s->options.loads, items, count);
  else if (s->had_user && !save_is_per_export (save))
    /* Those who were there have left nothing behind. */
    r = save_empty (save, s->options.loads, &s->base, &s->options.overlay);
  if (count > 0 || s->had_user) {
    HOLD (&s->lock); /* commands may still look at it */
    s->state = SET_SAVED;
  }
  return r;
}

bool
overlays_want_base (const struct overlays *s)
{
  return s->options.save && s->state != SET_SAVED && !s->had_user
         && !save_is_per_export (s->options.save)
         && !(s->options.loads
              && save_is_what_is_loaded (s->options.save, s->options.loads));
}

int
overlays_save_base (struct overlays *s, const struct base *base)
{
  struct overlay_entry *entry = new_entry (s, "", base->size);
  int r = -1;

  if (!entry) {
    nbdkit_error ("cow-save=%s: cannot make an image of a disk of %" PRIu64
                  " bytes: %m",
                  save_name (s->options.save), base->size);
    return -1;
  }
  if (make_ready (s, entry, base) == 0) {
    const struct save_item item = item_of (entry);

    overlay_close (entry->overlay);
    r = save_items (s->options.save, s->options.loads, &item, 1);
  }
  free_entry (entry);
  return r;
}
