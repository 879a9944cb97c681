/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay file becomes an image where it lies (see finish.h).
 *
 * Clusters lie where the overlay put them, and tables where tables.c has space for them.
 * Refcounts are collected in a bitmap of the file, as each is 0 or 1.
 *
 * Knows the format, the map and the file, but no locks, exports, or names.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "images/finish.h"

/* Writes pieces that come in any order of the file, those that lie one behind the
 * other together.
 */
struct writer {
  const struct store *store;
  char *buf;
  size_t size, used;
  uint64_t offset; /* of buf in the file */
};

static int
writer_flush (struct writer *w)
{
  struct iovec iov = { .iov_base = w->buf, .iov_len = w->used };

  w->used = 0;
  return store_writev (w->store, &iov, 1, w->offset);
}

/* Room for COUNT bytes (no more than size) that will be at OFFSET; NULL and
 * errno.
 */
static void *
writer_append (struct writer *w, size_t count, uint64_t offset)
{
  if (w->used > 0
      && (w->offset + w->used != offset || w->size - w->used < count)
      && writer_flush (w) == -1)
    return NULL;
  if (w->used == 0)
    w->offset = offset;
  w->used += count;
  return w->buf + (w->used - count);
}

/* A bit for each cluster of the file that is in use. */
struct used {
  uint64_t *words;
  uint64_t nr_words;
  uint64_t end; /* of the last one in use, in clusters */
};

static int
mark_used (struct used *u, uint64_t first, uint64_t count)
{
  const uint64_t needed = (first + count) / 64 + 1;

  if (needed > u->nr_words) {
    const uint64_t nr = needed + needed / 8;
    uint64_t *words = realloc (u->words, nr * sizeof *words);

    if (!words)
      return -1;
    memset (words + u->nr_words, 0, (nr - u->nr_words) * sizeof *words);
    u->words = words;
    u->nr_words = nr;
  }
  for (uint64_t i = first; i < first + count; ++i)
    u->words[i / 64] |= UINT64_C (1) << i % 64;
  u->end = MAX (u->end, first + count);
  return 0;
}

static bool
is_used (const struct used *u, uint64_t nr)
{
  return nr / 64 < u->nr_words && (u->words[nr / 64] >> nr % 64 & 1);
}

/* The image that is being made of an overlay file. */
struct finish {
  const struct image_source *s;
  struct tables *tables;
  struct writer writer;
  struct used used;
  uint64_t *l1;       /* big-endian */
  uint64_t *reftable; /* big-endian */
  uint64_t nr_refcount_blocks;
};

static int
mark_bytes (struct finish *f, uint64_t offset, uint64_t size)
{
  const struct qcow2_geometry *g = &f->s->geometry;

  return mark_used (&f->used, offset / g->cluster_size,
                    qcow2_clusters (g, size));
}

/* Mark the data clusters of a slot. */
static int
mark_slot (struct finish *f, struct slot_pair pair)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const uint64_t offset = pair.place * slot_size (f->s);
  uint32_t blocks = bitmap_allocated (pair.state);

  if (blocks && g->format == QCOW2_EXTENDED)
    return mark_bytes (f, offset, g->cluster_size);
  while (blocks) {
    const unsigned first = (unsigned) __builtin_ctz (blocks);
    const unsigned count = bitmap_run_of_ones (blocks, first);

    if (mark_bytes (f, offset + (uint64_t) first * g->block_size,
                    (uint64_t) count * g->block_size)
        == -1)
      return -1;
    blocks &= ~bitmap_mask (first, count);
  }
  return 0;
}

/* A cluster for a table, in use. */
static int
take_cluster (struct finish *f, uint64_t *offset)
{
  if (tables_take (f->tables, offset) == -1)
    return -1;
  return mark_bytes (f, *offset, f->s->geometry.cluster_size);
}

/* Write the L2 table of the slots from NR on.  SLOT is that of slot NR. */
static int
finish_l2_table (struct finish *f, uint64_t nr, struct image_slot slot)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const uint64_t l2 = nr / g->slots_per_l2;
  const uint64_t end = l2_end (f->s, l2);
  uint64_t offset;
  void *table;

  if (take_cluster (f, &offset) == -1)
    return -1;
  table = writer_append (&f->writer, g->cluster_size, offset);
  if (!table)
    return -1;
  memset (table, 0, g->cluster_size);
  f->l1[l2] = qcow2_l1_entry (offset);

  while (nr < end) {
    qcow2_encode_slot (g, table, nr % g->slots_per_l2, slot.pair.state,
                       slot.pair.place * slot_size (f->s), QCOW2_SPACED);
    if (mark_slot (f, slot.pair) == -1)
      return -1;
    nr = next_slot (f->s, nr + 1, end, &slot);
  }
  return 0;
}

static int
finish_l2_tables (struct finish *f)
{
  const uint64_t nr_slots = f->s->map->nr_slots;
  struct image_slot slot;
  uint64_t nr = next_slot (f->s, 0, nr_slots, &slot);

  while (nr < nr_slots) {
    if (finish_l2_table (f, nr, slot) == -1)
      return -1;
    nr = next_slot (f->s, l2_end (f->s, nr / f->s->geometry.slots_per_l2),
                    nr_slots, &slot);
  }
  return 0;
}

/* Where the last cluster in use ends. */
static uint64_t
end_of_used (const struct finish *f)
{
  return f->used.end * f->s->geometry.cluster_size;
}

/* Take a refcount block, which the refcount table has another entry for. */
static int
take_refcount_block (struct finish *f)
{
  const uint64_t max = f->tables->reftable_room / 8;
  uint64_t offset;

  if (f->nr_refcount_blocks == max) {
    errno = EFBIG;
    return -1;
  }
  if (take_cluster (f, &offset) == -1)
    return -1;
  f->reftable[f->nr_refcount_blocks++] = qcow2_reftable_entry (offset);
  return mark_bytes (f, f->tables->reftable_offset, f->nr_refcount_blocks * 8);
}

/* Take refcount blocks for all that is in use, also themselves and their table. */
static int
take_refcounts (struct finish *f)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const uint64_t per_block = qcow2_refcounts_per_block (g);

  if (tables_have_refcounts (f->tables) == -1)
    return -1;
  f->reftable = calloc (f->tables->reftable_room / 8, sizeof *f->reftable);
  if (!f->reftable)
    return -1;
  while (f->nr_refcount_blocks * per_block * g->cluster_size < end_of_used (f))
    if (take_refcount_block (f) == -1)
      return -1;
  return 0;
}

static int
finish_refcount_blocks (struct finish *f)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const uint64_t per_block = qcow2_refcounts_per_block (g);

  for (uint64_t i = 0; i < f->nr_refcount_blocks; ++i) {
    uint16_t *block
      = writer_append (&f->writer, g->cluster_size, be64toh (f->reftable[i]));

    if (!block)
      return -1;
    for (uint64_t j = 0; j < per_block; ++j)
      block[j] = htobe16 (is_used (&f->used, i * per_block + j));
  }
  return 0;
}

/* Write those pages of TABLE that hold anything.  The others are holes. */
static int
finish_table (struct finish *f, const uint64_t *table, uint64_t entries,
              uint64_t offset)
{
  const uint64_t per_page = 512;

  for (uint64_t i = 0; i < entries; i += per_page) {
    const uint64_t count = MIN (per_page, entries - i);
    uint64_t any = 0;

    for (uint64_t j = 0; j < count; ++j)
      any |= table[i + j];
    if (any) {
      void *page = writer_append (&f->writer, count * 8, offset + i * 8);

      if (!page)
        return -1;
      memcpy (page, table + i, count * 8);
    }
  }
  return 0;
}

static int
finish_header (struct finish *f)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const struct qcow2_layout layout = {
    .l1_offset = f->tables->l1_offset,
    .reftable_offset = f->tables->reftable_offset,
    .reftable_clusters = qcow2_clusters (g, f->nr_refcount_blocks * 8),
    .backing_file = f->s->backing_file,
    .backing_format = f->s->backing_format,
    .base = f->s->base,
  };

  CLEANUP_FREE char *header = malloc (g->cluster_size);

  if (!header)
    return -1;
  if (qcow2_encode_header (header, g, &layout) == -1) {
    errno = ENAMETOOLONG;
    return -1;
  }

  /* All of it is in the first page, for which there is space. */
  struct iovec iov = { .iov_base = header, .iov_len = 4096 };
  return store_writev (f->s->store, &iov, 1, 0);
}

static uint64_t
end_of_image (const struct finish *f)
{
  return MAX (end_of_used (f), QCOW2_MIN_FILE_SIZE);
}

/* Its end may be a hole. */
static int
extend_file (const struct store *store, uint64_t end)
{
  uint64_t size;

  if (store_size (store, &size) == -1)
    return -1;
  return size < end ? store_truncate (store, end) : 0;
}

static int
finish_all (struct finish *f)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const struct tables *t = f->tables;

  tables_take_again (f->tables);
  if (mark_bytes (f, 0, g->cluster_size) == -1
      || mark_bytes (f, t->l1_offset, g->l1_entries * 8) == -1
      || finish_l2_tables (f) == -1 || take_refcounts (f) == -1)
    return -1;

  if (finish_refcount_blocks (f) == -1
      || finish_table (f, f->l1, g->l1_entries, t->l1_offset) == -1
      || finish_table (f, f->reftable, f->nr_refcount_blocks,
                       t->reftable_offset)
           == -1
      || writer_flush (&f->writer) == -1 || finish_header (f) == -1
      || extend_file (f->s->store, end_of_image (f)) == -1)
    return -1;
  tables_give_back (f->tables);
  return 0;
}

int
image_finish (const struct image_source *source, struct tables *tables,
              uint64_t *end)
{
  const struct qcow2_geometry *g = &source->geometry;
  struct finish f = {
    .s = source,
    .tables = tables,
    .writer = { .store = source->store,
                .size = MAX (g->cluster_size, UINT32_C (1) << 20) },
  };
  int r = -1;

  if (store_make_file (source->store) == -1)
    return -1;
  f.writer.buf = malloc (f.writer.size);
  f.l1 = calloc (g->l1_entries, sizeof *f.l1);
  if (f.writer.buf && f.l1)
    r = finish_all (&f);
  *end = end_of_image (&f);

  const int err = errno;
  free (f.used.words);
  free (f.reftable);
  free (f.l1);
  free (f.writer.buf);
  errno = err;
  return r;
}
