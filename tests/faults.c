/* SPDX-License-Identifier: BSD-3-Clause */

/* See faults.h. */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "faults.h"
#include "overlay/map.h"

bool short_transfers, fail_punches, fail_truncates, no_tmpfile, no_seek_data;
bool no_threads;
atomic_uint nr_punches;
atomic_ullong longest_punch;
atomic_ullong bytes_read_from_files;
void (*before_punch) (void);
static int last_file = -1;

static int calls_left;
static int call_error;
static int failed;
static unsigned transfers;

void
fail_calls_from (int n, int err)
{
  calls_left = n;
  call_error = err;
  failed = 0;
}

int
call_has_failed (void)
{
  calls_left = 0;
  return failed;
}

/* For a call that would fail with ERR. */
static bool
fails_with (int err)
{
  if (calls_left == 0 || (calls_left > 1 && calls_left-- > 1))
    return false;
  if (!failed)
    failed = err;
  errno = err;
  return true;
}

static bool
fails (void)
{
  return fails_with (call_error);
}

static atomic_int calls_until_interrupt;
static bool interrupt_mutexes; /* those count, and not the other calls */
static void (*interrupt_function) (void *arg);
static void *interrupt_arg;

void
interrupt_call (int n, void (*function) (void *arg), void *arg)
{
  interrupt_function = function;
  interrupt_arg = arg;
  interrupt_mutexes = false;
  calls_until_interrupt = n;
}

void
interrupt_mutex (int n, void (*function) (void *arg), void *arg)
{
  interrupt_call (n, function, arg);
  interrupt_mutexes = true;
}

bool
call_was_interrupted (void)
{
  const bool it_was = calls_until_interrupt == 0;

  calls_until_interrupt = 0;
  return it_was;
}

static void
maybe_interrupt (bool mutex)
{
  if (mutex == interrupt_mutexes && calls_until_interrupt > 0
      && --calls_until_interrupt == 0)
    interrupt_function (interrupt_arg);
}

/* True: this transfer is to be interrupted. */
static bool
interrupted (void)
{
  if (!short_transfers || ++transfers % 2)
    return false;
  errno = EINTR;
  return true;
}

static size_t
shortened (size_t count)
{
  return short_transfers && count > 1 ? count - 1 : count;
}

unsigned long long
bytes_of_last_file (void)
{
  struct stat st;

  return fstat (last_file, &st) == 0 ? (unsigned long long) st.st_blocks * 512
                                     : 0;
}

extern void *__real_malloc (size_t size);
extern void *__real_calloc (size_t n, size_t size);
extern void *__real_realloc (void *old, size_t size);
extern int __real_open (const char *path, int flags, ...);
extern ssize_t __real_pread (int fd, void *buf, size_t count, off_t offset);
extern ssize_t __real_pwrite (int fd, const void *buf, size_t count,
                              off_t offset);
extern int __real_fallocate (int fd, int mode, off_t offset, off_t count);

extern void *__wrap_malloc (size_t size);
extern void *__wrap_calloc (size_t n, size_t size);
extern void *__wrap_realloc (void *old, size_t size);
extern int __wrap_open (const char *path, int flags, ...);
extern ssize_t __wrap_pread (int fd, void *buf, size_t count, off_t offset);
extern ssize_t __wrap_pwrite (int fd, const void *buf, size_t count,
                              off_t offset);
extern ssize_t __wrap_pwritev (int fd, const struct iovec *iov, int nr_iov,
                               off_t offset);
extern int __wrap_fallocate (int fd, int mode, off_t offset, off_t count);

void *
__wrap_malloc (size_t size)
{
  return fails_with (ENOMEM) ? NULL : __real_malloc (size);
}

void *
__wrap_calloc (size_t n, size_t size)
{
  return fails_with (ENOMEM) ? NULL : __real_calloc (n, size);
}

void *
__wrap_realloc (void *old, size_t size)
{
  return fails_with (ENOMEM) ? NULL : __real_realloc (old, size);
}

int
__wrap_open (const char *path, int flags, ...)
{
  va_list args;

  va_start (args, flags);
  const int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg (args, int) : 0;
  va_end (args);

  if (no_tmpfile && (flags & O_TMPFILE) == O_TMPFILE) {
    errno = EOPNOTSUPP;
    return -1;
  }
  if (fails ())
    return -1;
  last_file = __real_open (path, flags, mode);
  return last_file;
}

ssize_t
__wrap_pread (int fd, void *buf, size_t count, off_t offset)
{
  maybe_interrupt (false);
  if (fails () || interrupted ())
    return -1;

  const ssize_t r = __real_pread (fd, buf, shortened (count), offset);

  if (r > 0)
    bytes_read_from_files += (unsigned long long) r;
  return r;
}

ssize_t
__wrap_pwrite (int fd, const void *buf, size_t count, off_t offset)
{
  maybe_interrupt (false);
  if (fails () || interrupted ())
    return -1;
  return __real_pwrite (fd, buf, shortened (count), offset);
}

/* One element at a time, so that each can be the one that fails: the kernel
 * may stop between any two of them.
 */
ssize_t
__wrap_pwritev (int fd, const struct iovec *iov, int nr_iov, off_t offset)
{
  ssize_t total = 0;

  if (short_transfers) /* a short transfer that ends inside the first one */
    return __wrap_pwrite (fd, iov[0].iov_base, iov[0].iov_len, offset);

  for (int i = 0; i < nr_iov; ++i) {
    const ssize_t r
      = __wrap_pwrite (fd, iov[i].iov_base, iov[i].iov_len, offset + total);

    if (r == -1)
      return total > 0 ? total : -1;
    total += r;
  }
  return total;
}

int
__wrap_fallocate (int fd, int mode, off_t offset, off_t count)
{
  if (!(mode & FALLOC_FL_PUNCH_HOLE)) { /* to set space aside */
    if (fails ())
      return -1;
    if (mode != 0 && fail_punches) {
      errno = EOPNOTSUPP;
      return -1;
    }
    return __real_fallocate (fd, mode, offset, count);
  }
  if (before_punch) {
    void (*call) (void) = before_punch;

    before_punch = NULL;
    call ();
  }
  nr_punches++;
  if ((unsigned long long) count > longest_punch)
    longest_punch = (unsigned long long) count;
  if (fail_punches) {
    errno = EOPNOTSUPP;
    return -1;
  }
  return __real_fallocate (fd, mode, offset, count);
}

extern int __real_pthread_mutex_lock (pthread_mutex_t *mutex);
extern int __wrap_pthread_mutex_lock (pthread_mutex_t *mutex);

int
__wrap_pthread_mutex_lock (pthread_mutex_t *mutex)
{
  maybe_interrupt (true);
  return __real_pthread_mutex_lock (mutex);
}

/* Only where a test is linked with the map. */
extern const struct slot *__real_map_find (const struct map *map, uint64_t nr);
extern const struct slot *__wrap_map_find (const struct map *map, uint64_t nr);
#pragma weak __real_map_find
#pragma weak __real_pthread_mutex_lock

const struct slot *
__wrap_map_find (const struct map *map, uint64_t nr)
{
  maybe_interrupt (false);
  return __real_map_find (map, nr);
}

/* Only where a test is linked with --wrap=lseek and --wrap=fstat. */
extern off_t __real_lseek (int fd, off_t offset, int whence);
extern off_t __wrap_lseek (int fd, off_t offset, int whence);
extern int __real_fstat (int fd, struct stat *st);
extern int __wrap_fstat (int fd, struct stat *st);
#pragma weak __real_lseek
#pragma weak __real_fstat

off_t
__wrap_lseek (int fd, off_t offset, int whence)
{
  if (no_seek_data && whence == SEEK_DATA) {
    errno = EINVAL;
    return -1;
  }
  return fails () ? -1 : __real_lseek (fd, offset, whence);
}

int
__wrap_fstat (int fd, struct stat *st)
{
  return fails () ? -1 : __real_fstat (fd, st);
}

/* Only where a test is linked with --wrap=ftruncate and --wrap=pthread_create.  A file is
 * made longer ahead of its use, and nothing fails where that does; so these do not count
 * among the calls that fail from the N-th on.
 */
extern int __real_ftruncate (int fd, off_t size);
extern int __wrap_ftruncate (int fd, off_t size);
extern int __real_pthread_create (pthread_t *thread,
                                  const pthread_attr_t *attr,
                                  void *(*function) (void *arg), void *arg);
extern int __wrap_pthread_create (pthread_t *thread,
                                  const pthread_attr_t *attr,
                                  void *(*function) (void *arg), void *arg);
#pragma weak __real_ftruncate
#pragma weak __real_pthread_create

int
__wrap_ftruncate (int fd, off_t size)
{
  if (fail_truncates) {
    errno = EPERM;
    return -1;
  }
  return __real_ftruncate (fd, size);
}

int
__wrap_pthread_create (pthread_t *thread, const pthread_attr_t *attr,
                       void *(*function) (void *arg), void *arg)
{
  return no_threads ? EAGAIN
                    : __real_pthread_create (thread, attr, function, arg);
}
