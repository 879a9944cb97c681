/* SPDX-License-Identifier: BSD-3-Clause */

/* What cow-save names, and whether it may be written (see target.h).
 *
 * Nothing is replaced but a diff that this filter made or that is loaded, and
 * never a file that another parameter names, whatever it is called there.
 *
 * Knows nothing of overlays.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "server/descriptors.h"
#include "server/locks.h"
#include "server/names.h"
#include "format/qcow2.h"
#include "server/target.h"

/* How long a FIFO waits for its reader. */
#define FIFO_SECONDS 30

/* A file that a parameter names. */
struct other_file {
  char *text; /* key=value */
  dev_t device;
  ino_t inode;
};

static int
refuse (const struct target *t, const char *what)
{
  nbdkit_error ("cow-save=%s: %s", t->name, what);
  return -1;
}

static int
refuse_errno (const struct target *t, const char *what)
{
  nbdkit_error ("cow-save=%s: %s: %m", t->name, what);
  return -1;
}

/* Remember which files the parameters name. */
static int
find_others (struct target *t, const struct parameter *others,
             size_t nr_others)
{
  t->others = calloc (nr_others + 1, sizeof *t->others);
  if (!t->others)
    return refuse_errno (t, "cannot check it");
  for (size_t i = 0; i < nr_others; ++i) {
    struct other_file *o = &t->others[t->nr_others];
    struct stat st;

    if (stat (others[i].value, &st) == -1)
      continue;
    o->device = st.st_dev;
    o->inode = st.st_ino;
    if (asprintf (&o->text, "%s=%s", others[i].key, others[i].value) == -1) {
      o->text = NULL;
      return refuse_errno (t, "cannot check it");
    }
    t->nr_others++;
  }
  return 0;
}

/* The parameter that names this file, or NULL. */
static const char *
named_by_other (const struct target *t, const struct stat *st)
{
  for (size_t i = 0; i < t->nr_others; ++i)
    if (t->others[i].device == st->st_dev && t->others[i].inode == st->st_ino)
      return t->others[i].text;
  return NULL;
}

/*----------------------------------------------------------------------
 * Files
 */

int
target_read_header (const char *path, struct qcow2_header *header,
                    bool *is_image)
{
  CLEANUP_FREE char *buf = malloc (QCOW2_HEADER_BYTES);
  struct file_lock *lock;
  const int fd = locks_open (path, IMAGE_WRITE, &lock);
  struct qcow2_fault fault;
  struct stat st;
  ssize_t length = -1;

  *is_image = false;
  if (fd == -1)
    return -1;
  if (buf && fstat (fd, &st) == 0)
    do
      length = pread (fd, buf, QCOW2_HEADER_BYTES, 0);
    while (length == -1 && errno == EINTR);

  const int err = errno;
  locks_give_back (lock, IMAGE_WRITE);
  close (fd);
  errno = err;
  if (length == -1)
    return -1;
  *is_image = qcow2_decode_header (buf, (size_t) length, (uint64_t) st.st_size,
                                   header, &fault)
              == 0;
  return 0;
}

static int
say_why (char **why, const char *path, const char *what, const char *more)
{
  if (asprintf (why, "%s %s%s", path, what, more) == -1)
    *why = NULL;
  return -1;
}

#define IN_USE                                                                \
  "is in use by another program, perhaps a second server, qemu or "           \
  "qemu-nbd; end that one first, or name another file"

static int
say_in_use (char **why, const char *path)
{
  return say_why (why, path, IN_USE, "");
}

/* In a sticky directory only its owner and that of the file may replace it. */
static bool
is_protected (const struct target *t, const struct stat *st)
{
  const uid_t me = geteuid ();
  struct stat dir;

  return me != 0 && st->st_uid != me && t->directory
         && stat (t->directory, &dir) == 0 && (dir.st_mode & S_ISVTX)
         && dir.st_uid != me;
}

/* May the file PATH, which is there, be replaced?  As below. */
static int
check_existing (const struct target *t, const struct loads *loads,
                const char *path, const struct stat *st, char **why)
{
  const char *other = named_by_other (t, st);
  struct qcow2_header header;
  bool is_image;

  if (other)
    return say_why (why, path,
                    "must not be overwritten; name another file: it is also "
                    "that of the parameter ",
                    other);
  if (S_ISBLK (st->st_mode))
    return say_why (
      why, path,
      "is a block device, no regular file, and cannot be replaced "
      "by a diff; name a file, which can be copied to it later",
      "");
  if (!S_ISREG (st->st_mode))
    return say_why (why, path,
                    "exists and is no regular file; move it away, or name "
                    "another one",
                    "");
  if (is_protected (t, st))
    return say_why (why, path,
                    "belongs to another user, and its directory lets only "
                    "that one replace it; name another file",
                    "");
  if (target_read_header (path, &header, &is_image) == -1)
    return errno == EAGAIN
             ? say_in_use (why, path)
             : say_why (why, path,
                        "cannot be read, so as to see whether it may be "
                        "replaced: ",
                        strerror (errno));
  if (!is_image || (!header.ours && !loads_has (loads, path)))
    return say_why (why, path,
                    "exists and is not a diff that this filter made; move it "
                    "away, or name another file",
                    "");
  if (header.nr_snapshots > 0)
    return say_why (why, path,
                    "has internal snapshots, which would be lost; name "
                    "another file, or delete them with qemu-img snapshot -d",
                    "");
  return 0;
}

struct target_seen
target_look (const char *path)
{
  struct stat st;

  if (lstat (path, &st) == -1)
    return (struct target_seen) { .is_there = false };
  return (struct target_seen) {
    .is_there = true,
    .device = st.st_dev,
    .inode = st.st_ino,
    .size = st.st_size,
    .modified = st.st_mtim,
  };
}

bool
target_is_as_seen (const char *path, const struct target_seen *seen)
{
  const struct target_seen now = target_look (path);

  /* The time of the last change of the inode does not count: another mode, or another
   * name, as backups give it, changes nothing of what is in the file.
   */
  return now.is_there == seen->is_there
         && (!now.is_there
             || (now.device == seen->device && now.inode == seen->inode
                 && now.size == seen->size
                 && now.modified.tv_sec == seen->modified.tv_sec
                 && now.modified.tv_nsec == seen->modified.tv_nsec));
}

int
target_check_file (const struct target *t, const struct loads *loads,
                   const char *path, enum newfile_target *what, mode_t *mode,
                   char **why)
{
  struct stat st;

  if (lstat (path, &st) == -1) {
    if (errno != ENOENT)
      return say_why (why, path, "cannot be looked at: ", strerror (errno));
    *what = NEWFILE_IS_NEW;
    *mode = t->new_mode;
    return 0;
  }
  *what = NEWFILE_REPLACES;
  *mode = st.st_mode & 0777;
  return check_existing (t, loads, path, &st, why);
}

int
target_lock_file (const char *path, struct file_lock **lock, char **why)
{
  const int fd = locks_open (path, IMAGE_WRITE, lock);

  if (fd >= 0) {
    close (fd);
    return 0;
  }
  *lock = NULL;
  return errno == EAGAIN ? say_in_use (why, path) : 0;
}

static int
check_directory (const struct target *t)
{
  struct stat st;

  if (stat (t->directory, &st) == -1)
    return refuse_errno (t, "cannot use the directory");

  const char *other = named_by_other (t, &st);
  if (other) {
    nbdkit_error ("cow-save=%s: files of the base are in this directory; name "
                  "another one: it is also that of the parameter %s",
                  t->name, other);
    return -1;
  }
  if (newfile_check_dir (t->directory) == 0)
    return 0;
  nbdkit_error ("cow-save=%s: cannot make a file in %s: %m", t->name,
                t->directory);
  return -1;
}

/* A name without the slashes at its end, as an absolute path; NULL and errno. */
static char *
resolve_without_slashes (const char *name)
{
  size_t length = strlen (name);

  while (length > 1 && name[length - 1] == '/')
    length--;

  CLEANUP_FREE char *plain = strndup (name, length);
  return plain ? names_resolve (plain) : NULL;
}

int
target_make_directory (const char *name, const char *const *loads,
                       size_t nr_loads)
{
  const size_t length = strlen (name);
  CLEANUP_FREE char *path = length > 1 && name[length - 1] == '/'
                              ? resolve_without_slashes (name)
                              : NULL;
  bool loaded = false;

  for (size_t i = 0; path && i < nr_loads && !loaded; ++i) {
    CLEANUP_FREE char *load = resolve_without_slashes (loads[i]);

    loaded = load && strcmp (load, path) == 0;
  }
  if (!loaded || mkdir (path, 0777) == 0 || errno == EEXIST)
    return 0;
  nbdkit_error ("cow-save=%s: cannot make the directory: %m", name);
  return -1;
}

static int
use_directory (struct target *t)
{
  t->kind = TARGET_DIRECTORY;
  t->directory = realpath (t->name, NULL);
  if (!t->directory)
    return refuse_errno (t, "cannot use the directory");
  return check_directory (t);
}

static int
use_file (struct target *t, const struct loads *loads)
{
  CLEANUP_FREE char *why = NULL;
  enum newfile_target what;
  mode_t mode;

  t->kind = TARGET_FILE;
  t->directory = names_directory (t->path);
  if (!t->directory)
    return refuse_errno (t, "cannot check it");
  if (target_lock_file (t->path, &t->lock, &why) == -1
      || target_check_file (t, loads, t->path, &what, &mode, &why) == -1)
    return refuse (t, why ? why : "out of memory");
  return check_directory (t);
}

/*----------------------------------------------------------------------
 * Streams
 */

/* A stream that goes to the file or block device of descriptor FD. */
static int
check_descriptor (struct target *t, int fd, const struct stat *st)
{
  const char *other = named_by_other (t, st);
  char self[64];
  CLEANUP_FREE char *why = NULL;

  if (other) {
    nbdkit_error ("cow-save=%s: must not be overwritten; name another file: "
                  "it is also that of the parameter %s",
                  t->name, other);
    return -1;
  }
  (void) snprintf (self, sizeof self, "/proc/self/fd/%d", fd);
  return target_lock_file (self, &t->lock, &why) == -1 ? refuse (t, IN_USE)
                                                       : 0;
}

/* Write to a copy of descriptor FD, as nbdkit closes standard output soon. */
static int
use_descriptor (struct target *t, int fd)
{
  const int flags = fcntl (fd, F_GETFL);
  struct stat st;

  t->kind = TARGET_STREAM;
  if (flags == -1 || fstat (fd, &st) == -1)
    return refuse_errno (t, "no open file");
  if ((flags & O_ACCMODE) == O_RDONLY)
    return refuse (t, "this file is not open for writing");
  if (isatty (fd))
    return refuse (t, "will not write an image to a terminal; redirect it to "
                      "a file or a pipe");
  if (fd == STDOUT_FILENO && descriptors_serve_client ())
    return refuse (t, "option -s has standard output for the client; name a "
                      "file");

  if ((S_ISREG (st.st_mode) || S_ISBLK (st.st_mode))
      && check_descriptor (t, fd, &st) == -1)
    return -1;

  t->fd = fcntl (fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  return t->fd == -1 ? refuse_errno (t, "cannot use it") : 0;
}

static int
use_character_device (struct target *t)
{
  t->kind = TARGET_STREAM;
  t->fd = open (t->path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
  if (t->fd == -1)
    return refuse_errno (t, "cannot open it");
  if (isatty (t->fd))
    return refuse (t, "will not write an image to a terminal");
  return 0;
}

static int
use_fifo (struct target *t)
{
  t->kind = TARGET_STREAM;
  if (access (t->path, W_OK) == -1)
    return refuse_errno (t, "cannot write to it");
  return 0;
}

int
target_open_stream (struct target *t)
{
  const struct timespec pause = { .tv_nsec = 100000000 };

  /* Opened like this, ENXIO tells that nobody reads it yet. */
  for (unsigned i = 0; t->fd == -1; ++i) {
    t->fd = open (t->path, O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (t->fd == -1
        && ((errno != ENXIO && errno != EINTR) || i == FIFO_SECONDS * 10))
      return -1;
    if (t->fd == -1)
      nanosleep (&pause, NULL);
  }
  return 0;
}

/*----------------------------------------------------------------------
 */

static int
find_kind (struct target *t, const struct loads *loads)
{
  const size_t length = strlen (t->name);
  const int fd = descriptors_find (t->name, STDOUT_FILENO);
  struct stat st;

  if (fd >= 0)
    return use_descriptor (t, fd);
  if (length == 0)
    return refuse (t, "must be the name of a file or directory, or -");
  if (t->name[length - 1] == '/'
      || (stat (t->name, &st) == 0 && S_ISDIR (st.st_mode)))
    return use_directory (t);

  t->path = names_resolve (t->name);
  if (!t->path)
    return refuse_errno (t, "cannot find its directory");
  if (lstat (t->path, &st) == 0) {
    if (S_ISFIFO (st.st_mode))
      return use_fifo (t);
    if (S_ISCHR (st.st_mode))
      return use_character_device (t);
  }
  return use_file (t, loads);
}

struct target *
target_new (const char *name, const struct loads *loads,
            const struct parameter *others, size_t nr_others)
{
  struct target *t = calloc (1, sizeof *t);

  if (!t) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  t->name = name;
  t->fd = -1;

  const mode_t mask = umask (077);
  umask (mask);
  t->new_mode = 0666 & ~mask;

  if (find_others (t, others, nr_others) == -1 || find_kind (t, loads) == -1) {
    target_free (t);
    return NULL;
  }
  return t;
}

void
target_free (struct target *t)
{
  if (!t)
    return;
  if (t->fd >= 0)
    close (t->fd);
  locks_give_back (t->lock, IMAGE_WRITE);
  for (size_t i = 0; i < t->nr_others; ++i)
    free (t->others[i].text);
  free (t->others);
  free (t->directory);
  free (t->path);
  free (t);
}
