/* SPDX-License-Identifier: BSD-3-Clause */

/* Saving overlays (see save.h): which of them, and where each goes.
 *
 * Nothing here asks the base for anything, and nothing waits for a client.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "server/names.h"
#include "overlay/giveback.h"
#include "overlay/newfile.h"
#include "server/publish.h"
#include "server/backing.h"
#include "server/save.h"
#include "server/target.h"
#include "server/tmpdir.h"

struct save {
  struct target *target;
  struct save_options options;
  char *temporary; /* a directory for what cannot be kept elsewhere, or NULL */
  struct target_seen
    seen; /* the one file, before anything was loaded from it */
  struct giveback_budget giveback; /* changed by the one who saves */
};

bool
save_names_backing (const struct save_options *o)
{
  return o->backing && strcmp (o->backing, "none") != 0;
}

int
save_check_options (const struct save_options *o)
{
  if (o->backing
      && (*o->backing == '\0'
          || strlen (o->backing) > QCOW2_MAX_BACKING_NAME)) {
    nbdkit_error ("cow-save-backing=%s: must be a name of 1 to %d bytes, or "
                  "none",
                  o->backing, QCOW2_MAX_BACKING_NAME);
    return -1;
  }
  if (o->backing_format && !save_names_backing (o)) {
    nbdkit_error ("cow-save-backing-format=%s: there is no backing file whose "
                  "format this could be; name one with cow-save-backing",
                  o->backing_format);
    return -1;
  }
  if (o->backing_format
      && (*o->backing_format == '\0' || strlen (o->backing_format) > 15)) {
    nbdkit_error ("cow-save-backing-format=%s: must be a name of 1 to 15 "
                  "bytes, for example raw or qcow2",
                  o->backing_format);
    return -1;
  }
  return 0;
}

/* The diff in the file PATH must not be its own backing file.  -1 if it is, which was
 * reported.
 */
static int
refuse_itself (const struct save *s, const char *path)
{
  const struct save_options *o = &s->options;

  if (!save_names_backing (o)
      || !backing_is (o->backing, s->target->directory, path))
    return 0;
  nbdkit_error ("cow-save-backing=%s: that is the diff itself, %s; name the "
                "file that is to be below it",
                o->backing, path);
  return -1;
}

static int
check_backing (const struct save *s)
{
  const struct save_options *o = &s->options;

  if (!save_names_backing (o))
    return 0;
  if (s->target->kind == TARGET_FILE
      && refuse_itself (s, s->target->path) == -1)
    return -1;
  return backing_check (o->backing, o->backing_format, s->target->directory);
}

struct save *
save_new (const struct save_options *options, const struct loads *loads,
          const struct parameter *others, size_t nr_others)
{
  struct save *s;
  const char *name;

  s = calloc (1, sizeof *s);
  if (!s) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  s->options = *options;
  s->target = target_new (options->target, loads, others, nr_others);
  if (!s->target || check_backing (s) == -1) {
    save_free (s);
    return NULL;
  }
  if (s->target->kind == TARGET_FILE)
    s->seen = target_look (s->target->path);
  s->temporary = tmpdir_find (&name);
  s->giveback = GIVEBACK_BUDGET;
  return s;
}

void
save_free (struct save *s)
{
  if (!s)
    return;
  target_free (s->target);
  free (s->temporary);
  free (s);
}

const char *
save_name (const struct save *s)
{
  return s->target->name;
}

enum overlay_fate
save_fate (const struct save *s)
{
  return s->target->kind == TARGET_STREAM || s->options.compact
           ? OVERLAY_SAVED
           : OVERLAY_SAVED_IN_PLACE;
}

const char *
save_directory (const struct save *s)
{
  return save_fate (s) == OVERLAY_SAVED_IN_PLACE ? s->target->directory : NULL;
}

bool
save_is_per_export (const struct save *s)
{
  return s->target->kind == TARGET_DIRECTORY;
}

bool
save_is_what_is_loaded (const struct save *s, const struct loads *loads)
{
  return s->target->kind == TARGET_FILE
         && loads_has_only (loads, s->target->path);
}

int
save_check_again (const struct save *s, const struct loads *loads)
{
  const struct target *t = s->target;
  CLEANUP_FREE char *why = NULL;
  enum newfile_target what;
  mode_t mode;

  if (t->directory && newfile_check_dir (t->directory) == -1) {
    nbdkit_error ("cow-save=%s: cannot make a file in %s: %m", t->name,
                  t->directory);
    return -1;
  }
  if (t->kind == TARGET_FILE
      && target_check_file (t, loads, t->path, &what, &mode, &why) == -1) {
    nbdkit_error ("cow-save=%s: %s", t->name, why ? why : "out of memory");
    return -1;
  }
  return 0;
}

/*----------------------------------------------------------------------
 * Where an export goes
 */

/* The file for an export, in memory that the caller frees; NULL and errno. */
static char *
path_of_export (const struct save *s, const char *export_name)
{
  if (s->target->kind == TARGET_FILE)
    return strdup (s->target->path);

  CLEANUP_FREE char *file = names_of_export (export_name);
  return file ? names_join (s->target->directory, file) : NULL;
}

int
save_check_export (const struct save *s, const struct loads *loads,
                   const char *export_name, struct save_target *found)
{
  CLEANUP_FREE char *path = NULL;
  CLEANUP_FREE char *why = NULL;
  enum newfile_target what;
  mode_t mode;

  *found = (struct save_target) { .seen = s->seen };
  if (s->target->kind != TARGET_DIRECTORY)
    return 0;
  path = path_of_export (s, export_name);
  if (!path) {
    nbdkit_error ("cow-save=%s: export refused: no name for its file: %m",
                  s->target->name);
    return -1;
  }
  if (refuse_itself (s, path) == -1)
    return -1;
  found->seen = target_look (path);
  if (target_lock_file (path, &found->lock, &why) == -1
      || target_check_file (s->target, loads, path, &what, &mode, &why)
           == -1) {
    nbdkit_error ("cow-save=%s: export refused: %s", s->target->name,
                  why ? why : "out of memory");
    save_forget_target (found);
    return -1;
  }
  return 0;
}

void
save_forget_target (struct save_target *found)
{
  locks_give_back (found->lock, IMAGE_WRITE);
  found->lock = NULL;
}

/*----------------------------------------------------------------------
 * The end
 */

static int
save_one (struct save *s, const struct loads *loads,
          const struct save_item *item)
{
  CLEANUP_FREE char *path = NULL;
  const struct publish_order order = {
    .target = s->target,
    .loads = loads,
    .options = &s->options,
    .temporary = s->temporary,
    .giveback = &s->giveback,
    .item = item,
  };

  /* From then on nobody else uses the file. */
  overlay_cut_views (item->overlay);
  if (s->target->kind != TARGET_STREAM)
    path = path_of_export (s, item->name);
  return publish (&order, path);
}

int
save_items (struct save *s, const struct loads *loads,
            const struct save_item *items, size_t count)
{
  int r = 0;

  for (size_t i = 0; i < count; ++i)
    if ((!save_is_per_export (s) || overlay_is_changed (items[i].overlay))
        && save_one (s, loads, &items[i]) == -1)
      r = -1;
  return r;
}

int
save_empty (struct save *s, const struct loads *loads,
            const struct qcow2_base *base,
            const struct overlay_options *options)
{
  struct overlay *overlay = overlay_new (base->size, options);
  const struct save_item item = {
    .name = "",
    .overlay = overlay,
    .base = base,
    .seen = &s->seen,
  };
  int r;

  if (!overlay) {
    nbdkit_error ("cow-save=%s: cannot make an empty image: %m",
                  s->target->name);
    return -1;
  }
  overlay_close (overlay);
  r = save_one (s, loads, &item);
  overlay_free (overlay);
  return r;
}
