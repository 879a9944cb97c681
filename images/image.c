/* SPDX-License-Identifier: BSD-3-Clause */

/* An image in the order of the disk (see image.h).
 *
 * It lies like this, each part a whole number of clusters:
 *
 *   header | refcount table | refcount blocks | L1 table | L2 tables | data
 *
 * All clusters are in use but for what pads a short file.  The plan has 16 bytes
 * for each L2 table: which one it is, and how many data clusters come before its
 * own.  Of those that are all zero it has where they begin and end; a few that come behind
 * the others are in the place of all of them.  Everything else follows from the map when
 * it is read.
 *
 * Knows the format and the map, but no file, locks, exports, or names.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "images/image.h"

/* An L2 table with an entry that is no hole, but not all zero. */
struct image_l2 {
  uint64_t nr;          /* in the L1 table */
  uint64_t data_before; /* data clusters of the tables before it */
};

/* L2 tables that are all zero, and follow each other. */
struct image_zeroes {
  uint64_t nr, end; /* in the L1 table */
  uint64_t before;  /* how many come before them */
};

struct image {
  struct image_source s;
  struct image_l2 *l2s; /* in the order of the disk */
  uint64_t nr_l2, max_l2;
  struct image_zeroes *zeroes; /* the same */
  uint64_t nr_zeroes, max_zeroes;
  uint64_t nr_zero;      /* L2 tables in them */
  uint64_t nr_data;      /* data clusters */
  uint64_t nr_blocks;    /* refcount blocks */
  uint64_t nr_clusters;  /* all that are in use */
  uint64_t blocks_start; /* where the parts start, in clusters */
  uint64_t l1_start, l2_start, data_start;
  char *header; /* a cluster */
};

/* An array of elements of SIZE bytes, of which NR are used and *MAX are there, with room
 * for one more.  NULL and ENOMEM.
 */
static void *
have_room (void *array, uint64_t nr, uint64_t *max, size_t size)
{
  const uint64_t wanted = nr ? 2 * nr : 16;

  if (nr < *max)
    return array;
  array = realloc (array, wanted * size);
  if (array)
    *max = wanted;
  return array;
}

static int
plan_l2_table (struct image *im, uint64_t nr)
{
  struct image_l2 *l2s
    = have_room (im->l2s, im->nr_l2, &im->max_l2, sizeof *l2s);

  if (!l2s)
    return -1;
  im->l2s = l2s;
  im->l2s[im->nr_l2++]
    = (struct image_l2) { .nr = nr, .data_before = im->nr_data };
  return 0;
}

static int
plan_zero_table (struct image *im, uint64_t nr)
{
  struct image_zeroes *zeroes
    = have_room (im->zeroes, im->nr_zeroes, &im->max_zeroes, sizeof *zeroes);

  if (!zeroes)
    return -1;
  im->zeroes = zeroes;
  if (im->nr_zeroes > 0 && zeroes[im->nr_zeroes - 1].end == nr)
    zeroes[im->nr_zeroes - 1].end++;
  else
    zeroes[im->nr_zeroes++] = (struct image_zeroes) { .nr = nr,
                                                      .end = nr + 1,
                                                      .before = im->nr_zero };
  im->nr_zero++;
  return 0;
}

static int
plan_data (struct image *im)
{
  const struct qcow2_geometry *g = &im->s.geometry;
  const uint64_t nr_slots = im->s.map->nr_slots;
  struct image_slot slot;
  uint64_t count;

  im->nr_l2 = im->nr_zeroes = im->nr_zero = im->nr_data = 0;
  for (uint64_t nr = next_slot (&im->s, 0, nr_slots, &slot); nr < nr_slots;
       nr = next_slot (&im->s, nr + count, nr_slots, &slot)) {
    const uint64_t l2 = nr / g->slots_per_l2;

    if (nr % g->slots_per_l2 == 0 && is_zero_table (&im->s, l2)) {
      if (plan_zero_table (im, l2) == -1)
        return -1;
      count = g->slots_per_l2;
      continue;
    }
    if ((im->nr_l2 == 0 || im->l2s[im->nr_l2 - 1].nr != l2)
        && plan_l2_table (im, l2) == -1)
      return -1;
    count = MAX (whole_slots_of_base (&im->s, nr, l2_end (&im->s, l2)), 1);
    im->nr_data += count * qcow2_data_clusters (g, slot.pair.state);
  }
  return 0;
}

/* The clusters in the place of those L2 tables that are all zero. */
static uint64_t
nr_zero_clusters (const struct image *im)
{
  return (im->nr_zero + QCOW2_MAX_REFCOUNT - 1) / QCOW2_MAX_REFCOUNT;
}

/* How many of these tables number NR of these clusters is in the place of. */
static uint64_t
zero_refcount (const struct image *im, uint64_t nr)
{
  return MIN (im->nr_zero - nr * QCOW2_MAX_REFCOUNT, QCOW2_MAX_REFCOUNT);
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
                      + im->nr_l2 + nr_zero_clusters (im) + im->nr_data;
    im->nr_blocks = MAX (im->nr_blocks, im->nr_clusters / per_block);
  } while (im->nr_blocks * per_block < im->nr_clusters);

  im->blocks_start = 1 + reftable_clusters (im);
  im->l1_start = im->blocks_start + im->nr_blocks;
  im->l2_start = im->l1_start + l1_clusters;
  im->data_start = im->l2_start + im->nr_l2 + nr_zero_clusters (im);
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
    .base = im->s.base,
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
  free (im->zeroes);
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
  const uint64_t first_zero = im->l2_start + im->nr_l2;

  for (uint64_t i = start / 2; i * 2 < start + count; ++i) {
    uint16_t refcount = htobe16 (i < im->nr_clusters);

    if (i >= first_zero && i < im->data_start)
      refcount = htobe16 ((uint16_t) zero_refcount (im, i - first_zero));
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

/* The index in zeroes of the first ones that end behind NR. */
static uint64_t
find_zeroes (const struct image *im, uint64_t nr)
{
  uint64_t low = 0, high = im->nr_zeroes;

  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;

    if (im->zeroes[middle].end <= nr)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/* The entry of the L1 table for number NR of the L2 tables that are all zero. */
static uint64_t
zero_l1_entry (const struct image *im, uint64_t nr)
{
  const uint64_t cluster = nr / QCOW2_MAX_REFCOUNT;

  return qcow2_l1_entry ((im->l2_start + im->nr_l2 + cluster)
                           * im->s.geometry.cluster_size,
                         zero_refcount (im, cluster));
}

static void
read_l1 (const struct image *im, char *buf, uint64_t start, uint64_t count)
{
  memset (buf, 0, count);
  for (uint64_t i = find_l2_by_nr (im, start / 8);
       i < im->nr_l2 && im->l2s[i].nr * 8 < start + count; ++i) {
    const uint64_t entry
      = qcow2_l1_entry ((im->l2_start + i) * im->s.geometry.cluster_size, 1);

    copy_entry (&entry, 8, im->l2s[i].nr, buf, start, count);
  }
  for (uint64_t i = find_zeroes (im, start / 8);
       i < im->nr_zeroes && im->zeroes[i].nr * 8 < start + count; ++i) {
    const struct image_zeroes *z = &im->zeroes[i];

    for (uint64_t nr = MAX (z->nr, start / 8);
         nr < z->end && nr * 8 < start + count; ++nr) {
      const uint64_t entry = zero_l1_entry (im, z->before + (nr - z->nr));

      copy_entry (&entry, 8, nr, buf, start, count);
    }
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
    qcow2_encode_slot (g, table, nr % g->slots_per_l2, slot.pair.state,
                       offset);
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
    if (i < im->nr_l2)
      encode_l2_table (im, i, table);
    else
      qcow2_encode_zero_table (&im->s.geometry, table);
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
    int r = 0;

    if ((run = bitmap_run_of_ones (in_file, block)) > 0) {
      uint32_t address;

      run = slot_in_row (slot->pair, block, run, &address);
      r = next_piece (d, IN_FILE, address_offset (s, address), run * bs);
    }
    else if ((run = bitmap_run_of_ones (in_base, block)) > 0)
      r = next_piece (d, IN_BASE, nr * slot_size (s) + block * bs, run * bs);
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

/* The data clusters of L2 table I of l2s are the next ones. */
static int
next_data_table (struct data_read *d, uint64_t i)
{
  const struct image_source *s = &d->im->s;
  const uint64_t l2 = d->im->l2s[i].nr, end = l2_end (s, l2);
  struct image_slot slot;
  uint64_t nr = l2 * s->geometry.slots_per_l2;

  while (d->at < d->end && (nr = next_slot (s, nr, end, &slot)) < end) {
    const uint64_t whole = whole_slots_of_base (s, nr, end);
    const uint64_t before
      = d->at < d->start ? (d->start - d->at) / slot_size (s) : 0;
    const uint64_t skip = MIN (whole, before);

    if (skip > 0) {
      d->at += skip * slot_size (s);
      nr += skip;
    }
    else if (next_data_slot (d, nr++, &slot) == -1)
      return -1;
  }
  return 0;
}

static int
read_data (const struct image *im, const struct image_reader *reader,
           char *buf, uint64_t start, uint64_t count)
{
  const uint64_t cluster = im->s.geometry.cluster_size;
  uint64_t i = find_l2_by_data (im, start / cluster);
  struct data_read d = {
    .im = im,
    .reader = reader,
    .buf = buf,
    .start = start,
    .end = start + count,
    .at = im->l2s[i].data_before * cluster,
  };

  for (; d.at < d.end && i < im->nr_l2; ++i)
    if (next_data_table (&d, i) == -1)
      return -1;
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
