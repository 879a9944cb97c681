/* SPDX-License-Identifier: BSD-3-Clause */

/* The images that overlays start from (see loads.h).
 *
 * A file stays open from the start of the server on, so that it is the one that
 * was checked, whoever nbdkit becomes and whatever replaces it later.  The files
 * of a directory are checked at the start, and opened and checked again for the
 * export that needs them.
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "images/load.h"
#include "server/backing.h"
#include "server/descriptors.h"
#include "server/identity.h"
#include "server/loads.h"
#include "server/locks.h"
#include "server/names.h"
#include "server/spool.h"

/* An image, and the lock on its file. */
struct opened {
  struct loaded *image; /* NULL: not OPENED */
  struct file_lock *lock;
};

struct load_source {
  const char *name; /* as the user gave it */
  int descriptor;   /* that it stands for, or -1 */
  char *path;       /* else */
  bool is_directory;
  bool is_fifo;
  struct opened file; /* of a file; no image: it is not there yet */
};

struct loads {
  bool any_base;
  size_t count;
  struct load_source sources[];
};

static int
report (const char *name, const char *what)
{
  nbdkit_error ("cow-load=%s: %s: %m", name, what);
  return -1;
}

static int
refuse (const char *name, const char *what)
{
  nbdkit_error ("cow-load=%s: %s", name, what);
  return -1;
}

static int
refuse_kind (const char *name, mode_t mode)
{
  const char *kind = S_ISDIR (mode)    ? "a directory"
                     : S_ISCHR (mode)  ? "a character device"
                     : S_ISSOCK (mode) ? "a socket"
                                       : "a FIFO";

  nbdkit_error (
    "cow-load=%s: is %s; name a qcow2 image, in a file or on a block "
    "device",
    name, kind);
  return -1;
}

/*----------------------------------------------------------------------
 * Opening an image
 */

/* What became of that. */
enum outcome {
  OPENED,
  MISSING, /* there is none; this and the next one were not reported */
  IN_USE,  /* somebody else may write it */
  FAILED,
};

static int
refuse_in_use (const char *name)
{
  return refuse (name, "is in use by another program that may write it, "
                       "perhaps a second server, qemu or qemu-nbd; end that "
                       "one first, or load a copy");
}

static void
close_image (struct opened *o)
{
  load_close (o->image);
  locks_give_back (o->lock, IMAGE_READ);
  *o = (struct opened) { .image = NULL };
}

/* Check the image in FD, which it gets.  Messages call it NAME. */
static enum outcome
check_image (const char *name, int fd, struct opened *o)
{
  o->image = load_open (name, fd);
  if (o->image)
    return OPENED;
  close_image (o);
  return FAILED;
}

/* Open and check the image PATH in a file or on a block device.  It may be anything
 * else, and opening that must not block.
 */
static enum outcome
open_image (const char *name, const char *path, struct opened *o)
{
  struct stat st;
  int fd;

  *o = (struct opened) { .image = NULL };
  if (stat (path, &st) == 0 && !S_ISREG (st.st_mode)
      && !S_ISBLK (st.st_mode)) {
    refuse_kind (name, st.st_mode);
    return FAILED;
  }
  fd = locks_open (path, IMAGE_READ, &o->lock);
  if (fd >= 0)
    return check_image (name, fd, o);
  if (errno == ENOENT)
    return MISSING;
  if (errno == EAGAIN)
    return IN_USE;
  report (name, "cannot open it");
  return FAILED;
}

/* The same for an image that is to be read from the pipe FD. */
static enum outcome
open_spooled (const char *name, int fd, struct opened *o)
{
  const int spooled = spool_read (name, fd);

  return spooled == -1 ? FAILED : check_image (name, spooled, o);
}

/* The same for a FIFO. */
static enum outcome
open_fifo (const char *name, const char *path, struct opened *o)
{
  const int fd = open (path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);

  if (fd == -1) {
    report (name, "cannot open it");
    return FAILED;
  }

  const enum outcome outcome = open_spooled (name, fd, o);
  close (fd);
  return outcome;
}

/* The same for the file that descriptor FD is open on. */
static enum outcome
open_seekable (const char *name, int fd, struct opened *o)
{
  char path[64];

  /* Opened anew if that is possible: locks on what others have open would outlive
   * this server.
   */
  (void) snprintf (path, sizeof path, "/proc/self/fd/%d", fd);
  if (access (path, R_OK) == 0)
    return open_image (name, path, o);

  fd = fcntl (fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  if (fd >= 0)
    return check_image (name, fd, o);
  report (name, "cannot use it");
  return FAILED;
}

/* The same for descriptor FD, whatever that is. */
static enum outcome
open_descriptor (const char *name, int fd, struct opened *o)
{
  const int flags = fcntl (fd, F_GETFL);
  struct stat st;

  if (flags == -1 || fstat (fd, &st) == -1)
    report (name, "no open file");
  else if ((flags & O_ACCMODE) == O_WRONLY)
    refuse (name, "this file is not open for reading");
  else if (fd == STDIN_FILENO && descriptors_serve_client ())
    refuse (name, "option -s has standard input for the client; name a file");
  else if (isatty (fd))
    refuse (name, "will not read an image from a terminal; redirect a file or "
                  "a pipe to it");
  else if (S_ISREG (st.st_mode) || S_ISBLK (st.st_mode))
    return open_seekable (name, fd, o);
  else if (S_ISFIFO (st.st_mode) || S_ISSOCK (st.st_mode))
    return open_spooled (name, fd, o);
  else
    refuse_kind (name, st.st_mode);
  return FAILED;
}

/*----------------------------------------------------------------------
 * Finding the images
 */

/* The directory in which an image that messages call NAME is. */
static char *
directory_of (const char *name)
{
  const char *slash = strrchr (name, '/');

  return slash ? strndup (name, (size_t) (slash + 1 - name)) : strdup (".");
}

/* Tell what is odd about the backing file of an image that messages call NAME, and that
 * is in DIR (NULL: nowhere).  L are those below it, which it may well name.
 */
static void
warn_of_backing (const struct loads *l, const struct loads_options *options,
                 const struct loaded *image, const char *name, const char *dir)
{
  const char *backing = load_header (image)->backing_file;
  bool missing;
  CLEANUP_FREE char *path = backing_find (backing, dir, &missing);

  if (missing)
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: cow-load=%s: its backing file %s "
                    "is not there\n",
                    name, printable (backing).text);
  if (path && !loads_has (l, path))
    backing_compare (name, path, options->others, options->nr_others);
}

static bool
is_image_name (const char *name)
{
  const char *dot = strrchr (name, '.');

  return dot && dot != name && strcmp (dot, ".qcow2") == 0;
}

/* Check the image D of a directory. */
static int
check_in_directory (const struct loads *l, const struct loads_options *options,
                    const struct load_source *s, const struct dirent *d)
{
  CLEANUP_FREE char *path = names_join (s->path, d->d_name);
  struct opened o;

  if (!path)
    return report (s->name, "cannot check it");
  switch (open_image (path, path, &o)) {
  case OPENED:
    warn_of_backing (l, options, o.image, path, s->path);
    close_image (&o);
    return 0;
  case MISSING:
    return 0;
  case IN_USE:
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: cow-load=%s: is in use by another "
                    "program; its export is refused until that has ended\n",
                    path);
    return 0;
  case FAILED:
  default:
    return -1;
  }
}

/* Check all images that exports may start from. */
static int
check_directory (const struct loads *l, const struct loads_options *options,
                 const struct load_source *s)
{
  DIR *dir = opendir (s->path);
  struct dirent *d;
  int r = 0;

  if (!dir)
    return report (s->name, "cannot read the directory");
  while (r == 0 && (errno = 0, d = readdir (dir)))
    if (is_image_name (d->d_name)) {
      r = check_in_directory (l, options, s, d);
      errno = 0;
    }
  if (r == 0 && errno)
    r = report (s->name, "cannot read the directory");
  closedir (dir);
  return r;
}

/* Find out what a source is: its descriptor, or path and kind. */
static int
find_source (struct load_source *s)
{
  struct stat st;

  s->descriptor = descriptors_find (s->name, STDIN_FILENO);
  if (s->descriptor >= 0)
    return 0;

  const bool is_there = stat (s->name, &st) == 0;

  s->is_directory = is_there && S_ISDIR (st.st_mode);
  s->is_fifo = is_there && S_ISFIFO (st.st_mode);
  s->path
    = s->is_directory ? realpath (s->name, NULL) : names_resolve (s->name);
  /* What has no path but a link in /proc, as a pipe that a process has open. */
  if (is_there && s->path && access (s->path, F_OK) == -1) {
    free (s->path);
    s->path = strdup (s->name);
  }
  return s->path ? 0 : report (s->name, "cannot find it");
}

/* Are these one pipe, which can be read only once? */
static bool
are_one_pipe (const struct load_source *a, const struct load_source *b)
{
  if (a->descriptor >= 0 || b->descriptor >= 0)
    return a->descriptor == b->descriptor;
  return a->is_fifo && b->is_fifo && strcmp (a->path, b->path) == 0;
}

/* A file that is missing may be if it is saved to. */
static int
check_missing (const struct load_source *s, const char *save_name)
{
  CLEANUP_FREE char *target = save_name ? names_resolve (save_name) : NULL;

  if (target && strcmp (target, s->path) == 0)
    return 0;
  return refuse (s->name,
                 "no such file; only what cow-save names too may be missing");
}

static int
open_source (const struct loads *l, const struct loads_options *options,
             struct load_source *s)
{
  const bool is_pipe = s->descriptor >= 0 || s->is_fifo;
  CLEANUP_FREE char *dir = is_pipe ? NULL : directory_of (s->name);
  enum outcome outcome;

  if (s->is_directory)
    return check_directory (l, options, s);
  if (s->descriptor >= 0)
    outcome = open_descriptor (s->name, s->descriptor, &s->file);
  else if (s->is_fifo)
    outcome = open_fifo (s->name, s->path, &s->file);
  else
    outcome = open_image (s->name, s->path, &s->file);

  switch (outcome) {
  case OPENED:
    warn_of_backing (l, options, s->file.image, s->name, dir);
    return 0;
  case MISSING:
    return check_missing (s, options->save_name);
  case IN_USE:
    return refuse_in_use (s->name);
  case FAILED:
  default:
    return -1;
  }
}

/* Add the source NAME. */
static int
add_source (struct loads *l, const char *name,
            const struct loads_options *options)
{
  struct load_source *s = &l->sources[l->count++];

  s->name = name;
  if (find_source (s) == -1)
    return -1;
  for (size_t i = 0; i + 1 < l->count; ++i)
    if (are_one_pipe (&l->sources[i], s))
      return refuse (name, "is named twice, and can be read only once; leave "
                           "out one of them");
  return open_source (l, options, s);
}

struct loads *
loads_new (const char *const *names, size_t count,
           const struct loads_options *options)
{
  struct loads *l = calloc (1, sizeof *l + count * sizeof l->sources[0]);

  if (!l) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  l->any_base = options->any_base;
  for (size_t i = 0; i < count; ++i) {
    if (add_source (l, names[i], options) == -1) {
      loads_free (l);
      return NULL;
    }
  }
  return l;
}

void
loads_free (struct loads *l)
{
  if (!l)
    return;
  for (size_t i = 0; i < l->count; ++i) {
    close_image (&l->sources[i].file);
    free (l->sources[i].path);
  }
  free (l);
}

static bool
source_is (const struct load_source *s, const char *path)
{
  if (!s->is_directory)
    return s->path && strcmp (s->path, path) == 0;

  CLEANUP_FREE char *dir = names_directory (path);
  return dir && strcmp (s->path, dir) == 0
         && is_image_name (strrchr (path, '/') + 1);
}

bool
loads_has (const struct loads *l, const char *path)
{
  for (size_t i = 0; l && i < l->count; ++i)
    if (source_is (&l->sources[i], path))
      return true;
  return false;
}

bool
loads_has_only (const struct loads *l, const char *path)
{
  return l && l->count == 1 && l->sources[0].file.image
         && source_is (&l->sources[0], path);
}

bool
loads_has_first (const struct loads *l, const char *path)
{
  return l && l->count > 0 && source_is (&l->sources[0], path);
}

/* An export whose images are being brought in. */
struct loading {
  const struct loads *loads;
  struct overlay *overlay;
  const struct base *base;
  struct qcow2_base *identity; /* of the base */
  bool has_image;              /* one was brought in already */
};

static int
apply_image (struct loading *to, const struct loaded *image, const char *name)
{
  const struct base *base = to->base;
  const struct qcow2_header *header = load_header (image);
  const struct identity_below below = {
    .identity = to->identity,
    .base = base,
    .overlay = to->has_image ? to->overlay : NULL,
  };

  if (header->disk_size != ROUND_UP (base->size, UINT64_C (512))) {
    nbdkit_error ("cow-load=%s: the image is of a disk of %" PRIu64
                  " bytes, but the base has %" PRIu64
                  "; it does not belong to this base",
                  name, header->disk_size, base->size);
    return -1;
  }
  if (!to->loads->any_base) {
    if (header->base.is_increment && !to->has_image) {
      nbdkit_error (
        "cow-load=%s: it has only what changed between two moments; "
        "load the images of what was there before, in order, in "
        "front of it",
        name);
      return -1;
    }
    if (identity_check (name, header, &below) == -1)
      return -1;
    if (!to->has_image && !to->identity->id[0])
      memcpy (to->identity->id, header->base.id, sizeof to->identity->id);
  }
  to->has_image = true;
  return load_into (image, to->overlay, base);
}

/* The image of an export in a directory, if there is one. */
static int
apply_from_directory (struct loading *to, const struct load_source *s,
                      const char *export_name)
{
  CLEANUP_FREE char *name = names_of_export (export_name);
  CLEANUP_FREE char *path = name ? names_join (s->path, name) : NULL;
  struct opened o;
  int r;

  if (!path) {
    if (errno == ENAMETOOLONG) /* so there is none */
      return 0;
    return report (s->name, "cannot look for an image");
  }

  switch (open_image (path, path, &o)) {
  case OPENED:
    r = apply_image (to, o.image, path);
    close_image (&o);
    return r;
  case MISSING:
    return 0;
  case IN_USE:
    return refuse_in_use (path);
  case FAILED:
  default:
    return -1;
  }
}

int
loads_apply (const struct loads *l, const char *export_name,
             struct overlay *overlay, const struct base *base,
             struct qcow2_base *identity)
{
  struct loading to
    = { .loads = l, .overlay = overlay, .base = base, .identity = identity };

  for (size_t i = 0; i < l->count; ++i) {
    const struct load_source *s = &l->sources[i];
    int r = 0;

    if (s->is_directory)
      r = apply_from_directory (&to, s, export_name);
    else if (s->file.image)
      r = apply_image (&to, s->file.image, s->name);
    if (r == -1)
      return -1;
  }
  return 0;
}
