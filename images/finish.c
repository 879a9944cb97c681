/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay file becomes an image where it lies (see finish.h).
 *
 * Clusters lie where the overlay put them, and tables where tables.c has space for them.
 * Refcounts are collected in a bitmap of the file, as each is 0 or 1, but for those of L2
 * tables that are all zero: there is one for many entries of the L1 table.
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

/* An L2 table all of which is zero, and entries of the L1 table that refer to it. */
struct zero_table {
  uint64_t offset;
  uint64_t first; /* one of them */
  uint64_t count; /* how many there are */
};

/* As many as the largest L1 table needs. */
#define MAX_ZERO_TABLES (QCOW2_MAX_L1_SIZE / 8 / QCOW2_MAX_REFCOUNT + 1)

/* The image that is being made of an overlay file. */
struct finish {
  const struct image_source *s;
  struct tables *tables;
  struct writer writer;
  struct image_used used;
  uint64_t nr_clusters; /* up to the last one that is used */
  uint64_t *l1;         /* big-endian */
  uint64_t *reftable;   /* big-endian */
  uint64_t nr_refcount_blocks;
  struct zero_table zero_tables[MAX_ZERO_TABLES]; /* the last one has room */
  unsigned nr_zero_tables;
};

/* COUNT clusters from FIRST on are in use. */
static int
mark_used (struct finish *f, uint64_t first, uint64_t count)
{
  struct image_used *u = &f->used;
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
  f->nr_clusters = MAX (f->nr_clusters, first + count);
  return 0;
}

static int
mark_bytes (struct finish *f, uint64_t offset, uint64_t size)
{
  const struct qcow2_geometry *g = &f->s->geometry;

  return mark_used (f, offset / g->cluster_size, qcow2_clusters (g, size));
}

/* Mark the data clusters of a slot, and say where they lie.  A block is a cluster. */
static int
mark_slot (struct finish *f, struct slot_pair pair,
           uint64_t offsets[SLOT_BLOCKS])
{
  uint32_t left = bitmap_allocated (pair.state);

  while (left) {
    const unsigned first = (unsigned) __builtin_ctz (left);
    uint32_t address;
    const unsigned count
      = slot_in_row (pair, first, bitmap_run_of_ones (left, first), &address);

    for (unsigned i = 0; i < count; ++i)
      offsets[first + i] = address_offset (f->s, address + i);
    if (mark_used (f, address, count) == -1)
      return -1;
    left &= ~bitmap_mask (first, count);
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

/* A cluster for an L2 table, at *OFFSET of the file.  It is to be filled in; NULL and
 * errno.
 */
static void *
add_l2_table (struct finish *f, uint64_t *offset)
{
  if (take_cluster (f, offset) == -1)
    return NULL;
  return writer_append (&f->writer, f->s->geometry.cluster_size, *offset);
}

/* All of the L2 table numbered L2 is zero. */
static int
refer_to_zero_table (struct finish *f, uint64_t l2)
{
  struct zero_table *z = &f->zero_tables[MAX (f->nr_zero_tables, 1) - 1];

  if (f->nr_zero_tables == 0 || z->count == QCOW2_MAX_REFCOUNT) {
    uint64_t offset;
    void *table = add_l2_table (f, &offset);

    if (!table)
      return -1;
    qcow2_encode_zero_table (&f->s->geometry, table);
    z = &f->zero_tables[f->nr_zero_tables++];
    *z = (struct zero_table) { .offset = offset, .first = l2 };
  }
  z->count++;
  f->l1[l2]
    = qcow2_l1_entry (z->offset, 2); /* or more, for all that is known */
  return 0;
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

  if (is_zero_table (f->s, l2))
    return refer_to_zero_table (f, l2);

  table = add_l2_table (f, &offset);
  if (!table)
    return -1;
  memset (table, 0, g->cluster_size);
  f->l1[l2] = qcow2_l1_entry (offset, 1);

  while (nr < end) {
    uint64_t offsets[SLOT_BLOCKS];

    if (mark_slot (f, slot.pair, offsets) == -1)
      return -1;
    qcow2_encode_scattered (table, nr % g->slots_per_l2, slot.pair.state,
                            offsets);
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
  for (unsigned i = 0; i < f->nr_zero_tables; ++i) {
    const struct zero_table *z = &f->zero_tables[i];

    f->l1[z->first] = qcow2_l1_entry (z->offset, z->count);
  }
  return 0;
}

/* Where the last cluster in use ends. */
static uint64_t
end_of_used (const struct finish *f)
{
  return f->nr_clusters * f->s->geometry.cluster_size;
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

static bool
is_used (const struct image_used *u, uint64_t nr)
{
  return nr / 64 < u->nr_words && (u->words[nr / 64] >> nr % 64 & 1);
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
    for (unsigned j = 0; j < f->nr_zero_tables; ++j) {
      const struct zero_table *z = &f->zero_tables[j];
      const uint64_t nr = z->offset / g->cluster_size;

      if (nr / per_block == i)
        block[nr % per_block] = htobe16 ((uint16_t) z->count);
    }
  }
  return 0;
}

/* Write those pages of TABLE that hold anything.  In the head, the others are holes. */
static int
finish_table (struct finish *f, const uint64_t *table, uint64_t entries,
              uint64_t offset, bool in_head)
{
  const uint64_t per_page = 512;

  for (uint64_t i = 0; i < entries; i += per_page) {
    const uint64_t count = MIN (per_page, entries - i);
    uint64_t any = 0;

    for (uint64_t j = 0; j < count; ++j)
      any |= table[i + j];
    if (any || !in_head) {
      void *page = writer_append (&f->writer, count * 8, offset + i * 8);

      if (!page)
        return -1;
      memcpy (page, table + i, count * 8);
    }
  }
  return 0;
}

/* The refcount table.  Where it is not in the head, anything may be behind its last
 * entry.
 */
static int
finish_reftable (struct finish *f)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const bool in_head = f->tables->reftable_row.count == 0;
  const uint64_t size = f->nr_refcount_blocks * 8;

  return finish_table (f, f->reftable,
                       in_head
                         ? f->nr_refcount_blocks
                         : qcow2_clusters (g, size) * g->cluster_size / 8,
                       f->tables->reftable_offset, in_head);
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

/* The end of the image may be a hole.  What the log was made longer ahead of its use is
 * one.
 */
static int
set_file_size (struct finish *f)
{
  f->used.end = MAX (end_of_used (f), QCOW2_MIN_FILE_SIZE);
  return store_truncate (f->s->store,
                         MAX (f->used.end, log_end (f->tables->log)));
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
      || finish_table (f, f->l1, g->l1_entries, t->l1_offset, true) == -1
      || finish_reftable (f) == -1 || writer_flush (&f->writer) == -1
      || finish_header (f) == -1 || set_file_size (f) == -1)
    return -1;
  return 0;
}

int
image_finish (const struct image_source *source, struct tables *tables,
              struct image_used *used)
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

  const int err = errno;
  if (r == 0)
    *used = f.used;
  else
    free (f.used.words);
  free (f.reftable);
  free (f.l1);
  free (f.writer.buf);
  errno = err;
  return r;
}
