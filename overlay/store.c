/* SPDX-License-Identifier: BSD-3-Clause */

/* The overlay file (see store.h).
 *
 * Places are given out by appending, several at a time for a large request, so
 * that what is written in order lies in order.  Whoever took a place has it
 * alone until it stands in the map or is given back; so reading, writing and
 * punching need no lock here.  A place is punched before it can be given out
 * again.
 *
 * Knows nothing of blocks, of the map, or of nbdkit.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "overlay/store.h"

int
store_check_dir (const char *dir)
{
  struct newfile file;

  if (newfile_make (&file, dir, NEWFILE_ANONYMOUS) == -1)
    return -1;
  newfile_discard (&file);
  return 0;
}

char *
store_find_dir (const char **name)
{
  const char *tmpdir = getenv ("TMPDIR");

  *name = tmpdir && *tmpdir ? tmpdir : "/var/tmp";

  /* Absolute, because a server in the background changes to "/". */
  char *dir = realpath (*name, NULL);
  if (!dir)
    return NULL;
  if (store_check_dir (dir) == -1) {
    const int err = errno;

    free (dir);
    errno = err;
    return NULL;
  }
  return dir;
}

uint64_t
store_file_limit (void)
{
  struct rlimit limit;

  if (getrlimit (RLIMIT_NOFILE, &limit) == -1
      || limit.rlim_max == RLIM_INFINITY)
    return UINT64_MAX;
  return limit.rlim_max;
}

void
store_raise_file_limit (void)
{
  struct rlimit limit;

  if (getrlimit (RLIMIT_NOFILE, &limit) == 0
      && limit.rlim_cur != limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit (RLIMIT_NOFILE, &limit); /* the old one does for a while */
  }
}

void
store_ignore_file_size_signal (void)
{
  struct sigaction action;

  if (sigaction (SIGXFSZ, NULL, &action) == 0
      && !(action.sa_flags & SA_SIGINFO) && action.sa_handler == SIG_DFL) {
    action.sa_handler = SIG_IGN;
    sigaction (SIGXFSZ, &action, NULL);
  }
}

/* How long a file can be: every byte has an offset that off_t can hold, and whole
 * places lie within the limit of the process.
 */
static uint64_t
file_size_limit (void)
{
  struct rlimit limit;

  if (getrlimit (RLIMIT_FSIZE, &limit) == -1)
    return INT64_MAX;
  return MIN (limit.rlim_cur, INT64_MAX);
}

void
store_init (struct store *store, const char *dir, enum newfile_use use,
            uint64_t place_size, uint64_t head)
{
  store->dir = dir;
  store->use = use;
  store->place_size = place_size;
  pthread_mutex_init (&store->lock, NULL);
  store->end_limit = file_size_limit ();
  atomic_init (&store->no_clone, false);
  store->file = NEWFILE_NONE;
  store->next_place = head;
  store->free_words = NULL;
  store->nr_free_words = 0;
  store->nr_free = store->first_free = 0;
  store->write_back_early = false;
  writeback_init (&store->writeback);
}

void
store_write_back_early (struct store *store)
{
  store->write_back_early = true;
}

int
store_check_early (struct store *store)
{
  return writeback_end (&store->writeback);
}

int
store_check_written (struct store *store)
{
  return store->file.fd == -1
           ? 0
           : writeback_check (&store->writeback, store->file.fd);
}

int
store_sync (struct store *store)
{
  if (store->file.fd == -1)
    return 0;
  return store_check_early (store) == -1 ? -1 : fsync (store->file.fd);
}

void
store_destroy (struct store *store)
{
  writeback_destroy (&store->writeback);
  newfile_discard (&store->file);
  free (store->free_words);
  pthread_mutex_destroy (&store->lock);
}

/* Caller holds the lock. */
static int
make_file (struct store *store)
{
  return store->file.fd >= 0
           ? 0
           : newfile_make (&store->file, store->dir, store->use);
}

int
store_make_file (struct store *store)
{
  LOCK_FOR_SCOPE (&store->lock);

  return make_file (store);
}

uint64_t
store_end (struct store *store)
{
  LOCK_FOR_SCOPE (&store->lock);

  return store->next_place * store->place_size;
}

/* Was the place given back?  Caller holds the lock. */
static bool
is_free (const struct store *store, uint64_t place)
{
  return place / 64 < store->nr_free_words
         && (store->free_words[place / 64] >> place % 64 & 1);
}

static void
clear_free (struct store *store, uint64_t place)
{
  store->free_words[place / 64] &= ~(UINT64_C (1) << place % 64);
  store->nr_free--;
}

/* Take up to WANTED consecutive places from those that were given back, the first
 * ones of the file.  Caller holds the lock, and there are some.
 */
static uint64_t
take_free (struct store *store, uint64_t wanted, uint64_t *place)
{
  uint64_t i = store->first_free, count = 0;

  while (!is_free (store, i))
    i = store->free_words[i / 64] >> i % 64 == 0 ? (i / 64 + 1) * 64 : i + 1;
  *place = i;
  for (; count < wanted && is_free (store, i); ++i, ++count)
    clear_free (store, i);
  store->first_free = i;
  return count;
}

uint64_t
store_take (struct store *store, uint64_t wanted, uint64_t *place)
{
  LOCK_FOR_SCOPE (&store->lock);

  if (make_file (store) == -1)
    return 0;

  if (store->nr_free > 0)
    return take_free (store, wanted, place);

  const uint64_t last_place = store->end_limit / store->place_size - 1;
  if (store->next_place > last_place || last_place == UINT64_MAX) {
    errno = EFBIG;
    return 0;
  }
  const uint64_t count = MIN (wanted, last_place - store->next_place + 1);

  *place = store->next_place;
  store->next_place += count;
  if (store->write_back_early)
    writeback_grown (&store->writeback, store->file.fd,
                     store->next_place * store->place_size);
  return count;
}

/* Make room in the bitmap for places before END.  Caller holds the lock.  -1 and
 * ENOMEM.
 */
static int
grow_free_words (struct store *store, uint64_t end)
{
  const size_t needed = (size_t) ((end - 1) / 64 + 1);

  if (needed <= store->nr_free_words)
    return 0;

  const size_t nr = needed + needed / 2;
  uint64_t *words = realloc (store->free_words, nr * sizeof *words);
  if (!words)
    return -1;
  memset (words + store->nr_free_words, 0,
          (nr - store->nr_free_words) * sizeof *words);
  store->free_words = words;
  store->nr_free_words = nr;
  return 0;
}

/* Let the end of the file move back over places that were given back before.  Caller
 * holds the lock.
 */
static void
forget_free_places_at_end (struct store *store)
{
  while (store->nr_free > 0 && is_free (store, store->next_place - 1)) {
    uint64_t *word = &store->free_words[(store->next_place - 1) / 64];

    if (store->next_place % 64 == 0 && *word == UINT64_MAX) {
      *word = 0;
      store->nr_free -= 64;
      store->next_place -= 64;
    }
    else
      clear_free (store, --store->next_place);
  }
}

void
store_give_back (struct store *store, uint64_t place, uint64_t count)
{
  store_punch (store, place * store->place_size, count * store->place_size);

  LOCK_FOR_SCOPE (&store->lock);

  if (place + count == store->next_place) {
    store->next_place = place;
    forget_free_places_at_end (store);
    return;
  }

  /* Without memory to remember them, these places are not used again.  They were
   * punched: what is lost is a range of file offsets, no space.
   */
  if (grow_free_words (store, place + count) == -1)
    return;
  for (uint64_t i = place; i < place + count; ++i)
    store->free_words[i / 64] |= UINT64_C (1) << i % 64;
  store->nr_free += count;
  store->first_free = MIN (store->first_free, place);
}

int
store_read (const struct store *store, void *buf, size_t count,
            uint64_t offset)
{
  while (count > 0) {
    const ssize_t r = pread (store->file.fd, buf, count, (off_t) offset);

    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    if (r == 0) {
      /* Allocated blocks were written whole, so they end inside the file:
       * somebody else has cut it.
       */
      errno = EIO;
      return -1;
    }
    buf = (char *) buf + r;
    count -= (size_t) r;
    offset += (uint64_t) r;
  }
  return 0;
}

int
store_writev (const struct store *store, struct iovec *iov, int nr_iov,
              uint64_t offset)
{
  for (;;) {
    while (nr_iov > 0 && iov->iov_len == 0)
      iov++, nr_iov--;
    if (nr_iov == 0)
      return 0;

    ssize_t r = nr_iov == 1
                  ? pwrite (store->file.fd, iov->iov_base, iov->iov_len,
                            (off_t) offset)
                  : pwritev (store->file.fd, iov, nr_iov, (off_t) offset);
    if (r == -1 && errno == EINTR)
      continue;
    if (r == 0)
      errno = EIO;
    if (r <= 0)
      return -1;

    offset += (uint64_t) r;
    for (struct iovec *v = iov; r > 0; ++v) {
      const size_t n = MIN ((size_t) r, v->iov_len);

      v->iov_base = (char *) v->iov_base + n;
      v->iov_len -= n;
      r -= (ssize_t) n;
    }
  }
}

/* True if the file system shares the bytes of a range with another one. */
static bool
clone_range (struct store *store, uint64_t from, uint64_t to, uint64_t count)
{
  struct file_clone_range range = {
    .src_fd = store->file.fd,
    .src_offset = from,
    .src_length = count,
    .dest_offset = to,
  };

  if (atomic_load_explicit (&store->no_clone, memory_order_relaxed))
    return false;
  if (ioctl (store->file.fd, FICLONERANGE, &range) == 0)
    return true;

  /* ENOSPC and the like say nothing of the next time. */
  if (errno == EOPNOTSUPP || errno == ENOTTY || errno == EINVAL
      || errno == ENOSYS)
    atomic_store_explicit (&store->no_clone, true, memory_order_relaxed);
  return false;
}

int
store_copy (struct store *store, uint64_t from, uint64_t to, uint64_t count)
{
  char buf[64 << 10];

  if (clone_range (store, from, to, count))
    return 0;
  while (count > 0) {
    const size_t n = MIN (count, sizeof buf);
    struct iovec iov = { .iov_base = buf, .iov_len = n };

    if (store_read (store, buf, n, from) == -1
        || store_writev (store, &iov, 1, to) == -1)
      return -1;
    from += n;
    to += n;
    count -= n;
  }
  return 0;
}

void
store_punch (const struct store *store, uint64_t offset, uint64_t count)
{
  const int err = errno;

  while (fallocate (store->file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    (off_t) offset, (off_t) count)
           == -1
         && errno == EINTR)
    ;
  errno = err;
}

int
store_set_aside (const struct store *store, uint64_t offset, uint64_t count)
{
  int r;

  while ((r = fallocate (store->file.fd, 0, (off_t) offset, (off_t) count))
           == -1
         && errno == EINTR)
    ;
  return r;
}

int
store_truncate (const struct store *store, uint64_t size)
{
  int r;

  while ((r = ftruncate (store->file.fd, (off_t) size)) == -1
         && errno == EINTR)
    ;
  return r;
}

void
store_prefetch (const struct store *store, uint64_t offset, uint64_t count)
{
  posix_fadvise (store->file.fd, (off_t) offset, (off_t) count,
                 POSIX_FADV_WILLNEED);
}
