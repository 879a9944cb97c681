/* SPDX-License-Identifier: BSD-3-Clause */

/* A file that gets its name when it is complete (see newfile.h).
 *
 * Order: the file is synced before it is linked, the directory after.  Linking a
 * nameless file cannot replace another one, so that is done in two steps, link
 * and rename.
 *
 * Knows nothing of overlays, of images, or of nbdkit.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "overlay/newfile.h"

/* unlink, free and close keep errno, as they run after what has failed. */

static void
forget_temp_name (struct newfile *file)
{
  free (file->temp_name);
  file->temp_name = NULL;
}

static void
remove_temp_name (struct newfile *file)
{
  const int err = errno;

  if (file->temp_name)
    unlink (file->temp_name);
  forget_temp_name (file);
  errno = err;
}

int
newfile_make (struct newfile *file, const char *dir, enum newfile_use use)
{
  *file = NEWFILE_NONE;
  do
    file->fd = open (dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  while (file->fd == -1 && errno == EINTR);

  /* EISDIR is what a kernel says that does not know the flag. */
  if (file->fd >= 0)
    return 0;
  if (errno != EOPNOTSUPP && errno != EISDIR)
    return -1;

  if (asprintf (&file->temp_name, "%s/.cowXXXXXX", dir) == -1) {
    file->temp_name = NULL;
    errno = ENOMEM;
    return -1;
  }
  file->fd = mkostemp (file->temp_name, O_CLOEXEC);
  if (file->fd == -1)
    forget_temp_name (file);
  else if (use == NEWFILE_ANONYMOUS)
    remove_temp_name (file);
  return file->fd == -1 ? -1 : 0;
}

void
newfile_discard (struct newfile *file)
{
  const int err = errno;

  remove_temp_name (file);
  if (file->fd >= 0)
    close (file->fd);
  file->fd = -1;
  errno = err;
}

int
newfile_check_dir (const char *dir)
{
  struct newfile file;

  if (newfile_make (&file, dir, NEWFILE_ANONYMOUS) == -1)
    return -1;
  newfile_discard (&file);
  return 0;
}

/* Give a nameless file the name PATH. */
static int
link_nameless (const struct newfile *file, const char *path)
{
  char self[64];

  (void) snprintf (self, sizeof self, "/proc/self/fd/%d", file->fd);
  if (linkat (AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW) == 0)
    return 0;
  if (errno != ENOENT && errno != ENOTDIR)
    return -1;

  /* No /proc here, perhaps: whoever may, can do without. */
  return linkat (file->fd, "", AT_FDCWD, path, AT_EMPTY_PATH);
}

/* Give a nameless file a temporary name beside PATH. */
static int
link_beside (struct newfile *file, const char *path)
{
  const size_t dir_length = (size_t) (strrchr (path, '/') - path);

  for (unsigned i = 0; i < 1000; ++i) {
    if (asprintf (&file->temp_name, "%.*s/.cow%u-%u", (int) dir_length, path,
                  (unsigned) getpid (), i)
        == -1) {
      file->temp_name = NULL;
      errno = ENOMEM;
      return -1;
    }
    if (link_nameless (file, file->temp_name) == 0)
      return 0;
    forget_temp_name (file);
    if (errno != EEXIST)
      return -1;
  }
  return -1;
}

/* Rename without replacing anything.  Where the file system cannot promise
 * that, look first.
 */
static int
rename_to_new (const char *from, const char *to)
{
  struct stat st;

#ifdef RENAME_NOREPLACE
  if (renameat2 (AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0)
    return 0;
  if (errno != EINVAL && errno != ENOSYS)
    return -1;
#endif
  if (lstat (to, &st) == 0) {
    errno = EEXIST;
    return -1;
  }
  return rename (from, to);
}

static int
give_name (struct newfile *file, const char *path, enum newfile_target target)
{
  int r;

  if (!file->temp_name && target == NEWFILE_IS_NEW)
    return link_nameless (file, path);
  if (!file->temp_name && link_beside (file, path) == -1)
    return -1;

  if (target == NEWFILE_IS_NEW)
    r = rename_to_new (file->temp_name, path);
  else
    r = rename (file->temp_name, path);
  if (r == 0)
    forget_temp_name (file);
  return r;
}

/* Sync the directory in which PATH is. */
static int
sync_directory (const char *path)
{
  CLEANUP_FREE char *dir = strdup (path);

  if (!dir)
    return -1;
  *(strrchr (dir, '/') + 1) = '\0';

  const int fd = open (dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd == -1)
    return -1;

  int r = fsync (fd);

  /* Some file systems have no sync of a directory. */
  if (r == -1 && (errno == EINVAL || errno == ENOTSUP))
    r = 0;

  const int err = errno;
  close (fd);
  errno = err;
  return r;
}

int
newfile_publish (struct newfile *file, const char *path,
                 enum newfile_target target, mode_t mode,
                 enum newfile_step *step)
{
  /* A file system without modes may refuse.  Then it is as private as it was. */
  if (fchmod (file->fd, mode) == -1)
    errno = 0;
  *step = NEWFILE_SYNC;
  if (fsync (file->fd) == -1)
    return -1;
  *step = NEWFILE_NAME;
  if (give_name (file, path, target) == -1)
    return -1;
  file->published = true;
  *step = NEWFILE_SYNC_DIRECTORY;
  return sync_directory (path);
}

int
newfile_name_unsynced (struct newfile *file, const char *path)
{
  /* As above; and it may have got another one already. */
  if (fchmod (file->fd, 0600) == -1)
    errno = 0;
  if (give_name (file, path, NEWFILE_IS_NEW) == -1)
    return -1;
  file->published = true;
  return 0;
}
