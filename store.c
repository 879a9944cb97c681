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
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cleanup.h"
#include "store.h"

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
  store->file = NEWFILE_NONE;
  store->next_place = head;
  store->free_runs = NULL;
  store->nr_free_runs = store->max_free_runs = 0;
}

void
store_destroy (struct store *store)
{
  newfile_discard (&store->file);
  free (store->free_runs);
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

uint64_t
store_take (struct store *store, uint64_t wanted, uint64_t *place)
{
  LOCK_FOR_SCOPE (&store->lock);

  if (make_file (store) == -1)
    return 0;

  if (store->nr_free_runs > 0) {
    struct place_run *run = &store->free_runs[store->nr_free_runs - 1];
    const uint64_t count = MIN (run->count, wanted);

    *place = run->first;
    run->first += count;
    run->count -= count;
    if (run->count == 0)
      store->nr_free_runs--;
    return count;
  }

  const uint64_t last_place = store->end_limit / store->place_size - 1;
  if (store->next_place > last_place || last_place == UINT64_MAX) {
    errno = EFBIG;
    return 0;
  }
  const uint64_t count = MIN (wanted, last_place - store->next_place + 1);

  *place = store->next_place;
  store->next_place += count;
  return count;
}

/* Let the end of the file move back over places that were given back before.  Caller
 * holds the lock.
 */
static void
forget_free_places_at_end (struct store *store)
{
  for (size_t i = 0; i < store->nr_free_runs;) {
    struct place_run *run = &store->free_runs[i];

    if (run->first + run->count != store->next_place) {
      i++;
      continue;
    }
    store->next_place = run->first;
    *run = store->free_runs[--store->nr_free_runs];
    i = 0;
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
  if (store->nr_free_runs == store->max_free_runs) {
    const size_t max = store->max_free_runs ? 2 * store->max_free_runs : 16;
    struct place_run *runs
      = realloc (store->free_runs, max * sizeof *store->free_runs);

    /* Without memory to remember them, these places are not used again.  They
     * were punched: what is lost is a range of file offsets, no space.
     */
    if (!runs)
      return;
    store->free_runs = runs;
    store->max_free_runs = max;
  }
  store->free_runs[store->nr_free_runs++]
    = (struct place_run) { .first = place, .count = count };
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
