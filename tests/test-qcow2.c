/* SPDX-License-Identifier: BSD-3-Clause */

/* The qcow2 format, without files. */

#include <config.h>

#include <endian.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "format/qcow2.h"

#define KiB UINT64_C (1024)
#define MiB (KiB * 1024)
#define GiB (MiB * 1024)
#define TiB (GiB * 1024)
#define PiB (TiB * 1024)
#define EiB (PiB * 1024)

static uint32_t
get32 (const void *buf, size_t offset)
{
  uint32_t value;

  memcpy (&value, (const char *) buf + offset, sizeof value);
  return be32toh (value);
}

static uint64_t
get64 (const void *buf, size_t offset)
{
  uint64_t value;

  memcpy (&value, (const char *) buf + offset, sizeof value);
  return be64toh (value);
}

static void
put64 (void *buf, size_t offset, uint64_t value)
{
  value = htobe64 (value);
  memcpy ((char *) buf + offset, &value, sizeof value);
}

/*----------------------------------------------------------------------
 * Geometry
 */

static void
sizes_that_each_format_can_address (void **state)
{
  /* "Portable" up to the first size, "extended" up to the second one (0: it
   * does not exist for such blocks).
   */
  static const struct {
    uint32_t block_size;
    uint64_t portable, extended;
  } cases[] = {
    { 512, 128 * GiB, 64 * TiB }, { 4096, 8 * TiB, 4 * PiB },
    { 65536, 2 * PiB, 1 * EiB },  { 131072, 8 * PiB, 0 },
    { 2 * MiB, 2 * EiB, 0 },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const uint32_t bs = cases[i].block_size;
    struct qcow2_geometry g;

    assert_int_equal (
      qcow2_geometry_init (&g, cases[i].portable, bs, QCOW2_PORTABLE), 0);
    assert_int_equal (g.format, QCOW2_PORTABLE);
    assert_int_equal (g.cluster_size, bs);
    assert_true (g.l1_entries * 8 == QCOW2_MAX_L1_SIZE);

    const int r
      = qcow2_geometry_init (&g, cases[i].portable + 1, bs, QCOW2_PORTABLE);
    if (cases[i].extended == 0) {
      assert_int_equal (r, -1);
      assert_int_equal (qcow2_geometry_init (&g, 1, bs, QCOW2_EXTENDED), -1);
      continue;
    }
    assert_int_equal (r, 0);
    assert_int_equal (g.format, QCOW2_EXTENDED);
    assert_int_equal (g.cluster_size, 32 * bs);

    for (enum qcow2_l2_format f = QCOW2_PORTABLE; f <= QCOW2_EXTENDED; ++f) {
      assert_int_equal (qcow2_geometry_init (&g, cases[i].extended, bs, f), 0);
      assert_int_equal (g.format, QCOW2_EXTENDED);
      assert_true (g.l1_entries * 8 == QCOW2_MAX_L1_SIZE);
      assert_int_equal (qcow2_geometry_init (&g, cases[i].extended + 1, bs, f),
                        -1);
    }
  }
}

static void
sizes_of_disks (void **state)
{
  static const struct {
    uint64_t size, rounded, l1_entries;
  } cases[] = {
    { 0, 0, 1 },
    { 1, 512, 1 },
    { 511, 512, 1 },
    { 512, 512, 1 },
    { 513, 1024, 1 },
    { 2 * MiB - 1, 2 * MiB, 1 },
    { 2 * MiB, 2 * MiB, 1 },
    { 2 * MiB + 1, 2 * MiB + 512, 2 },
    { 7 * TiB + 12345, 7 * TiB + 12800, 3670017 },
  };
  struct qcow2_geometry g;

  (void) state;
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    assert_int_equal (
      qcow2_geometry_init (&g, cases[i].size, 4096, QCOW2_PORTABLE), 0);
    assert_true (g.disk_size == cases[i].rounded);
    assert_true (g.l1_entries == cases[i].l1_entries);
    assert_int_equal (g.slots_per_l2, 16);
  }

  /* The rounding does not overflow. */
  assert_int_equal (qcow2_geometry_init (&g, INT64_MAX, 65536, QCOW2_PORTABLE),
                    -1);
  assert_int_equal (
    qcow2_geometry_init (&g, INT64_MAX - 511, 65536, QCOW2_PORTABLE), -1);

  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_EXTENDED), 0);
  assert_int_equal (g.format, QCOW2_EXTENDED);
  assert_int_equal (g.slots_per_l2, 8192);
  assert_int_equal (g.l1_entries, 1);
}

static void
counting_clusters (void **state)
{
  struct qcow2_geometry g;

  (void) state;
  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_PORTABLE), 0);
  assert_int_equal (qcow2_refcounts_per_block (&g), 2048);
  assert_int_equal (qcow2_clusters (&g, 0), 0);
  assert_int_equal (qcow2_clusters (&g, 1), 1);
  assert_int_equal (qcow2_clusters (&g, 4096), 1);
  assert_int_equal (qcow2_clusters (&g, 4097), 2);
  assert_true (qcow2_clusters (&g, UINT64_MAX) == UINT64_C (1) << 52);
  assert_int_equal (qcow2_data_clusters (&g, 0), 0);
  assert_int_equal (qcow2_data_clusters (&g, UINT64_C (7) << 32 | 0x80000100),
                    2);
  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_EXTENDED), 0);
  assert_int_equal (qcow2_data_clusters (&g, UINT64_C (7) << 32), 0);
  assert_int_equal (qcow2_data_clusters (&g, UINT64_C (7) << 32 | 0x80000100),
                    1);
}

/*----------------------------------------------------------------------
 * Header
 */

/* The file that the header is of. */
#define FILE_SIZE GiB

static uint8_t cluster[2 * MiB];

/* A disk of nearly 1 GiB, with its refcount table in cluster 1 and its L1 table
 * from cluster 2 on.
 */
static int
encode_with_base (uint32_t block_size, enum qcow2_l2_format format,
                  const char *backing_file, const char *backing_format,
                  const struct qcow2_base *base)
{
  struct qcow2_geometry g;

  assert_int_equal (qcow2_geometry_init (&g, GiB - 1, block_size, format), 0);

  const struct qcow2_layout layout = {
    .reftable_offset = g.cluster_size,
    .reftable_clusters = 1,
    .l1_offset = UINT64_C (2) * g.cluster_size,
    .backing_file = backing_file,
    .backing_format = backing_format,
    .base = base,
  };
  memset (cluster, 'x', sizeof cluster);
  return qcow2_encode_header (cluster, &g, &layout);
}

static int
encode (uint32_t block_size, enum qcow2_l2_format format,
        const char *backing_file, const char *backing_format)
{
  return encode_with_base (block_size, format, backing_file, backing_format,
                           NULL);
}

static struct qcow2_header
decode (void)
{
  struct qcow2_header h;
  struct qcow2_fault fault;

  if (qcow2_decode_header (cluster, QCOW2_HEADER_BYTES, FILE_SIZE, &h, &fault)
      == -1)
    fail_msg ("offset %lu: %s", (unsigned long) fault.offset, fault.what);
  return h;
}

static void
header_by_its_bytes (void **state)
{
  (void) state;
  assert_int_equal (encode (4096, QCOW2_PORTABLE, NULL, NULL), 0);
  assert_memory_equal (cluster, "QFI\xfb", 4);
  assert_int_equal (get32 (cluster, 4), 3);
  assert_int_equal (get64 (cluster, 8), 0);
  assert_int_equal (get32 (cluster, 16), 0);
  assert_int_equal (get32 (cluster, 20), 12);
  assert_int_equal (get64 (cluster, 24), GiB);
  assert_int_equal (get32 (cluster, 32), 0);
  assert_int_equal (get32 (cluster, 36), 512);
  assert_int_equal (get64 (cluster, 40), 8192);
  assert_int_equal (get64 (cluster, 48), 4096);
  assert_int_equal (get32 (cluster, 56), 1);
  assert_int_equal (get32 (cluster, 60), 0);
  assert_int_equal (get64 (cluster, 64), 0);
  assert_int_equal (get64 (cluster, 72), 0);
  assert_int_equal (get64 (cluster, 80), 0);
  assert_int_equal (get64 (cluster, 88), 0);
  assert_int_equal (get32 (cluster, 96), 4);
  assert_int_equal (get32 (cluster, 100), 112);
  assert_int_equal (get64 (cluster, 104), 0);
  assert_memory_equal (cluster + 112,
                       "ncow\0\0\0\x08"
                       "cow 1\0\0\0",
                       16);
  for (unsigned i = 128; i < 4096; ++i)
    assert_int_equal (cluster[i], 0);
  assert_int_equal (cluster[4096], 'x');

  assert_int_equal (encode (4096, QCOW2_EXTENDED, "base.img", "raw"), 0);
  assert_int_equal (get32 (cluster, 20), 17);
  assert_int_equal (get32 (cluster, 36), 1);
  assert_int_equal (get64 (cluster, 72), 16);
  assert_memory_equal (cluster + 112,
                       "\xe2\x79\x2a\xca\0\0\0\x03raw\0\0\0\0\0", 16);
  assert_memory_equal (cluster + 128, "ncow", 4);
  assert_int_equal (get64 (cluster, 144), 0);
  assert_int_equal (get64 (cluster, 8), 152);
  assert_int_equal (get32 (cluster, 16), 8);
  assert_memory_equal (cluster + 152, "base.img\0", 9);
}

static void
header_there_and_back (void **state)
{
  static const uint32_t block_sizes[] = { 4096, 65536, 2 * MiB };

  (void) state;
  for (unsigned i = 0; i < 3; ++i)
    for (enum qcow2_l2_format f = QCOW2_PORTABLE; f <= QCOW2_EXTENDED; ++f)
      for (unsigned backing = 0; backing < 3; ++backing) {
        const bool extended = f == QCOW2_EXTENDED;
        const uint32_t bs = block_sizes[i];

        if (extended && bs > 65536)
          continue;
        assert_int_equal (encode (bs, f, backing > 0 ? "disk.img" : NULL,
                                  backing > 1 ? "raw" : NULL),
                          0);

        const struct qcow2_header h = decode ();
        const uint64_t cluster_size = extended ? 32 * bs : bs;
        assert_int_equal (h.version, 3);
        assert_int_equal (qcow2_cluster_size (&h), cluster_size);
        assert_int_equal (h.disk_size, GiB);
        assert_int_equal (h.reftable_offset, cluster_size);
        assert_int_equal (h.reftable_size, cluster_size);
        assert_int_equal (h.l1_offset, 2 * cluster_size);
        assert_int_equal (h.l1_size, 8 * h.l1_entries);
        assert_int_equal (h.extended_l2, extended);
        assert_int_equal (qcow2_l2_entry_size (&h), extended ? 16 : 8);
        assert_int_equal (qcow2_l2_entries (&h) * qcow2_l2_entry_size (&h),
                          cluster_size);
        assert_int_equal (h.nr_snapshots, 0);
        assert_false (h.zstd);
        assert_true (h.ours);
        assert_false (h.base.known);
        assert_string_equal (h.backing_file, backing > 0 ? "disk.img" : "");
        assert_string_equal (h.backing_format, backing > 1 ? "raw" : "");
      }
}

/* What an image says of its base is behind the eight bytes that were there at first, and
 * which are all that older filters look at.
 */
static void
base_by_its_bytes (void **state)
{
  struct qcow2_base base = { .known = true,
                             .has_checksum = true,
                             .checksum = 0x12345678,
                             .size = GiB - 1,
                             .id = "golden 7" };

  (void) state;
  assert_int_equal (encode_with_base (4096, QCOW2_PORTABLE, NULL, NULL, &base),
                    0);
  assert_memory_equal (cluster + 112,
                       "ncow\0\0\0\x24"
                       "cow 1\0\0\0"
                       "\0\0\0\0\x3f\xff\xff\xff"
                       "\0\0\0\x01\x12\x34\x56\x78"
                       "\0\0\0\x08golden 7"
                       "\0\0\0\0\0\0\0\0\0\0\0\0",
                       56);
  base.has_checksum = false;
  base.id[0] = '\0';
  assert_int_equal (encode_with_base (4096, QCOW2_PORTABLE, NULL, NULL, &base),
                    0);
  assert_memory_equal (cluster + 112,
                       "ncow\0\0\0\x1c"
                       "cow 1\0\0\0"
                       "\0\0\0\0\x3f\xff\xff\xff"
                       "\0\0\0\0\0\0\0\0\0\0\0\0",
                       36);
}

static void
base_there_and_back (void **state)
{
  struct qcow2_base base
    = { .known = true, .has_checksum = true, .checksum = UINT32_MAX };
  char name[QCOW2_MAX_BACKING_NAME + 1];

  (void) state;
  memset (name, 'n', sizeof name - 1);
  name[sizeof name - 1] = '\0';
  memset (base.id, 'i', QCOW2_MAX_BASE_ID);
  for (unsigned i = 0; i < 3; ++i) {
    assert_int_equal (
      encode_with_base (4096, QCOW2_PORTABLE, name, "fifteen letters", &base),
      0);

    /* All of it is in the first page. */
    for (unsigned byte = 4096; byte < 8192; ++byte)
      assert_int_equal (cluster[byte], 'x');

    const struct qcow2_header h = decode ();
    assert_true (h.base.known);
    assert_int_equal (h.base.has_checksum, base.has_checksum);
    assert_int_equal (h.base.checksum, base.checksum);
    assert_true (h.base.size == base.size);
    assert_string_equal (h.base.id, base.id);
    assert_string_equal (h.backing_file, name);
    assert_string_equal (h.backing_format, "fifteen letters");

    base.size = i ? 1 : UINT64_MAX;
    base.has_checksum = false;
    base.checksum = 0;
    base.id[i] = '\0';
  }
}

static void
names_of_a_base (void **state)
{
  char text[300] = "";

  (void) state;
  assert_true (qcow2_is_base_id ("golden-2026-11 (\xc3\xa4)"));
  assert_false (qcow2_is_base_id (""));
  assert_false (qcow2_is_base_id ("two\nlines"));
  assert_false (qcow2_is_base_id ("\x1b[2J"));
  assert_false (qcow2_is_base_id ("\x7f"));
  memset (text, 'x', QCOW2_MAX_BASE_ID);
  assert_true (qcow2_is_base_id (text));
  text[QCOW2_MAX_BASE_ID] = 'x';
  assert_false (qcow2_is_base_id (text));
}

/* A reader takes what a later filter has added for no fault, nor bits that it does not
 * know.
 */
static void
base_with_more_behind_it (void **state)
{
  const struct qcow2_base base = { .known = true, .size = 5, .id = "four" };

  (void) state;
  assert_int_equal (encode_with_base (4096, QCOW2_PORTABLE, NULL, NULL, &base),
                    0);
  assert_int_equal (cluster[119], 32);
  cluster[119] = 200;
  cluster[136] = 0x80;
  const struct qcow2_header h = decode ();
  assert_true (h.base.known);
  assert_false (h.base.has_checksum);
  assert_string_equal (h.base.id, "four");
}

static void
images_by_their_first_bytes (void **state)
{
  (void) state;
  assert_int_equal (encode (4096, QCOW2_PORTABLE, NULL, NULL), 0);
  assert_true (qcow2_is_image (cluster, 512));
  assert_true (qcow2_is_image (cluster, 8));
  assert_false (qcow2_is_image (cluster, 7));
  assert_false (qcow2_is_image (cluster, 0));
  cluster[7] = 4;
  assert_false (qcow2_is_image (cluster, 512));
  cluster[7] = 2;
  assert_true (qcow2_is_image (cluster, 512));
  cluster[0] = 'q';
  assert_false (qcow2_is_image (cluster, 512));
}

static void
names_that_do_not_fit (void **state)
{
  char name[5000];

  (void) state;
  memset (name, 'n', sizeof name);
  name[QCOW2_MAX_BACKING_NAME] = '\0';
  assert_int_equal (encode (4096, QCOW2_PORTABLE, name, "raw"), 0);
  decode ();
  name[QCOW2_MAX_BACKING_NAME] = 'n';
  name[QCOW2_MAX_BACKING_NAME + 1] = '\0';
  assert_int_equal (encode (4096, QCOW2_PORTABLE, name, "raw"), -1);
  assert_int_equal (encode (65536, QCOW2_PORTABLE, name, "raw"), -1);
  memset (name, 'n', sizeof name);
  name[4500] = '\0';
  assert_int_equal (encode (4096, QCOW2_PORTABLE, NULL, name), -1);
  assert_int_equal (encode (4096, QCOW2_PORTABLE, name, NULL), -1);
}

/* Each piece of a good header cannot be decoded without what follows it, and
 * does no harm.
 */
static void
header_cut_short (void **state)
{
  struct qcow2_header h;
  struct qcow2_fault fault;

  (void) state;
  assert_int_equal (encode (4096, QCOW2_PORTABLE, "base.img", "raw"), 0);
  for (size_t length = 0; length < 160; ++length) {
    assert_int_equal (
      qcow2_decode_header (cluster, length, length, &h, &fault), -1);
    assert_true (fault.offset <= length);
  }
}

/*----------------------------------------------------------------------
 * Entries
 */

/* Blocks 0 and 2 are allocated, 1 and 31 zero. */
#define STATE (UINT64_C (0x80000002) << 32 | UINT64_C (0x5))

static void
check_entry (const void *table, size_t index, uint64_t expected)
{
  if (get64 (table, 8 * index) != expected)
    fail_msg ("word %zu: %lx", index,
              (unsigned long) get64 (table, 8 * index));
}

static void
slots_by_their_bytes (void **state)
{
  static uint8_t table[128 * KiB];
  struct qcow2_geometry g;

  (void) state;
  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_PORTABLE), 0);
  for (unsigned scattered = 0; scattered < 2; ++scattered) {
    const uint64_t offsets[SLOT_BLOCKS]
      = { [0] = 0x40000, [1] = 0x99000, [2] = 0x7000 };

    memset (table, 0, sizeof table);
    if (scattered)
      qcow2_encode_scattered (table, 3, STATE, offsets);
    else
      qcow2_encode_slot (&g, table, 3, STATE, 0x40000);
    for (unsigned i = 0; i < 4096 / 8; ++i) {
      uint64_t expected = 0;

      if (i == 96)
        expected = UINT64_C (0x8000000000040000);
      else if (i == 98)
        expected = scattered ? UINT64_C (0x8000000000007000)
                             : UINT64_C (0x8000000000041000);
      else if (i == 97 || i == 127)
        expected = 1;
      check_entry (table, i, expected);
    }
    assert_int_equal (table[4096], 0);

    /* The first bytes are those of the largest digits. */
    assert_memory_equal (table + 96 * 8, "\x80\0\0\0\0\x04\0\0", 8);
  }

  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_EXTENDED), 0);
  memset (table, 0, sizeof table);
  qcow2_encode_slot (&g, table, 3, STATE, 0x40000);
  qcow2_encode_slot (&g, table, 5, UINT64_C (0xffffffff) << 32, 0x80000);
  for (unsigned i = 0; i < sizeof table / 8; ++i)
    check_entry (table, i,
                 i == 6    ? UINT64_C (0x8000000000040000)
                 : i == 7  ? STATE
                 : i == 11 ? UINT64_C (0xffffffff00000000)
                           : 0);
}

static void
zero_tables_by_their_bytes (void **state)
{
  static uint8_t table[128 * KiB];
  struct qcow2_geometry g;

  (void) state;
  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_PORTABLE), 0);
  memset (table, 'x', sizeof table);
  qcow2_encode_zero_table (&g, table);
  for (unsigned i = 0; i < 4096 / 8; ++i)
    check_entry (table, i, 1);
  assert_int_equal (table[4096], 'x');

  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_EXTENDED), 0);
  qcow2_encode_zero_table (&g, table);
  for (unsigned i = 0; i < sizeof table / 8; ++i)
    check_entry (table, i, i % 2 ? UINT64_C (0xffffffff00000000) : 0);
}

static void
other_entries_by_their_bytes (void **state)
{
  (void) state;
  assert_true (qcow2_l1_entry (0x123000, 1)
               == htobe64 (UINT64_C (0x8000000000123000)));
  assert_true (qcow2_l1_entry (0x123000, 2) == htobe64 (0x123000));
  assert_true (qcow2_l1_entry (0x123000, QCOW2_MAX_REFCOUNT)
               == htobe64 (0x123000));
  assert_true (qcow2_reftable_entry (0x123000) == htobe64 (0x123000));
}

/* What is written is read back as what it was. */
static void
slots_there_and_back (void **state)
{
  static uint8_t table[4096];
  struct qcow2_geometry g;
  struct qcow2_fault fault;
  struct qcow2_cluster c;

  (void) state;
  assert_int_equal (encode (4096, QCOW2_PORTABLE, NULL, NULL), 0);
  const struct qcow2_header h = decode ();
  assert_int_equal (qcow2_geometry_init (&g, GiB, 4096, QCOW2_PORTABLE), 0);
  qcow2_encode_slot (&g, table, 0, STATE, MiB);
  for (unsigned i = 0; i < 32; ++i) {
    assert_int_equal (
      qcow2_decode_l2_entry (&h, FILE_SIZE, table, i, 0, 4096, &c, &fault), 0);
    switch (bitmap_state (STATE, i)) {
    case BLOCK_ALLOCATED:
      assert_int_equal (c.kind, QCOW2_DATA);
      assert_int_equal (c.offset, MiB + (i == 2 ? 4096 : 0));
      break;
    case BLOCK_ZERO:
      assert_int_equal (c.kind, QCOW2_ZERO);
      break;
    case BLOCK_HOLE:
      assert_int_equal (c.kind, QCOW2_UNALLOCATED);
      break;
    }
  }
}

#define COPIED (UINT64_C (1) << 63)
#define COMPRESSED (UINT64_C (1) << 62)

/* An entry, and what becomes of it in a file of FILE_SIZE bytes. */
struct entry_case {
  uint64_t words[2];
  int kind; /* -1: refused, with this text */
  const char *what;
  uint64_t offset;
  uint64_t size_or_states;
  uint64_t reach; /* 0: a whole cluster */
};

static void
check_case (const struct qcow2_header *h, const struct entry_case *e)
{
  const uint64_t reach = e->reach ? e->reach : qcow2_cluster_size (h);
  const unsigned entry_size = qcow2_l2_entry_size (h);
  struct qcow2_cluster c;
  struct qcow2_fault fault = { .what = "" };
  uint8_t table[48] = { 0 };

  put64 (table, 2 * entry_size, e->words[0]);
  if (h->extended_l2)
    put64 (table, 2 * entry_size + 8, e->words[1]);
  const int r
    = qcow2_decode_l2_entry (h, FILE_SIZE, table, 2, 1000, reach, &c, &fault);
  if (r == -1) {
    assert_string_equal (fault.what, e->what ? e->what : "(not refused)");
    assert_int_equal (fault.offset, 1000 + 2 * entry_size);
    assert_int_equal (e->kind, -1);
    return;
  }
  assert_int_equal (c.kind, e->kind);
  if (c.kind != QCOW2_ZERO && c.kind != QCOW2_UNALLOCATED)
    assert_int_equal (c.offset, e->offset);
  if (c.kind == QCOW2_COMPRESSED)
    assert_int_equal (c.size, e->size_or_states);
  if (c.kind == QCOW2_MIXED)
    assert_true (c.subclusters == e->size_or_states);
}

static const char not_aligned[] = "a cluster is not aligned";
static const char beyond[] = "a cluster goes beyond the end of the file";

static void
standard_entries (void **state)
{
  /* Clusters of 4096 bytes: of a compressed one's entry 58 bits are the offset,
   * 4 the additional sectors.
   */
  static const struct entry_case cases[] = {
    { { 0 }, QCOW2_UNALLOCATED, .offset = 0 },
    { { COPIED }, QCOW2_UNALLOCATED, .offset = 0 },
    { { 1 }, QCOW2_ZERO, .offset = 0 },
    { { COPIED | MiB | 1 }, QCOW2_ZERO, .offset = 0 },
    { { 0x1201 }, QCOW2_ZERO, .offset = 0 }, /* is not read */
    { { MiB }, QCOW2_DATA, .offset = MiB },
    { { COPIED | MiB }, QCOW2_DATA, .offset = MiB },
    { { COPIED | (FILE_SIZE - 4096) },
      QCOW2_DATA,
      .offset = FILE_SIZE - 4096 },
    { { COPIED | (MiB + 512) }, .kind = -1, .what = not_aligned },
    { { COPIED | FILE_SIZE }, .kind = -1, .what = beyond },
    { { COPIED | (FILE_SIZE - 4096) },
      QCOW2_DATA,
      .offset = FILE_SIZE - 4096,
      .reach = 512 },
    { { UINT64_C (0x00fffffffffff000) }, .kind = -1, .what = beyond },
    { { COMPRESSED | 4567 },
      QCOW2_COMPRESSED,
      .offset = 4567,
      .size_or_states = 512 - 471 },
    { { COMPRESSED | UINT64_C (15) << 58 | 1024 },
      QCOW2_COMPRESSED,
      .offset = 1024,
      .size_or_states = 8192 },
    { { COMPRESSED | UINT64_C (15) << 58 | (FILE_SIZE - 1) },
      QCOW2_COMPRESSED,
      .offset = FILE_SIZE - 1,
      .size_or_states = 1 },
    { { COMPRESSED | FILE_SIZE },
      .kind = -1,
      .what = "a compressed cluster lies beyond the end of the file" },
  };

  (void) state;
  assert_int_equal (encode (4096, QCOW2_PORTABLE, NULL, NULL), 0);
  const struct qcow2_header h = decode ();
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i)
    check_case (&h, &cases[i]);

  struct qcow2_header version_2 = h;
  version_2.version = 2;
  const struct entry_case zero
    = { { COPIED | MiB | 1 },
        .kind = -1,
        .what = "a zero cluster, which version 2 does not have" };
  check_case (&version_2, &zero);
}

static void
extended_entries (void **state)
{
#define ALL UINT64_C (0xffffffff)
#define LAST (FILE_SIZE - 4096)
  /* Clusters of 128 KiB. */
  static const struct entry_case cases[] = {
    { { 0, 0 }, QCOW2_UNALLOCATED, .offset = 0 },
    { { COPIED | MiB, 0 }, QCOW2_UNALLOCATED, .offset = 0 },
    { { 0, ALL << 32 }, QCOW2_ZERO, .offset = 0 },
    { { COPIED | MiB, ALL << 32 }, QCOW2_ZERO, .offset = 0 },
    { { COPIED | MiB, ALL }, QCOW2_DATA, .offset = MiB },
    { { COPIED | MiB, STATE },
      QCOW2_MIXED,
      .offset = MiB,
      .size_or_states = STATE },
    { { 0, UINT64_C (6) << 32 },
      QCOW2_MIXED,
      .offset = 0,
      .size_or_states = UINT64_C (6) << 32 },
    { { COPIED | 0x200, UINT64_C (6) << 32 },
      QCOW2_MIXED,
      .offset = 0,
      .size_or_states = UINT64_C (6) << 32 },
    { { COPIED | MiB, UINT64_C (2) << 32 | 2 },
      .kind = -1,
      .what = "a subcluster is both allocated and zero" },
    { { COPIED, 1 },
      .kind = -1,
      .what = "an allocated subcluster lies nowhere in the file" },
    { { COPIED | (MiB + 4096), ALL }, .kind = -1, .what = not_aligned },
    { { COPIED | (MiB + 4096), 1 }, .kind = -1, .what = not_aligned },
    { { COPIED | FILE_SIZE, ALL }, .kind = -1, .what = beyond },
    { { COPIED | FILE_SIZE, 1 }, .kind = -1, .what = beyond },
    { { COMPRESSED | 4608, 0 },
      QCOW2_COMPRESSED,
      .offset = 4608,
      .size_or_states = 512 },
    { { COMPRESSED | 4608, 1 },
      .kind = -1,
      .what = "a compressed cluster has subclusters" },
  };

  (void) state;
  assert_int_equal (encode (4096, QCOW2_EXTENDED, NULL, NULL), 0);
  const struct qcow2_header h = decode ();
  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i)
    check_case (&h, &cases[i]);
}

/* A file need not go on behind the last subcluster that is allocated. */
static void
file_ends_in_a_cluster_with_subclusters (void **state)
{
  struct qcow2_fault fault;
  struct qcow2_cluster c;
  uint8_t entry[16];

  (void) state;
  assert_int_equal (encode (4096, QCOW2_EXTENDED, NULL, NULL), 0);
  const struct qcow2_header h = decode ();
  put64 (entry, 0, COPIED | MiB);
  put64 (entry, 8, 0x9);
  assert_int_equal (qcow2_decode_l2_entry (&h, MiB + 4 * 4096, entry, 0, 0,
                                           128 * KiB, &c, &fault),
                    0);
  assert_int_equal (qcow2_decode_l2_entry (&h, MiB + 4 * 4096 - 1, entry, 0, 0,
                                           128 * KiB, &c, &fault),
                    -1);
  /* Only as far as the disk goes. */
  assert_int_equal (
    qcow2_decode_l2_entry (&h, MiB + 512, entry, 0, 0, 512, &c, &fault), 0);
}

static void
table_entries (void **state)
{
  struct qcow2_fault fault;
  uint64_t offset;

  (void) state;
  assert_int_equal (encode (4096, QCOW2_PORTABLE, NULL, NULL), 0);
  const struct qcow2_header h = decode ();

  assert_int_equal (qcow2_decode_l1_entry (&h, FILE_SIZE,
                                           qcow2_l1_entry (MiB, 1), 8, &offset,
                                           &fault),
                    0);
  assert_int_equal (offset, MiB);
  assert_int_equal (
    qcow2_decode_l1_entry (&h, FILE_SIZE, 0, 8, &offset, &fault), 0);
  assert_int_equal (offset, 0);
  assert_int_equal (qcow2_decode_l1_entry (&h, FILE_SIZE,
                                           qcow2_l1_entry (MiB + 512, 1), 8,
                                           &offset, &fault),
                    -1);
  assert_string_equal (fault.what, "an L2 table is not aligned");
  assert_int_equal (fault.offset, 8);
  assert_int_equal (qcow2_decode_l1_entry (
                      &h, FILE_SIZE - 1, qcow2_l1_entry (FILE_SIZE - 4096, 1),
                      8, &offset, &fault),
                    -1);
  assert_string_equal (fault.what,
                       "an L2 table goes beyond the end of the file");

  assert_int_equal (qcow2_decode_reftable_entry (&h, FILE_SIZE,
                                                 qcow2_reftable_entry (MiB), 8,
                                                 &offset, &fault),
                    0);
  assert_int_equal (offset, MiB);
  assert_int_equal (qcow2_decode_reftable_entry (&h, FILE_SIZE,
                                                 qcow2_reftable_entry (512), 8,
                                                 &offset, &fault),
                    -1);
  assert_string_equal (fault.what, "a refcount block is not aligned");
  assert_int_equal (qcow2_decode_reftable_entry (
                      &h, FILE_SIZE, qcow2_reftable_entry (UINT64_C (1) << 63),
                      8, &offset, &fault),
                    -1);
  assert_string_equal (fault.what,
                       "a refcount block goes beyond the end of the file");
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (sizes_that_each_format_can_address),
    cmocka_unit_test (sizes_of_disks),
    cmocka_unit_test (counting_clusters),
    cmocka_unit_test (header_by_its_bytes),
    cmocka_unit_test (header_there_and_back),
    cmocka_unit_test (base_by_its_bytes),
    cmocka_unit_test (base_there_and_back),
    cmocka_unit_test (names_of_a_base),
    cmocka_unit_test (base_with_more_behind_it),
    cmocka_unit_test (images_by_their_first_bytes),
    cmocka_unit_test (names_that_do_not_fit),
    cmocka_unit_test (header_cut_short),
    cmocka_unit_test (slots_by_their_bytes),
    cmocka_unit_test (zero_tables_by_their_bytes),
    cmocka_unit_test (other_entries_by_their_bytes),
    cmocka_unit_test (slots_there_and_back),
    cmocka_unit_test (standard_entries),
    cmocka_unit_test (extended_entries),
    cmocka_unit_test (file_ends_in_a_cluster_with_subclusters),
    cmocka_unit_test (table_entries),
  };

  return cmocka_run_group_tests_name ("qcow2", tests, NULL, NULL);
}
