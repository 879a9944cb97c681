/* SPDX-License-Identifier: BSD-3-Clause */

/* Which base a diff belongs to (see identity.h).
 *
 * The size and a checksum of the first bytes tell most disks from each other: partition
 * tables and file systems have their unique numbers there.  Who names the base has an
 * exact check.
 *
 * Knows the format's words for this, and the base; nothing of files.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>
#include <zlib.h>

#include "common/cleanup.h"
#include "server/identity.h"
#include "server/names.h"

/* The checksum is that of so many bytes, or of all of a smaller base. */
#define CHECKED_BYTES UINT64_C (65536)

#define INSIST "cow-base-check=false loads it all the same"

static uint64_t
checked_bytes (uint64_t size)
{
  return MIN (size, CHECKED_BYTES);
}

/* The checksum of the base, or of the disk that OVERLAY (if there is one) makes of it.
 * -1 and *ERR, which was reported.
 */
static int
read_checksum (const struct base *base, struct overlay *overlay,
               uint32_t *checksum, int *err)
{
  const uint32_t count = (uint32_t) checked_bytes (base->size);
  CLEANUP_FREE void *buf = malloc (CHECKED_BYTES);
  int r = 0;

  if (!buf) {
    *err = errno;
    nbdkit_error ("cow: out of memory");
    return -1;
  }
  if (count > 0)
    r = overlay ? blk_read (live_disk (overlay), base, ON_READ_PASS, buf,
                            count, 0, err)
                : base_read (base, buf, count, 0, err);
  if (r == 0)
    *checksum = (uint32_t) crc32 (0, buf, count);
  return r;
}

int
identity_read (struct qcow2_base *identity, const struct base *base,
               const char *id, int *err)
{
  *identity = (struct qcow2_base) { .known = true, .size = base->size };
  if (id)
    memcpy (identity->id, id, MIN (strlen (id), QCOW2_MAX_BASE_ID));
  if (read_checksum (base, NULL, &identity->checksum, err) == -1)
    return -1;
  identity->has_checksum = true;
  return 0;
}

/* Somebody calls the base by another name. */
static int
check_id (const char *name, const struct qcow2_base *said,
          const struct qcow2_base *is)
{
  if (!said->id[0] || !is->id[0] || strcmp (said->id, is->id) == 0)
    return 0;
  nbdkit_error (
    "cow-load=%s: it was made over the base that is called \"%s\", "
    "and this one is called cow-base-id=%s; serve that one, or " INSIST,
    name, printable (said->id).text, printable (is->id).text);
  return -1;
}

/* The size of the disk is compared elsewhere; this is the size of the base, to the
 * byte.  RESIZED: somebody has changed the size of the disk in the image since.
 */
static int
check_size (const char *name, const struct qcow2_base *said,
            const struct qcow2_base *is, bool resized)
{
  if (resized || said->size == is->size)
    return 0;
  nbdkit_error ("cow-load=%s: it was made over a base of %" PRIu64
                " bytes, and this one has %" PRIu64
                "; serve that one, or " INSIST,
                name, said->size, is->size);
  return -1;
}

static int
check_checksum (const char *name, const struct qcow2_base *said,
                const struct identity_below *below)
{
  const struct qcow2_base *is = below->identity;
  uint32_t of_disk;
  int err;

  /* Of another number of bytes, it says nothing. */
  if (!said->has_checksum
      || checked_bytes (said->size) != checked_bytes (is->size))
    return 0;
  if (!is->has_checksum) {
    nbdkit_error ("cow-load=%s: the first bytes of the base cannot be read, "
                  "so as to see whether it was made over this one; " INSIST,
                  name);
    return -1;
  }
  if (said->checksum == is->checksum)
    return 0;
  if (below->overlay) {
    if (read_checksum (below->base, below->overlay, &of_disk, &err) == -1)
      return -1;
    if (said->checksum == of_disk)
      return 0;
  }
  nbdkit_error (
    "cow-load=%s: it was made over another base: the first %" PRIu64
    " bytes of this one are not the same; serve that one, or " INSIST,
    name, checked_bytes (is->size));
  return -1;
}

int
identity_check (const char *name, const struct qcow2_header *diff,
                const struct identity_below *below)
{
  const struct qcow2_base *said = &diff->base;
  const bool resized
    = diff->disk_size != ROUND_UP (said->size, UINT64_C (512));

  if (!said->known)
    return 0;
  /* What lies on others may have been made over a disk with a name of its own. */
  if (!below->overlay && check_id (name, said, below->identity) == -1)
    return -1;
  if (check_size (name, said, below->identity, resized) == -1)
    return -1;
  return check_checksum (name, said, below);
}

void
identity_warn_of_container (const char *name, const struct base *base)
{
  static atomic_flag told = ATOMIC_FLAG_INIT;
  char buf[512];
  const uint32_t count = (uint32_t) MIN (sizeof buf, base->size);
  int err;

  if (base_read (base, buf, count, 0, &err) == -1
      || !qcow2_is_image (buf, count) || atomic_flag_test_and_set (&told))
    return;
  nbdkit_error ("cow: warning: export \"%s\": the base is a qcow2 image, and "
                "clients see the bytes of its file, not the disk in it; to "
                "serve that: nbdkit --filter=cow nbd command=qemu-nbd arg=-r "
                "arg=-f arg=qcow2 arg=/PATH/TO/FILE",
                printable (name).text);
}
