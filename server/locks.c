/* SPDX-License-Identifier: BSD-3-Clause */

/* The files that this server has locked (see locks.h).
 *
 * The list belongs to the process, as the locks do.  Each file is in it once, with a
 * descriptor of its own, which has the locks for all uses of that file.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "common/lock.h"
#include "server/locks.h"

struct file_lock {
  dev_t device; /* constant, as are the next two */
  ino_t inode;
  int fd;
  unsigned
    nr_uses[IMAGE_WRITE + 1]; /* guarded by the mutex, as is what follows */
  struct file_lock *next;
};

static struct mutex mutex = MUTEX_INITIALIZER (RANK_FILE_LOCKS);
static struct file_lock *files; /* guarded by the mutex */

/* What the locks of a file have to allow.  Caller holds the mutex. */
static enum image_use
use_of (const struct file_lock *f)
{
  assert_held (&mutex);

  return f->nr_uses[IMAGE_WRITE]  ? IMAGE_WRITE
         : f->nr_uses[IMAGE_READ] ? IMAGE_READ
                                  : IMAGE_UNUSED;
}

/* The file in the list, which it is added to.  Caller holds the mutex.  NULL and
 * errno.
 */
static struct file_lock *
find_or_add (int fd)
{
  assert_held (&mutex);

  struct file_lock *f;
  struct stat st;

  if (fstat (fd, &st) == -1)
    return NULL;
  for (f = files; f; f = f->next)
    if (f->device == st.st_dev && f->inode == st.st_ino)
      return f;

  f = calloc (1, sizeof *f);
  if (!f)
    return NULL;
  *f = (struct file_lock) {
    .device = st.st_dev,
    .inode = st.st_ino,
    .fd = fcntl (fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1),
    .next = files,
  };
  if (f->fd == -1) {
    free (f);
    return NULL;
  }
  files = f;
  return f;
}

/* Take a file out of the list if nobody uses it.  Caller holds the mutex. */
static void
remove_unused (struct file_lock *f)
{
  assert_held (&mutex);

  const int err = errno;
  struct file_lock **link = &files;

  if (use_of (f) != IMAGE_UNUSED)
    return;
  while (*link != f)
    link = &(*link)->next;
  *link = f->next;
  close (f->fd);
  free (f);
  errno = err;
}

/* Change the locks of a file from what FROM needs to what it needs now.  Caller
 * holds the mutex.
 */
static int
change (const struct file_lock *f, enum image_use from)
{
  assert_held (&mutex);

  const enum image_use to = use_of (f);
  bool works = true;

  if (from != to && imagelock_change (f->fd, from, to, &works) == -1)
    return -1;
  if (!works)
    nbdkit_debug ("cow: this file system has no locks for images");
  return 0;
}

/* Lock the file that FD, open for reading, is open on.  NULL and errno. */
static struct file_lock *
take (int fd, enum image_use use)
{
  HOLD (&mutex);

  struct file_lock *f = find_or_add (fd);
  if (!f)
    return NULL;

  const enum image_use from = use_of (f);
  f->nr_uses[use]++;
  if (change (f, from) == 0)
    return f;
  f->nr_uses[use]--;
  remove_unused (f);
  return NULL;
}

void
locks_give_back (struct file_lock *f, enum image_use use)
{
  if (!f)
    return;

  HOLD (&mutex);

  const enum image_use from = use_of (f);
  const int err = errno;

  f->nr_uses[use]--;
  (void) change (f, from); /* it needs no more than before */
  errno = err;
  remove_unused (f);
}

/* Lock the file of FD, and see that it still has the name PATH: whoever had locked it
 * before may have replaced it.  1: it has not.
 */
static int
lock_named (int fd, const char *path, enum image_use use,
            struct file_lock **lock)
{
  struct stat st, named;

  *lock = NULL;
  if (fstat (fd, &st) == -1)
    return -1;
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    return 0;
  *lock = take (fd, use);
  if (!*lock)
    return -1;
  if (stat (path, &named) == 0 && named.st_dev == st.st_dev
      && named.st_ino == st.st_ino)
    return 0;
  locks_give_back (*lock, use);
  *lock = NULL;
  return 1;
}

int
locks_open (const char *path, enum image_use use, struct file_lock **lock)
{
  for (;;) {
    const int fd = open (path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    const int r = fd == -1 ? -1 : lock_named (fd, path, use, lock);

    if (r == 0)
      return fd;
    if (fd == -1)
      return -1;

    const int err = errno;
    close (fd);
    errno = err;
    if (r == -1)
      return -1;
  }
}
