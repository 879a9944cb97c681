/* SPDX-License-Identifier: BSD-3-Clause */

/* The check of an image, when it is opened (see check.h).
 *
 * Marks what every table and cluster takes of the file, so that none overlaps
 * another, and expands what is compressed.  Of the bitmaps for the marks only
 * those pages take memory that get one.
 */

#include <config.h>

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "images/check.h"
#include "images/walk.h"

/* The address space for one bitmap of the file's clusters. */
#define MAX_BITMAP_SIZE (UINT64_C (4) << 30)

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
  walk_cleanup (&c->walk);
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
  return c->used && c->compressed ? 0 : walk_out_of_memory (image);
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
      return walk_refuse (c->walk.image, offset, what);
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
      return walk_refuse (
        c->walk.image, met->entry,
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

  if (mark_compressed (c, met) == -1
      || walk_expand (&c->walk, met, &taken) == -1)
    return -1;
  c->compressed_taken += taken;
  if (c->compressed_taken > c->compressed_room)
    return walk_refuse (c->walk.image, met->entry,
                        "compressed clusters overlap");
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
  CLEANUP_FREE char *piece = malloc (WALK_PIECE);
  uint64_t offset = h->reftable_offset;
  size_t count;

  if (!piece)
    return walk_out_of_memory (image);
  for (;; offset += count) {
    if (walk_read_piece (&c->walk, piece, &offset, end, &count) == -1)
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
        return walk_refuse_fault (image, &fault);
      if (block != 0
          && mark_used (c, block, qcow2_cluster_size (h), offset + at,
                        "a refcount block lies where something else does")
               == -1)
        return -1;
    }
  }
}

int
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
      || check_reftable (&c) == -1 || walk_image (&c.walk) == -1)
    return -1;
  image->checked = c.walk.so_far;
  return 0;
}
