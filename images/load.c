/* SPDX-License-Identifier: BSD-3-Clause */

/* Bringing a qcow2 image into an overlay (see load.h).
 *
 * An image is checked when it is opened (check.c), and brought into an overlay,
 * possibly much later, and several times.  Neighbours are joined to long runs.
 *
 * The file may be written by somebody else between the two.  So nothing is
 * believed because it was checked: it is decoded again, and no more is done than
 * the check has met.
 *
 * Knows the format through qcow2.h, the overlay through blk.h, and of its file only
 * in which directory it is.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "format/expand.h"
#include "images/check.h"
#include "images/load.h"
#include "images/walk.h"
#include "overlay/store.h"

/* The longest runs that are brought into the overlay at once, of data and of
 * zeroes.  They end at multiples of this on the disk, so that they end between
 * blocks of the overlay.
 */
#define DATA_RUN (UINT64_C (1) << 20)
#define ZERO_RUN (UINT64_C (1) << 30)

/*----------------------------------------------------------------------
 * Opening
 */

/* Fills in image->header. */
static int
open_header (struct loaded *image)
{
  const size_t length = (size_t) MIN (image->file_size, QCOW2_HEADER_BYTES);
  CLEANUP_FREE char *buf = malloc (QCOW2_HEADER_BYTES);
  struct qcow2_fault fault;

  if (!buf)
    return walk_out_of_memory (image);
  if (walk_read_file (image, buf, length, 0) == -1)
    return -1;
  if (qcow2_decode_header (buf, length, image->file_size, &image->header,
                           &fault)
      == -1)
    return walk_refuse_fault (image, &fault);

  if (image->header.zstd && !expander_knows (COMPRESSION_ZSTD)) {
    nbdkit_error ("cow-load=%s: its clusters are compressed with zstd, which "
                  "this filter was built without; convert it with "
                  "\"qemu-img convert -O qcow2\"",
                  image->name);
    return -1;
  }
  return 0;
}

/* The size of the file, and when it was changed.  A block device may go on behind
 * the end of the image.
 */
static int
look_at_file (const struct loaded *image, uint64_t *size,
              struct timespec *modified)
{
  struct stat st;
  off_t end;

  if (fstat (image->fd, &st) == -1)
    return walk_cannot_read (image);
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode)) {
    nbdkit_error ("cow-load=%s: neither a file nor a block device",
                  image->name);
    return -1;
  }
  end = S_ISBLK (st.st_mode) ? lseek (image->fd, 0, SEEK_END) : st.st_size;
  if (end == -1)
    return walk_cannot_read (image);
  *size = (uint64_t) end;
  *modified = st.st_mtim;
  return 0;
}

static void
warn_of_snapshots (const struct loaded *image)
{
  if (image->header.nr_snapshots > 0)
    (void) fprintf (
      stderr,
      "nbdkit: cow: warning: cow-load=%s: its internal snapshots "
      "(%" PRIu32 ") are ignored\n",
      image->name, image->header.nr_snapshots);
}

struct loaded *
load_open (const char *name, int fd)
{
  const size_t name_size = strlen (name) + 1;
  struct loaded *image = calloc (1, sizeof *image + name_size);

  if (!image) {
    nbdkit_error ("cow-load=%s: out of memory", name);
    close (fd);
    return NULL;
  }
  image->fd = fd;
  memcpy (image->name, name, name_size);

  if (look_at_file (image, &image->file_size, &image->modified) == -1
      || open_header (image) == -1 || check_image (image) == -1) {
    load_close (image);
    return NULL;
  }
  warn_of_snapshots (image);
  VERBOSE ("cow-load=%s: %" PRIu64 " bytes changed of %" PRIu64, name,
           image->checked.changed_bytes, image->header.disk_size);
  return image;
}

void
load_close (struct loaded *image)
{
  if (!image)
    return;
  close (image->fd);
  free (image);
}

uint64_t
load_changed_bytes (const struct loaded *image)
{
  return image->checked.changed_bytes;
}

const struct qcow2_header *
load_header (const struct loaded *image)
{
  return &image->header;
}

/*----------------------------------------------------------------------
 * The transfer
 */

/* A range of the disk to be brought in, which neighbours are joined to. */
struct run {
  enum {
    RUN_OF_DATA,
    RUN_OF_ZEROES,
  } kind;
  uint64_t length; /* 0: there is none */
  uint64_t disk_offset;
  uint64_t file_offset; /* of data */
};

struct transfer {
  struct walk walk; /* first: this is what the visitor gets */
  struct overlay *overlay;
  const struct base *base;
  struct stretch data; /* for find_stretch */
  struct run run;
  char *buf; /* for a run of data, DATA_RUN bytes; made when needed */
};

/* Has the file changed since it was opened?  Reports it. */
static int
refuse_if_changed (const struct loaded *image)
{
  struct timespec modified;
  uint64_t size;

  if (look_at_file (image, &size, &modified) == -1)
    return -1;
  if (size == image->file_size && modified.tv_sec == image->modified.tv_sec
      && modified.tv_nsec == image->modified.tv_nsec)
    return 0;
  nbdkit_error (
    "cow-load=%s: the file has changed since it was checked; start "
    "the server again",
    image->name);
  return -1;
}

static void
cleanup_transfer (struct transfer *t)
{
  walk_cleanup (&t->walk);
  free (t->buf);
}

#define CLEANUP_TRANSFER __attribute__ ((cleanup (cleanup_transfer)))

/* The overlay has said why, but for the end of the server, which is no error. */
static int
not_brought_in (const struct transfer *t, int err, uint64_t disk_offset)
{
  const struct loaded *image = t->walk.image;

  if (err == ENOSPC || err == EDQUOT || err == EFBIG)
    nbdkit_error ("cow-load=%s: could not be loaded: its data, up to %" PRIu64
                  " bytes, has to go to %s: %s; make room there, and connect "
                  "again",
                  image->name, image->checked.data_bytes,
                  overlay_store (t->overlay)->dir, strerror (err));
  else if (err != ESHUTDOWN)
    nbdkit_error ("cow-load=%s: could not be loaded: offset %" PRIu64
                  " of the disk cannot be changed",
                  image->name, disk_offset);
  return -1;
}

static int
write_bytes (const struct transfer *t, const void *buf, uint64_t count,
             uint64_t disk_offset)
{
  int err;

  if (blk_write (t->overlay, t->base, buf, (uint32_t) count, disk_offset, &err)
      == -1)
    return not_brought_in (t, err, disk_offset);
  return 0;
}

static int
transfer_data (struct transfer *t, const struct run *run)
{
  if (!t->buf)
    t->buf = malloc (DATA_RUN);
  if (!t->buf)
    return walk_out_of_memory (t->walk.image);
  if (walk_read_file (t->walk.image, t->buf, run->length, run->file_offset)
      == -1)
    return -1;
  return write_bytes (t, t->buf, run->length, run->disk_offset);
}

/* Bring in the run that was gathered. */
static int
end_run (struct transfer *t)
{
  const struct run run = t->run;
  int err;

  t->run.length = 0;
  if (run.length == 0)
    return 0;
  if (run.kind == RUN_OF_DATA)
    return transfer_data (t, &run);
  if (blk_zero (t->overlay, t->base, ZERO_ANY, ZERO_GIVES_BACK,
                (uint32_t) run.length, run.disk_offset, &err)
      == -1)
    return not_brought_in (t, err, run.disk_offset);
  return 0;
}

/* Does NEXT go on where RUN ends? */
static bool
goes_on (const struct run *run, const struct run *next)
{
  if (run->length == 0 || run->kind != next->kind
      || run->disk_offset + run->length != next->disk_offset)
    return false;
  if (run->kind == RUN_OF_ZEROES)
    return next->disk_offset % ZERO_RUN != 0;
  return run->file_offset + run->length == next->file_offset
         && next->disk_offset % DATA_RUN != 0;
}

/* NEXT does not cross one of the places where runs end. */
static int
add_to_run (struct transfer *t, const struct run *next)
{
  if (goes_on (&t->run, next)) {
    t->run.length += next->length;
    return 0;
  }
  if (end_run (t) == -1)
    return -1;
  t->run = *next;
  return 0;
}

/* How far the bytes of the file from OFFSET on, and before END, are a hole, or
 * are not.  Where a hole ends in the middle of a cluster, it is cut so as not to
 * split blocks of the overlay.
 */
static struct stretch
next_stretch (struct transfer *t, uint64_t offset, uint64_t end)
{
  const struct loaded *image = t->walk.image;
  const uint64_t unit = MIN (WALK_PIECE, qcow2_cluster_size (&image->header));
  struct stretch s = walk_find_stretch (image, &t->data, offset);

  s.start = offset;
  if (s.is_hole && s.end < end) {
    s.end = ROUND_DOWN (s.end, unit);
    s.is_hole = s.end > offset;
  }
  if (!s.is_hole)
    s.end = ROUND_DOWN (offset, unit) + unit;
  s.end = MIN (s.end, end);
  return s;
}

/* Bytes of the disk that are in the file, inside one cluster. */
static int
add_data (struct transfer *t, uint64_t disk_offset, uint64_t offset,
          uint64_t length)
{
  const uint64_t end = offset + length;

  while (offset < end) {
    const struct stretch s = next_stretch (t, offset, end);
    const struct run next = {
      .kind = s.is_hole ? RUN_OF_ZEROES : RUN_OF_DATA,
      .length = s.end - offset,
      .disk_offset = disk_offset,
      .file_offset = offset,
    };

    if (add_to_run (t, &next) == -1)
      return -1;
    disk_offset += next.length;
    offset = s.end;
  }
  return 0;
}

static int
add_zeroes (struct transfer *t, uint64_t disk_offset, uint64_t length)
{
  const uint64_t end = disk_offset + length;

  while (disk_offset < end) {
    const uint64_t run_end = ROUND_DOWN (disk_offset, ZERO_RUN) + ZERO_RUN;
    const struct run next = {
      .kind = RUN_OF_ZEROES,
      .length = MIN (run_end, end) - disk_offset,
      .disk_offset = disk_offset,
    };

    if (add_to_run (t, &next) == -1)
      return -1;
    disk_offset += next.length;
  }
  return 0;
}

/* "Extended L2 Entries": the first REACH bytes of a cluster whose subclusters
 * differ.
 */
static int
add_subclusters (struct transfer *t, const struct met *met, uint64_t reach)
{
  const uint64_t states = met->cluster.subclusters;
  const unsigned shift = t->walk.image->header.cluster_bits
                         - (unsigned) __builtin_ctz (SLOT_BLOCKS);
  unsigned next;

  for (unsigned i = 0; i < SLOT_BLOCKS && (uint64_t) i << shift < reach;
       i = next) {
    next = i + bitmap_run (states, i);

    const uint64_t start = (uint64_t) i << shift;
    const uint64_t length = MIN ((uint64_t) next << shift, reach) - start;
    const uint64_t disk_offset = met->disk_offset + start;
    const enum block_state state = bitmap_state (states, i);

    if (state == BLOCK_ALLOCATED
        && add_data (t, disk_offset, met->cluster.offset + start, length)
             == -1)
      return -1;
    if (state == BLOCK_ZERO && add_zeroes (t, disk_offset, length) == -1)
      return -1;
  }
  return 0;
}

static int
add_compressed (struct transfer *t, const struct met *met, uint64_t reach)
{
  size_t taken;

  if (walk_expand (&t->walk, met, &taken) == -1)
    return -1;
  return write_bytes (t, t->walk.expanded, reach, met->disk_offset);
}

static int
transfer_table (struct walk *w, uint64_t table, uint64_t entry)
{
  (void) w;
  (void) table;
  (void) entry;
  return 0;
}

static int
transfer_cluster (struct walk *w, const struct met *met)
{
  struct transfer *t = (struct transfer *) w;
  const uint64_t size = overlay_size (t->overlay);

  if (met->disk_offset >= size)
    return 0;
  const uint64_t reach = MIN (met->reach, size - met->disk_offset);

  switch (met->cluster.kind) {
  case QCOW2_DATA:
    return add_data (t, met->disk_offset, met->cluster.offset, reach);
  case QCOW2_MIXED:
    return add_subclusters (t, met, reach);
  case QCOW2_COMPRESSED:
    return add_compressed (t, met, reach);
  case QCOW2_ZERO:
    return add_zeroes (t, met->disk_offset, reach);
  case QCOW2_UNALLOCATED:
  default:
    return 0;
  }
}

int
load_into (const struct loaded *image, struct overlay *overlay,
           const struct base *base)
{
  CLEANUP_TRANSFER struct transfer t = {
    .walk = {
      .image = image,
      .visit_table = transfer_table,
      .visit_cluster = transfer_cluster,
      .limit = image->checked,
    },
    .overlay = overlay,
    .base = base,
  };

  if (refuse_if_changed (image) == -1 || walk_image (&t.walk) == -1
      || end_run (&t) == -1)
    return -1;
  return refuse_if_changed (image);
}
