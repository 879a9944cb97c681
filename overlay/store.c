/* SPDX-License-Identifier: BSD-3-Clause */

/* The overlay file (see store.h).
 *
 * Whoever took a part of it (log.c) has it alone, so that reading, writing and
 * punching need no lock.
 *
 * Knows nothing of blocks, of the map, or of nbdkit.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "overlay/store.h"

void
store_init (struct store *store, const char *dir, enum newfile_use use,
            enum store_write_back write_back)
{
  store->dir = dir;
  store->use = use;
  store->write_back = write_back;
  mutex_init (&store->lock, RANK_STORE);
  store->file = NEWFILE_NONE;
  writeback_init (&store->writeback);
}

void
store_grown (struct store *store, uint64_t end)
{
  if (store->write_back == STORE_WRITES_BACK_EARLY)
    writeback_grown (&store->writeback, store->file.fd, end);
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
  if (!store_has_file (store))
    return 0;
  return store_check_early (store) == -1 ? -1 : fsync (store->file.fd);
}

void
store_destroy (struct store *store)
{
  writeback_destroy (&store->writeback);
  newfile_discard (&store->file);
  mutex_destroy (&store->lock);
}

int
store_make_file (struct store *store)
{
  HOLD (&store->lock);

  return store->file.fd >= 0
           ? 0
           : newfile_make (&store->file, store->dir, store->use);
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

int
store_copy (const struct store *store, uint64_t from, uint64_t to,
            uint64_t count)
{
  char buf[64 << 10];

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

static int
allocate (const struct store *store, int mode, uint64_t offset, uint64_t count)
{
  int r;

  while ((r = fallocate (store->file.fd, mode, (off_t) offset, (off_t) count))
           == -1
         && errno == EINTR)
    ;
  return r;
}

int
store_set_aside (const struct store *store, uint64_t offset, uint64_t count)
{
  return allocate (store, 0, offset, count);
}

int
store_zero_range (const struct store *store, uint64_t offset, uint64_t count)
{
  return allocate (store, FALLOC_FL_ZERO_RANGE, offset, count);
}

int
store_write_zeroes (const struct store *store, uint64_t offset, uint64_t count)
{
  static const char zeroes[64 << 10];

  while (count > 0) {
    const uint64_t n = MIN (count, sizeof zeroes);
    struct iovec iov = { .iov_base = (char *) zeroes, .iov_len = n };

    if (store_writev (store, &iov, 1, offset) == -1)
      return -1;
    offset += n;
    count -= n;
  }
  return 0;
}

int
store_size (const struct store *store, uint64_t *size)
{
  struct stat st;

  if (fstat (store->file.fd, &st) == -1)
    return -1;
  *size = (uint64_t) st.st_size;
  return 0;
}

uint64_t
store_extents_on_disk (const struct store *store, uint64_t offset,
                       uint64_t count, uint64_t most)
{
  union {
    struct fiemap map;
    char bytes[sizeof (struct fiemap) + 64 * sizeof (struct fiemap_extent)];
  } answer;
  const struct fiemap_extent *extents = answer.map.fm_extents;
  const uint64_t end = offset + count;
  uint64_t nr = 0;

  memset (&answer, 0, sizeof answer);
  while (offset < end && nr < most) {
    answer.map = (struct fiemap) { .fm_start = offset,
                                   .fm_length = end - offset,
                                   .fm_extent_count = 64 };
    if (ioctl (store->file.fd, FS_IOC_FIEMAP, &answer.map) == -1
        || answer.map.fm_mapped_extents == 0)
      break;
    for (uint32_t i = 0; i < answer.map.fm_mapped_extents; ++i) {
      nr += !(extents[i].fe_flags & FIEMAP_EXTENT_DELALLOC);
      offset = extents[i].fe_logical + extents[i].fe_length;
    }
    if (answer.map.fm_mapped_extents < 64)
      break;
  }
  return MIN (nr, most);
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
