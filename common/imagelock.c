/* SPDX-License-Identifier: BSD-3-Clause */

/* qemu's locks on images (see imagelock.h).
 *
 * First the own locks are taken, and then it is looked for those of others that are
 * against them.  So of two who come at the same moment at least one sees the other.
 *
 * Knows nothing of overlays, or of nbdkit.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>

#include "common/imagelock.h"

/* The first bytes for what is done, and for what others must not do. */
#define DOES_BASE 100
#define FORBIDS_BASE 200

/* What can be done to an image: qemu's BLK_PERM_*, of which the locks know these. */
#define READS 1u
#define WRITES 2u
#define RESIZES 8u
#define NR_BITS 4

struct bits {
  unsigned does, forbids;
};

static const struct bits bits_of[] = {
  [IMAGE_UNUSED] = { 0, 0 },
  [IMAGE_READ] = { READS, WRITES | RESIZES },
  [IMAGE_WRITE] = { READS | WRITES | RESIZES, WRITES | RESIZES },
};

static struct flock
byte_lock (short type, int byte)
{
  return (struct flock) {
    .l_type = type,
    .l_whence = SEEK_SET,
    .l_start = byte,
    .l_len = 1,
  };
}

/* Lock or unlock one byte for each of BITS. */
static int
set (int fd, short type, int base, unsigned bits)
{
  for (int i = 0; i < NR_BITS; ++i) {
    struct flock lock = byte_lock (type, base + i);

    if ((bits >> i & 1) && fcntl (fd, F_OFD_SETLK, &lock) == -1) {
      if (errno == EACCES)
        errno = EAGAIN;
      return -1;
    }
  }
  return 0;
}

static int
set_both (int fd, short type, struct bits bits)
{
  return set (fd, type, DOES_BASE, bits.does) == -1
             || set (fd, type, FORBIDS_BASE, bits.forbids) == -1
           ? -1
           : 0;
}

/* Has nobody else one of these bytes?  -1 and errno. */
static int
look (int fd, int base, unsigned bits)
{
  for (int i = 0; i < NR_BITS; ++i) {
    struct flock lock = byte_lock (F_WRLCK, base + i);

    if (!(bits >> i & 1))
      continue;
    if (fcntl (fd, F_OFD_GETLK, &lock) == -1)
      return -1;
    if (lock.l_type != F_UNLCK) {
      errno = EAGAIN;
      return -1;
    }
  }
  return 0;
}

/* Those of A that B has not. */
static struct bits
without (struct bits a, struct bits b)
{
  return (struct bits) { a.does & ~b.does, a.forbids & ~b.forbids };
}

static bool
means_no_locks (int err)
{
  return err == ENOLCK || err == EOPNOTSUPP || err == EINVAL || err == ENOSYS;
}

int
imagelock_change (int fd, enum image_use from, enum image_use use, bool *works)
{
  const struct bits old = bits_of[from], new = bits_of[use];

  *works = true;
  if (set_both (fd, F_RDLCK, without (new, old)) == 0
      && look (fd, FORBIDS_BASE, new.does) == 0
      && look (fd, DOES_BASE, new.forbids) == 0)
    return set_both (fd, F_UNLCK, without (old, new));

  const int err = errno;
  (void) set_both (fd, F_UNLCK, without (new, old));
  *works = !means_no_locks (err);
  errno = err;
  return *works ? -1 : 0;
}
