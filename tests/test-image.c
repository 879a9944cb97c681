/* SPDX-License-Identifier: BSD-3-Clause */

/* Images of a map, without a server: both ways to have one, read back by the
 * decoder, every refcount counted; random reads; space that was set aside, and space that
 * is given back; calls that fail one after the other.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/cleanup.h"
#include "faults.h"
#include "images/finish.h"
#include "images/image.h"

#define MIB (UINT64_C (1) << 20)

static struct map map;
static struct store store;
static struct log blocks;
static struct tables tables;
static struct image_source source;
static uint32_t block_size;

static int
read_store (void *opaque, void *buf, uint64_t count, uint64_t offset)
{
  return store_read (opaque, buf, count, offset);
}

static const struct image_reader reader
  = { .read_file = read_store, .opaque = &store };

static uint64_t
slot_bytes (void)
{
  return (uint64_t) block_size * SLOT_BLOCKS;
}

static void
set_up_disk (uint64_t size, uint32_t bs, enum qcow2_l2_format format)
{
  struct qcow2_geometry g;

  block_size = bs;
  assert_int_equal (qcow2_geometry_init (&g, size, bs, format), 0);
  map_init (&map, (size + slot_bytes () - 1) / slot_bytes ());
  store_init (&store, "/var/tmp", NEWFILE_ANONYMOUS, STORE_WRITES_BACK_LATE);
  log_init (&blocks, &store, (unsigned) __builtin_ctz (bs),
            format == QCOW2_PORTABLE ? tables_head_size (&g) / bs : 1);
  assert_int_equal (tables_init (&tables, &g, &blocks,
                                 format == QCOW2_PORTABLE ? TABLES_SET_ASIDE
                                                          : TABLES_UNPLANNED),
                    0);
  source = (struct image_source) { .map = &map,
                                   .store = &store,
                                   .geometry = g,
                                   .backing_file = "base.img",
                                   .backing_format = "raw" };
}

static int
tear_down (void **state)
{
  (void) state;
  fail_calls_from (0, 0);
  short_transfers = no_tmpfile = fail_punches = false;
  tables_destroy (&tables);
  log_destroy (&blocks);
  store_destroy (&store);
  map_destroy (&map);
  return 0;
}

/* What a block holds tells which one it is. */
static void
fill_block (void *buf, uint64_t nr_slot, unsigned block)
{
  uint64_t *words = buf;

  for (unsigned i = 0; i < block_size / 8; ++i)
    words[i] = (nr_slot << 5 | block) * UINT64_C (0x9e3779b97f4a7c15) + i;
}

/* Write a block to where it lies now. */
static void
write_block (uint64_t nr, unsigned block, uint32_t address)
{
  CLEANUP_FREE char *buf = malloc (block_size);
  struct iovec iov = { .iov_base = buf, .iov_len = block_size };

  fill_block (buf, nr, block);
  assert_int_equal (
    store_writev (&store, &iov, 1, log_offset (&blocks, address)), 0);
}

/* What change.c does: space first, then bytes, then the state.  The blocks get addresses
 * one by one, from the last one down if BACKWARDS.
 */
static void
change_slot_in_order (uint64_t nr, uint64_t state, bool backwards)
{
  struct slot *slot = map_touch (&map, nr);
  uint32_t to[SLOT_BLOCKS];
  struct slot_step step
    = { .found = slot_load (slot), .state = state, .to = to };

  assert_int_not_equal (
    tables_reserve_l2 (&tables, nr / source.geometry.slots_per_l2), -1);
  step.fresh = bitmap_allocated (state) & ~bitmap_allocated (step.found.state);
  for (unsigned i = 0; i < SLOT_BLOCKS; ++i) {
    const unsigned b = backwards ? SLOT_BLOCKS - 1 - i : i;
    struct log_run run;

    if (!(step.fresh >> b & 1))
      continue;
    assert_int_equal (log_take (&blocks, 1, LOG_TIDY, LOG_UNLIMITED, &run), 0);
    to[b] = run.first;
  }
  assert_int_equal (tables_reserve_refcounts (&tables), 0);
  for (unsigned b = 0; b < SLOT_BLOCKS; ++b)
    if (step.fresh >> b & 1)
      write_block (nr, b, to[b]);
  assert_int_equal (slot_prepare (&map, &step), 0);
  slot_store (slot, &step);
}

static void
change_slot (uint64_t nr, uint64_t state)
{
  change_slot_in_order (nr, state, nr % 3 == 0);
}

/* Zero COUNT leaves from slot NR on as change.c does. */
static void
zero_leaves (uint64_t nr, uint64_t count)
{
  const uint64_t per_l2 = source.geometry.slots_per_l2;

  for (uint64_t end = nr + count * LEAF_SLOTS; nr < end; nr += LEAF_SLOTS) {
    assert_true (map_ready_leaf (&map, nr));
    if (per_l2 <= LEAF_SLOTS)
      assert_int_equal (
        tables_reserve_zero_l2 (&tables, nr / per_l2, LEAF_SLOTS / per_l2), 0);
    else
      assert_int_not_equal (tables_reserve_l2 (&tables, nr / per_l2), -1);
    map_zero_leaf (&map, nr);
  }
}

static uint64_t seed;

static uint64_t
next_random (void)
{
  seed
    = seed * UINT64_C (6364136223846793005) + UINT64_C (1442695040888963407);
  return seed >> 33;
}

static uint64_t
random_state (void)
{
  const uint32_t allocated = (uint32_t) (next_random () << 7 ^ next_random ());
  const uint32_t zero = (uint32_t) (next_random () << 5 ^ next_random ());

  switch (next_random () % 4) {
  case 0:
    return UINT32_MAX;
  case 1:
    return (uint64_t) zero << 32;
  default:
    return (uint64_t) (zero & ~allocated) << 32 | allocated;
  }
}

static void
change_slots (unsigned count)
{
  seed = 42;
  for (unsigned i = 0; i < count; ++i)
    change_slot (next_random () % map.nr_slots, random_state ());
}

/*----------------------------------------------------------------------
 * A reader of images
 */

static const char *bytes; /* of the image */
static uint64_t length;
static struct qcow2_header header;
static uint32_t *counted; /* references to each cluster */

static void
count_cluster (uint64_t offset)
{
  assert_int_equal (offset % qcow2_cluster_size (&header), 0);
  counted[offset >> header.cluster_bits]++;
}

static void
count_range (uint64_t offset, uint64_t size)
{
  for (uint64_t at = 0; at < size; at += qcow2_cluster_size (&header))
    count_cluster (offset + at);
}

/* The state of a block as the image has it, and its bytes. */
static void
check_block (uint64_t nr, unsigned b, enum block_state state, uint64_t offset)
{
  const struct slot *slot = map_find (&map, nr);
  const enum block_state expected
    = slot ? bitmap_state (slot_load (slot).state, b) : BLOCK_HOLE;

  assert_int_equal (state, expected);
  if (state == BLOCK_ALLOCATED) {
    CLEANUP_FREE char *buf = malloc (block_size);

    fill_block (buf, nr, b);
    assert_true (offset + block_size <= length);
    assert_memory_equal (bytes + offset, buf, block_size);
  }
}

static void
check_cluster (uint64_t nr, const struct qcow2_cluster *c)
{
  const uint64_t cluster = qcow2_cluster_size (&header);
  uint64_t states = c->subclusters;

  if (c->kind == QCOW2_DATA || (c->kind == QCOW2_MIXED && c->offset))
    count_cluster (c->offset);
  if (!header.extended_l2) {
    check_block (nr * cluster / slot_bytes (), nr % SLOT_BLOCKS,
                 c->kind == QCOW2_DATA   ? BLOCK_ALLOCATED
                 : c->kind == QCOW2_ZERO ? BLOCK_ZERO
                                         : BLOCK_HOLE,
                 c->offset);
    return;
  }
  for (unsigned b = 0; b < SLOT_BLOCKS; ++b)
    check_block (nr, b, bitmap_state (states, b),
                 c->offset + (uint64_t) b * block_size);
}

static void
check_l2_table (uint64_t l1_index, uint64_t offset)
{
  const unsigned entries = qcow2_l2_entries (&header);
  const uint64_t cluster = qcow2_cluster_size (&header);
  struct qcow2_cluster c = { .kind = QCOW2_UNALLOCATED };
  struct qcow2_fault fault;

  if (offset)
    count_cluster (offset);
  /* Of many entries for one table, some are enough. */
  if (offset && counted[offset >> header.cluster_bits] > 10
      && l1_index % 97 != 0)
    return;
  for (unsigned i = 0; i < entries; ++i) {
    const uint64_t nr = l1_index * entries + i;

    if (nr * cluster >= header.disk_size)
      break;
    if (offset)
      assert_int_equal (
        qcow2_decode_l2_entry (&header, length, bytes + offset, i, offset,
                               MIN (cluster, header.disk_size - nr * cluster),
                               &c, &fault),
        0);
    check_cluster (nr, &c);
  }
}

/* The bit that says "not shared" is in the entries of the L1 table that are alone with
 * theirs.
 */
static void
check_copied (void)
{
  for (uint64_t i = 0; i < header.l1_entries; ++i) {
    uint64_t entry;

    memcpy (&entry, bytes + header.l1_offset + i * 8, 8);
    entry = be64toh (entry);
    if (entry)
      assert_int_equal (
        entry >> 63,
        counted[(entry & (UINT64_MAX >> 1)) >> header.cluster_bits] == 1);
  }
}

/* Each refcount is the number of references. */
static void
check_refcounts (void)
{
  const uint64_t cluster = qcow2_cluster_size (&header);
  const uint64_t per_block = cluster / 2;
  const uint64_t nr_blocks = header.reftable_size / 8;
  const char *table = bytes + header.reftable_offset;

  for (uint64_t i = 0; i < nr_blocks; ++i) {
    uint64_t offset;

    memcpy (&offset, table + i * 8, 8);
    if (offset)
      count_cluster (be64toh (offset));
  }
  for (uint64_t i = 0; i < length / cluster; ++i) {
    uint64_t offset = 0;
    uint16_t refcount = 0;

    if (i / per_block < nr_blocks)
      memcpy (&offset, table + i / per_block * 8, 8);
    if (offset)
      memcpy (&refcount, bytes + be64toh (offset) + i % per_block * 2, 2);
    if (be16toh (refcount) != counted[i])
      fail_msg ("cluster %llu: refcount %u, references %u",
                (unsigned long long) i, be16toh (refcount), counted[i]);
  }
}

static void
check_image (const char *image, uint64_t size)
{
  struct qcow2_fault fault = { 0, "" };
  const uint64_t used = MIN (size, QCOW2_HEADER_BYTES);

  bytes = image;
  length = size;
  if (qcow2_decode_header (image, used, size, &header, &fault) == -1)
    fail_msg ("offset %llu: %s", (unsigned long long) fault.offset,
              fault.what);
  assert_true (header.ours);
  assert_true (size >= QCOW2_MIN_FILE_SIZE);
  assert_int_equal (header.disk_size, source.geometry.disk_size);

  counted = calloc (size / qcow2_cluster_size (&header) + 1, sizeof *counted);
  count_cluster (0);
  count_range (header.l1_offset, header.l1_size);
  count_range (header.reftable_offset, header.reftable_size);
  for (uint64_t i = 0; i < header.l1_entries; ++i) {
    uint64_t entry, offset;

    memcpy (&entry, image + header.l1_offset + i * 8, 8);
    assert_int_equal (qcow2_decode_l1_entry (&header, size, entry,
                                             header.l1_offset + i * 8, &offset,
                                             &fault),
                      0);
    check_l2_table (i, offset);
  }
  check_refcounts ();
  check_copied ();
  free (counted);
}

/*----------------------------------------------------------------------
 * Tests
 */

static char *
read_planned (uint64_t *size)
{
  struct image *image = image_plan (&source);
  char *buf;

  assert_non_null (image);
  *size = image_size (image);
  buf = malloc (*size);
  assert_non_null (buf);
  assert_int_equal (image_read (image, &reader, buf, *size, 0), 0);

  /* Any piece is the same as in the whole. */
  seed = 7;
  for (unsigned i = 0; i < 500; ++i) {
    const uint64_t offset = next_random () % *size;
    const uint64_t wanted = 1 + next_random () % 300000;
    const size_t count = MIN (*size - offset, wanted);
    CLEANUP_FREE char *piece = malloc (count);

    assert_int_equal (image_read (image, &reader, piece, count, offset), 0);
    assert_memory_equal (piece, buf + offset, count);
  }
  image_free (image);
  return buf;
}

static uint64_t had_space; /* for so many tables, before an image was made */

/* Make the overlay's file into an image, and give back what it does not use.  -1 and errno. */
static int
finish (void)
{
  struct giveback_budget budget
    = { .nanoseconds = INT64_C (1) << 60, .extents = UINT32_MAX };
  struct image_used used;

  had_space = tables.with_space.nr;
  if (image_finish (&source, &tables, &used) == -1)
    return -1;
  giveback (&store, block_size, &used, &budget);
  free (used.words);
  return 0;
}

/* No space had to be found for it. */
static void
check_space (void)
{
  assert_true (tables.used.nr <= had_space);
}

/* The overlay's file after that. */
static char *
read_finished (uint64_t *size)
{
  struct stat st;
  char *buf;

  assert_int_equal (fstat (store.file.fd, &st), 0);
  *size = (uint64_t) st.st_size;
  buf = malloc (*size);
  assert_non_null (buf);
  assert_int_equal (store_read (&store, buf, *size, 0), 0);
  return buf;
}

static void
check_both (uint64_t disk_size, uint32_t bs, enum qcow2_l2_format format,
            unsigned slots)
{
  uint64_t size;
  char *buf;

  set_up_disk (disk_size, bs, format);
  change_slots (slots);

  buf = read_planned (&size);
  check_image (buf, size);
  free (buf);

  /* An extended one is always copied. */
  if (format == QCOW2_PORTABLE) {
    assert_int_equal (finish (), 0);
    buf = read_finished (&size);
    check_image (buf, size);
    free (buf);
    if (slots > 0)
      check_space ();
  }
  tear_down (NULL);
}

static void
test_both (void **state)
{
  (void) state;
  check_both (64 * MIB, 4096, QCOW2_PORTABLE, 300);
  check_both (64 * MIB, 4096, QCOW2_EXTENDED, 300);
  check_both (200 * MIB, 4096, QCOW2_PORTABLE, 3);
  check_both (256 * MIB, 65536, QCOW2_PORTABLE, 20);
  check_both (256 * MIB, 65536, QCOW2_EXTENDED, 20);
  check_both (512 * MIB, 1 << 20, QCOW2_PORTABLE, 3);
  set_up_disk (MIB, 4096, QCOW2_PORTABLE); /* for tear_down */
}

static void
test_empty (void **state)
{
  static const uint64_t sizes[] = { 0, 1, 511, 512, 513, 10000, 3 * MIB + 7 };

  (void) state;
  for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; ++i) {
    check_both (sizes[i], 4096, QCOW2_PORTABLE, 0);
    check_both (sizes[i], 4096, QCOW2_EXTENDED, 0);
  }
  set_up_disk (MIB, 4096, QCOW2_PORTABLE);
}

/* Read, check and free the file that became an image.  Returns its length. */
static uint64_t
check_finished (void)
{
  uint64_t size;
  char *buf;

  assert_int_equal (finish (), 0);
  buf = read_finished (&size);
  check_image (buf, size);
  free (buf);
  return size;
}

static uint64_t
bytes_of_file (void)
{
  struct stat st;

  assert_int_equal (fstat (store.file.fd, &st), 0);
  return (uint64_t) st.st_blocks * 512;
}

/* Addresses that nobody owns any more, or only old versions of the disk, are clusters whose
 * refcounts are 0.  Their space is given back: at the end of the file, in long rows, and in
 * between.
 */
static void
test_unused_addresses (void **state)
{
  struct log_run row, single, last;
  char *garbage = malloc (16 * MIB);
  struct iovec iov = { .iov_base = garbage, .iov_len = 16 * MIB };

  (void) state;
  memset (garbage, 0xff, 16 * MIB);
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  change_slot (5, UINT32_MAX);
  assert_int_equal (log_take_row (&blocks, 2048, &row), 0);
  change_slot (6, UINT32_MAX);
  assert_int_equal (log_take_row (&blocks, 1, &single), 0);
  change_slot (7, 5);
  assert_int_equal (log_take_row (&blocks, 4096, &last), 0);
  assert_int_equal (
    store_writev (&store, &iov, 1, log_offset (&blocks, last.first)), 0);
  iov = (struct iovec) { garbage, 8 * MIB };
  assert_int_equal (
    store_writev (&store, &iov, 1, log_offset (&blocks, row.first)), 0);
  iov = (struct iovec) { garbage, 4096 };
  assert_int_equal (
    store_writev (&store, &iov, 1, log_offset (&blocks, single.first)), 0);
  free (garbage);
  assert_int_equal (tables_reserve_refcounts (&tables), 0);

  /* Two slots and a bit, their L2 table, two refcount blocks and the table of these; the
   * header, the L1 table.
   */
  assert_true (bytes_of_file () > 24 * MIB);
  assert_true (check_finished () < 12 * MIB);
  assert_true (bytes_of_file () <= (2 * 32 + 2 + 1 + 2 + 1 + 2) * 4096);
  check_space ();
}

/* With no time for it, only what the file was made longer ahead of its use is cut off. */
static void
test_no_time (void **state)
{
  struct giveback_budget budget = { .nanoseconds = 0, .extents = 1000 };
  struct image_used used;
  struct log_run row;
  uint64_t size;

  (void) state;
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  change_slot (5, UINT32_MAX);
  assert_int_equal (log_take_row (&blocks, 1, &row), 0);
  write_block (1, 1, row.first);
  change_slot (6, UINT32_MAX);
  assert_int_equal (image_finish (&source, &tables, &used), 0);
  giveback (&store, block_size, &used, &budget);
  assert_int_equal (store_size (&store, &size), 0);
  assert_true (size == used.end);
  assert_true (bytes_of_file () >= (2 * 32 + 1) * 4096);
  free (used.words);
  char *buf = read_finished (&size);
  check_image (buf, size);
  free (buf);
}

/* Where free addresses lie between used ones, tables go there, each for itself. */
static void
test_scattered_tables (void **state)
{
  struct log_run row;

  (void) state;
  set_up_disk (1024 * MIB, 4096, QCOW2_PORTABLE);
  change_slot (0, 1);
  assert_int_equal (log_take_row (&blocks, 4000, &row), 0);
  for (uint32_t i = 0; i < row.count; ++i)
    if (i % 4 != 0)
      log_give_back (&blocks, (struct log_run) { row.first + i, 1 });
  for (uint64_t nr = 16; nr < map.nr_slots; nr += 16)
    change_slot (nr, UINT64_C (2) << 32 | 1);
  assert_true (tables.nr_runs > 100);
  check_finished ();
  check_space ();
}

/* Addresses that were used before, and were freed without being punched, hold older bytes.
 * Tables that get them have space of their own: nothing of that is left.  (A file system
 * that copies on write would want new space to write the table, which the save may not
 * find.)
 */
static void
test_tables_where_bytes_were (void **state)
{
  struct log_run row, run;
  char bytes[4096];
  bool punch;

  (void) state;
  set_up_disk (1024 * MIB, 4096, QCOW2_PORTABLE);
  assert_int_equal (log_take_row (&blocks, 64, &row), 0);
  for (uint32_t i = 0; i < row.count; ++i)
    write_block (1, 1, row.first + i);
  assert_int_equal (log_take_row (&blocks, 256, &run), 0);
  log_wait (&blocks, row);
  assert_true (log_take_waiting (&blocks));
  while (log_next_taken (&blocks, 4096, &run, &punch))
    log_free_taken (&blocks, run);

  assert_int_equal (tables_reserve_l2 (&tables, 3), 1);
  assert_true (tables.runs[0].first >= row.first
               && tables.runs[0].first < row.first + row.count);
  for (uint32_t i = 0; i < tables.runs[0].count; ++i) {
    assert_int_equal (
      store_read (&store, bytes, sizeof bytes,
                  log_offset (&blocks, tables.runs[0].first + i)),
      0);
    assert_true (bytes[0] == 0
                 && memcmp (bytes, bytes + 1, sizeof bytes - 1) == 0);
  }
}

/* A disk that is touched everywhere has many L2 tables, and refcounts that were set aside as
 * it grew.
 */
static void
test_many_tables (void **state)
{
  (void) state;
  set_up_disk (1024 * MIB, 4096, QCOW2_PORTABLE);
  for (uint64_t nr = 0; nr < map.nr_slots; nr += 16)
    change_slot (nr, UINT64_C (2) << 32 | 1);
  check_finished ();
  assert_true (tables.used.nr > 512);
  check_space ();
}

static void
check_zero_tables (uint64_t nr_l2)
{
  uint64_t size;
  char *buf = read_planned (&size);

  check_image (buf, size);
  free (buf);
  check_finished ();
  assert_int_equal (tables.used.nr, nr_l2 + 1); /* and a refcount block */
  check_space ();
  tear_down (NULL);
}

/* L2 tables that are all zero are one, and one of them alone is a table like others. */
static void
test_zero_tables (void **state)
{
  (void) state;
  for (unsigned nr = 1; nr <= 3; ++nr) {
    set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
    for (uint64_t i = 0; i < nr * 16; ++i)
      change_slot (64 + i, UINT64_MAX << 32);
    change_slot (64 + nr * 16, UINT64_MAX << 32);
    check_zero_tables (2);
  }

  /* Whole leaves, of which some is written to again. */
  set_up_disk (256 * MIB, 4096, QCOW2_PORTABLE);
  zero_leaves (256, 3);
  change_slot (1023, 7);
  change_slot (700, UINT64_MAX << 32); /* which it is */
  check_zero_tables (2);

  /* The last table, which is not a whole one. */
  set_up_disk (64 * MIB + 5000, 4096, QCOW2_PORTABLE);
  zero_leaves (0, 2);
  change_slot (512, UINT64_C (3) << 32);
  check_zero_tables (2);
  set_up_disk (3 * 4096, 4096, QCOW2_PORTABLE);
  change_slot (0, UINT64_C (7) << 32);
  check_zero_tables (1);

  /* Leaves that are just a part of a table. */
  set_up_disk (64 * 1024 * MIB, 128 * 1024, QCOW2_PORTABLE);
  for (uint64_t i = 0; i < 10; ++i)
    zero_leaves (i * 512 + 256, 1);
  zero_leaves (20 * 512, 2);
  check_zero_tables (11);
  set_up_disk (MIB, 4096, QCOW2_PORTABLE);
}

/* More of them than a refcount can count, and two pages of the L1 table between them. */
static void
test_many_zero_tables (void **state)
{
  (void) state;
  set_up_disk (UINT64_C (160) * 1024 * MIB, 4096, QCOW2_PORTABLE);
  zero_leaves (0, 4100);
  change_slot (4100 * 256, 3);
  zero_leaves (4101 * 256 + 256 * 64, 300);
  check_zero_tables (3);

  /* The same in a planned one whose clusters are slots. */
  set_up_disk (16 * 1024 * MIB, 4096, QCOW2_EXTENDED);
  zero_leaves (0, 32 * 5);
  change_slot (32 * 256 * 9, 1);
  uint64_t size;
  char *buf = read_planned (&size);
  check_image (buf, size);
  free (buf);
  assert_true (size < 8 * MIB);
}

/* A file in which so many addresses went to old versions of the disk that the refcount
 * table is too long for the head: it moves, more than once, and stays where it was when
 * there is no space elsewhere.
 */
static void
test_long_file (void **state)
{
  static const uint64_t added[] = { 9 * 1024 * MIB, 130 * 1024 * MIB };
  char garbage[1 << 18];
  struct log_run row;
  struct stat st;

  (void) state;
  if (sizeof (size_t) < sizeof (uint64_t))
    skip ();
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  change_slots (20);
  for (unsigned i = 0; i < 2; ++i) {
    const uint64_t offset = tables.reftable_offset;
    struct iovec iov = { .iov_base = garbage, .iov_len = sizeof garbage };

    assert_int_equal (log_take_row (&blocks, added[i] / block_size, &row), 0);
    /* What comes behind it was used before. */
    memset (garbage, 0xff, sizeof garbage);
    assert_int_equal (store_writev (&store, &iov, 1, log_end (&blocks)), 0);
    fail_punches = true;
    fail_calls_from (1, ENOSPC);
    assert_int_equal (tables_reserve_refcounts (&tables), -1);
    assert_int_equal (call_has_failed (), ENOSPC);
    fail_punches = false;
    assert_true (tables.reftable_offset == offset);
    change_slots (20);
    assert_true (tables.reftable_offset >= log_offset (&blocks, row.first));
  }

  /* All that the save will need has space. */
  const uint64_t end = log_end (&blocks);
  assert_int_equal (finish (), 0);
  assert_true (log_end (&blocks) == end);
  check_space ();
  assert_int_equal (fstat (store.file.fd, &st), 0);
  const size_t size = (size_t) st.st_size;
  char *image = mmap (NULL, size, PROT_READ, MAP_SHARED, store.file.fd, 0);
  /* Valgrind has no room for so much, and calls that invalid. */
  if (image == MAP_FAILED && errno == EINVAL)
    skip ();
  assert_true (image != MAP_FAILED);
  check_image (image, size);
  assert_true (header.reftable_offset > 100 * 1024 * MIB);
  munmap (image, size);
}

/* Where nothing was set aside, an overlay can be made into an image all the same. */
static void
test_long_file_unplanned (void **state)
{
  struct stat st;
  struct log_run row;

  (void) state;
  if (sizeof (size_t) < sizeof (uint64_t))
    skip ();
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  tables.space = TABLES_UNPLANNED;
  change_slots (20);
  assert_int_equal (log_take_row (&blocks, 9 * 1024 * MIB / block_size, &row),
                    0);
  change_slots (20);
  change_slot (100, 1);
  assert_int_equal (finish (), 0);
  assert_int_equal (fstat (store.file.fd, &st), 0);
  const size_t size = (size_t) st.st_size;
  char *image = mmap (NULL, size, PROT_READ, MAP_SHARED, store.file.fd, 0);
  assert_true (image != MAP_FAILED);
  check_image (image, size);
  munmap (image, size);
}

/* What was set aside and not needed is given back. */
static void
test_space (void **state)
{
  (void) state;
  set_up_disk (64 * 1024 * MIB, 4096, QCOW2_PORTABLE);
  for (unsigned i = 0; i < 1000; ++i)
    change_slot (i * 512, 1);
  assert_int_equal (finish (), 0);

  /* A block and an L2 table each, some refcounts, and some pages of the head. */
  assert_true (bytes_of_file ()
               <= 1000 * (4096 + 4096) + 8 * 4096 + 256 * 1024);
}

/* Whatever fails, the overlay can still be read. */
static void
test_failures (void **state)
{
  static const int errors[] = { ENOSPC, EIO };
  int failed = 0;

  (void) state;
  for (unsigned e = 0; e < 2; ++e) {
    for (int n = 1;; ++n) {
      uint64_t size;
      char *buf;
      int r;

      set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
      change_slots (100);
      fail_calls_from (n, errors[e]);
      r = finish ();
      const int err = call_has_failed ();
      if (!err) {
        assert_int_equal (r, 0);
        break;
      }
      if (r == -1) {
        failed++;
        buf = read_planned (&size);
        check_image (buf, size);
      }
      else
        buf = read_finished (&size);
      free (buf);
      tear_down (NULL);
    }
    if (e == 0)
      tear_down (NULL);
  }
  assert_true (failed > 10);
}

/* A plan that fails says so. */
static void
test_plan_failures (void **state)
{
  (void) state;
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  change_slots (100);
  for (int n = 1;; ++n) {
    struct image *image;

    fail_calls_from (n, EIO);
    image = image_plan (&source);
    const int err = call_has_failed ();
    if (!err) {
      assert_non_null (image);
      image_free (image);
      break;
    }
    assert_null (image);
  }
}

/* Setting space aside fails with the reason, and can be tried again: what was said to have
 * space has it.
 */
static void
test_reserve_failures (void **state)
{
  bool failed = true;

  (void) state;
  for (unsigned zero = 0; zero < 2; ++zero)
    for (int n = 1; n == 1 || failed; ++n) {
      int r;

      set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
      fail_calls_from (n, ENOSPC);
      r = zero ? tables_reserve_zero_l2 (&tables, 0, 16)
               : tables_reserve_l2 (&tables, 3);
      failed = call_has_failed () != 0;
      assert_int_equal (r, failed ? -1 : !zero);
      if (zero)
        zero_leaves (0, 1);
      else
        change_slots (50);
      check_finished ();
      check_space ();
      tear_down (NULL);
    }
  set_up_disk (MIB, 4096, QCOW2_PORTABLE);
}

/* Asked again, what has space costs nothing. */
static void
test_reserve_again (void **state)
{
  (void) state;
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  assert_int_equal (tables_reserve_l2 (&tables, 3), 1);
  assert_int_equal (tables_reserve_zero_l2 (&tables, 16, 16), 0);

  const uint64_t nr = tables.nr_clusters, end = log_end (&blocks);
  fail_calls_from (1, ENOSPC);
  for (unsigned i = 0; i < 1000; ++i) {
    assert_int_equal (tables_reserve_l2 (&tables, 3), 0);
    assert_int_equal (tables_reserve_zero_l2 (&tables, 0, 16), 0);
  }
  assert_int_equal (call_has_failed (), 0);
  assert_true (tables.nr_clusters == nr && log_end (&blocks) == end);
}

/* What a request that fails had set aside is not counted any more, unless another one has
 * asked for the same table meanwhile.
 */
static void
test_cancel (void **state)
{
  (void) state;
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  assert_int_equal (tables_reserve_l2 (&tables, 3), 1);
  tables_cancel_l2 (&tables, 3);
  assert_int_equal (tables.nr_l2, 0);
  assert_int_equal (tables_reserve_l2 (&tables, 3), 1);
  assert_int_equal (tables_reserve_l2 (&tables, 3), 0);
  tables_cancel_l2 (&tables, 3);
  assert_int_equal (tables.nr_l2, 1);
  assert_int_equal (tables_reserve_l2 (&tables, 3), 0);
  for (unsigned i = 0; i < 100; ++i) {
    assert_int_equal (tables_reserve_l2 (&tables, 4), 1);
    tables_cancel_l2 (&tables, 4);
  }
  assert_int_equal (tables.nr_l2, 1);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_teardown (test_cancel, tear_down),
    cmocka_unit_test_teardown (test_both, tear_down),
    cmocka_unit_test_teardown (test_empty, tear_down),
    cmocka_unit_test_teardown (test_unused_addresses, tear_down),
    cmocka_unit_test_teardown (test_no_time, tear_down),
    cmocka_unit_test_teardown (test_scattered_tables, tear_down),
    cmocka_unit_test_teardown (test_tables_where_bytes_were, tear_down),
    cmocka_unit_test_teardown (test_many_tables, tear_down),
    cmocka_unit_test_teardown (test_zero_tables, tear_down),
    cmocka_unit_test_teardown (test_many_zero_tables, tear_down),
    cmocka_unit_test_teardown (test_long_file, tear_down),
    cmocka_unit_test_teardown (test_long_file_unplanned, tear_down),
    cmocka_unit_test_teardown (test_space, tear_down),
    cmocka_unit_test_teardown (test_failures, tear_down),
    cmocka_unit_test_teardown (test_plan_failures, tear_down),
    cmocka_unit_test_teardown (test_reserve_failures, tear_down),
    cmocka_unit_test_teardown (test_reserve_again, tear_down),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
