/* SPDX-License-Identifier: BSD-3-Clause */

/* A qcow2 image of a map that does not change any more (see image.h).
 *
 * In place, clusters lie where the overlay put them, and tables where tables.c has
 * space for them.  Refcounts are collected in a bitmap of the file, as each is 0
 * or 1.
 *
 * A planned image lies like this, each part a whole number of clusters:
 *
 *   header | refcount table | refcount blocks | L1 table | L2 tables | data
 *
 * All clusters are in use but for what pads a short file.  The plan has 16 bytes
 * for each L2 table: which one it is, and how many data clusters come before its
 * own.  Everything else follows from the map when it is read.
 *
 * Knows the format, the map and the file, but no locks, exports, or names.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "images/image.h"

int
image_data_add (struct image_data *data, uint32_t bs, uint64_t offset,
                uint64_t count)
{
  const uint64_t start = offset / bs, end = (offset + count - 1) / bs + 1;
  struct image_data_run *last
    = data->nr_runs > 0 ? &data->runs[data->nr_runs - 1] : NULL;

  if (last && start <= last->end) {
    last->end = MAX (last->end, end);
    return 0;
  }
  if (data->nr_runs == data->max_runs) {
    const size_t max = data->max_runs ? 2 * data->max_runs : 16;
    struct image_data_run *runs = realloc (data->runs, max * sizeof *runs);

    if (!runs)
      return -1;
    data->runs = runs;
    data->max_runs = max;
  }
  data->runs[data->nr_runs++]
    = (struct image_data_run) { .start = start, .end = end };
  return 0;
}

int
image_set_backing (struct image_source *source, const char *backing,
                   const char *format, char **made_up)
{
  *made_up = NULL;
  source->backing_file = backing;
  source->backing_format = format ? format : "raw";
  if (backing && strcmp (backing, "none") == 0)
    source->backing_file = source->backing_format = NULL;
  if (backing)
    return 0;

  /* Opens anywhere, and reads as zeroes, which null-co by itself does not. */
  if (asprintf (made_up,
                "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"null-co\","
                "\"size\":%" PRIu64 ",\"read-zeroes\":true}}",
                source->geometry.disk_size)
      == -1) {
    *made_up = NULL;
    errno = ENOMEM;
    return -1;
  }
  source->backing_file = *made_up;
  return 0;
}

/* What is in a slot of an image. */
struct image_slot {
  struct slot_pair pair; /* the states of its blocks in the image */
  uint32_t of_base; /* the allocated blocks that come from the base; the others
                          * are in the place */
};

/* The first run of the base's data that ends behind BLOCK. */
static size_t
find_data_run (const struct image_data *data, uint64_t block)
{
  size_t low = 0, high = data->nr_runs;

  while (low < high) {
    const size_t middle = low + (high - low) / 2;

    if (data->runs[middle].end <= block)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/* The blocks of slot NR where the base has data, the first run that ends behind its
 * start being number I.
 */
static uint32_t
data_blocks (const struct image_data *data, size_t i, uint64_t nr)
{
  const uint64_t start = nr * SLOT_BLOCKS, end = start + SLOT_BLOCKS;
  uint32_t blocks = 0;

  for (; i < data->nr_runs && data->runs[i].start < end; ++i) {
    const uint64_t from = MAX (start, data->runs[i].start);
    const uint64_t to = MIN (end, data->runs[i].end);

    blocks |= bitmap_mask ((unsigned) (from - start), (unsigned) (to - from));
  }
  return blocks;
}

/* The first slot from NR on, before END, that has a block that is not unallocated in
 * the image; or END.  What is in it is in *SLOT.
 */
static uint64_t
next_slot (const struct image_source *s, uint64_t nr, uint64_t end,
           struct image_slot *slot)
{
  const struct image_data *data = s->of_base;

  while (nr < end) {
    uint64_t at = map_next (s->map, nr);
    size_t run = 0;

    if (data) {
      run = find_data_run (data, nr * SLOT_BLOCKS);
      if (run < data->nr_runs)
        at = MIN (at, MAX (nr, data->runs[run].start / SLOT_BLOCKS));
    }
    if (at >= end)
      break;

    const struct slot *found = map_find (s->map, at);
    slot->pair = found ? slot_load (found) : (struct slot_pair) { .place = 0 };
    slot->of_base = 0;
    if (data) {
      slot->of_base
        = data_blocks (data, run, at) & bitmap_holes (slot->pair.state);
      slot->pair.state
        = bitmap_set_allocated (slot->pair.state, slot->of_base);
    }
    if (slot->pair.state != 0)
      return at;
    nr = at + 1;
  }
  return end;
}

/* How many slots from NR on, before END, are all data of the base, as nothing near them
 * was ever written.
 */
static uint64_t
whole_slots_of_base (const struct image_source *s, uint64_t nr, uint64_t end)
{
  const struct image_data *data = s->of_base;

  if (!data)
    return 0;
  const size_t run = find_data_run (data, nr * SLOT_BLOCKS);
  if (run == data->nr_runs || data->runs[run].start > nr * SLOT_BLOCKS)
    return 0;
  end = MIN (end,
             MIN (map_next (s->map, nr), data->runs[run].end / SLOT_BLOCKS));
  return end > nr ? end - nr : 0;
}

static uint64_t
slot_size (const struct image_source *s)
{
  return (uint64_t) s->geometry.block_size * SLOT_BLOCKS;
}

/* Where the slots of the L2 table numbered NR end. */
static uint64_t
l2_end (const struct image_source *s, uint64_t nr)
{
  return MIN ((nr + 1) * s->geometry.slots_per_l2, s->map->nr_slots);
}

/*----------------------------------------------------------------------
 * In place
 */

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
  uint64_t nr_refcount_blocks, max_refcount_blocks;
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

/* Take refcount blocks for all that is in use, also themselves. */
static int
take_refcount_blocks (struct finish *f)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const uint64_t per_block = qcow2_refcounts_per_block (g);

  while (f->nr_refcount_blocks * per_block * g->cluster_size
         < end_of_used (f)) {
    uint64_t offset;

    if (f->nr_refcount_blocks == f->max_refcount_blocks) {
      errno = EFBIG;
      return -1;
    }
    if (take_cluster (f, &offset) == -1)
      return -1;
    f->reftable[f->nr_refcount_blocks++] = qcow2_reftable_entry (offset);
  }
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

/* Write those pages of the head's TABLE that hold anything.  The others are
 * holes.
 */
static int
finish_head_table (struct finish *f, const uint64_t *table, uint64_t entries,
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

static int
finish_all (struct finish *f)
{
  const struct qcow2_geometry *g = &f->s->geometry;
  const struct tables *t = f->tables;

  tables_take_again (f->tables);
  if (mark_bytes (f, 0, g->cluster_size) == -1
      || mark_bytes (f, t->l1_offset, g->l1_entries * 8) == -1
      || finish_l2_tables (f) == -1 || take_refcount_blocks (f) == -1
      || mark_bytes (f, t->reftable_offset, f->nr_refcount_blocks * 8) == -1)
    return -1;

  if (finish_refcount_blocks (f) == -1
      || finish_head_table (f, f->l1, g->l1_entries, t->l1_offset) == -1
      || finish_head_table (f, f->reftable, f->nr_refcount_blocks,
                            t->reftable_offset)
           == -1
      || writer_flush (&f->writer) == -1 || finish_header (f) == -1
      || store_truncate (f->s->store,
                         MAX (end_of_used (f), QCOW2_MIN_FILE_SIZE))
           == -1)
    return -1;
  tables_give_back (f->tables);
  return 0;
}

int
image_finish (const struct image_source *source, struct tables *tables)
{
  const struct qcow2_geometry *g = &source->geometry;
  struct finish f = {
    .s = source,
    .tables = tables,
    .writer = { .store = source->store,
                .size = MAX (g->cluster_size, UINT32_C (1) << 20) },
    .max_refcount_blocks = tables->reftable_room / 8,
  };
  int r = -1;

  if (store_make_file (source->store) == -1)
    return -1;
  f.writer.buf = malloc (f.writer.size);
  f.l1 = calloc (g->l1_entries, sizeof *f.l1);
  f.reftable = calloc (f.max_refcount_blocks, sizeof *f.reftable);
  if (f.writer.buf && f.l1 && f.reftable)
    r = finish_all (&f);

  const int err = errno;
  free (f.used.words);
  free (f.reftable);
  free (f.l1);
  free (f.writer.buf);
  errno = err;
  return r;
}

/*----------------------------------------------------------------------
 * In the order of the disk
 */

/* An L2 table with an entry that is no hole. */
struct image_l2 {
  uint64_t nr;          /* in the L1 table */
  uint64_t data_before; /* data clusters of the tables before it */
};

struct image {
  struct image_source s;
  struct image_l2 *l2s; /* in the order of the disk */
  uint64_t nr_l2, max_l2;
  uint64_t nr_data;      /* data clusters */
  uint64_t nr_blocks;    /* refcount blocks */
  uint64_t nr_clusters;  /* all that are in use */
  uint64_t blocks_start; /* where the parts start, in clusters */
  uint64_t l1_start, l2_start, data_start;
  char *header; /* a cluster */
};

static int
plan_l2_table (struct image *im, uint64_t nr)
{
  if (im->nr_l2 == im->max_l2) {
    const uint64_t max = im->max_l2 ? 2 * im->max_l2 : 16;
    struct image_l2 *l2s = realloc (im->l2s, max * sizeof *l2s);

    if (!l2s)
      return -1;
    im->l2s = l2s;
    im->max_l2 = max;
  }
  im->l2s[im->nr_l2++]
    = (struct image_l2) { .nr = nr, .data_before = im->nr_data };
  return 0;
}

static int
plan_data (struct image *im)
{
  const struct qcow2_geometry *g = &im->s.geometry;
  const uint64_t nr_slots = im->s.map->nr_slots;
  struct image_slot slot;
  uint64_t count;

  im->nr_l2 = im->nr_data = 0;
  for (uint64_t nr = next_slot (&im->s, 0, nr_slots, &slot); nr < nr_slots;
       nr = next_slot (&im->s, nr + count, nr_slots, &slot)) {
    const uint64_t l2 = nr / g->slots_per_l2;

    if ((im->nr_l2 == 0 || im->l2s[im->nr_l2 - 1].nr != l2)
        && plan_l2_table (im, l2) == -1)
      return -1;
    count = MAX (whole_slots_of_base (&im->s, nr, l2_end (&im->s, l2)), 1);
    im->nr_data += count * qcow2_data_clusters (g, slot.pair.state);
  }
  return 0;
}

static uint64_t
reftable_clusters (const struct image *im)
{
  return qcow2_clusters (&im->s.geometry, im->nr_blocks * 8);
}

/* Say where the parts lie.  False if the image is too long. */
static bool
plan_parts (struct image *im)
{
  const struct qcow2_geometry *g = &im->s.geometry;
  const uint64_t per_block = qcow2_refcounts_per_block (g);
  const uint64_t l1_clusters = qcow2_clusters (g, g->l1_entries * 8);

  /* Refcount blocks and their table are counted themselves. */
  im->nr_blocks = 0;
  do {
    im->nr_blocks++;
    im->nr_clusters = 1 + reftable_clusters (im) + im->nr_blocks + l1_clusters
                      + im->nr_l2 + im->nr_data;
    im->nr_blocks = MAX (im->nr_blocks, im->nr_clusters / per_block);
  } while (im->nr_blocks * per_block < im->nr_clusters);

  im->blocks_start = 1 + reftable_clusters (im);
  im->l1_start = im->blocks_start + im->nr_blocks;
  im->l2_start = im->l1_start + l1_clusters;
  im->data_start = im->l2_start + im->nr_l2;
  return im->nr_blocks * 8 <= QCOW2_MAX_REFTABLE_SIZE
         && im->nr_clusters <= INT64_MAX / g->cluster_size;
}

static int
plan_header (struct image *im)
{
  const struct qcow2_geometry *g = &im->s.geometry;
  const struct qcow2_layout layout = {
    .reftable_offset = g->cluster_size,
    .reftable_clusters = reftable_clusters (im),
    .l1_offset = im->l1_start * g->cluster_size,
    .backing_file = im->s.backing_file,
    .backing_format = im->s.backing_format,
  };

  im->header = malloc (g->cluster_size);
  if (!im->header)
    return -1;
  if (qcow2_encode_header (im->header, g, &layout) == -1) {
    errno = ENAMETOOLONG;
    return -1;
  }
  return 0;
}

static int
plan_all (struct image *im)
{
  struct qcow2_geometry *g = &im->s.geometry;

  if (plan_data (im) == -1)
    return -1;
  if (!plan_parts (im)) {
    errno = EFBIG;
    if (g->format == QCOW2_EXTENDED
        || qcow2_geometry_init (g, g->disk_size, g->block_size, QCOW2_EXTENDED)
             == -1
        || plan_data (im) == -1)
      return -1;
    if (!plan_parts (im)) {
      errno = EFBIG;
      return -1;
    }
  }
  return plan_header (im);
}

struct image *
image_plan (const struct image_source *source)
{
  struct image *im = calloc (1, sizeof *im);

  if (!im)
    return NULL;
  im->s = *source;
  if (plan_all (im) == -1) {
    const int err = errno;

    image_free (im);
    errno = err;
    return NULL;
  }
  return im;
}

void
image_free (struct image *im)
{
  if (!im)
    return;
  free (im->header);
  free (im->l2s);
  free (im);
}

uint64_t
image_size (const struct image *im)
{
  return MAX (im->nr_clusters * im->s.geometry.cluster_size,
              QCOW2_MIN_FILE_SIZE);
}

/* The entries of a table, each WIDTH bytes, that START .. START+COUNT-1 of it
 * touches, are made one by one and copied as far as they are wanted.
 */
static void
copy_entry (const void *entry, uint64_t width, uint64_t nr, char *buf,
            uint64_t start, uint64_t count)
{
  const uint64_t entry_start = nr * width;
  const uint64_t from = MAX (entry_start, start);
  const uint64_t to = MIN (entry_start + width, start + count);

  memcpy (buf + (from - start), (const char *) entry + (from - entry_start),
          to - from);
}

static void
read_reftable (const struct image *im, char *buf, uint64_t start,
               uint64_t count)
{
  for (uint64_t i = start / 8; i * 8 < start + count; ++i) {
    uint64_t entry = 0;

    if (i < im->nr_blocks)
      entry = qcow2_reftable_entry ((im->blocks_start + i)
                                    * im->s.geometry.cluster_size);
    copy_entry (&entry, 8, i, buf, start, count);
  }
}

static void
read_refcounts (const struct image *im, char *buf, uint64_t start,
                uint64_t count)
{
  for (uint64_t i = start / 2; i * 2 < start + count; ++i) {
    const uint16_t refcount = htobe16 (i < im->nr_clusters);

    copy_entry (&refcount, 2, i, buf, start, count);
  }
}

/* The index in l2s of the first table whose number in the L1 table is >= NR. */
static uint64_t
find_l2_by_nr (const struct image *im, uint64_t nr)
{
  uint64_t low = 0, high = im->nr_l2;

  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;

    if (im->l2s[middle].nr < nr)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

static void
read_l1 (const struct image *im, char *buf, uint64_t start, uint64_t count)
{
  memset (buf, 0, count);
  for (uint64_t i = find_l2_by_nr (im, start / 8);
       i < im->nr_l2 && im->l2s[i].nr * 8 < start + count; ++i) {
    const uint64_t entry
      = qcow2_l1_entry ((im->l2_start + i) * im->s.geometry.cluster_size);

    copy_entry (&entry, 8, im->l2s[i].nr, buf, start, count);
  }
}

/* Make all of the L2 table that is number I of l2s. */
static void
encode_l2_table (const struct image *im, uint64_t i, void *table)
{
  const struct qcow2_geometry *g = &im->s.geometry;
  const uint64_t end = l2_end (&im->s, im->l2s[i].nr);
  uint64_t offset
    = (im->data_start + im->l2s[i].data_before) * g->cluster_size;
  struct image_slot slot;

  memset (table, 0, g->cluster_size);
  for (uint64_t nr
       = next_slot (&im->s, im->l2s[i].nr * g->slots_per_l2, end, &slot);
       nr < end; nr = next_slot (&im->s, nr + 1, end, &slot)) {
    qcow2_encode_slot (g, table, nr % g->slots_per_l2, slot.pair.state, offset,
                       QCOW2_PACKED);
    offset
      += (uint64_t) qcow2_data_clusters (g, slot.pair.state) * g->cluster_size;
  }
}

static int
read_l2 (const struct image *im, char *buf, uint64_t start, uint64_t count)
{
  const uint64_t cluster = im->s.geometry.cluster_size;
  CLEANUP_FREE char *table = malloc (cluster);

  if (!table)
    return -1;
  for (uint64_t i = start / cluster; i * cluster < start + count; ++i) {
    encode_l2_table (im, i, table);
    copy_entry (table, cluster, i, buf, start, count);
  }
  return 0;
}

/* The index in l2s of the table that has data cluster NR. */
static uint64_t
find_l2_by_data (const struct image *im, uint64_t nr)
{
  uint64_t low = 0, high = im->nr_l2;

  /* The last one with no more than NR data clusters before its own; of several,
   * those before it have none.
   */
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;

    if (im->l2s[middle].data_before <= nr)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/* Where the bytes of data clusters are. */
enum data_source { IN_FILE, IN_BASE, NOWHERE /* they are zero */ };

/* Bytes of data clusters that are wanted, and how far the walk over them is. */
struct data_read {
  const struct image *im;
  const struct image_reader *reader;
  char *buf;
  uint64_t start, end; /* wanted, from data_start on */
  uint64_t at;         /* where the next data cluster lies, likewise */

  /* Found, and not read yet: the next piece may be read together with it. */
  enum data_source source;
  uint64_t offset; /* in the file or on the disk */
  char *to;
  uint64_t count;
};

static int
read_found (struct data_read *d)
{
  const uint64_t count = d->count;

  d->count = 0;
  if (count == 0)
    return 0;
  switch (d->source) {
  case IN_FILE:
    return d->reader->read_file (d->reader->opaque, d->to, count, d->offset);
  case IN_BASE:
    return d->reader->read_base (d->reader->opaque, d->to, count, d->offset);
  case NOWHERE:
  default:
    memset (d->to, 0, count);
    return 0;
  }
}

/* The next COUNT bytes of the image are at OFFSET of SOURCE. */
static int
next_piece (struct data_read *d, enum data_source source, uint64_t offset,
            uint64_t count)
{
  const uint64_t from = MAX (d->start, d->at);
  const uint64_t to = MIN (d->end, d->at + count);

  offset += from - d->at;
  d->at += count;
  if (from >= to)
    return 0;
  if (d->count > 0 && source == d->source && offset == d->offset + d->count) {
    d->count += to - from;
    return 0;
  }
  if (read_found (d) == -1)
    return -1;
  d->source = source;
  d->offset = offset;
  d->to = d->buf + (from - d->start);
  d->count = to - from;
  return 0;
}

/* The data clusters of slot NR are the next ones.  (What they hold behind the end of
 * the disk is zeroes, as blocks are written whole.)
 */
static int
next_data_slot (struct data_read *d, uint64_t nr,
                const struct image_slot *slot)
{
  const struct image_source *s = &d->im->s;
  const uint64_t bs = s->geometry.block_size;
  const uint32_t in_file
    = bitmap_allocated (slot->pair.state) & ~slot->of_base;
  const uint32_t in_base = slot->of_base;

  if (!(in_file | in_base))
    return 0;
  for (unsigned block = 0, run; block < SLOT_BLOCKS; block += run) {
    const uint64_t in_slot = block * bs;
    int r = 0;

    if ((run = bitmap_run_of_ones (in_file, block)) > 0)
      r = next_piece (d, IN_FILE, slot->pair.place * slot_size (s) + in_slot,
                      run * bs);
    else if ((run = bitmap_run_of_ones (in_base, block)) > 0)
      r = next_piece (d, IN_BASE, nr * slot_size (s) + in_slot, run * bs);
    else {
      run = bitmap_run_of_ones (~(in_file | in_base), block);
      if (s->geometry.format == QCOW2_EXTENDED)
        r = next_piece (d, NOWHERE, 0, run * bs);
    }
    if (r == -1)
      return -1;
  }
  return 0;
}

static int
read_data (const struct image *im, const struct image_reader *reader,
           char *buf, uint64_t start, uint64_t count)
{
  const struct qcow2_geometry *g = &im->s.geometry;
  const uint64_t nr_slots = im->s.map->nr_slots;
  const uint64_t i = find_l2_by_data (im, start / g->cluster_size);
  struct data_read d = {
    .im = im,
    .reader = reader,
    .buf = buf,
    .start = start,
    .end = start + count,
    .at = im->l2s[i].data_before * g->cluster_size,
  };
  struct image_slot slot;

  uint64_t nr = im->l2s[i].nr * g->slots_per_l2;

  while (d.at < d.end
         && (nr = next_slot (&im->s, nr, nr_slots, &slot)) < nr_slots) {
    const uint64_t whole = whole_slots_of_base (&im->s, nr, nr_slots);
    const uint64_t before
      = d.at < d.start ? (d.start - d.at) / slot_size (&im->s) : 0;
    const uint64_t skip = MIN (whole, before);

    if (skip > 0) {
      d.at += skip * slot_size (&im->s);
      nr += skip;
    }
    else if (next_data_slot (&d, nr++, &slot) == -1)
      return -1;
  }
  return read_found (&d);
}

/* Read from one part: the bytes START .. START+COUNT-1 of it. */
enum part { HEADER, REFTABLE, REFCOUNTS, L1, L2, DATA, PADDING };

static int
read_part (const struct image *im, const struct image_reader *reader,
           enum part part, char *buf, uint64_t start, uint64_t count)
{
  switch (part) {
  case HEADER:
    memcpy (buf, im->header + start, count);
    return 0;
  case REFTABLE:
    read_reftable (im, buf, start, count);
    return 0;
  case REFCOUNTS:
    read_refcounts (im, buf, start, count);
    return 0;
  case L1:
    read_l1 (im, buf, start, count);
    return 0;
  case L2:
    return read_l2 (im, buf, start, count);
  case DATA:
    return read_data (im, reader, buf, start, count);
  case PADDING:
  default:
    memset (buf, 0, count);
    return 0;
  }
}

int
image_read (const struct image *im, const struct image_reader *reader,
            void *buf, size_t count, uint64_t offset)
{
  const uint64_t cluster = im->s.geometry.cluster_size;
  const uint64_t ends[] = {
    [HEADER] = cluster,
    [REFTABLE] = im->blocks_start * cluster,
    [REFCOUNTS] = im->l1_start * cluster,
    [L1] = im->l2_start * cluster,
    [L2] = im->data_start * cluster,
    [DATA] = im->nr_clusters * cluster,
    [PADDING] = UINT64_MAX,
  };
  uint64_t part_start = 0;

  for (enum part part = HEADER; count > 0; ++part) {
    if (offset < ends[part]) {
      const uint64_t n = MIN (count, ends[part] - offset);

      if (read_part (im, reader, part, buf, offset - part_start, n) == -1)
        return -1;
      buf = (char *) buf + n;
      offset += n;
      count -= n;
    }
    part_start = ends[part];
  }
  return 0;
}
