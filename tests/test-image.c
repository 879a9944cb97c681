/* SPDX-License-Identifier: BSD-3-Clause */

/* Images of a map, without a server: both ways to have one, read back by the
 * decoder, every refcount counted; random reads; space that was set aside; calls
 * that fail one after the other.
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
static struct places places;
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
  places_init (&places, &store, slot_bytes (),
               (tables_head_size (&g) + slot_bytes () - 1) / slot_bytes ());
  assert_int_equal (tables_init (&tables, &g, &places, TABLES_SET_ASIDE), 0);
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
  short_transfers = no_tmpfile = false;
  tables_destroy (&tables);
  places_destroy (&places);
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

/* What change.c does: space first, then bytes, then the state. */
static void
change_slot (uint64_t nr, uint64_t state)
{
  struct slot *slot = map_touch (&map, nr);
  struct slot_pair pair = slot_load (slot);
  CLEANUP_FREE char *buf = malloc (block_size);

  assert_int_equal (
    tables_reserve_l2 (&tables, nr / source.geometry.slots_per_l2), 0);
  if (bitmap_allocated (state) && pair.place == 0)
    assert_int_equal (places_take (&places, 1, &pair.place), 1);
  assert_int_equal (tables_reserve_refcounts (&tables), 0);
  for (unsigned b = 0; b < SLOT_BLOCKS; ++b) {
    struct iovec iov = { .iov_base = buf, .iov_len = block_size };

    if (bitmap_state (state, b) != BLOCK_ALLOCATED)
      continue;
    fill_block (buf, nr, b);
    assert_int_equal (
      store_writev (&store, &iov, 1,
                    pair.place * slot_bytes () + (uint64_t) b * block_size),
      0);
  }
  pair.state = state;
  slot_store (slot, pair);
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
static uint8_t *counted; /* references to each cluster */

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
  CLEANUP_FREE char *buf = malloc (block_size);

  assert_int_equal (state, expected);
  if (state == BLOCK_ALLOCATED) {
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

  counted = calloc (size / qcow2_cluster_size (&header) + 1, 1);
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

/* Make the overlay's file into an image.  -1 and errno. */
static int
finish (void)
{
  uint64_t end;

  return image_finish (&source, &tables, &end) == -1
           ? -1
           : store_truncate (&store, end);
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

  assert_int_equal (finish (), 0);
  buf = read_finished (&size);
  check_image (buf, size);
  free (buf);

  /* No space had to be found for it. */
  assert_true (slots == 0 || tables.nr_used <= tables.nr_with_space);
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

/* Places that were given back leave holes in the file, whose refcounts are 0. */
static void
test_unused_places (void **state)
{
  uint64_t place, size;
  char *buf;

  (void) state;
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  change_slot (5, UINT32_MAX);
  assert_int_equal (places_take (&places, 7, &place), 7);
  change_slot (6, UINT32_MAX);
  places_give_back (&places, place, 7);
  assert_int_equal (finish (), 0);
  buf = read_finished (&size);
  check_image (buf, size);
  free (buf);
}

/* A disk that is touched everywhere has more L2 tables than fit into one place,
 * and refcounts that were set aside as it grew.
 */
static void
test_many_tables (void **state)
{
  uint64_t size;
  char *buf;

  (void) state;
  set_up_disk (1024 * MIB, 4096, QCOW2_PORTABLE);
  for (uint64_t nr = 0; nr < map.nr_slots; nr += 16)
    change_slot (nr, UINT64_C (2) << 32 | 1);
  assert_int_equal (finish (), 0);
  assert_true (tables.nr_used > 512);
  assert_true (tables.nr_used <= tables.nr_with_space);
  buf = read_finished (&size);
  check_image (buf, size);
  free (buf);
}

/* A file in which so many places went to old versions of the disk that the refcount
 * table is too long for the head: it moves, more than once, and stays where it was when
 * there is no space elsewhere.
 */
static void
test_long_file (void **state)
{
  static const uint64_t added[] = { 9 * 1024 * MIB, 130 * 1024 * MIB };
  struct stat st;
  uint64_t place;

  (void) state;
  if (sizeof (size_t) < sizeof (uint64_t))
    skip ();
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  change_slots (20);
  for (unsigned i = 0; i < 2; ++i) {
    const uint64_t offset = tables.reftable_offset;

    assert_int_equal (
      places_take_row (&places, added[i] / slot_bytes (), &place), 0);
    fail_calls_from (1, ENOSPC);
    assert_int_equal (tables_reserve_refcounts (&tables), -1);
    assert_int_equal (call_has_failed (), ENOSPC);
    assert_true (tables.reftable_offset == offset);
    change_slots (20);
    assert_true (tables.reftable_offset >= place * slot_bytes ());
  }

  /* All that the save will need has space. */
  const uint64_t end = places_end (&places);
  assert_int_equal (finish (), 0);
  assert_true (places_end (&places) == end);
  assert_true (tables.nr_used <= tables.nr_with_space);
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
  uint64_t place;

  (void) state;
  if (sizeof (size_t) < sizeof (uint64_t))
    skip ();
  set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
  tables.space = TABLES_UNPLANNED;
  change_slots (20);
  assert_int_equal (
    places_take_row (&places, 9 * 1024 * MIB / slot_bytes (), &place), 0);
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
  struct stat st;

  (void) state;
  set_up_disk (64 * 1024 * MIB, 4096, QCOW2_PORTABLE);
  for (unsigned i = 0; i < 1000; ++i)
    change_slot (i * 512, 1);
  assert_int_equal (finish (), 0);
  assert_int_equal (fstat (store.file.fd, &st), 0);

  /* A block and an L2 table each, refcounts for a file of 1000 slots, and some
   * pages of the head.
   */
  assert_true ((uint64_t) st.st_blocks * 512
               <= 1000 * (4096 + 4096) + (1000 / 64 + 8) * 4096 + 256 * 1024);
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

/* Setting space aside fails with the reason, and can be tried again. */
static void
test_reserve_failures (void **state)
{
  (void) state;
  for (int n = 1;; ++n) {
    int r;

    set_up_disk (64 * MIB, 4096, QCOW2_PORTABLE);
    fail_calls_from (n, ENOSPC);
    r = tables_reserve_l2 (&tables, 3);
    const int err = call_has_failed ();
    if (!err) {
      assert_int_equal (r, 0);
      return;
    }
    assert_int_equal (r, -1);
    change_slots (50);
    assert_int_equal (finish (), 0);
    tear_down (NULL);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test_teardown (test_both, tear_down),
    cmocka_unit_test_teardown (test_empty, tear_down),
    cmocka_unit_test_teardown (test_unused_places, tear_down),
    cmocka_unit_test_teardown (test_many_tables, tear_down),
    cmocka_unit_test_teardown (test_long_file, tear_down),
    cmocka_unit_test_teardown (test_long_file_unplanned, tear_down),
    cmocka_unit_test_teardown (test_space, tear_down),
    cmocka_unit_test_teardown (test_failures, tear_down),
    cmocka_unit_test_teardown (test_plan_failures, tear_down),
    cmocka_unit_test_teardown (test_reserve_failures, tear_down),
  };

  return cmocka_run_group_tests (tests, NULL, NULL);
}
