/* SPDX-License-Identifier: BSD-3-Clause */

/* Loading images that are made by hand: good ones of every kind, hostile ones,
 * and good ones while calls fail or the file is changed.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
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
#include <zlib.h>
#ifdef HAVE_ZSTD
#include <zstd.h>
#endif

#include "bitmap.h"
#include "blk.h"
#include "common/cleanup.h"
#include "faults.h"
#include "images/load.h"
#include "nbdkit-stubs.h"
#include "overlay/private.h"

#define NAME "dir/test.qcow2"

#define COPIED (UINT64_C (1) << 63)
#define COMPRESSED (UINT64_C (1) << 62)
#define ZERO UINT64_C (1)

#define COUNT(array) (sizeof (array) / sizeof (array)[0])

static void
put (void *bytes, uint64_t offset, unsigned width, uint64_t value)
{
  for (unsigned i = 0; i < width; ++i)
    ((uint8_t *) bytes)[offset + i] = (uint8_t) (value >> 8 * (width - 1 - i));
}

/* Bytes that no 0 ends. */
static void
put_bytes (void *to, const void *bytes, size_t count)
{
  memcpy (to, bytes, count);
}

/* A file with these bytes, and holes where it has pages of zeroes. */
static int
make_file (const void *bytes, size_t size)
{
  static const uint8_t zeroes[4096];
  const int fd = memfd_create ("test-load", MFD_CLOEXEC);
  const bool short_ones = short_transfers;

  short_transfers = false;
  assert_true (fd >= 0);
  assert_int_equal (ftruncate (fd, (off_t) size), 0);
  for (size_t pos = 0; pos < size; pos += sizeof zeroes) {
    const size_t count = MIN (sizeof zeroes, size - pos);

    if (memcmp ((const char *) bytes + pos, zeroes, count) != 0)
      assert_int_equal (
        pwrite (fd, (const char *) bytes + pos, count, (off_t) pos), count);
  }
  short_transfers = short_ones;
  return fd;
}

static bool
is_open (int fd)
{
  return fcntl (fd, F_GETFD) != -1;
}

/* Raw deflate.  Returns the length. */
static size_t
deflate_bytes (const void *in, size_t count, void *out, size_t room)
{
  z_stream z = { .next_in = (Bytef *) in, .avail_in = (uInt) count };

  assert_int_equal (
    deflateInit2 (&z, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
  z.next_out = out;
  z.avail_out = (uInt) room;
  assert_int_equal (deflate (&z, Z_FINISH), Z_STREAM_END);
  deflateEnd (&z);
  return z.total_out;
}

static size_t
compress_bytes (bool zstd, const void *in, size_t count, void *out,
                size_t room)
{
#ifdef HAVE_ZSTD
  if (zstd) {
    const size_t r = ZSTD_compress (out, room, in, count, 3);

    assert_false (ZSTD_isError (r));
    return r;
  }
#endif
  assert_false (zstd);
  return deflate_bytes (in, count, out, room);
}

/* The entry of COUNT compressed bytes at OFFSET. */
static uint64_t
compressed_entry (unsigned cluster_bits, uint64_t offset, size_t count)
{
  const uint64_t sectors = (offset + count - 1) / 512 - offset / 512;

  return COMPRESSED | sectors << (70 - cluster_bits) | offset;
}

static int
reset (void **state)
{
  (void) state;
  fail_calls_from (0, 0);
  short_transfers = fail_punches = no_tmpfile = no_seek_data = false;
  nr_errors = 0;
  last_error[0] = '\0';
  return 0;
}

#define TEST(test) cmocka_unit_test_setup_teardown (test, reset, reset)

/*----------------------------------------------------------------------
 * A small image, in pieces that can be spoiled one by one
 */

#define C UINT64_C (4096) /* a cluster */
#define REFTABLE (1 * C)
#define REFBLOCK (2 * C)
#define L1 (3 * C)
#define L2_FIRST (4 * C)
#define L2_SECOND (5 * C)
#define DATA_0 (6 * C)
#define DATA_2 (7 * C)
#define SPARE (8 * C) /* of the zero cluster number 5 */
#define PACKED (9 * C)
#define DATA_LAST (10 * C)
#define SMALL_SIZE (11 * C)

#define SMALL_DISK (4 * C * 256) /* as much as two L2 tables describe */

#define L2_ENTRY(nr) (L2_FIRST + 8 * (nr))

static uint8_t small[SMALL_SIZE];
static size_t packed_size; /* of the compressed cluster number 4 */

static void
make_small (void)
{
  uint8_t plain[C];

  memset (small, 0, sizeof small);
  put_bytes (small, "QFI\xfb", 4);
  put (small, 4, 4, 3);
  put (small, 20, 4, 12);
  put (small, 24, 8, SMALL_DISK);
  put (small, 36, 4, 2);
  put (small, 40, 8, L1);
  put (small, 48, 8, REFTABLE);
  put (small, 56, 4, 1);
  put (small, 96, 4, 4);
  put (small, 100, 4, 112);
  put (small, REFTABLE, 8, REFBLOCK);
  memset (small + REFBLOCK, 1, 22);
  put (small, L1, 8, L2_FIRST | COPIED);
  put (small, L1 + 8, 8, L2_SECOND | COPIED);
  memset (small + DATA_0, 'a', C);
  memset (small + DATA_2, 'c', C);
  memset (small + SPARE, 'S', C);
  memset (small + DATA_LAST, 'z', C);
  put (small, L2_ENTRY (0), 8, DATA_0 | COPIED);
  put (small, L2_ENTRY (1), 8, ZERO);
  put (small, L2_ENTRY (2), 8, DATA_2 | COPIED);
  memset (plain, 'e', sizeof plain);
  packed_size = deflate_bytes (plain, C, small + PACKED + 100, C - 100);
  put (small, L2_ENTRY (4), 8,
       compressed_entry (12, PACKED + 100, packed_size));
  put (small, L2_ENTRY (5), 8, SPARE | ZERO | COPIED);
  put (small, L2_SECOND + 8 * 511, 8, DATA_LAST | COPIED);
}

/* Is refused, with this message, and with no other. */
static void
expect_refusal_of (int fd, const char *message)
{
  struct loaded *image;

  nr_errors = 0;
  image = load_open (NAME, fd);
  if (image)
    fail_msg ("was not refused: %s", message);
  if (strncmp (last_error, "cow-load=" NAME ": ", 25) != 0
      || strcmp (last_error + 25, message) != 0)
    fail_msg ("expected: %s\ngot: %s", message, last_error);
  assert_int_equal (nr_errors, 1);
  assert_false (is_open (fd));
}

static struct loaded *
open_good (int fd)
{
  struct loaded *image;

  nr_errors = 0;
  image = load_open (NAME, fd);
  if (!image)
    fail_msg ("refused: %s", last_error);
  assert_int_equal (nr_errors, 0);
  return image;
}

/*----------------------------------------------------------------------
 * Hostile images
 */

struct poke {
  uint64_t offset;
  unsigned width; /* in bytes; 0: no more */
  uint64_t value;
};

struct hostile {
  const char *message;
  struct poke pokes[4];
};

#define DATA_MESSAGE "a cluster lies where something else does"
#define TABLE_MESSAGE "an L2 table lies where something else does"
#define BLOCK_MESSAGE "a refcount block lies where something else does"
#define PACKED_MESSAGE "a compressed cluster lies where something else does"
#define EXPAND_MESSAGE "a compressed cluster does not expand to one cluster"
#define OURS 0x6e636f77 /* the type of this filter's header extension */
#define FEATURE_MESSAGE "it has an incompatible feature that is not known"

/* Offsets in messages: of the field or entry that is wrong.  The first L1 entry
 * is at 12288, the first L2 entry at 16384, the last one at 24568.
 */
static const struct hostile hostile[] = {
  { "offset 0: not a qcow2 image", { { 0, 4, 0x514649fa } } },
  { "offset 4: its version is not 2 or 3", { { 4, 4, 1 } } },
  { "offset 4: its version is not 2 or 3", { { 4, 4, 4 } } },
  { "offset 8: no valid name of a backing file",
    { { 8, 8, 200 }, { 16, 4, 1024 } } },
  { "offset 8: no valid name of a backing file",
    { { 8, 8, C - 1 }, { 16, 4, 2 } } },
  { "offset 8: no valid name of a backing file",
    { { 8, 8, UINT64_MAX }, { 16, 4, 2 } } },
  { "offset 20: its clusters are not of 512 bytes to 2 MiB",
    { { 20, 4, 8 } } },
  { "offset 20: its clusters are not of 512 bytes to 2 MiB",
    { { 20, 4, 22 } } },
  { "offset 20: its clusters are not of 512 bytes to 2 MiB",
    { { 20, 4, UINT32_MAX } } },
  { "offset 20: its clusters are too small for extended L2 entries",
    { { 72, 8, 16 } } },
  { "offset 24: no valid size of the disk", { { 24, 8, COPIED } } },
  { "offset 32: it is encrypted", { { 32, 4, 1 } } },
  { "offset 32: it is encrypted", { { 32, 4, 2 } } },
  { "offset 36: the L1 table is larger than 32 MiB", { { 36, 4, 0x400001 } } },
  { "offset 36: the L1 table is larger than 32 MiB",
    { { 36, 4, UINT32_MAX } } },
  { "offset 36: the L1 table is too small for the size of the disk",
    { { 36, 4, 1 } } },
  { "offset 36: the L1 table is too small for the size of the disk",
    { { 24, 8, SMALL_DISK + 1 } } },
  { "offset 36: the L1 table is too small for the size of the disk",
    { { 24, 8, INT64_MAX } } },
  { "offset 40: the L1 table is not aligned", { { 40, 8, L1 + 512 } } },
  { "offset 40: the L1 table overlaps the header", { { 40, 8, 0 } } },
  { "offset 40: the L1 table goes beyond the end of the file",
    { { 40, 8, SMALL_SIZE } } },
  { "offset 40: the L1 table goes beyond the end of the file",
    { { 40, 8, UINT64_MAX - C + 1 } } },
  { "offset 40: the L1 table goes beyond the end of the file",
    { { 36, 4, 8 * C } } },
  { "offset 48: the refcount table is not aligned",
    { { 48, 8, REFTABLE + 8 } } },
  { "offset 48: no refcount table", { { 48, 8, 0 } } },
  { "offset 48: no refcount table", { { 56, 4, 0 } } },
  { "offset 48: the refcount table goes beyond the end of the file",
    { { 48, 8, SMALL_SIZE } } },
  { "offset 48: the refcount table goes beyond the end of the file",
    { { 56, 4, 11 } } },
  { "offset 56: the refcount table is larger than 8 MiB",
    { { 56, 4, 2049 } } },
  { "offset 56: the refcount table is larger than 8 MiB",
    { { 56, 4, UINT32_MAX } } },
  { "offset 72: " FEATURE_MESSAGE, { { 72, 8, 32 } } },
  { "offset 72: " FEATURE_MESSAGE, { { 72, 8, COPIED } } },
  { "offset 72: it is marked as corrupt; repair it with qemu-img check -r",
    { { 72, 8, 2 } } },
  { "offset 72: its data is in another file", { { 72, 8, 4 } } },
  { "offset 96: no valid width of refcounts", { { 96, 4, 7 } } },
  { "offset 100: no valid length of the header", { { 100, 4, 72 } } },
  { "offset 100: no valid length of the header", { { 100, 4, 108 } } },
  { "offset 100: no valid length of the header", { { 100, 4, C + 8 } } },
  { "offset 104: its kind of compression is not known",
    { { 72, 8, 8 }, { 104, 1, 2 } } },
  { "offset 104: its kind of compression contradicts its features",
    { { 104, 1, 1 } } },
  { "offset 112: a header extension is too long",
    { { 112, 4, 1 }, { 116, 4, C - 119 } } },
  { "offset 112: a header extension is too long",
    { { 112, 4, 1 }, { 116, 4, UINT32_MAX } } },
  { "offset 120: what it says of its base is cut short",
    { { 112, 4, OURS }, { 116, 4, 9 } } },
  { "offset 120: what it says of its base is cut short",
    { { 112, 4, OURS }, { 116, 4, 27 } } },
  { "offset 144: the name of its base is too long",
    { { 112, 4, OURS }, { 116, 4, 28 }, { 144, 4, 1 } } },
  { "offset 144: the name of its base is too long",
    { { 112, 4, OURS }, { 116, 4, 1024 }, { 144, 4, 256 } } },
  { "offset 144: the name of its base is too long",
    { { 112, 4, OURS }, { 116, 4, 1024 }, { 144, 4, UINT32_MAX } } },
  { "offset 148: the name of its base is no text",
    { { 112, 4, OURS },
      { 116, 4, 36 },
      { 144, 4, 5 },
      { 148, 8, 0x6100610061006100 } } },
  { "offset 148: the name of its base is no text",
    { { 112, 4, OURS },
      { 116, 4, 36 },
      { 144, 4, 4 },
      { 148, 4, 0x611b5b32 } } },
  { "offset 4096: the L1 table overlaps the refcount table",
    { { 40, 8, REFTABLE } } },
  { "offset 8192: the L1 table overlaps the refcount table",
    { { 56, 4, 2 }, { 40, 8, REFTABLE + C } } },

  { "offset 4096: a refcount block is not aligned",
    { { REFTABLE, 8, REFBLOCK + 512 } } },
  { "offset 4096: a refcount block goes beyond the end of the file",
    { { REFTABLE, 8, SMALL_SIZE } } },
  { "offset 8184: a refcount block goes beyond the end of the file",
    { { REFTABLE + C - 8, 8, COPIED } } },
  { "offset 4096: " BLOCK_MESSAGE, { { REFTABLE, 8, REFTABLE } } },
  { "offset 4096: " BLOCK_MESSAGE, { { REFTABLE, 8, L1 } } },
  { "offset 4104: " BLOCK_MESSAGE, { { REFTABLE + 8, 8, REFBLOCK } } },

  { "offset 12288: an L2 table is not aligned",
    { { L1, 8, L2_FIRST + 512 } } },
  { "offset 12296: an L2 table goes beyond the end of the file",
    { { L1 + 8, 8, SMALL_SIZE } } },
  { "offset 12288: an L2 table goes beyond the end of the file",
    { { L1, 8, UINT64_C (0x00fffffffffff000) } } },
  { "offset 12288: " TABLE_MESSAGE, { { L1, 8, REFTABLE } } },
  { "offset 12288: " TABLE_MESSAGE, { { L1, 8, REFBLOCK } } },
  { "offset 12288: " TABLE_MESSAGE, { { L1, 8, L1 } } },
  { "offset 12296: " TABLE_MESSAGE, { { L1 + 8, 8, L2_FIRST } } },
  { "offset 12296: " TABLE_MESSAGE, { { L1 + 8, 8, DATA_0 } } },
  { "offset 12296: " TABLE_MESSAGE, { { L1 + 8, 8, PACKED } } },

  { "offset 16384: a cluster is not aligned",
    { { L2_ENTRY (0), 8, DATA_0 + 512 } } },
  { "offset 16384: a cluster goes beyond the end of the file",
    { { L2_ENTRY (0), 8, SMALL_SIZE } } },
  { "offset 16384: a cluster goes beyond the end of the file",
    { { L2_ENTRY (0), 8, UINT64_C (0x00fffffffffff000) } } },
  { "offset 16384: " DATA_MESSAGE, { { L2_ENTRY (0), 8, REFTABLE } } },
  { "offset 16384: " DATA_MESSAGE, { { L2_ENTRY (0), 8, REFBLOCK } } },
  { "offset 16384: " DATA_MESSAGE, { { L2_ENTRY (0), 8, L1 } } },
  { "offset 16384: " DATA_MESSAGE, { { L2_ENTRY (0), 8, L2_FIRST } } },
  { "offset 12296: " TABLE_MESSAGE, { { L2_ENTRY (0), 8, L2_SECOND } } },
  { "offset 16400: " DATA_MESSAGE, { { L2_ENTRY (2), 8, DATA_0 } } },
  { "offset 24568: " DATA_MESSAGE, { { L2_SECOND + 4088, 8, DATA_2 } } },
  { "offset 24568: " DATA_MESSAGE, { { L2_SECOND + 4088, 8, PACKED } } },
  { "offset 16392: a zero cluster, which version 2 does not have",
    { { 4, 4, 2 } } },

  { "offset 16416: a compressed cluster lies beyond the end of the file",
    { { L2_ENTRY (4), 8, COMPRESSED | SMALL_SIZE } } },
  { "offset 16416: " PACKED_MESSAGE,
    { { L2_ENTRY (4), 8, COMPRESSED | 200 } } },
  { "offset 16416: " PACKED_MESSAGE,
    { { L2_ENTRY (4), 8, COMPRESSED | (REFTABLE + 1) } } },
  { "offset 16416: " PACKED_MESSAGE,
    { { L2_ENTRY (4), 8, COMPRESSED | (L2_FIRST + 10) } } },
  { "offset 16416: " PACKED_MESSAGE,
    { { L2_ENTRY (4), 8, COMPRESSED | (DATA_2 + 4095) } } },
  /* Its first byte is in the one before, or its last one in the one after. */
  { "offset 16416: " PACKED_MESSAGE,
    { { L2_ENTRY (4), 8,
        COMPRESSED | UINT64_C (8) << 58 | (PACKED - 2 * C + 4095) } } },
  { "offset 24568: " DATA_MESSAGE,
    { { L2_ENTRY (4), 8,
        COMPRESSED | UINT64_C (8) << 58 | (PACKED + 100) } } },

  { "offset 16416: " EXPAND_MESSAGE, { { PACKED + 100, 1, 0xff } } },
  { "offset 16416: " EXPAND_MESSAGE,
    { { L2_ENTRY (4), 8, COMPRESSED | (PACKED + 1024) } } },
};

static void
hostile_images (void **state)
{
  (void) state;
  for (unsigned i = 0; i < COUNT (hostile); ++i) {
    make_small ();
    for (unsigned k = 0; k < 4 && hostile[i].pokes[k].width; ++k) {
      const struct poke *p = &hostile[i].pokes[k];

      put (small, p->offset, p->width, p->value);
    }
    expect_refusal_of (make_file (small, sizeof small), hostile[i].message);
  }
}

/* A stream that expands to more or less than a cluster, or that does not end. */
static void
compressed_cluster_of_the_wrong_size (void **state)
{
  static const size_t sizes[] = { 0, 1, C - 1, C + 1, 2 * C, 100 * C };
  static uint8_t plain[100 * C];
  const char message[] = "offset 16416: " EXPAND_MESSAGE;
  uint64_t entry;

  (void) state;
  for (unsigned i = 0; i < COUNT (sizes); ++i) {
    make_small ();
    const size_t count = deflate_bytes (plain, sizes[i], small + PACKED, C);

    put (small, L2_ENTRY (4), 8, compressed_entry (12, PACKED, count));
    expect_refusal_of (make_file (small, sizeof small), message);
  }

  /* Its end is in a sector that does not belong to it. */
  make_small ();
  for (unsigned i = 0; i < C; ++i)
    plain[i] = (uint8_t) ((i * i >> 8 ^ i) & 0x3f);
  const size_t count = deflate_bytes (plain, C, small + PACKED, C);
  assert_true (count > 512);
  entry = compressed_entry (12, PACKED, count);
  put (small, L2_ENTRY (4), 8, entry);
  load_close (open_good (make_file (small, sizeof small)));
  put (small, L2_ENTRY (4), 8, entry - (UINT64_C (1) << 58));
  expect_refusal_of (make_file (small, sizeof small), message);
}

/* The same few bytes again and again. */
static void
compressed_clusters_that_overlap (void **state)
{
  char message[100];

  (void) state;
  make_small ();
  const uint64_t entry = compressed_entry (12, PACKED + 100, packed_size);
  const unsigned most = (unsigned) (C / packed_size);
  assert_true (most < 500);
  for (unsigned i = 0; i < 500; ++i)
    put (small, L2_ENTRY (4 + i), 8, entry);
  (void) snprintf (message, sizeof message,
                   "offset %" PRIu64 ": compressed clusters overlap",
                   (uint64_t) L2_ENTRY (4 + most));
  expect_refusal_of (make_file (small, sizeof small), message);
}

#ifdef HAVE_ZSTD
static void
hostile_zstd (void **state)
{
  static const size_t sizes[] = { 0, 1, C - 1, C + 1, 100 * C };
  static uint8_t plain[100 * C];
  const char message[] = "offset 16416: " EXPAND_MESSAGE;

  (void) state;
  make_small ();
  put (small, 72, 8, 8);
  put (small, 104, 1, 1);
  expect_refusal_of (make_file (small, sizeof small), message); /* is zlib */

  for (unsigned i = 0; i < COUNT (sizes); ++i) {
    const size_t count
      = compress_bytes (true, plain, sizes[i], small + PACKED, C);

    put (small, L2_ENTRY (4), 8, compressed_entry (12, PACKED, count));
    expect_refusal_of (make_file (small, sizeof small), message);
  }

  /* A frame to be skipped in front. */
  const size_t count
    = compress_bytes (true, plain, C, small + PACKED + 12, C - 12);
  put_bytes (small + PACKED, "\x50\x2a\x4d\x18\x04\0\0\0abcd", 12);
  put (small, L2_ENTRY (4), 8, compressed_entry (12, PACKED, count + 12));
  expect_refusal_of (make_file (small, sizeof small), message);
  put (small, L2_ENTRY (4), 8, compressed_entry (12, PACKED + 12, count));
  load_close (open_good (make_file (small, sizeof small)));

  /* Cut short at the end of the file. */
  put (small, L2_ENTRY (4), 8, compressed_entry (12, SMALL_SIZE - 3, 3));
  put (small, L2_SECOND + 4088, 8, 0);
  expect_refusal_of (make_file (small, sizeof small), message);
}
#else
static void
zstd_is_refused_by_name (void **state)
{
  (void) state;
  make_small ();
  put (small, 72, 8, 8);
  put (small, 104, 1, 1);
  expect_refusal_of (
    make_file (small, sizeof small),
    "its clusters are compressed with zstd, which this filter "
    "was built without; convert it with \"qemu-img convert -O "
    "qcow2\"");
}
#endif

static void
truncated_files (void **state)
{
  (void) state;
  make_small ();
  for (size_t size = 0; size < sizeof small; size += size < 256 ? 1 : 127) {
    const int fd = make_file (small, size);

    nr_errors = 0;
    assert_null (load_open (NAME, fd));
    assert_int_equal (nr_errors, 1);
    assert_false (is_open (fd));
  }
  expect_refusal_of (make_file (small, 0), "offset 0: not a qcow2 image");
  expect_refusal_of (make_file (small, 71),
                     "offset 71: the file ends in the header");
  expect_refusal_of (
    make_file (small, L1 + 15),
    "offset 40: the L1 table goes beyond the end of the file");
  expect_refusal_of (
    make_file (small, L2_SECOND + 1),
    "offset 16384: a cluster goes beyond the end of the file");
  expect_refusal_of (
    make_file (small, SMALL_SIZE - 1),
    "offset 24568: a cluster goes beyond the end of the file");
}

static void
no_regular_file (void **state)
{
  int fds[2];

  (void) state;
  assert_int_equal (pipe (fds), 0);
  expect_refusal_of (fds[0], "neither a file nor a block device");
  close (fds[1]);
  expect_refusal_of (open ("/", O_RDONLY | O_CLOEXEC),
                     "neither a file nor a block device");
  expect_refusal_of (open ("/dev/null", O_RDONLY | O_CLOEXEC),
                     "neither a file nor a block device");
}

static void
file_too_long (void **state)
{
  (void) state;
  make_small ();
  put (small, 20, 4, 9);
  put (small, 24, 8, 512);
  const int fd = make_file (small, sizeof small);
  assert_int_equal (ftruncate (fd, (off_t) 1 << 44), 0);
  expect_refusal_of (fd, "the file is too long for its clusters of 512 bytes: "
                         "17592186044416 is the limit");
}

/*----------------------------------------------------------------------
 * Good images
 */

static struct fake_base fake;
static struct base base;

/* An overlay for a disk of SIZE bytes, on a base with BYTES. */
static struct overlay *
make_overlay (const uint8_t *bytes, uint64_t size, uint32_t block_size)
{
  const struct overlay_options options
    = { .block_size = block_size, .dir = "/var/tmp" };
  struct overlay *overlay = overlay_new (size, &options);

  fake = (struct fake_base) { .bytes = bytes, .size = size };
  assert_non_null (overlay);
  assert_int_equal (base_init (&base, fake_next (&fake)), 0);
  return overlay;
}

static void
check_disk (struct overlay *overlay, const uint8_t *expected)
{
  const uint64_t size = overlay_size (overlay);
  CLEANUP_FREE uint8_t *bytes = malloc (size + 1);
  int err;

  assert_non_null (bytes);
  if (size > 0)
    assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_PASS,
                                bytes, (uint32_t) size, 0, &err),
                      0);
  for (uint64_t i = 0; i < size; ++i)
    if (bytes[i] != expected[i])
      fail_msg ("byte %" PRIu64 ": expected %u, got %u", i, expected[i],
                bytes[i]);
}

static uint8_t small_base[SMALL_DISK], small_disk[SMALL_DISK];

/* What the small image makes of its base. */
static void
make_small_disk (void)
{
  for (unsigned i = 0; i < SMALL_DISK; ++i)
    small_base[i] = (uint8_t) (1 + i % 251);
  memcpy (small_disk, small_base, SMALL_DISK);
  memset (small_disk, 'a', C);
  memset (small_disk + 1 * C, 0, C);
  memset (small_disk + 2 * C, 'c', C);
  memset (small_disk + 4 * C, 'e', C);
  memset (small_disk + 5 * C, 0, C);
  memset (small_disk + SMALL_DISK - C, 'z', C);
}

static void
small_image (void **state)
{
  (void) state;
  make_small ();
  make_small_disk ();
  const int fd = make_file (small, sizeof small);
  struct loaded *image = open_good (fd);

  assert_int_equal (load_header (image)->disk_size, SMALL_DISK);
  assert_int_equal (load_changed_bytes (image), 6 * C);
  assert_false (load_header (image)->ours);

  /* As often as one likes. */
  for (uint32_t block_size = 512; block_size <= 65536; block_size *= 2) {
    struct overlay *overlay
      = make_overlay (small_base, SMALL_DISK, block_size);

    assert_int_equal (load_into (image, overlay, &base), 0);
    if (block_size <= C)
      assert_int_equal (fake.nr_reads, 0);
    check_disk (overlay, small_disk);
    overlay_free (overlay);
  }
  assert_true (is_open (fd));
  load_close (image);
  assert_false (is_open (fd));
  load_close (NULL);
  assert_int_equal (nr_errors, 0);
}

/* An overlay may be somewhat shorter than the image, whose size is rounded. */
static void
overlay_of_another_size (void **state)
{
  static const uint64_t sizes[]
    = { 0, 1, 4 * C + 5, SMALL_DISK - 511, SMALL_DISK - 1 };

  (void) state;
  make_small ();
  make_small_disk ();
  struct loaded *image = open_good (make_file (small, sizeof small));

  for (unsigned i = 0; i < COUNT (sizes); ++i) {
    struct overlay *overlay = make_overlay (small_base, sizes[i], 65536);

    assert_int_equal (load_into (image, overlay, &base), 0);
    check_disk (overlay, small_disk);
    overlay_free (overlay);
  }
  load_close (image);
}

/* Only what the image has is changed in an overlay that has something. */
static void
image_on_top_of_another (void **state)
{
  int err;

  (void) state;
  make_small ();
  make_small_disk ();
  struct loaded *image = open_good (make_file (small, sizeof small));
  struct overlay *overlay = make_overlay (small_base, SMALL_DISK, C);

  memset (small_base, 'o', SMALL_DISK / 2);
  assert_int_equal (
    blk_write (overlay, &base, small_base, SMALL_DISK / 2, 0, &err), 0);
  assert_int_equal (load_into (image, overlay, &base), 0);
  memset (small_disk + 3 * C, 'o', C);
  memset (small_disk + 6 * C, 'o', SMALL_DISK / 2 - 6 * C);
  check_disk (overlay, small_disk);
  overlay_free (overlay);
  load_close (image);
}

static void
harmless_things_in_the_header (void **state)
{
  char text[256] = "";

  (void) state;
  make_small ();
  put (small, 72, 8, 1);          /* dirty */
  put (small, 80, 8, UINT64_MAX); /* compatible features */
  put (small, 88, 8, UINT64_MAX); /* autoclear features */
  put (small, 8, 8, 512);         /* a backing file, which is not opened */
  put (small, 16, 4, 9);
  put_bytes (small + 512, "/dev/null", 9);
  put_bytes (small + 128, "\xe2\x79\x2a\xca\0\0\0\x05qcow2\0\0\0", 16);
  /* What qemu would not take for a format is none. */
  put_bytes (small + 144,
             "\xe2\x79\x2a\xca\0\0\0\x10"
             "a format too long",
             24);
  put_bytes (small + 112,
             "ncow\0\0\0\x08"
             "cow 1\0\0\0",
             16);
  put (small, 60, 4, 3); /* snapshots */
  put (small, 64, 8, 5);

  /* They are warned of. */
  const int warnings = memfd_create ("stderr", MFD_CLOEXEC);
  const int saved = dup (STDERR_FILENO);
  assert_true (dup2 (warnings, STDERR_FILENO) >= 0);
  struct loaded *image = load_open (NAME, make_file (small, sizeof small));
  assert_true (dup2 (saved, STDERR_FILENO) >= 0);
  close (saved);

  assert_non_null (image);
  assert_int_equal (nr_errors, 0);
  assert_true (load_header (image)->ours);
  assert_false (load_header (image)->base.known);
  assert_string_equal (load_header (image)->backing_file, "/dev/null");
  assert_string_equal (load_header (image)->backing_format, "qcow2");
  assert_true (pread (warnings, text, sizeof text - 1, 0) > 0);
  assert_string_equal (text, "nbdkit: cow: warning: cow-load=" NAME
                             ": its internal snapshots (3) are ignored\n");
  close (warnings);
  load_close (image);
}

/* A table may be longer than the disk needs, and what it says beyond is not
 * looked at.
 */
static void
entries_beyond_the_disk (void **state)
{
  (void) state;
  make_small ();
  put (small, 24, 8, SMALL_DISK / 2 - 2 * C);
  put (small, L1 + 8, 8, 1536);
  put (small, L2_ENTRY (510), 8, 1536);
  load_close (open_good (make_file (small, sizeof small)));
  put (small, 24, 8, 0);
  put (small, L1, 8, 1536);
  load_close (open_good (make_file (small, sizeof small)));

  /* Nor need the file hold bytes of the last cluster that are beyond it. */
  make_small ();
  put (small, 24, 8, SMALL_DISK - 1024);
  load_close (open_good (make_file (small, sizeof small - 1024)));
  expect_refusal_of (
    make_file (small, sizeof small - 1025),
    "offset 24568: a cluster goes beyond the end of the file");
}

/*----------------------------------------------------------------------
 * Random images of every format
 */

struct format {
  unsigned version, cluster_bits;
  bool extended, zstd;
};

/* What is being made: an image, and the disk that it makes of a base. */
static struct {
  struct format format;
  uint64_t cluster_size, disk_size, base_size;
  uint8_t *file, *disk, *base_bytes;
  uint64_t next;          /* cluster of the file */
  uint64_t packed_offset; /* where the next compressed cluster may go */
} m;

static uint8_t
random_byte (void)
{
  return (uint8_t) (1 + (unsigned) random () % 255);
}

/* In runs of up to 200 bytes, so that it can be compressed. */
static void
random_bytes (uint8_t *bytes, uint64_t count)
{
  while (count > 0) {
    const uint64_t length = (uint64_t) random () % 200 + 1;
    const uint64_t n = MIN (count, length);

    memset (bytes, random_byte (), n);
    bytes += n;
    count -= n;
  }
}

/* A cluster of the file, mostly the next one. */
static uint64_t
take_cluster (void)
{
  if (random () % 4 == 0)
    m.next++;
  return m.next++ * m.cluster_size;
}

/* Bytes of the disk, with some zeroes that may become holes in the file. */
static void
make_data (uint64_t offset, uint64_t disk_offset, uint64_t count)
{
  random_bytes (m.disk + disk_offset, count);
  if (random () % 3 == 0)
    memset (m.disk + disk_offset + count / 4, 0, count / 2);
  if (random () % 6 == 0)
    memset (m.disk + disk_offset, 0, count);
  memcpy (m.file + offset, m.disk + disk_offset, count);
}

static uint64_t
make_compressed (uint64_t disk_offset)
{
  random_bytes (m.disk + disk_offset, m.cluster_size);

  /* The worst case of either library is not that bad. */
  if (m.packed_offset == 0
      || m.packed_offset % m.cluster_size > m.cluster_size / 2)
    m.packed_offset = m.next++ * m.cluster_size + (unsigned) random () % 99;
  m.next += 2;
  const uint64_t offset = m.packed_offset;
  const size_t count
    = compress_bytes (m.format.zstd, m.disk + disk_offset, m.cluster_size,
                      m.file + offset, 2 * m.cluster_size);
  m.packed_offset += count;
  return compressed_entry (m.format.cluster_bits, offset, count);
}

static void
make_subclusters (uint64_t entry, uint64_t disk_offset)
{
  const uint64_t size = m.cluster_size / 32;
  const uint64_t offset = take_cluster ();
  const bool allocates = random () % 4 > 0;
  uint64_t states = 0;

  for (unsigned i = 0; i < 32; i++) {
    const unsigned length = 1 + (unsigned) random () % 4;
    const unsigned run = MIN (32 - i, length);

    switch (random () % 3) {
    case 0:
      if (!allocates)
        break;
      make_data (offset + i * size, disk_offset + i * size, run * size);
      states = bitmap_set_allocated (states, bitmap_mask (i, run));
      break;
    case 1:
      memset (m.disk + disk_offset + i * size, 0, run * size);
      states = bitmap_set_zero (states, bitmap_mask (i, run));
      break;
    default:
      break;
    }
    i += run - 1;
  }
  put (m.file, entry, 8,
       bitmap_allocated (states) ? offset | COPIED : (uint64_t) 0);
  put (m.file, entry + 8, 8, states);
}

/* The cluster of the disk at DISK_OFFSET, whose L2 entry is at ENTRY. */
static void
make_cluster (uint64_t entry, uint64_t disk_offset)
{
  const bool extended = m.format.extended;
  uint64_t offset;

  switch (random () % (extended ? 7 : 6)) {
  case 0:
  case 1:
  case 2:
    offset = take_cluster ();
    make_data (offset, disk_offset, m.cluster_size);
    put (m.file, entry, 8, offset | COPIED);
    if (extended)
      put (m.file, entry + 8, 8, UINT32_MAX);
    return;
  case 3:
    if (m.format.version == 2)
      return;
    memset (m.disk + disk_offset, 0, m.cluster_size);
    offset = random () % 2 ? take_cluster () : 0;
    if (offset)
      memset (m.file + offset, 'P', m.cluster_size);
    put (m.file, entry, 8, offset | (extended ? 0 : ZERO));
    if (extended)
      put (m.file, entry + 8, 8, (uint64_t) UINT32_MAX << 32);
    return;
  case 4:
    put (m.file, entry, 8, make_compressed (disk_offset));
    return;
  case 6:
    make_subclusters (entry, disk_offset);
    return;
  default:
    return;
  }
}

static size_t
image_size (void)
{
  return (m.next + 4) * m.cluster_size;
}

/* Of NR_CLUSTERS clusters, the last of which may be cut. */
static void
make_image (struct format format, unsigned nr_clusters)
{
  const unsigned entry_size = format.extended ? 16 : 8;

  memset (&m, 0, sizeof m);
  m.format = format;
  m.cluster_size = UINT64_C (1) << format.cluster_bits;

  const uint64_t rounded = nr_clusters * m.cluster_size;
  const uint64_t l2_entries = m.cluster_size / entry_size;
  const uint64_t nr_l2 = (nr_clusters + l2_entries - 1) / l2_entries;
  const uint64_t size = (8 + 4 * (nr_l2 + nr_clusters)) * m.cluster_size;

  m.disk_size = rounded - (uint64_t) random () % (m.cluster_size / 512) * 512;
  m.base_size = m.disk_size - (unsigned) random () % 512;
  m.file = calloc (1, size);
  m.disk = malloc (rounded);
  m.base_bytes = malloc (rounded);
  assert_true (m.file && m.disk && m.base_bytes);
  random_bytes (m.base_bytes, rounded);
  memcpy (m.disk, m.base_bytes, rounded);

  put_bytes (m.file, "QFI\xfb", 4);
  put (m.file, 4, 4, format.version);
  put (m.file, 20, 4, format.cluster_bits);
  put (m.file, 24, 8, m.disk_size);
  put (m.file, 36, 4, nr_l2);
  put (m.file, 40, 8, 3 * m.cluster_size);
  put (m.file, 48, 8, m.cluster_size);
  put (m.file, 56, 4, 1);
  if (format.version == 3) {
    put (m.file, 72, 8, (format.extended ? 16 : 0) | (format.zstd ? 8 : 0));
    put (m.file, 96, 4, 4);
    put (m.file, 100, 4, 112);
    put (m.file, 104, 1, format.zstd);
  }
  put (m.file, m.cluster_size, 8, 2 * m.cluster_size);
  m.next = 3 + (8 * nr_l2 + m.cluster_size - 1) / m.cluster_size;

  for (uint64_t i = 0; i < nr_clusters; ++i) {
    const uint64_t l1 = 3 * m.cluster_size + i / l2_entries * 8;
    static uint64_t table;

    if (i % l2_entries == 0) {
      table = nr_l2 > 1 && random () % 4 == 0 ? 0 : take_cluster ();
      put (m.file, l1, 8, table ? table | COPIED : (uint64_t) 0);
    }
    if (table)
      make_cluster (table + i % l2_entries * entry_size, i * m.cluster_size);
  }
  assert_true (image_size () <= size);
}

static void
free_image (void)
{
  free (m.file);
  free (m.disk);
  free (m.base_bytes);
}

static void
check_image (void)
{
  static const uint32_t block_sizes[] = { 512, 4096, 65536, 2 << 20 };
  struct loaded *image = open_good (make_file (m.file, image_size ()));

  assert_int_equal (load_header (image)->disk_size, m.disk_size);
  for (unsigned i = 0; i < COUNT (block_sizes); ++i) {
    struct overlay *overlay
      = make_overlay (m.base_bytes, m.base_size, block_sizes[i]);

    assert_int_equal (load_into (image, overlay, &base), 0);
    check_disk (overlay, m.disk);
    overlay_free (overlay);
  }
  load_close (image);
  free_image ();
}

static void
random_images (void **state)
{
  static const struct format formats[] = {
    { 2, 9, false, false },  { 3, 9, false, false },  { 2, 12, false, false },
    { 3, 12, false, false }, { 3, 16, false, false }, { 3, 21, false, false },
    { 3, 14, true, false },  { 3, 16, true, false },  { 3, 21, true, false },
#ifdef HAVE_ZSTD
    { 3, 9, false, true },   { 3, 12, false, true },  { 3, 21, false, true },
    { 3, 16, true, true },
#endif
  };

  (void) state;
  for (unsigned i = 0; i < COUNT (formats); ++i) {
    const unsigned bits = formats[i].cluster_bits;
    const unsigned rounds = bits < 16 ? 10 : 2;

    for (unsigned seed = 0; seed < rounds; ++seed) {
      srandom (100 * i + seed);
      make_image (formats[i], bits < 16 ? 150 : bits < 21 ? 40 : 12);
      short_transfers = seed % 2;
      no_seek_data = seed % 4 == 2;
      check_image ();
    }
  }
}

/*----------------------------------------------------------------------
 * Work in proportion to what is there
 */

#define BIG_C UINT64_C (65536)
#define BIG_TABLES 32
#define BIG_DISK (BIG_TABLES * BIG_C / 8 * BIG_C) /* 16 GiB */

/* Preallocated: all entries give clusters, in order, all of them holes. */
static int
make_preallocated (void)
{
  const uint64_t data = (4 + BIG_TABLES) * BIG_C;
  CLEANUP_FREE uint8_t *bytes = calloc (1, data);

  assert_non_null (bytes);
  memcpy (bytes, small, 120);
  put (bytes, 20, 4, 16);
  put (bytes, 24, 8, BIG_DISK);
  put (bytes, 36, 4, BIG_TABLES);
  put (bytes, 40, 8, 3 * BIG_C);
  put (bytes, 48, 8, BIG_C);
  for (unsigned i = 0; i < BIG_TABLES; ++i)
    put (bytes, 3 * BIG_C + UINT64_C (8) * i, 8, (4 + i) * BIG_C | COPIED);
  for (uint64_t i = 0; i < BIG_TABLES * BIG_C / 8; ++i)
    put (bytes, 4 * BIG_C + 8 * i, 8, (data + i * BIG_C) | COPIED);

  const int fd = make_file (bytes, data);
  assert_int_equal (ftruncate (fd, (off_t) (data + BIG_DISK)), 0);
  return fd;
}

static void
preallocated_image (void **state)
{
  (void) state;
  make_small ();
  struct loaded *image = open_good (make_preallocated ());
  struct overlay *overlay = make_overlay (small_base, BIG_DISK, 65536);
  struct nbdkit_extents *x = nbdkit_extents_new (0, BIG_DISK);
  int err;

  assert_true (load_changed_bytes (image) == BIG_DISK);

  /* All that is read, looked for and allocated: two calls a table, and a few
   * for each of the zeroed runs of 1 GiB.
   */
  fail_calls_from (4 * BIG_TABLES + 16 * 10, EIO);
  assert_int_equal (load_into (image, overlay, &base), 0);
  assert_int_equal (call_has_failed (), 0);

  for (uint64_t pos = 0; pos < BIG_DISK; pos += UINT32_C (1) << 31)
    assert_int_equal (blk_extents (live_disk (overlay), &base,
                                   UINT32_C (1) << 31, pos, 0, x, &err),
                      0);
  assert_int_equal (nbdkit_extents_count (x), 1);
  assert_int_equal (nbdkit_get_extent (x, 0).type,
                    NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO);
  nbdkit_extents_free (x);
  overlay_free (overlay);
  load_close (image);
}

/* All L2 tables are in holes: the L1 table is full, the file is long, and there
 * is nothing to do.
 */
static void
tables_in_holes (void **state)
{
  const uint64_t c = UINT64_C (2) << 20, entries = UINT64_C (1) << 22;
  CLEANUP_FREE uint8_t *bytes = calloc (1, 19 * c);

  (void) state;
  assert_non_null (bytes);
  make_small ();
  memcpy (bytes, small, 120);
  put (bytes, 20, 4, 21);
  put (bytes, 24, 8, entries << 39);
  put (bytes, 36, 4, entries);
  put (bytes, 40, 8, 3 * c);
  put (bytes, 48, 8, c);
  for (uint64_t i = 0; i < entries; ++i)
    put (bytes, 3 * c + 8 * i, 8, (20 + i) * c);

  const int fd = make_file (bytes, 19 * c);
  assert_int_equal (ftruncate (fd, (off_t) ((20 + entries) * c)), 0);
  struct loaded *image = open_good (fd);
  struct overlay *overlay = make_overlay (small_base, entries << 39, 65536);

  assert_int_equal (load_changed_bytes (image), 0);
  assert_int_equal (load_into (image, overlay, &base), 0);
  assert_false (overlay_is_changed (overlay));
  overlay_free (overlay);
  load_close (image);
}

/* An L2 table that says nothing but zero may be there for many parts of the disk, the end
 * of which need not be that of a table.
 */
static void
shared_zero_tables (void **state)
{
  const uint64_t per_l2 = 512 * C, size = 5 * per_l2 - 3 * C;
  CLEANUP_FREE uint8_t *expected = calloc (1, size);
  CLEANUP_FREE uint8_t *of_base = malloc (size);
  uint8_t bytes[SMALL_SIZE];

  (void) state;
  assert_non_null (expected);
  assert_non_null (of_base);
  memset (of_base, 'b', size);
  make_small ();
  memcpy (bytes, small, SMALL_SIZE);
  put (bytes, 24, 8, size);
  put (bytes, 36, 4, 5);
  for (unsigned i = 0; i < 512; ++i)
    put (bytes, L2_FIRST + 8 * i, 8, ZERO);
  for (unsigned i = 0; i < 5; ++i)
    put (bytes, L1 + 8 * i, 8,
         i == 1   ? L2_SECOND | COPIED
         : i == 3 ? 0
                  : L2_FIRST);
  memset (expected + per_l2, 'b', 511 * C);
  memset (expected + per_l2 + 511 * C, 'z', C);
  memset (expected + 3 * per_l2, 'b', per_l2);

  struct loaded *image = open_good (make_file (bytes, SMALL_SIZE));
  struct overlay *overlay = make_overlay (of_base, size, 4096);

  assert_true (load_changed_bytes (image) == size - 2 * per_l2 + C);
  assert_int_equal (load_into (image, overlay, &base), 0);
  check_disk (overlay, expected);
  overlay_free (overlay);
  load_close (image);

  /* But not if it says more. */
  put (bytes, L2_FIRST + 8 * 511, 8, 0);
  expect_refusal_of (make_file (bytes, SMALL_SIZE),
                     "offset 12304: " TABLE_MESSAGE);
}

/* The same where a table is for more than is made zero at once. */
static void
shared_zero_tables_of_large_clusters (void **state)
{
  const uint64_t c = UINT64_C (2) << 20, per_l2 = c * (c / 8);
  const uint64_t size = 3 * per_l2 - 5 * c;
  CLEANUP_FREE uint8_t *bytes = calloc (1, 5 * c);
  struct nbdkit_extents *x = nbdkit_extents_new (0, size);
  int err;

  (void) state;
  assert_non_null (bytes);
  make_small ();
  memcpy (bytes, small, 120);
  put (bytes, 20, 4, 21);
  put (bytes, 24, 8, size);
  put (bytes, 36, 4, 3);
  put (bytes, 40, 8, 3 * c);
  put (bytes, 48, 8, c);
  for (unsigned i = 0; i < 3; ++i)
    put (bytes, 3 * c + 8 * i, 8, 4 * c);
  for (uint64_t i = 0; i < c / 8; ++i)
    put (bytes, 4 * c + 8 * i, 8, ZERO);

  struct loaded *image = open_good (make_file (bytes, 5 * c));
  struct overlay *overlay = make_overlay (small_base, size, 65536);

  assert_true (load_changed_bytes (image) == size);
  assert_int_equal (load_into (image, overlay, &base), 0);
  assert_int_equal (fake.nr_reads, 0);
  for (uint64_t pos = 0; pos < size; pos += UINT32_C (1) << 31)
    assert_int_equal (
      blk_extents (live_disk (overlay), &base,
                   (uint32_t) MIN (UINT32_C (1) << 31, size - pos), pos, 0, x,
                   &err),
      0);
  assert_int_equal (nbdkit_extents_count (x), 1);
  assert_int_equal (nbdkit_get_extent (x, 0).type,
                    NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO);
  nbdkit_extents_free (x);
  overlay_free (overlay);
  load_close (image);
}

/* A hole in a cluster that is as large as a block of the overlay, or larger, does
 * not have the base read for the rest of the block.
 */
static void
holes_do_not_split_blocks (void **state)
{
  const uint64_t c = UINT64_C (1) << 21;
  CLEANUP_FREE uint8_t *bytes = calloc (1, 6 * c);

  (void) state;
  assert_non_null (bytes);
  make_small ();
  memcpy (bytes, small, 120);
  put (bytes, 20, 4, 21);
  put (bytes, 24, 8, c);
  put (bytes, 36, 4, 1);
  put (bytes, 40, 8, 3 * c);
  put (bytes, 48, 8, c);
  put (bytes, 3 * c, 8, 4 * c);
  put (bytes, 4 * c, 8, 5 * c);
  for (uint64_t pos = 0; pos < c; pos += c / 4) {
    memset (bytes + 5 * c + pos, 'a', 4096);
    memset (bytes + 5 * c + pos + 68 * 1024, 'b', 8192);
  }

  struct loaded *image = open_good (make_file (bytes, 6 * c));
  struct overlay *overlay = make_overlay (small_base, c, 65536);
  struct nbdkit_extents *x = nbdkit_extents_new (0, c);
  int err;

  assert_int_equal (load_into (image, overlay, &base), 0);
  assert_int_equal (fake.nr_reads, 0);
  check_disk (overlay, bytes + 5 * c);

  /* Four times 128 KiB of data, and as often zeroes. */
  assert_int_equal (
    blk_extents (live_disk (overlay), &base, (uint32_t) c, 0, 0, x, &err), 0);
  assert_int_equal (nbdkit_extents_count (x), 8);
  assert_int_equal (nbdkit_get_extent (x, 0).length, 128 * 1024);
  nbdkit_extents_free (x);
  overlay_free (overlay);
  load_close (image);
}

/* 1 MiB of neighbours, in few calls. */
static void
neighbours_are_joined (void **state)
{
  const uint64_t size = 5 * C + (1 << 20);
  CLEANUP_FREE uint8_t *bytes = calloc (1, size);

  (void) state;
  assert_non_null (bytes);
  make_small ();
  memcpy (bytes, small, 4 * C);
  put (bytes, 24, 8, 1 << 20);
  for (uint64_t i = 0; i < 256; ++i)
    put (bytes, L2_FIRST + 8 * i, 8, (5 + i) * C | COPIED);
  memset (bytes + 5 * C, 'n', 1 << 20);

  struct loaded *image = open_good (make_file (bytes, size));
  struct overlay *overlay = make_overlay (small_base, 1 << 20, 4096);
  fail_calls_from (50, EIO);
  assert_int_equal (load_into (image, overlay, &base), 0);
  assert_int_equal (call_has_failed (), 0);
  check_disk (overlay, bytes + 5 * C);
  overlay_free (overlay);
  load_close (image);
}

/*----------------------------------------------------------------------
 * Calls that fail
 */

static void
every_call_fails_while_checking (void **state)
{
  bool done = false;
  int n;

  (void) state;
  make_small ();
  for (n = 1; !done; ++n) {
    const int fd = make_file (small, sizeof small);

    nr_errors = 0;
    fail_calls_from (n, EIO);
    struct loaded *image = load_open (NAME, fd);
    const int failed = call_has_failed ();

    done = !failed;
    if (image)
      load_close (image);
    else {
      assert_int_equal (nr_errors, 1);
      if (failed == ENOMEM)
        assert_string_equal (last_error, "cow-load=" NAME ": out of memory");
      else
        assert_string_equal (
          last_error, "cow-load=" NAME ": cannot read it: Input/output error");
    }
    assert_true (image || failed);
    assert_false (is_open (fd));
  }
  assert_true (n > 15);
}

/* Load the image FD into an overlay on BYTES, of SIZE bytes, which makes DISK of
 * it; again and again, while one call after the other begins to fail.  Returns
 * how often.
 */
static int
fail_every_call (int fd, const uint8_t *bytes, uint64_t size,
                 const uint8_t *disk)
{
  struct loaded *image = open_good (fd);
  bool done = false;
  int n;

  for (n = 0; !done; ++n) {
    struct overlay *overlay = make_overlay (bytes, size, 4096);

    nr_errors = 0;
    fail_calls_from (n + 1, EIO);
    const int r = load_into (image, overlay, &base);
    const int failed = call_has_failed ();

    done = !failed;
    if (r == -1) {
      assert_int_not_equal (failed, 0);
      assert_true (nr_errors > 0);
      assert_non_null (strstr (last_error, "cow-load=" NAME ": "));
    }
    else
      check_disk (overlay, disk);
    overlay_free (overlay);
  }
  load_close (image);
  return n;
}

static void
every_call_fails_while_loading (void **state)
{
  static const struct format formats[] = {
    { 3, 12, false, false },
    { 3, 14, true, false },
  };

  (void) state;
  make_small ();
  make_small_disk ();
  assert_true (fail_every_call (make_file (small, sizeof small), small_base,
                                SMALL_DISK, small_disk)
               > 20);

  /* It begins with zeroes. */
  put (small, L2_ENTRY (0), 8, ZERO);
  put (small, L2_ENTRY (2), 8, ZERO);
  memset (small_disk, 0, 3 * C);
  fail_every_call (make_file (small, sizeof small), small_base, SMALL_DISK,
                   small_disk);

  for (unsigned i = 0; i < COUNT (formats); ++i) {
    srandom (i);
    make_image (formats[i], 40);
    assert_true (fail_every_call (make_file (m.file, image_size ()),
                                  m.base_bytes, m.base_size, m.disk)
                 > 20);
    free_image ();
  }
}

/*----------------------------------------------------------------------
 * A file that is changed after it was checked
 */

/* Returns whether the overlay was changed before that. */
static bool
expect_failure (const struct loaded *image, const char *message)
{
  struct overlay *overlay = make_overlay (small_base, SMALL_DISK, 4096);

  nr_errors = 0;
  assert_int_equal (load_into (image, overlay, &base), -1);
  assert_string_equal (last_error, message);
  assert_int_equal (nr_errors, 1);

  const bool changed = overlay_is_changed (overlay);
  overlay_free (overlay);
  return changed;
}

static void
changed_and_seen_at_once (void **state)
{
  const char message[]
    = "cow-load=" NAME ": the file has changed since it was "
      "checked; start the server again";

  (void) state;
  make_small ();
  const int fd = make_file (small, sizeof small);
  struct loaded *image = open_good (fd);

  usleep (20000); /* longer than a tick of the file's clock */
  assert_int_equal (pwrite (fd, "x", 1, DATA_0), 1);
  assert_false (expect_failure (image, message));
  load_close (image);

  const int shorter = make_file (small, sizeof small);
  image = open_good (shorter);
  assert_int_equal (ftruncate (shorter, C), 0);
  assert_false (expect_failure (image, message));
  load_close (image);
}

/* The times of the file do not tell. */
static void
change_unseen (int fd, const struct poke *p)
{
  struct stat st;
  uint8_t bytes[8];

  assert_int_equal (fstat (fd, &st), 0);
  put (bytes, 0, p->width, p->value);
  assert_int_equal (pwrite (fd, bytes, p->width, (off_t) p->offset), p->width);

  const struct timespec times[2] = { st.st_atim, st.st_mtim };
  assert_int_equal (futimens (fd, times), 0);
}

static void
changed_and_not_seen (void **state)
{
  static const struct hostile changes[] = {
    { "offset 12288: an L2 table is not aligned", { { L1, 8, 1536 } } },
    { "offset 12296: an L2 table goes beyond the end of the file",
      { { L1 + 8, 8, SMALL_SIZE } } },
    { "offset 16384: a cluster is not aligned",
      { { L2_ENTRY (0), 8, 1536 } } },
    { "offset 16384: a cluster goes beyond the end of the file",
      { { L2_ENTRY (0), 8, SMALL_SIZE } } },
    { "offset 16416: " EXPAND_MESSAGE, { { PACKED + 100, 1, 0xff } } },
    { "offset 24568: it has changed since it was checked",
      { { L2_ENTRY (6), 8, ZERO } } },
    { "offset 24568: it has changed since it was checked",
      { { L2_ENTRY (6), 8, DATA_0 } } },
    { "offset 24552: it has changed since it was checked",
      { { L2_SECOND + 4064, 8, ZERO }, { L2_SECOND + 4072, 8, ZERO } } },
    /* It had one L2 table. */
    { "offset 12296: it has changed since it was checked",
      { { L1 + 8, 8, L2_FIRST } } },
  };

  (void) state;
  for (unsigned i = 0; i < COUNT (changes); ++i) {
    char message[200];

    make_small ();
    if (i == COUNT (changes) - 1)
      put (small, L1 + 8, 8, 0);
    const int fd = make_file (small, sizeof small);
    struct loaded *image = open_good (fd);

    for (unsigned k = 0; k < 4 && changes[i].pokes[k].width; ++k)
      change_unseen (fd, &changes[i].pokes[k]);
    (void) snprintf (message, sizeof message, "cow-load=" NAME ": %s",
                     changes[i].message);
    expect_failure (image, message);
    load_close (image);
  }
}

static void
cut_file (void *arg)
{
  assert_int_equal (ftruncate (*(int *) arg, DATA_0 + 5), 0);
}

/* It is cut in front of one call after the other. */
static void
cut_while_it_is_loaded (void **state)
{
  bool done = false, seen = false;

  (void) state;
  make_small ();
  make_small_disk ();
  for (int n = 1; !done; ++n) {
    int fd = make_file (small, sizeof small);
    struct loaded *image = open_good (fd);
    struct overlay *overlay = make_overlay (small_base, SMALL_DISK, 4096);

    interrupt_call (n, cut_file, &fd);
    const int r = load_into (image, overlay, &base);
    done = !call_was_interrupted ();

    assert_int_equal (r, done ? 0 : -1);
    assert_int_equal (nr_errors, done ? 0 : 1);
    seen |= strstr (last_error, "the file has become shorter") != NULL;
    overlay_free (overlay);
    load_close (image);
  }
  assert_true (seen);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    TEST (hostile_images),
    TEST (compressed_cluster_of_the_wrong_size),
    TEST (compressed_clusters_that_overlap),
#ifdef HAVE_ZSTD
    TEST (hostile_zstd),
#else
    TEST (zstd_is_refused_by_name),
#endif
    TEST (truncated_files),
    TEST (no_regular_file),
    TEST (file_too_long),
    TEST (small_image),
    TEST (overlay_of_another_size),
    TEST (image_on_top_of_another),
    TEST (harmless_things_in_the_header),
    TEST (entries_beyond_the_disk),
    TEST (random_images),
    TEST (preallocated_image),
    TEST (tables_in_holes),
    TEST (shared_zero_tables),
    TEST (shared_zero_tables_of_large_clusters),
    TEST (holes_do_not_split_blocks),
    TEST (neighbours_are_joined),
    TEST (every_call_fails_while_checking),
    TEST (every_call_fails_while_loading),
    TEST (changed_and_seen_at_once),
    TEST (changed_and_not_seen),
    TEST (cut_while_it_is_loaded),
  };

  return cmocka_run_group_tests_name ("load", tests, NULL, NULL);
}
