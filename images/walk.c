/* SPDX-License-Identifier: BSD-3-Clause */

/* A walk over a qcow2 image (see walk.h).
 *
 * The walk goes over the image in the order of the disk: each entry of the L1
 * table that gives an L2 table, and each entry of that which gives a cluster.
 * It decodes them (qcow2.c checks each for itself), and leaves what to do with
 * them to its visitor.  An L2 table may be there for more than one entry of the L1
 * table if all that it says is zero: images of this filter have such.
 *
 * The size of a file is not trusted: a sparse one of a few KiB can claim to be
 * as long as a file can be.  So all work follows what really is in it.  Tables
 * are read in pieces, and holes of the file are not read at all (an entry in
 * one is zero, and data in one is zeroes).
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "format/expand.h"
#include "images/walk.h"

/* Holes are looked for in multiples of this. */
#define SECTOR UINT64_C (512)

/*----------------------------------------------------------------------
 * Messages
 */

int
walk_refuse (const struct loaded *image, uint64_t offset, const char *what)
{
  nbdkit_error ("cow-load=%s: offset %" PRIu64 ": %s", image->name, offset,
                what);
  return -1;
}

int
walk_refuse_fault (const struct loaded *image, const struct qcow2_fault *fault)
{
  return walk_refuse (image, fault->offset, fault->what);
}

int
walk_out_of_memory (const struct loaded *image)
{
  nbdkit_error ("cow-load=%s: out of memory", image->name);
  return -1;
}

int
walk_cannot_read (const struct loaded *image)
{
  nbdkit_error ("cow-load=%s: cannot read it: %m", image->name);
  return -1;
}

/*----------------------------------------------------------------------
 * The file
 */

int
walk_read_file (const struct loaded *image, void *buf, uint64_t count,
                uint64_t offset)
{
  while (count > 0) {
    const ssize_t r = pread (image->fd, buf, count, (off_t) offset);

    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return walk_cannot_read (image);
    if (r == 0)
      return walk_refuse (image, offset, "the file has become shorter");
    buf = (char *) buf + r;
    count -= (uint64_t) r;
    offset += (uint64_t) r;
  }
  return 0;
}

struct stretch
walk_find_stretch (const struct loaded *image, struct stretch *last,
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
    last->end = ROUND_DOWN (offset, WALK_PIECE) + WALK_PIECE;
  }
  return *last;
}

/*----------------------------------------------------------------------
 * The walk
 */

void
walk_cleanup (struct walk *w)
{
  expander_free (w->expander);
  free (w->expanded);
  free (w->packed);
  free (w->pieces);
}

int
walk_read_piece (struct walk *w, void *piece, uint64_t *offset, uint64_t end,
                 size_t *count)
{
  *count = 0;
  while (*offset < end) {
    const struct stretch s = walk_find_stretch (w->image, &w->tables, *offset);

    if (!s.is_hole) {
      *count = (size_t) (MIN (s.end, end) - *offset);
      return walk_read_file (w->image, piece, *count, *offset);
    }
    *offset = MIN (s.end, end);
  }
  return 0;
}

/* The bytes of the disk that an L2 table is for. */
static uint64_t
bytes_per_l2 (const struct qcow2_header *h)
{
  return (uint64_t) qcow2_l2_entries (h) << h->cluster_bits;
}

static int
refuse_if_more (const struct walk *w, uint64_t entry)
{
  if (w->so_far.l2_tables > w->limit.l2_tables
      || w->so_far.changed_bytes > w->limit.changed_bytes)
    return walk_refuse (w->image, entry,
                        "it has changed since it was checked");
  return 0;
}

/* Entry INDEX of WALK_PIECE, which is at OFFSET of the file. */
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
    return walk_refuse_fault (image, &fault);
  if (met.cluster.kind == QCOW2_UNALLOCATED)
    return 0;

  w->so_far.changed_bytes += met.reach;
  if (met.cluster.kind == QCOW2_ZERO)
    w->nr_zero++;
  else
    w->so_far.data_bytes += met.reach;
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
  char *piece = w->pieces + WALK_PIECE;
  uint64_t offset = table;
  size_t count;

  for (;;) {
    if (walk_read_piece (w, piece, &offset, table + qcow2_cluster_size (h),
                         &count)
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

/* The last zero table once more, for the entry of the L1 table that is at offset ENTRY, and
 * for the disk from DISK_OFFSET on.
 */
static int
walk_zero_table (struct walk *w, uint64_t entry, uint64_t disk_offset)
{
  const struct qcow2_header *h = &w->image->header;
  const struct met met = {
    .cluster = { .kind = QCOW2_ZERO },
    .entry = entry,
    .disk_offset = disk_offset,
    .reach = MIN (bytes_per_l2 (h), h->disk_size - disk_offset),
  };

  w->so_far.changed_bytes += met.reach;
  return refuse_if_more (w, entry) == -1 ? -1 : w->visit_cluster (w, &met);
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
    return walk_refuse_fault (image, &fault);
  if (table == 0)
    return 0;

  w->so_far.l2_tables++;
  if (refuse_if_more (w, offset) == -1)
    return -1;
  if (table == w->zero_table)
    return walk_zero_table (w, offset, disk_offset);

  w->nr_zero = 0;
  if (w->visit_table (w, table, offset) == -1
      || walk_l2_table (w, table, disk_offset) == -1)
    return -1;
  if (w->nr_zero == qcow2_l2_entries (&image->header))
    w->zero_table = table;
  return 0;
}

int
walk_image (struct walk *w)
{
  const struct qcow2_header *h = &w->image->header;
  uint64_t offset = h->l1_offset;
  size_t count;

  w->pieces = malloc (2 * WALK_PIECE);
  if (!w->pieces)
    return walk_out_of_memory (w->image);

  for (;;) {
    if (walk_read_piece (w, w->pieces, &offset,
                         h->l1_offset + 8 * h->l1_entries, &count)
        == -1)
      return -1;
    if (count == 0)
      return 0;

    for (size_t at = 0; at + 8 <= count; at += 8) {
      const uint64_t nr = (offset + at - h->l1_offset) / 8;
      uint64_t entry;

      memcpy (&entry, w->pieces + at, sizeof entry);
      if (walk_l1_entry (w, entry, offset + at, nr * bytes_per_l2 (h)) == -1)
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
  return w->expander ? 0 : walk_out_of_memory (w->image);
}

int
walk_expand (struct walk *w, const struct met *met, size_t *taken)
{
  const struct loaded *image = w->image;
  const uint64_t cluster_size = qcow2_cluster_size (&image->header);

  if (!w->expander && make_expander (w) == -1)
    return -1;
  if (walk_read_file (image, w->packed, met->cluster.size, met->cluster.offset)
      == -1)
    return -1;
  *taken = expander_run (w->expander, w->packed, met->cluster.size,
                         w->expanded, cluster_size);
  if (*taken > 0)
    return 0;
  if (errno == ENOMEM)
    return walk_out_of_memory (image);
  return walk_refuse (image, met->entry,
                      "a compressed cluster does not expand to one cluster");
}
