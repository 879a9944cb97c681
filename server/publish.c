/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay as an image to its target, or to where it can be kept (see publish.h).
 *
 * In place: the overlay's file is made in the directory of the target.  Its tables
 * are written, and it gets the target's name; no data is copied.  A stream, and
 * cow-save-compact, copy the image in the order of the disk.
 *
 * What cannot be saved where it should be is kept elsewhere as a complete image, if
 * possible beside the target: in the overlay's own file, if that is there, or as a copy;
 * then in the directory for temporary files, in the same ways; and if that fails too, in
 * the overlay's own file all the same, though it could not be synced.
 */

#include <config.h>

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "images/finish.h"
#include "images/image.h"
#include "overlay/giveback.h"
#include "overlay/newfile.h"
#include "overlay/store.h"
#include "server/names.h"
#include "server/publish.h"

#define COPY_BYTES (1u << 20)

/*----------------------------------------------------------------------
 * Writing
 */

/* An overlay on its way out. */
struct job {
  const struct publish_order *order;
  struct overlay *overlay;
  struct image_source source;
  char *backing;                /* of source, where we have made it up; */
  struct qcow2_header replaced; /* or where it is that of what is there */
  struct newfile copy; /* the image in the order of the disk, if it was made */
  enum {
    JOB_STARTED,
    JOB_FINISHED, /* the overlay's file is an image */
    JOB_PUBLISHED /* an image has the name that it is to have */
  } state;
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

#define PAGE_BYTES 4096

/* Write COUNT bytes of BUF at OFFSET of a new file, but leave out pages of zeroes. */
static int
write_sparse (int fd, const char *buf, size_t count, uint64_t offset)
{
  for (size_t at = 0, end; at < count; at = end) {
    const size_t page = MIN (PAGE_BYTES, count - at);

    end = at + page;
    if (bytes_are_zero (buf + at, page))
      continue;
    while (end < count
           && !bytes_are_zero (buf + end, MIN (PAGE_BYTES, count - end)))
      end = MIN (end + PAGE_BYTES, count);
    if (lseek (fd, (off_t) (offset + at), SEEK_SET) == -1
        || bytes_write (fd, buf + at, end - at) == -1)
      return -1;
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

enum copying { COPY_ALL, COPY_SPARSE /* to a new file: with holes */ };

/* Write the image in the order of the disk, from its start to its end. */
static int
copy_out (struct job *j, int fd, enum copying how, const char *where)
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
    else if ((how == COPY_ALL ? bytes_write (fd, buf, n)
                              : write_sparse (fd, buf, n, at))
             == -1)
      r = job_failed (j, "cannot write to %s", where);
    at += n;
  }
  if (r == 0 && how == COPY_SPARSE
      && ftruncate (fd, (off_t) image_size (image)) == -1)
    r = job_failed (j, "cannot write to %s", where);
  image_free (image);
  return r;
}

/* Make the overlay's own file into an image, in the portable form.  -1 and errno. */
static int
finish_in_place (struct job *j)
{
  struct tables *tables = overlay_tables (j->overlay);
  const uint64_t cluster = tables->geometry.cluster_size;
  struct image_source source = j->source;
  struct image_used used;

  if (j->state != JOB_STARTED)
    return 0;
  source.geometry = tables->geometry;
  if (source.geometry.format != QCOW2_PORTABLE) {
    errno = EFBIG;
    return -1;
  }
  if (image_finish (&source, tables, &used) == -1) {
    const int err = errno;

    job_failed (j, "cannot write the tables of the image in %s",
                source.store->dir);
    errno = err;
    return -1;
  }
  giveback (source.store, cluster, &used, j->order->giveback);
  free (used.words);
  j->state = JOB_FINISHED;
  return 0;
}

static int
save_to_stream (struct job *j)
{
  struct target *t = j->order->target;
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
    r = copy_out (j, t->fd, COPY_ALL, "it");
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
give_name (struct job *j, struct newfile *file, const char *path)
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

  if (target_check_file (j->order->target, j->order->loads, path, &what, &mode,
                         &why)
      == -1) {
    errno = 0;
    return job_failed (j, "%s", why ? why : "out of memory");
  }
  if (what == NEWFILE_REPLACES
      && !target_is_as_seen (path, j->order->item->seen)) {
    errno = 0;
    return job_failed (j,
                       "%s was changed by somebody else since this server "
                       "began to use it, and stays as it is",
                       path);
  }
  if (newfile_publish (file, path, what, mode, &step) == 0)
    return 0;
  if (file->published)
    j->state = JOB_PUBLISHED;
  j->damaged |= file == &j->source.store->file && step == NEWFILE_SYNC;
  return job_failed (j, "%s: %s", path, steps[step]);
}

/* Write the image to a file of its own in DIR. */
static int
make_copy (struct job *j, const char *dir)
{
  newfile_discard (&j->copy);
  if (newfile_make (&j->copy, dir, NEWFILE_TO_PUBLISH) == -1)
    return job_failed (j, "cannot make a file in %s", dir);
  if (copy_out (j, j->copy.fd,
                j->order->options->compact ? COPY_ALL : COPY_SPARSE, dir)
      == 0)
    return 0;
  newfile_discard (&j->copy);
  return -1;
}

static int
save_copy (struct job *j, const char *path)
{
  if (make_copy (j, j->order->target->directory) == -1
      || check_written (j, store_check_written (j->source.store)) == -1)
    return -1;
  return give_name (j, &j->copy, path);
}

/* Publish the overlay's own file. */
static int
save_in_place (struct job *j, const char *path)
{
  if (finish_in_place (j) == -1)
    return -1;

  /* No more than this: an error that is asked for, the sync would not see. */
  if (check_written (j, store_check_early (j->source.store)) == -1)
    return -1;
  return give_name (j, &j->source.store->file, path);
}

/* In the extended form if that can be had, else in the portable one. */
static int
save_extended (struct job *j, const char *path)
{
  if (make_copy (j, j->order->target->directory) == -1) {
    if (overlay_tables (j->overlay)->geometry.format != QCOW2_PORTABLE)
      return -1;
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: cow-save=%s: %s; it is saved "
                    "without cow-save-format=extended\n",
                    j->order->target->name,
                    j->failure ? j->failure : "out of memory");
    return save_in_place (j, path);
  }
  if (check_written (j, store_check_written (j->source.store)) == -1)
    return -1;
  return give_name (j, &j->copy, path);
}

static int
save_to_file (struct job *j, const char *path)
{
  if (j->order->options->compact)
    return save_copy (j, path);
  if (j->source.geometry.format == QCOW2_EXTENDED)
    return save_extended (j, path);

  /* A file that cannot be that long can most often be copied: holes take no room then. */
  if (save_in_place (j, path) == 0)
    return 0;
  return j->state == JOB_STARTED && errno == EFBIG ? save_copy (j, path) : -1;
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
  CLEANUP_FREE char *name = names_of_export (j->order->item->name);

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

/* Keep a copy in DIR, which may be NULL. */
static char *
keep_copy (struct job *j, const char *dir)
{
  return dir && make_copy (j, dir) == 0 ? keep_file (j, &j->copy, dir, true)
                                        : NULL;
}

/* Keep it beside the target if that can be done at all, else where temporary files
 * are.
 */
static char *
keep_anywhere (struct job *j)
{
  const char *beside = j->order->target->directory;
  const bool is_beside = beside && strcmp (j->source.store->dir, beside) == 0;
  char *kept = is_beside ? keep_in_place (j) : NULL;

  if (!kept)
    kept = keep_copy (j, beside);
  if (!kept && !is_beside)
    kept = keep_in_place (j);
  if (!kept)
    kept = keep_copy (j, j->order->temporary);
  return kept;
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
  const char *name = j->order->target->name;
  CLEANUP_FREE char *first = j->failure;
  CLEANUP_FREE char *kept = NULL;
  const char *failure = first ? first : "out of memory";

  j->failure = NULL;
  if (j->state == JOB_PUBLISHED) {
    nbdkit_error ("cow-save=%s: %s; the diff is complete, but may not outlive "
                  "a crash of this machine",
                  name, failure);
    return;
  }
  j->damaged |= store_sync (j->source.store) == -1;
  kept = keep_anywhere (j);
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
  const struct save_options *options = j->order->options;
  struct image_source *source = &j->source;
  struct qcow2_header *h = &j->replaced;
  bool is_image;

  if (options->backing || !path || !loads_has_first (j->order->loads, path)
      || target_read_header (path, h, &is_image) == -1 || !is_image)
    return image_set_backing (source, options->backing,
                              options->backing_format, &j->backing);
  source->backing_file = h->backing_file[0] ? h->backing_file : NULL;
  source->backing_format = h->backing_format[0] ? h->backing_format : NULL;
  return 0;
}

int
publish (const struct publish_order *order, const char *path)
{
  const bool is_stream = order->target->kind == TARGET_STREAM;
  struct overlay *overlay = order->item->overlay;
  struct job j = {
    .order = order,
    .overlay = overlay,
    .source = { .map = overlay_map (overlay),
                .store = overlay_store (overlay),
                .geometry = *overlay_geometry (overlay),
                .base = order->item->base },
    .copy = NEWFILE_NONE,
  };
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
    VERBOSE ("export \"%s\": saved to %s", order->item->name,
             path ? path : order->target->name);
  newfile_discard (&j.copy);
  free (j.failure);
  free (j.backing);
  return r;
}
