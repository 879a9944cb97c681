/* SPDX-License-Identifier: BSD-3-Clause */

/* Loaded into nbdkit by LD_PRELOAD: calls that fail.
 *
 *   COW_FAULTS=FILE   as soon as FILE is there, the calls below that are about
 *                     regular files and directories are counted, from 1.  FILE
 *                     says which ones fail, and how: "FIRST LAST ERRNO".  A call
 *                     that has failed makes FILE.hit, with the name of the call.
 *   COW_FAULTS_DIR=D  only those in the file system of D count.
 *   COW_NO_TMPFILE=1  no file system has O_TMPFILE.
 *   COW_HELD=FILE     who opens FILE makes FILE.held, and waits until FILE.go is there.
 *   COW_SLOW_PUNCH=F  as soon as F is there, each punch takes 20 ms, and so does each
 *                     truncation.
 *
 * Punching does not count, as it only saves space.
 */

#include <config.h>

/* Both kinds of functions are replaced here, those with off_t and with off64_t. */
#undef _FILE_OFFSET_BITS

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REPLACES __attribute__ ((visibility ("default")))

static const char *faults, *directory, *held, *slow_punch;
static bool no_tmpfile;
static struct stat where;
static atomic_long nr_calls;

/* The commands that nbdkit runs go without this. */
__attribute__ ((constructor)) static void
start (void)
{
  faults = getenv ("COW_FAULTS");
  directory = getenv ("COW_FAULTS_DIR");
  held = getenv ("COW_HELD");
  slow_punch = getenv ("COW_SLOW_PUNCH");
  no_tmpfile = getenv ("COW_NO_TMPFILE") != NULL;
  if (directory && stat (directory, &where) == -1)
    abort ();
  unsetenv ("LD_PRELOAD");
}

static void *
real (const char *name)
{
  void *function = dlsym (RTLD_NEXT, name);

  if (!function)
    abort ();
  return function;
}

#define REAL(name, ...) (((__typeof__ (&(name))) real (#name)) (__VA_ARGS__))

static void
say_hit (const char *call)
{
  char path[PATH_MAX];

  (void) snprintf (path, sizeof path, "%s.hit", faults);
  FILE *f = fopen (path, "ae");
  if (f) {
    (void) fprintf (f, "%s\n", call);
    (void) fclose (f);
  }
}

/* Is this call to fail?  Sets errno. */
static bool
fails (const char *call, const struct stat *st)
{
  long first, last;
  int error;

  if (!faults || (!S_ISREG (st->st_mode) && !S_ISDIR (st->st_mode))
      || (directory && st->st_dev != where.st_dev))
    return false;

  const int old = errno;
  FILE *f = fopen (faults, "re");
  if (!f) {
    errno = old;
    return false;
  }
  const int n = fscanf (f, "%ld %ld %d", &first, &last, &error);
  (void) fclose (f);
  errno = old;
  if (n != 3)
    return false;

  const long nr = 1 + atomic_fetch_add (&nr_calls, 1);
  if (nr < first || nr > last)
    return false;
  say_hit (call);
  errno = error;
  return true;
}

/* Standard error may be a file. */
static bool
fails_fd (const char *call, int fd)
{
  struct stat st;

  return fd > STDERR_FILENO && fstat (fd, &st) == 0 && fails (call, &st);
}

/* The directory in which PATH is counts. */
static bool
fails_path (const char *call, const char *path)
{
  char dir[PATH_MAX];
  struct stat st;

  (void) snprintf (dir, sizeof dir, "%s", path);
  char *slash = strrchr (dir, '/');
  if (!slash)
    return false;
  slash[1] = '\0';
  return stat (dir, &st) == 0 && fails (call, &st);
}

/*----------------------------------------------------------------------*/

REPLACES ssize_t
write (int fd, const void *buf, size_t count)
{
  struct stat st;

  /* Not the server's own pipes, nor what is written while this looks. */
  if (fd > STDERR_FILENO && fstat (fd, &st) == 0 && S_ISREG (st.st_mode)
      && fails ("write", &st))
    return -1;
  return REAL (write, fd, buf, count);
}

#define POSITIONED(name, off, type, what)                                     \
  REPLACES ssize_t name (int fd, type buf, what count, off offset)            \
  {                                                                           \
    return fails_fd ("write at an offset", fd)                                \
             ? -1                                                             \
             : REAL (name, fd, buf, count, offset);                           \
  }

#define SYNC(name)                                                            \
  REPLACES int name (int fd)                                                  \
  {                                                                           \
    return fails_fd (#name, fd) ? -1 : REAL (name, fd);                       \
  }

static void
be_slow (void)
{
  if (slow_punch && access (slow_punch, F_OK) == 0)
    usleep (20000);
}

#define TRUNCATE(name, off)                                                   \
  REPLACES int name (int fd, off size)                                        \
  {                                                                           \
    be_slow ();                                                               \
    return fails_fd ("ftruncate", fd) ? -1 : REAL (name, fd, size);           \
  }

#define FALLOCATE(name, off)                                                  \
  REPLACES int name (int fd, int mode, off offset, off count)                 \
  {                                                                           \
    be_slow ();                                                               \
    return mode == 0 && fails_fd ("fallocate", fd)                            \
             ? -1                                                             \
             : REAL (name, fd, mode, offset, count);                          \
  }

REPLACES int
sync_file_range (int fd, __off64_t offset, __off64_t count, unsigned flags)
{
  return fails_fd ("sync_file_range", fd)
           ? -1
           : REAL (sync_file_range, fd, offset, count, flags);
}

SYNC (fsync)
SYNC (fdatasync)
POSITIONED (pwrite, off_t, const void *, size_t)
POSITIONED (pwritev, off_t, const struct iovec *, int)
TRUNCATE (ftruncate, off_t)
FALLOCATE (fallocate, off_t)
#ifdef __GLIBC__
POSITIONED (pwrite64, off64_t, const void *, size_t)
POSITIONED (pwritev64, off64_t, const struct iovec *, int)
TRUNCATE (ftruncate64, off64_t)
FALLOCATE (fallocate64, off64_t)
#endif

REPLACES int
linkat (int from_dir, const char *from, int to_dir, const char *to, int flags)
{
  return fails_path ("linkat", to)
           ? -1
           : REAL (linkat, from_dir, from, to_dir, to, flags);
}

REPLACES int
rename (const char *from, const char *to)
{
  return fails_path ("rename", to) ? -1 : REAL (rename, from, to);
}

REPLACES int
renameat2 (int from_dir, const char *from, int to_dir, const char *to,
           unsigned flags)
{
  return fails_path ("renameat2", to)
           ? -1
           : REAL (renameat2, from_dir, from, to_dir, to, flags);
}

/* Hold whoever opens this file. */
static void
hold (const char *path)
{
  char name[PATH_MAX];

  if (!held || strcmp (path, held) != 0)
    return;
  (void) snprintf (name, sizeof name, "%s.held", held);
  FILE *f = fopen (name, "we");
  if (f)
    (void) fclose (f);
  (void) snprintf (name, sizeof name, "%s.go", held);
  while (access (name, F_OK) == -1)
    usleep (10000);
}

/* Of the calls that open, those of directories count, and with O_TMPFILE. */
#define OPEN(name)                                                            \
  REPLACES int name (const char *path, int flags, ...)                        \
  {                                                                           \
    mode_t mode = 0;                                                          \
    struct stat st;                                                           \
                                                                              \
    hold (path);                                                              \
    if (flags & (O_CREAT | O_TMPFILE)) {                                      \
      va_list args;                                                           \
                                                                              \
      va_start (args, flags);                                                 \
      mode = va_arg (args, mode_t);                                           \
      va_end (args);                                                          \
    }                                                                         \
    if ((flags & O_TMPFILE) == O_TMPFILE && no_tmpfile) {                     \
      errno = EOPNOTSUPP;                                                     \
      return -1;                                                              \
    }                                                                         \
    if ((flags & O_DIRECTORY) && stat (path, &st) == 0                        \
        && fails ("open of a directory", &st))                                \
      return -1;                                                              \
    return REAL (name, path, flags, mode);                                    \
  }

OPEN (open)
#ifdef __GLIBC__
OPEN (open64)
#endif
