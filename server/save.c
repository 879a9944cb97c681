/* SPDX-License-Identifier: BSD-3-Clause */

/* Saving overlays (see save.h).
 *
 * In place: the overlay's file is made in the directory of the target.  Its tables
 * are written, and it gets the target's name; no data is copied.  A stream, and
 * cow-save-compact, copy the image in the order of the disk.
 *
 * What cannot be saved where it should be is kept elsewhere as a complete image:
 * in the overlay's own file, under another name in its directory; if that fails
 * too, as a copy in the directory for temporary files; and if there is no room for
 * one, in the overlay's own file all the same, though it could not be synced.
 *
 * Nothing here asks the base for anything, and nothing waits for a client.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "common/debug.h"
#include "images/finish.h"
#include "images/image.h"
#include "server/names.h"
#include "overlay/newfile.h"
#include "server/backing.h"
#include "server/save.h"
#include "overlay/store.h"
#include "overlay/tables.h"
#include "server/target.h"
#include "server/tmpdir.h"

#define COPY_BYTES (1u << 20)

struct save {
  struct target *target;
  struct save_options options;
  char *temporary; /* a directory for what cannot be kept elsewhere, or NULL */
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
  s->temporary = tmpdir_find (&name);
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
                   const char *export_name, struct file_lock **lock)
{
  CLEANUP_FREE char *path = NULL;
  CLEANUP_FREE char *why = NULL;
  enum newfile_target what;
  mode_t mode;

  *lock = NULL;
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
  if (target_lock_file (path, lock, &why) == -1
      || target_check_file (s->target, loads, path, &what, &mode, &why)
           == -1) {
    nbdkit_error ("cow-save=%s: export refused: %s", s->target->name,
                  why ? why : "out of memory");
    locks_give_back (*lock, IMAGE_WRITE);
    return -1;
  }
  return 0;
}

/*----------------------------------------------------------------------
 * Writing
 */

/* An overlay on its way out. */
struct job {
  struct save *s;
  const struct loads *loads;
  const char *export_name;
  struct overlay *overlay;
  struct image_source source;
  char *backing;                /* of source, where we have made it up; */
  struct qcow2_header replaced; /* or where it is that of what is there */
  bool finished;                /* its file is an image */
  bool published;               /* an image has the name that it is to have */
  bool damaged; /* perhaps: its disk did not take all of its file */
  char
    *failure; /* what went wrong first, or NULL: there is no memory to say */
};

/* Note what went wrong, with errno.  Returns -1. */
static int __attribute__ ((format (printf, 2, 3)))
job_failed (struct job *j, const char *format, ...)
{
  CLEANUP_FREE char *what = NULL;
  const char *error = errno ? strerror (errno) : NULL;
  va_list args;

  va_start (args, format);
  if (vasprintf (&what, format, args) == -1)
    what = NULL;
  va_end (args);

  free (j->failure);
  if (!what
      || asprintf (&j->failure, "%s%s%s", what, error ? ": " : "",
                   error ? error : "")
           == -1)
    j->failure = NULL;
  return -1;
}

/* For image_read: nobody else uses the file any more. */
static int
read_file (void *store, void *buf, uint64_t count, uint64_t offset)
{
  return store_read (store, buf, count, offset);
}

/* Write all of BUF to a descriptor that may be a pipe, and may not block. */
static int
write_all (int fd, const char *buf, size_t count)
{
  while (count > 0) {
    const ssize_t r = write (fd, buf, count);

    if (r == -1 && errno == EAGAIN) {
      struct pollfd p = { .fd = fd, .events = POLLOUT };

      poll (&p, 1, -1);
      continue;
    }
    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    buf += r;
    count -= (size_t) r;
  }
  return 0;
}

/* R is what a check of the overlay's file has said: what the kernel could not write to
 * the disk, it has forgotten or will forget.
 */
static int
check_written (struct job *j, int r)
{
  if (r == 0)
    return 0;
  j->damaged = true;
  return job_failed (j, "the disk of %s did not take all of the overlay",
                     j->source.store->dir);
}

/* Write the image in the order of the disk, from its start to its end. */
static int
copy_out (struct job *j, int fd, const char *where)
{
  CLEANUP_FREE char *buf = malloc (COPY_BYTES);
  struct image *image = buf ? image_plan (&j->source) : NULL;
  const struct image_reader reader
    = { .read_file = read_file, .opaque = j->source.store };
  int r = 0;

  if (!image)
    return job_failed (j, "cannot make an image");

  for (uint64_t at = 0; at < image_size (image) && r == 0;) {
    const size_t n = MIN (COPY_BYTES, image_size (image) - at);

    if (image_read (image, &reader, buf, n, at) == -1)
      r = job_failed (j, "cannot read the overlay");
    else if (write_all (fd, buf, n) == -1)
      r = job_failed (j, "cannot write to %s", where);
    at += n;
  }
  image_free (image);
  return r;
}

/* Make the overlay's own file into an image. */
static int
finish_in_place (struct job *j)
{
  if (j->finished)
    return 0;
  if (image_finish (&j->source, overlay_tables (j->overlay)) == -1)
    return job_failed (j, "cannot write the tables of the image in %s",
                       j->source.store->dir);
  j->finished = true;
  return 0;
}

static int
save_to_stream (struct job *j)
{
  struct target *t = j->s->target;
  int r;

  errno = 0;
  if (target_open_stream (t) == -1) {
    if (errno == ENXIO) {
      errno = 0;
      return job_failed (j, "nobody reads the FIFO");
    }
    return job_failed (j, "cannot open it");
  }
  /* Rather no stream than one that may be damaged. */
  r = check_written (j, store_check_written (j->source.store));
  if (r == 0)
    r = copy_out (j, t->fd, "it");
  if (r == 0)
    r = check_written (j, store_check_written (j->source.store));

  /* Pipes have no sync. */
  if (r == 0 && fsync (t->fd) == -1 && errno != EINVAL && errno != EROFS
      && errno != ENOTSUP)
    r = job_failed (j, "cannot sync it");
  close (t->fd);
  t->fd = -1;
  return r;
}

/* Give FILE, which is an image, its name. */
static int
publish (struct job *j, struct newfile *file, const char *path)
{
  static const char *const steps[] = {
    [NEWFILE_SYNC] = "cannot sync it",
    [NEWFILE_NAME] = "cannot give it its name",
    [NEWFILE_SYNC_DIRECTORY] = "cannot sync its directory",
  };
  CLEANUP_FREE char *why = NULL;
  enum newfile_target what;
  enum newfile_step step;
  mode_t mode;

  if (target_check_file (j->s->target, j->loads, path, &what, &mode, &why)
      == -1) {
    errno = 0;
    return job_failed (j, "%s", why ? why : "out of memory");
  }
  if (newfile_publish (file, path, what, mode, &step) == 0)
    return 0;
  j->published = file->published;
  j->damaged |= file == &j->source.store->file && step == NEWFILE_SYNC;
  return job_failed (j, "%s: %s", path, steps[step]);
}

static int
save_to_file (struct job *j, const char *path)
{
  struct newfile copy;
  int r;

  if (!j->s->options.compact) {
    /* No more than this: an error that is asked for, the sync would not see. */
    if (finish_in_place (j) == -1
        || check_written (j, store_check_early (j->source.store)) == -1)
      return -1;
    return publish (j, &j->source.store->file, path);
  }

  if (newfile_make (&copy, j->s->target->directory, NEWFILE_TO_PUBLISH) == -1)
    return job_failed (j, "cannot make a file in %s", j->s->target->directory);
  r = copy_out (j, copy.fd, j->s->target->directory);
  if (r == 0)
    r = check_written (j, store_check_written (j->source.store));
  if (r == 0)
    r = publish (j, &copy, path);
  newfile_discard (&copy);
  return r;
}

/*----------------------------------------------------------------------
 * When that failed
 */

/* Publish FILE in DIR under a name that nothing has, which is returned; NULL and
 * errno.
 */
static char *
keep_file (const struct job *j, struct newfile *file, const char *dir,
           bool synced)
{
  CLEANUP_FREE char *name = names_of_export (j->export_name);

  for (unsigned i = 0; i < 100; ++i) {
    enum newfile_step step;
    char *path;
    int r;

    if (asprintf (&path, "%s/cow-kept-%u-%u-%.200s", dir, (unsigned) getpid (),
                  i, name ? name : "export.qcow2")
        == -1)
      return NULL;
    r = synced ? newfile_publish (file, path, NEWFILE_IS_NEW, 0600, &step)
               : newfile_name_unsynced (file, path);
    if (r == 0 || file->published)
      return path;
    free (path);
    if (errno != EEXIST)
      return NULL;
  }
  return NULL;
}

/* Keep the overlay's own file.  Once a sync of it has failed, a copy of what the kernel
 * still has is safer.
 */
static char *
keep_in_place (struct job *j)
{
  struct store *store = j->source.store;

  if (j->damaged || finish_in_place (j) == -1)
    return NULL;
  return keep_file (j, &store->file, store->dir, true);
}

/* Keep a copy in the directory for temporary files. */
static char *
keep_copy (struct job *j)
{
  struct newfile copy;
  char *path = NULL;

  if (!j->s->temporary
      || newfile_make (&copy, j->s->temporary, NEWFILE_TO_PUBLISH) == -1)
    return NULL;
  if (copy_out (j, copy.fd, j->s->temporary) == 0)
    path = keep_file (j, &copy, j->s->temporary, true);
  newfile_discard (&copy);
  return path;
}

/* Keep the overlay's own file after all. */
static char *
keep_unsynced (struct job *j)
{
  struct store *store = j->source.store;

  return finish_in_place (j) == -1
           ? NULL
           : keep_file (j, &store->file, store->dir, false);
}

static void
keep (struct job *j)
{
  const char *name = j->s->target->name;
  CLEANUP_FREE char *first = j->failure;
  CLEANUP_FREE char *kept = NULL;
  const char *failure = first ? first : "out of memory";

  j->failure = NULL;
  if (j->published) {
    nbdkit_error ("cow-save=%s: %s; the diff is complete, but may not outlive "
                  "a crash of this machine",
                  name, failure);
    return;
  }
  j->damaged |= store_sync (j->source.store) == -1;
  kept = keep_in_place (j);
  if (!kept)
    kept = keep_copy (j);
  if (!kept) {
    kept = keep_unsynced (j);
    j->damaged = true;
  }
  if (kept)
    nbdkit_error ("cow-save=%s: %s; the changes were kept, as a complete "
                  "diff, %sin %s",
                  name, failure,
                  j->damaged ? "perhaps damaged as its disk did not take all "
                               "of it, "
                             : "",
                  kept);
  else
    nbdkit_error ("cow-save=%s: %s; the changes could not be kept elsewhere: "
                  "%s",
                  name, failure,
                  j->failure ? j->failure : "no directory takes them");
}

/* Which backing file the image is to have.  One that takes the place of what its overlay
 * has started from keeps that one's, or has none as that, unless the user has named
 * another.  -1 and errno.
 */
static int
set_backing (struct job *j, const char *path)
{
  struct image_source *source = &j->source;
  struct qcow2_header *h = &j->replaced;
  bool is_image;

  if (j->s->options.backing || !path || !loads_has_first (j->loads, path)
      || target_read_header (path, h, &is_image) == -1 || !is_image)
    return image_set_backing (source, j->s->options.backing,
                              j->s->options.backing_format, &j->backing);
  source->backing_file = h->backing_file[0] ? h->backing_file : NULL;
  source->backing_format = h->backing_format[0] ? h->backing_format : NULL;
  return 0;
}

int
save_overlay (struct save *s, const struct loads *loads,
              const char *export_name, struct overlay *overlay,
              const struct qcow2_base *base)
{
  struct job j = {
    .s = s,
    .loads = loads,
    .export_name = export_name,
    .overlay = overlay,
    .source = { .map = overlay_map (overlay),
                .store = overlay_store (overlay),
                .geometry = overlay_tables (overlay)->geometry,
                .base = base },
  };
  const bool is_stream = s->target->kind == TARGET_STREAM;
  CLEANUP_FREE char *path = is_stream ? NULL : path_of_export (s, export_name);
  int r;

  if (set_backing (&j, path) == -1)
    r = job_failed (&j, "cannot save");
  else if (!is_stream && !path)
    r = job_failed (&j, "no name for the file");
  else
    r = is_stream ? save_to_stream (&j) : save_to_file (&j, path);
  if (r == -1)
    keep (&j);
  else
    VERBOSE ("export \"%s\": saved to %s", export_name,
             path ? path : s->target->name);
  free (j.failure);
  free (j.backing);
  return r;
}
