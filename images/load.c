/* SPDX-License-Identifier: BSD-3-Clause */

/* Bringing a qcow2 image into an overlay (see load.h).
 *
 * A walk goes over the image in the order of the disk: each entry of the L1
 * table that gives an L2 table, and each entry of that which gives a cluster.
 * It decodes them (qcow2.c checks each for itself), and leaves what to do with
 * them to one of two visitors:
 *
 *   the check    when the file is opened.  Marks what every table and cluster
 *                takes of the file, so that none overlaps another, and expands
 *                what is compressed
 *   the transfer into an overlay, possibly much later, and several times.
 *                Joins neighbours to long runs
 *
 * The file may be written by somebody else between the two.  So the transfer
 * believes nothing because it was checked: it decodes again, and does no more
 * than the check has met.
 *
 * The size of a file is not trusted either: a sparse one of a few KiB can claim
 * to be as long as a file can be.  So all work follows what really is in it.
 * Tables are read in pieces, holes of the file are not read at all (an entry in
 * one is zero, and data in one is zeroes), and of the bitmaps of the check only
 * those pages take memory that get a mark.
 *
 * Knows the format through qcow2.h, and the overlay through blk.h only.
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
#include "images/load.h"
#include "format/qcow2.h"

/* As much of a table is read at once; and where data starts in the file, so
 * much is taken for data, up to the next multiple.  A power of two.
 */
#define PIECE UINT64_C (65536)

/* Holes are looked for in multiples of this. */
#define SECTOR UINT64_C (512)

/* The longest runs that are brought into the overlay at once, of data and of
 * zeroes.  They end at multiples of this on the disk, so that they end between
 * blocks of the overlay.
 */
#define DATA_RUN (UINT64_C (1) << 20)
#define ZERO_RUN (UINT64_C (1) << 30)

/* The address space for one bitmap of the file's clusters. */
#define MAX_BITMAP_SIZE (UINT64_C (4) << 30)

/* What a walk has met: the size of the work. */
struct amounts {
  uint64_t l2_tables;
  uint64_t changed_bytes; /* of the disk */
};

struct loaded {
  int fd;
  uint64_t file_size;
  struct timespec modified; /* the file, before it was checked */
  struct qcow2_header header;
  struct amounts checked;
  char name[]; /* for messages */
};

/*----------------------------------------------------------------------
 * Messages
 */

static int
refuse (const struct loaded *image, uint64_t offset, const char *what)
{
  nbdkit_error ("cow-load=%s: offset %" PRIu64 ": %s", image->name, offset,
                what);
  return -1;
}

static int
refuse_fault (const struct loaded *image, const struct qcow2_fault *fault)
{
  return refuse (image, fault->offset, fault->what);
}

static int
out_of_memory (const struct loaded *image)
{
  nbdkit_error ("cow-load=%s: out of memory", image->name);
  return -1;
}

static int
cannot_read (const struct loaded *image)
{
  nbdkit_error ("cow-load=%s: cannot read it: %m", image->name);
  return -1;
}

/*----------------------------------------------------------------------
 * The file
 */

/* Read a range that was inside the file when it was opened. */
static int
read_file (const struct loaded *image, void *buf, uint64_t count,
           uint64_t offset)
{
  while (count > 0) {
    const ssize_t r = pread (image->fd, buf, count, (off_t) offset);

    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return cannot_read (image);
    if (r == 0)
      return refuse (image, offset, "the file has become shorter");
    buf = (char *) buf + r;
    count -= (uint64_t) r;
    offset += (uint64_t) r;
  }
  return 0;
}

/* A range of the file that is a hole, so reads as zeroes, or is not known to be
 * one.
 */
struct stretch {
  uint64_t start, end;
  bool is_hole;
};

/* The stretch at OFFSET, a multiple of SECTOR, from there on at least.  *LAST is
 * the answer to the question before, empty at first.
 *
 * Only the end of a hole is asked for.  To look for the end of data takes some
 * file systems time in proportion to what is left of the file.
 */
static struct stretch
find_stretch (const struct loaded *image, struct stretch *last,
              uint64_t offset)
{
  if (last->start <= offset && offset < last->end)
    return *last;

  const off_t r = lseek (image->fd, (off_t) offset, SEEK_DATA);
  last->start = offset;
  last->is_hole = true;
  if (r == -1 && errno == ENXIO) /* there is none up to the file's end */
    last->end = UINT64_MAX;
  else if (r >= 0 && ROUND_DOWN ((uint64_t) r, SECTOR) > offset)
    last->end = ROUND_DOWN ((uint64_t) r, SECTOR);
  else { /* data, or the file system does not say */
    last->is_hole = false;
    last->end = ROUND_DOWN (offset, PIECE) + PIECE;
  }
  return *last;
}

/* Has the file changed since it was opened?  Reports it. */
static int
refuse_if_changed (const struct loaded *image)
{
  struct stat st;

  if (fstat (image->fd, &st) == -1)
    return cannot_read (image);
  if ((uint64_t) st.st_size == image->file_size
      && st.st_mtim.tv_sec == image->modified.tv_sec
      && st.st_mtim.tv_nsec == image->modified.tv_nsec)
    return 0;
  nbdkit_error (
    "cow-load=%s: the file has changed since it was checked; start "
    "the server again",
    image->name);
  return -1;
}

/*----------------------------------------------------------------------
 * The walk
 */

/* A cluster of the disk that is not unallocated. */
struct met {
  struct qcow2_cluster cluster;
  uint64_t entry;       /* offset of its L2 entry in the file */
  uint64_t disk_offset; /* of its first byte */
  uint64_t reach;       /* its bytes that are inside the disk */
};

struct walk {
  const struct loaded *image;
  /* The visitor, which returns -1 after reporting. */
  int (*visit_table) (struct walk *walk, uint64_t table, uint64_t entry);
  int (*visit_cluster) (struct walk *walk, const struct met *met);
  struct amounts limit; /* to be refused where there is more */
  struct amounts so_far;
  struct stretch tables; /* for find_stretch */
  char *pieces;          /* of an L1 and an L2 table, PIECE bytes each */
  /* To expand compressed clusters; made when the first one is met. */
  struct expander *expander;
  char *packed, *expanded;
};

static void
cleanup_walk (struct walk *w)
{
  expander_free (w->expander);
  free (w->expanded);
  free (w->packed);
  free (w->pieces);
}

#define CLEANUP_WALK __attribute__ ((cleanup (cleanup_walk)))

/* Read the next piece of a table that is not in a hole, between *OFFSET, which
 * goes there, and END.  *COUNT becomes its length, 0 at the end of the table.
 */
static int
read_piece (struct walk *w, void *piece, uint64_t *offset, uint64_t end,
            size_t *count)
{
  *count = 0;
  while (*offset < end) {
    const struct stretch s = find_stretch (w->image, &w->tables, *offset);

    if (!s.is_hole) {
      *count = (size_t) (MIN (s.end, end) - *offset);
      return read_file (w->image, piece, *count, *offset);
    }
    *offset = MIN (s.end, end);
  }
  return 0;
}

static int
refuse_if_more (const struct walk *w, uint64_t entry)
{
  if (w->so_far.l2_tables > w->limit.l2_tables
      || w->so_far.changed_bytes > w->limit.changed_bytes)
    return refuse (w->image, entry, "it has changed since it was checked");
  return 0;
}

/* Entry INDEX of PIECE, which is at OFFSET of the file. */
static int
walk_l2_entry (struct walk *w, const void *piece, unsigned index,
               uint64_t offset, uint64_t disk_offset)
{
  const struct loaded *image = w->image;
  const struct qcow2_header *h = &image->header;
  struct qcow2_fault fault;
  struct met met = {
    .entry = offset + (uint64_t) index * qcow2_l2_entry_size (h),
    .disk_offset = disk_offset,
    .reach = MIN (qcow2_cluster_size (h), h->disk_size - disk_offset),
  };

  if (qcow2_decode_l2_entry (h, image->file_size, piece, index, offset,
                             met.reach, &met.cluster, &fault)
      == -1)
    return refuse_fault (image, &fault);
  if (met.cluster.kind == QCOW2_UNALLOCATED)
    return 0;

  w->so_far.changed_bytes += met.reach;
  if (refuse_if_more (w, met.entry) == -1)
    return -1;
  return w->visit_cluster (w, &met);
}

/* The L2 table at offset TABLE, for the disk from DISK_OFFSET on. */
static int
walk_l2_table (struct walk *w, uint64_t table, uint64_t disk_offset)
{
  const struct qcow2_header *h = &w->image->header;
  const unsigned entry_size = qcow2_l2_entry_size (h);
  char *piece = w->pieces + PIECE;
  uint64_t offset = table;
  size_t count;

  for (;;) {
    if (read_piece (w, piece, &offset, table + qcow2_cluster_size (h), &count)
        == -1)
      return -1;
    if (count == 0)
      return 0;

    const uint64_t first = (offset - table) / entry_size;
    for (unsigned i = 0; i < count / entry_size; ++i) {
      const uint64_t pos = disk_offset + ((first + i) << h->cluster_bits);

      /* Entries beyond the end of the disk mean nothing. */
      if (pos >= h->disk_size)
        return 0;
      if (walk_l2_entry (w, piece, i, offset, pos) == -1)
        return -1;
    }
    offset += count;
  }
}

/* The entry of the L1 table that is at OFFSET of the file. */
static int
walk_l1_entry (struct walk *w, uint64_t big_endian, uint64_t offset,
               uint64_t disk_offset)
{
  const struct loaded *image = w->image;
  struct qcow2_fault fault;
  uint64_t table;

  if (qcow2_decode_l1_entry (&image->header, image->file_size, big_endian,
                             offset, &table, &fault)
      == -1)
    return refuse_fault (image, &fault);
  if (table == 0)
    return 0;

  w->so_far.l2_tables++;
  if (refuse_if_more (w, offset) == -1
      || w->visit_table (w, table, offset) == -1)
    return -1;
  return walk_l2_table (w, table, disk_offset);
}

/* The whole image.  W is to be declared with CLEANUP_WALK, or so the struct that
 * it is in.
 */
static int
walk (struct walk *w)
{
  const struct qcow2_header *h = &w->image->header;
  const uint64_t bytes_per_l2 = (uint64_t) qcow2_l2_entries (h)
                                << h->cluster_bits;
  uint64_t offset = h->l1_offset;
  size_t count;

  w->pieces = malloc (2 * PIECE);
  if (!w->pieces)
    return out_of_memory (w->image);

  for (;;) {
    if (read_piece (w, w->pieces, &offset, h->l1_offset + 8 * h->l1_entries,
                    &count)
        == -1)
      return -1;
    if (count == 0)
      return 0;

    for (size_t at = 0; at + 8 <= count; at += 8) {
      const uint64_t nr = (offset + at - h->l1_offset) / 8;
      uint64_t entry;

      memcpy (&entry, w->pieces + at, sizeof entry);
      if (walk_l1_entry (w, entry, offset + at, nr * bytes_per_l2) == -1)
        return -1;
    }
    offset += count;
  }
}

static int
make_expander (struct walk *w)
{
  const struct qcow2_header *h = &w->image->header;

  /* A descriptor cannot say more than two clusters. */
  w->packed = malloc (2 * qcow2_cluster_size (h));
  w->expanded = malloc (qcow2_cluster_size (h));
  if (w->packed && w->expanded)
    w->expander = expander_new (h->zstd ? COMPRESSION_ZSTD : COMPRESSION_ZLIB);
  return w->expander ? 0 : out_of_memory (w->image);
}

/* Expand a compressed cluster into w->expanded.  *TAKEN becomes the number of
 * bytes of the file that hold it.
 */
static int
expand (struct walk *w, const struct met *met, size_t *taken)
{
  const struct loaded *image = w->image;
  const uint64_t cluster_size = qcow2_cluster_size (&image->header);

  if (!w->expander && make_expander (w) == -1)
    return -1;
  if (read_file (image, w->packed, met->cluster.size, met->cluster.offset)
      == -1)
    return -1;
  *taken = expander_run (w->expander, w->packed, met->cluster.size,
                         w->expanded, cluster_size);
  if (*taken > 0)
    return 0;
  if (errno == ENOMEM)
    return out_of_memory (image);
  return refuse (image, met->entry,
                 "a compressed cluster does not expand to one cluster");
}

/*----------------------------------------------------------------------
 * The check
 */

struct check {
  struct walk walk; /* first: this is what the visitor gets */
  /* One bit for each cluster of the file, of which the last may be cut short.
   * Compressed clusters may share one, but nothing else may.
   */
  uint64_t *used;
  uint64_t *compressed;
  /* Different compressed clusters have different bytes, so all of them together
   * take no more bytes than there are in clusters with a mark.  (Else a short
   * file could hold the same few bytes again and again, each time to be
   * expanded.)
   */
  uint64_t compressed_room;
  uint64_t compressed_taken;
};

static void
cleanup_check (struct check *c)
{
  cleanup_walk (&c->walk);
  free (c->compressed);
  free (c->used);
}

#define CLEANUP_CHECK __attribute__ ((cleanup (cleanup_check)))

static bool
has_mark (const uint64_t *bitmap, uint64_t nr)
{
  return bitmap[nr / 64] >> nr % 64 & 1;
}

static void
set_mark (uint64_t *bitmap, uint64_t nr)
{
  bitmap[nr / 64] |= UINT64_C (1) << nr % 64;
}

/* Memory for the marks. */
static int
make_bitmaps (struct check *c)
{
  const struct loaded *image = c->walk.image;
  const uint64_t words
    = (image->file_size >> image->header.cluster_bits) / 64 + 1;

  if (words > MAX_BITMAP_SIZE / 8) {
    nbdkit_error ("cow-load=%s: the file is too long for its clusters of "
                  "%" PRIu64 " bytes: %" PRIu64 " is the limit",
                  image->name, qcow2_cluster_size (&image->header),
                  MAX_BITMAP_SIZE * 8 << image->header.cluster_bits);
    return -1;
  }
  c->used = calloc (words, 8);
  c->compressed = calloc (words, 8);
  return c->used && c->compressed ? 0 : out_of_memory (image);
}

/* Mark a range of the file, which lies inside it and starts on a cluster, as
 * used by one thing alone.  OFFSET is where the file says so, and WHAT says what
 * is wrong if something else uses it too.
 */
static int
mark_used (struct check *c, uint64_t start, uint64_t length, uint64_t offset,
           const char *what)
{
  const unsigned bits = c->walk.image->header.cluster_bits;

  for (uint64_t nr = start >> bits; nr << bits < start + length; ++nr) {
    if (has_mark (c->used, nr) || has_mark (c->compressed, nr))
      return refuse (c->walk.image, offset, what);
    set_mark (c->used, nr);
  }
  return 0;
}

static int
mark_compressed (struct check *c, const struct met *met)
{
  const unsigned bits = c->walk.image->header.cluster_bits;
  const uint64_t last = met->cluster.offset + met->cluster.size - 1;

  for (uint64_t nr = met->cluster.offset >> bits; nr <= last >> bits; ++nr) {
    if (has_mark (c->used, nr))
      return refuse (c->walk.image, met->entry,
                     "a compressed cluster lies where something else does");
    if (!has_mark (c->compressed, nr))
      c->compressed_room += UINT64_C (1) << bits;
    set_mark (c->compressed, nr);
  }
  return 0;
}

static int
check_compressed (struct check *c, const struct met *met)
{
  size_t taken;

  if (mark_compressed (c, met) == -1 || expand (&c->walk, met, &taken) == -1)
    return -1;
  c->compressed_taken += taken;
  if (c->compressed_taken > c->compressed_room)
    return refuse (c->walk.image, met->entry, "compressed clusters overlap");
  return 0;
}

static int
check_table (struct walk *w, uint64_t table, uint64_t entry)
{
  return mark_used ((struct check *) w, table,
                    qcow2_cluster_size (&w->image->header), entry,
                    "an L2 table lies where something else does");
}

static int
check_cluster (struct walk *w, const struct met *met)
{
  struct check *c = (struct check *) w;

  switch (met->cluster.kind) {
  case QCOW2_DATA:
  case QCOW2_MIXED:
    if (met->cluster.offset == 0)
      return 0;
    return mark_used (c, met->cluster.offset, 1, met->entry,
                      "a cluster lies where something else does");
  case QCOW2_COMPRESSED:
    return check_compressed (c, met);
  case QCOW2_UNALLOCATED:
  case QCOW2_ZERO: /* where it lies, if it does, is not read */
  default:
    return 0;
  }
}

/* Mark the refcount blocks. */
static int
check_reftable (struct check *c)
{
  const struct loaded *image = c->walk.image;
  const struct qcow2_header *h = &image->header;
  const uint64_t end = h->reftable_offset + h->reftable_size;
  CLEANUP_FREE char *piece = malloc (PIECE);
  uint64_t offset = h->reftable_offset;
  size_t count;

  if (!piece)
    return out_of_memory (image);
  for (;; offset += count) {
    if (read_piece (&c->walk, piece, &offset, end, &count) == -1)
      return -1;
    if (count == 0)
      return 0;

    for (size_t at = 0; at + 8 <= count; at += 8) {
      struct qcow2_fault fault;
      uint64_t entry, block;

      memcpy (&entry, piece + at, sizeof entry);
      if (qcow2_decode_reftable_entry (h, image->file_size, entry, offset + at,
                                       &block, &fault)
          == -1)
        return refuse_fault (image, &fault);
      if (block != 0
          && mark_used (c, block, qcow2_cluster_size (h), offset + at,
                        "a refcount block lies where something else does")
               == -1)
        return -1;
    }
  }
}

/* All but the header, which was decoded.  Fills in image->checked. */
static int
check_image (struct loaded *image)
{
  const struct qcow2_header *h = &image->header;
  CLEANUP_CHECK struct check c = {
    .walk = {
      .image = image,
      .visit_table = check_table,
      .visit_cluster = check_cluster,
      .limit = { .l2_tables = UINT64_MAX, .changed_bytes = UINT64_MAX },
    },
  };

  if (make_bitmaps (&c) == -1)
    return -1;
  set_mark (c.used, 0); /* the header */
  if (mark_used (&c, h->reftable_offset, h->reftable_size, h->reftable_offset,
                 "the refcount table overlaps the header")
        == -1
      || mark_used (&c, h->l1_offset, h->l1_size, h->l1_offset,
                    "the L1 table overlaps the refcount table")
           == -1
      || check_reftable (&c) == -1 || walk (&c.walk) == -1)
    return -1;
  image->checked = c.walk.so_far;
  return 0;
}

/* Fills in image->header. */
static int
open_header (struct loaded *image)
{
  const size_t length = (size_t) MIN (image->file_size, QCOW2_HEADER_BYTES);
  CLEANUP_FREE char *buf = malloc (QCOW2_HEADER_BYTES);
  struct qcow2_fault fault;

  if (!buf)
    return out_of_memory (image);
  if (read_file (image, buf, length, 0) == -1)
    return -1;
  if (qcow2_decode_header (buf, length, image->file_size, &image->header,
                           &fault)
      == -1)
    return refuse_fault (image, &fault);

  if (image->header.zstd && !expander_knows (COMPRESSION_ZSTD)) {
    nbdkit_error ("cow-load=%s: its clusters are compressed with zstd, which "
                  "this filter was built without; convert it with "
                  "\"qemu-img convert -O qcow2\"",
                  image->name);
    return -1;
  }
  return 0;
}

static int
open_file (struct loaded *image)
{
  struct stat st;

  if (fstat (image->fd, &st) == -1)
    return cannot_read (image);
  if (!S_ISREG (st.st_mode)) {
    nbdkit_error ("cow-load=%s: not a regular file", image->name);
    return -1;
  }
  image->file_size = (uint64_t) st.st_size;
  image->modified = st.st_mtim;
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

  if (open_file (image) == -1 || open_header (image) == -1
      || check_image (image) == -1) {
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
load_disk_size (const struct loaded *image)
{
  return image->header.disk_size;
}

uint64_t
load_changed_bytes (const struct loaded *image)
{
  return image->checked.changed_bytes;
}

bool
load_is_ours (const struct loaded *image)
{
  return image->header.ours;
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

static void
cleanup_transfer (struct transfer *t)
{
  cleanup_walk (&t->walk);
  free (t->buf);
}

#define CLEANUP_TRANSFER __attribute__ ((cleanup (cleanup_transfer)))

/* The overlay has said why, but for the end of the server, which is no error. */
static int
not_brought_in (const struct transfer *t, int err, uint64_t disk_offset)
{
  if (err != ESHUTDOWN)
    nbdkit_error ("cow-load=%s: could not be loaded: offset %" PRIu64
                  " of the disk cannot be changed",
                  t->walk.image->name, disk_offset);
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
    return out_of_memory (t->walk.image);
  if (read_file (t->walk.image, t->buf, run->length, run->file_offset) == -1)
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
  if (blk_zero (t->overlay, t->base, ZERO_ANY, (uint32_t) run.length,
                run.disk_offset, &err)
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

/* NEXT is not longer than a PIECE, or, if of zeroes, a cluster, and does not
 * cross one of the places where runs end.
 */
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
  const uint64_t unit = MIN (PIECE, qcow2_cluster_size (&image->header));
  struct stretch s = find_stretch (image, &t->data, offset);

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
  const struct run next = {
    .kind = RUN_OF_ZEROES,
    .length = length,
    .disk_offset = disk_offset,
  };

  return add_to_run (t, &next);
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

  if (expand (&t->walk, met, &taken) == -1)
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

  if (refuse_if_changed (image) == -1 || walk (&t.walk) == -1
      || end_run (&t) == -1)
    return -1;
  return refuse_if_changed (image);
}
