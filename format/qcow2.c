/* SPDX-License-Identifier: BSD-3-Clause */

/* The qcow2 format (see qcow2.h; the specification is docs/interop/qcow2.txt in
 * qemu).
 *
 * Encoding trusts its caller.  Decoding trusts nothing: whatever it returns has
 * been checked against the size of the file, and a value that it refuses is
 * described in a struct qcow2_fault.
 */

#include <config.h>

#include <endian.h>
#include <string.h>

#include "common/cleanup.h"
#include "format/qcow2.h"

#define MAGIC UINT32_C (0x514649fb) /* "QFI\xfb" */

/* Offsets in the header ("Header"). */
#define H_MAGIC 0
#define H_VERSION 4
#define H_BACKING_FILE_OFFSET 8
#define H_BACKING_FILE_SIZE 16
#define H_CLUSTER_BITS 20
#define H_SIZE 24
#define H_CRYPT_METHOD 32
#define H_L1_SIZE 36
#define H_L1_TABLE_OFFSET 40
#define H_REFCOUNT_TABLE_OFFSET 48
#define H_REFCOUNT_TABLE_CLUSTERS 56
#define H_NB_SNAPSHOTS 60
#define H_VERSION_2_LENGTH 72
#define H_INCOMPATIBLE_FEATURES 72
#define H_REFCOUNT_ORDER 96
#define H_HEADER_LENGTH 100
#define H_VERSION_3_LENGTH 104
#define H_COMPRESSION_TYPE 104
#define H_LENGTH 112 /* with the compression type, padded */

#define INCOMPATIBLE_DIRTY (UINT64_C (1) << 0)
#define INCOMPATIBLE_CORRUPT (UINT64_C (1) << 1)
#define INCOMPATIBLE_DATA_FILE (UINT64_C (1) << 2)
#define INCOMPATIBLE_COMPRESSION_TYPE (UINT64_C (1) << 3)
#define INCOMPATIBLE_EXTENDED_L2 (UINT64_C (1) << 4)
#define INCOMPATIBLE_KNOWN                                                    \
  (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_DATA_FILE         \
   | INCOMPATIBLE_COMPRESSION_TYPE | INCOMPATIBLE_EXTENDED_L2)

/* "Header extensions".  The last one is this filter's own: it marks the images
 * that the filter made.  Other programs skip and keep it.
 *
 *   0  "cow 1", 3 zero bytes; all there was at first
 *   8  size of the base
 *  16  bit 0: there is a checksum; bit 1: it is an increment
 *  20  the checksum
 *  24  length of what the base is called
 *  28  that text
 *
 * Readers ignore what may follow, and the other bits.
 */
#define EXTENSION_END UINT32_C (0)
#define EXTENSION_BACKING_FORMAT UINT32_C (0xe2792aca)
#define EXTENSION_OURS UINT32_C (0x6e636f77) /* "ncow" */
static const char ours[8] = "cow 1";
#define O_SIZE 8
#define O_FLAGS 16
#define O_CHECKSUM 20
#define O_ID_LENGTH 24
#define O_ID 28
#define OURS_HAS_CHECKSUM UINT32_C (1)
#define OURS_IS_INCREMENT UINT32_C (2)

/* Bits of L1 and L2 entries. */
#define ENTRY_COPIED (UINT64_C (1) << 63)
#define ENTRY_COMPRESSED (UINT64_C (1) << 62)
#define ENTRY_ZERO UINT64_C (1)
#define ENTRY_OFFSET UINT64_C (0x00fffffffffffe00)

/* Of an entry of the refcount table; the other bits are reserved. */
#define REFTABLE_OFFSET UINT64_C (0xfffffffffffffe00)

/* Where compressed data is counted in ("Compressed Clusters Descriptor"). */
#define SECTOR 512u

static void
put32 (void *buf, size_t offset, uint32_t value)
{
  value = htobe32 (value);
  memcpy ((char *) buf + offset, &value, sizeof value);
}

static void
put64 (void *buf, size_t offset, uint64_t value)
{
  value = htobe64 (value);
  memcpy ((char *) buf + offset, &value, sizeof value);
}

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

/*----------------------------------------------------------------------
 * Geometry
 */

static void
set_format (struct qcow2_geometry *g, enum qcow2_l2_format format)
{
  const bool extended = format == QCOW2_EXTENDED;

  g->format = format;
  g->cluster_size = extended ? g->block_size * SLOT_BLOCKS : g->block_size;

  const uint64_t l2_entries = g->cluster_size / (extended ? 16 : 8);
  const uint64_t slot_size = (uint64_t) g->block_size * SLOT_BLOCKS;
  const uint64_t nr_slots
    = g->disk_size / slot_size + (g->disk_size % slot_size > 0);
  uint64_t nr_l2;

  g->slots_per_l2 = extended ? l2_entries : l2_entries / SLOT_BLOCKS;
  nr_l2 = nr_slots / g->slots_per_l2 + (nr_slots % g->slots_per_l2 > 0);

  /* qemu-img check finds fault with the table of a disk of no bytes, if that has
   * a cluster but no entry.
   */
  g->l1_entries = MAX (nr_l2, 1);
}

static bool
l1_is_too_large (const struct qcow2_geometry *g)
{
  return g->l1_entries > QCOW2_MAX_L1_SIZE / 8;
}

int
qcow2_geometry_init (struct qcow2_geometry *g, uint64_t disk_size,
                     uint32_t block_size, enum qcow2_l2_format format)
{
  /* The largest disk that nbdkit can express is no multiple of 512. */
  if (disk_size > INT64_MAX - SECTOR + 1)
    return -1;
  g->disk_size = ROUND_UP (disk_size, (uint64_t) SECTOR);
  g->block_size = block_size;
  set_format (g, format);
  if (format == QCOW2_PORTABLE && l1_is_too_large (g))
    set_format (g, QCOW2_EXTENDED);
  if (g->format == QCOW2_EXTENDED
      && block_size > QCOW2_MAX_EXTENDED_BLOCK_SIZE)
    return -1;
  return l1_is_too_large (g) ? -1 : 0;
}

/*----------------------------------------------------------------------
 * Encoding
 */

/* The part of a cluster that is being filled in. */
struct encoder {
  char *cluster;
  size_t at, size;
};

/* COUNT bytes, then zeroes up to a multiple of 8.  -1: no room. */
static int
encode_bytes (struct encoder *e, const void *bytes, size_t count)
{
  const size_t padded = ROUND_UP (count, (size_t) 8);

  if (padded > e->size - e->at)
    return -1;
  if (count > 0)
    memcpy (e->cluster + e->at, bytes, count);
  e->at += padded;
  return 0;
}

static int
encode_extension (struct encoder *e, uint32_t type, const void *data,
                  size_t length)
{
  char head[8];

  put32 (head, 0, type);
  put32 (head, 4, (uint32_t) length);
  if (encode_bytes (e, head, sizeof head) == -1)
    return -1;
  return encode_bytes (e, data, length);
}

/* The extension of this filter. */
static int
encode_ours (struct encoder *e, const struct qcow2_base *base)
{
  char data[O_ID + QCOW2_MAX_BASE_ID];

  memcpy (data, ours, sizeof ours);
  if (!base || !base->known)
    return encode_extension (e, EXTENSION_OURS, data, sizeof ours);

  const size_t length = strlen (base->id);
  put64 (data, O_SIZE, base->size);
  put32 (data, O_FLAGS,
         (base->has_checksum ? OURS_HAS_CHECKSUM : 0)
           | (base->is_increment ? OURS_IS_INCREMENT : 0));
  put32 (data, O_CHECKSUM, base->has_checksum ? base->checksum : 0);
  put32 (data, O_ID_LENGTH, (uint32_t) length);
  memcpy (data + O_ID, base->id, length);
  return encode_extension (e, EXTENSION_OURS, data, O_ID + length);
}

int
qcow2_encode_header (void *cluster, const struct qcow2_geometry *g,
                     const struct qcow2_layout *layout)
{
  struct encoder e
    = { .cluster = cluster, .at = H_LENGTH, .size = g->cluster_size };
  const bool extended = g->format == QCOW2_EXTENDED;

  memset (cluster, 0, g->cluster_size);
  put32 (cluster, H_MAGIC, MAGIC);
  put32 (cluster, H_VERSION, 3);
  put32 (cluster, H_CLUSTER_BITS, (uint32_t) __builtin_ctz (g->cluster_size));
  put64 (cluster, H_SIZE, g->disk_size);
  put32 (cluster, H_L1_SIZE, (uint32_t) g->l1_entries);
  put64 (cluster, H_L1_TABLE_OFFSET, layout->l1_offset);
  put64 (cluster, H_REFCOUNT_TABLE_OFFSET, layout->reftable_offset);
  put32 (cluster, H_REFCOUNT_TABLE_CLUSTERS,
         (uint32_t) layout->reftable_clusters);
  put64 (cluster, H_INCOMPATIBLE_FEATURES,
         extended ? INCOMPATIBLE_EXTENDED_L2 : 0);
  put32 (cluster, H_REFCOUNT_ORDER, 4);
  put32 (cluster, H_HEADER_LENGTH, H_LENGTH);

  if (layout->backing_format
      && encode_extension (&e, EXTENSION_BACKING_FORMAT,
                           layout->backing_format,
                           strlen (layout->backing_format))
           == -1)
    return -1;
  if (encode_ours (&e, layout->base) == -1
      || encode_extension (&e, EXTENSION_END, NULL, 0) == -1)
    return -1;

  if (layout->backing_file) {
    const size_t length = strlen (layout->backing_file);

    put64 (cluster, H_BACKING_FILE_OFFSET, e.at);
    put32 (cluster, H_BACKING_FILE_SIZE, (uint32_t) length);
    if (length > QCOW2_MAX_BACKING_NAME
        || encode_bytes (&e, layout->backing_file, length) == -1)
      return -1;
  }
  return 0;
}

uint64_t
qcow2_l1_entry (uint64_t offset, uint64_t refcount)
{
  return htobe64 (offset | (refcount == 1 ? ENTRY_COPIED : 0));
}

uint64_t
qcow2_reftable_entry (uint64_t offset)
{
  return htobe64 (offset);
}

void
qcow2_encode_scattered (void *table, uint64_t index, uint64_t state,
                        const uint64_t offsets[SLOT_BLOCKS])
{
  for (unsigned block = 0; block < SLOT_BLOCKS; ++block) {
    uint64_t entry = 0;

    switch (bitmap_state (state, block)) {
    case BLOCK_ALLOCATED:
      entry = offsets[block] | ENTRY_COPIED;
      break;
    case BLOCK_ZERO:
      entry = ENTRY_ZERO;
      break;
    case BLOCK_HOLE:
      break;
    }
    put64 (table, (index * SLOT_BLOCKS + block) * 8, entry);
  }
}

void
qcow2_encode_slot (const struct qcow2_geometry *g, void *table, uint64_t index,
                   uint64_t state, uint64_t offset)
{
  uint64_t offsets[SLOT_BLOCKS];

  if (g->format == QCOW2_EXTENDED) {
    put64 (table, index * 16,
           bitmap_allocated (state) ? offset | ENTRY_COPIED : 0);
    put64 (table, index * 16 + 8, state);
    return;
  }
  for (unsigned block = 0; block < SLOT_BLOCKS; ++block) {
    offsets[block] = offset;
    if (bitmap_state (state, block) == BLOCK_ALLOCATED)
      offset += g->block_size;
  }
  qcow2_encode_scattered (table, index, state, offsets);
}

void
qcow2_encode_zero_table (const struct qcow2_geometry *g, void *table)
{
  for (uint64_t i = 0; i < g->slots_per_l2; ++i)
    qcow2_encode_slot (g, table, i, bitmap_set_zero (0, UINT32_MAX), 0);
}

/*----------------------------------------------------------------------
 * Decoding
 */

static int
refuse (struct qcow2_fault *fault, uint64_t offset, const char *what)
{
  fault->offset = offset;
  fault->what = what;
  return -1;
}

/* Does a range lie in a file of FILE_SIZE bytes? */
static bool
is_inside (uint64_t file_size, uint64_t offset, uint64_t length)
{
  return offset <= file_size && length <= file_size - offset;
}

/* "Header": the incompatible features of version 3. */
static int
decode_features (const void *buf, struct qcow2_header *h,
                 struct qcow2_fault *fault)
{
  const uint64_t features = get64 (buf, H_INCOMPATIBLE_FEATURES);
  const size_t at = H_INCOMPATIBLE_FEATURES;

  if (features & ~INCOMPATIBLE_KNOWN)
    return refuse (fault, at,
                   "it has an incompatible feature that is not known");
  if (features & INCOMPATIBLE_CORRUPT)
    return refuse (
      fault, at, "it is marked as corrupt; repair it with qemu-img check -r");
  if (features & INCOMPATIBLE_DATA_FILE)
    return refuse (fault, at, "its data is in another file");

  h->extended_l2 = features & INCOMPATIBLE_EXTENDED_L2;
  if (h->extended_l2 && h->cluster_bits < 14)
    return refuse (fault, H_CLUSTER_BITS,
                   "its clusters are too small for extended L2 entries");
  return 0;
}

/* The fields that only version 3 has.  HEADER_LENGTH becomes that of either
 * version.
 */
static int
decode_version_3 (const void *buf, size_t length, struct qcow2_header *h,
                  uint32_t *header_length, struct qcow2_fault *fault)
{
  if (h->version == 2) {
    *header_length = H_VERSION_2_LENGTH;
    return 0;
  }
  if (length < H_VERSION_3_LENGTH)
    return refuse (fault, length, "the file ends in the header");
  *header_length = get32 (buf, H_HEADER_LENGTH);
  if (*header_length < H_VERSION_3_LENGTH || *header_length % 8 != 0
      || *header_length > qcow2_cluster_size (h))
    return refuse (fault, H_HEADER_LENGTH, "no valid length of the header");
  if (*header_length > length)
    return refuse (fault, length, "the file ends in the header");
  if (get32 (buf, H_REFCOUNT_ORDER) > 6)
    return refuse (fault, H_REFCOUNT_ORDER, "no valid width of refcounts");
  if (decode_features (buf, h, fault) == -1)
    return -1;

  const unsigned compression
    = *header_length > H_COMPRESSION_TYPE
        ? ((const unsigned char *) buf)[H_COMPRESSION_TYPE]
        : 0;
  if (compression > 1)
    return refuse (fault, H_COMPRESSION_TYPE,
                   "its kind of compression is not known");
  if (compression == 1
      && !(get64 (buf, H_INCOMPATIBLE_FEATURES)
           & INCOMPATIBLE_COMPRESSION_TYPE))
    return refuse (fault, H_COMPRESSION_TYPE,
                   "its kind of compression contradicts its features");
  h->zstd = compression == 1;
  return 0;
}

bool
qcow2_is_base_id (const char *text)
{
  size_t length = 0;

  for (; text[length]; ++length) {
    const unsigned char c = (unsigned char) text[length];

    if (c < ' ' || c == 0x7f)
      return false;
  }
  return length >= 1 && length <= QCOW2_MAX_BASE_ID;
}

/* The extension of this filter: LENGTH bytes that are at AT of the file. */
static int
decode_ours (const char *data, size_t length, size_t at,
             struct qcow2_header *h, struct qcow2_fault *fault)
{
  struct qcow2_base *base = &h->base;

  h->ours = true;
  memset (base, 0, sizeof *base);
  if (length <= O_SIZE)
    return 0;
  if (length < O_ID)
    return refuse (fault, at, "what it says of its base is cut short");

  const uint32_t id_length = get32 (data, O_ID_LENGTH);
  if (id_length > MIN (length - O_ID, QCOW2_MAX_BASE_ID))
    return refuse (fault, at + O_ID_LENGTH,
                   "the name of its base is too long");
  memcpy (base->id, data + O_ID, id_length);
  if (id_length > 0
      && (strlen (base->id) != id_length || !qcow2_is_base_id (base->id)))
    return refuse (fault, at + O_ID, "the name of its base is no text");

  base->known = true;
  base->size = get64 (data, O_SIZE);
  base->has_checksum = get32 (data, O_FLAGS) & OURS_HAS_CHECKSUM;
  base->is_increment = get32 (data, O_FLAGS) & OURS_IS_INCREMENT;
  base->checksum = get32 (data, O_CHECKSUM);
  return 0;
}

/* "Header extensions": from AT on, to the end that is marked or END. */
static int
decode_extensions (const void *buf, size_t at, size_t end,
                   struct qcow2_header *h, struct qcow2_fault *fault)
{
  while (end - at >= 8) {
    const uint32_t type = get32 (buf, at);
    const uint32_t length = get32 (buf, at + 4);

    if (type == EXTENSION_END)
      return 0;
    if (length > end - at - 8)
      return refuse (fault, at, "a header extension is too long");

    const char *data = (const char *) buf + at + 8;
    if (type == EXTENSION_OURS
        && decode_ours (data, length, at + 8, h, fault) == -1)
      return -1;
    if (type == EXTENSION_BACKING_FORMAT && length <= QCOW2_MAX_FORMAT_NAME) {
      memset (h->backing_format, 0, sizeof h->backing_format);
      memcpy (h->backing_format, data, length);
    }
    at += 8 + (size_t) length;
    at = MIN (ROUND_UP (at, (size_t) 8), end);
  }
  return 0;
}

/* The name of the backing file must be where it may be. */
static int
decode_backing_file (const void *buf, uint64_t header_area,
                     struct qcow2_header *h, struct qcow2_fault *fault,
                     uint64_t *extensions_end)
{
  const uint64_t offset = get64 (buf, H_BACKING_FILE_OFFSET);
  const uint32_t size = get32 (buf, H_BACKING_FILE_SIZE);

  *extensions_end = header_area;
  if (offset == 0)
    return 0;
  if (size > QCOW2_MAX_BACKING_NAME || !is_inside (header_area, offset, size))
    return refuse (fault, H_BACKING_FILE_OFFSET,
                   "no valid name of a backing file");
  memcpy (h->backing_file, (const char *) buf + offset, size);
  *extensions_end = offset;
  return 0;
}

/* The L1 table: "the number of entries must be at least as many as are needed
 * for the disk".
 */
static int
decode_l1_table (const void *buf, uint64_t file_size, struct qcow2_header *h,
                 struct qcow2_fault *fault)
{
  const unsigned l2_coverage_bits
    = h->cluster_bits + (unsigned) __builtin_ctz (qcow2_l2_entries (h));

  h->l1_offset = get64 (buf, H_L1_TABLE_OFFSET);
  h->l1_size = UINT64_C (8) * get32 (buf, H_L1_SIZE);
  h->l1_entries = h->disk_size >> l2_coverage_bits;
  if (h->disk_size & ((UINT64_C (1) << l2_coverage_bits) - 1))
    h->l1_entries++;

  if (h->l1_size > QCOW2_MAX_L1_SIZE)
    return refuse (fault, H_L1_SIZE, "the L1 table is larger than 32 MiB");
  if (h->l1_entries > h->l1_size / 8)
    return refuse (fault, H_L1_SIZE,
                   "the L1 table is too small for the size of the disk");
  if (h->l1_offset & (qcow2_cluster_size (h) - 1))
    return refuse (fault, H_L1_TABLE_OFFSET, "the L1 table is not aligned");
  if (h->l1_size > 0 && h->l1_offset == 0)
    return refuse (fault, H_L1_TABLE_OFFSET,
                   "the L1 table overlaps the header");
  if (!is_inside (file_size, h->l1_offset, h->l1_size))
    return refuse (fault, H_L1_TABLE_OFFSET,
                   "the L1 table goes beyond the end of the file");
  return 0;
}

static int
decode_reftable (const void *buf, uint64_t file_size, struct qcow2_header *h,
                 struct qcow2_fault *fault)
{
  h->reftable_offset = get64 (buf, H_REFCOUNT_TABLE_OFFSET);
  h->reftable_size = (uint64_t) get32 (buf, H_REFCOUNT_TABLE_CLUSTERS)
                     << h->cluster_bits;

  if (h->reftable_size > QCOW2_MAX_REFTABLE_SIZE)
    return refuse (fault, H_REFCOUNT_TABLE_CLUSTERS,
                   "the refcount table is larger than 8 MiB");
  if (h->reftable_offset & (qcow2_cluster_size (h) - 1))
    return refuse (fault, H_REFCOUNT_TABLE_OFFSET,
                   "the refcount table is not aligned");
  if (h->reftable_offset == 0 || h->reftable_size == 0)
    return refuse (fault, H_REFCOUNT_TABLE_OFFSET, "no refcount table");
  if (!is_inside (file_size, h->reftable_offset, h->reftable_size))
    return refuse (fault, H_REFCOUNT_TABLE_OFFSET,
                   "the refcount table goes beyond the end of the file");
  return 0;
}

bool
qcow2_is_image (const void *buf, size_t length)
{
  if (length < H_BACKING_FILE_OFFSET || get32 (buf, H_MAGIC) != MAGIC)
    return false;
  return get32 (buf, H_VERSION) == 2 || get32 (buf, H_VERSION) == 3;
}

int
qcow2_decode_header (const void *buf, size_t length, uint64_t file_size,
                     struct qcow2_header *h, struct qcow2_fault *fault)
{
  uint32_t header_length;
  uint64_t extensions_end;

  memset (h, 0, sizeof *h);
  if (length < 4 || get32 (buf, H_MAGIC) != MAGIC)
    return refuse (fault, H_MAGIC, "not a qcow2 image");
  if (length < H_VERSION_2_LENGTH)
    return refuse (fault, length, "the file ends in the header");
  h->version = get32 (buf, H_VERSION);
  if (h->version != 2 && h->version != 3)
    return refuse (fault, H_VERSION, "its version is not 2 or 3");
  h->cluster_bits = get32 (buf, H_CLUSTER_BITS);
  if (h->cluster_bits < 9 || h->cluster_bits > 21)
    return refuse (fault, H_CLUSTER_BITS,
                   "its clusters are not of 512 bytes to 2 MiB");
  if (decode_version_3 (buf, length, h, &header_length, fault) == -1)
    return -1;
  if (get32 (buf, H_CRYPT_METHOD) != 0)
    return refuse (fault, H_CRYPT_METHOD, "it is encrypted");
  h->disk_size = get64 (buf, H_SIZE);
  if (h->disk_size > INT64_MAX)
    return refuse (fault, H_SIZE, "no valid size of the disk");
  h->nr_snapshots = get32 (buf, H_NB_SNAPSHOTS);

  const uint64_t header_area = MIN (qcow2_cluster_size (h), length);
  if (decode_backing_file (buf, header_area, h, fault, &extensions_end) == -1)
    return -1;
  if (extensions_end > header_length
      && decode_extensions (buf, header_length, (size_t) extensions_end, h,
                            fault)
           == -1)
    return -1;
  if (decode_l1_table (buf, file_size, h, fault) == -1)
    return -1;
  return decode_reftable (buf, file_size, h, fault);
}

int
qcow2_decode_l1_entry (const struct qcow2_header *h, uint64_t file_size,
                       uint64_t big_endian, uint64_t offset,
                       uint64_t *l2_offset, struct qcow2_fault *fault)
{
  *l2_offset = be64toh (big_endian) & ENTRY_OFFSET;
  if (*l2_offset & (qcow2_cluster_size (h) - 1))
    return refuse (fault, offset, "an L2 table is not aligned");
  if (!is_inside (file_size, *l2_offset, qcow2_cluster_size (h)))
    return refuse (fault, offset,
                   "an L2 table goes beyond the end of the file");
  return 0;
}

int
qcow2_decode_reftable_entry (const struct qcow2_header *h, uint64_t file_size,
                             uint64_t big_endian, uint64_t offset,
                             uint64_t *block_offset, struct qcow2_fault *fault)
{
  *block_offset = be64toh (big_endian) & REFTABLE_OFFSET;
  if (*block_offset & (qcow2_cluster_size (h) - 1))
    return refuse (fault, offset, "a refcount block is not aligned");
  if (!is_inside (file_size, *block_offset, qcow2_cluster_size (h)))
    return refuse (fault, offset,
                   "a refcount block goes beyond the end of the file");
  return 0;
}

/* "Compressed Clusters Descriptor" */
static int
decode_compressed (const struct qcow2_header *h, uint64_t file_size,
                   uint64_t entry, uint64_t offset,
                   struct qcow2_cluster *cluster, struct qcow2_fault *fault)
{
  const unsigned offset_bits = 62 - (h->cluster_bits - 8);
  const uint64_t sectors = (entry & (ENTRY_COMPRESSED - 1)) >> offset_bits;

  cluster->kind = QCOW2_COMPRESSED;
  cluster->offset = entry & ((UINT64_C (1) << offset_bits) - 1);
  cluster->size
    = (uint32_t) ((sectors + 1) * SECTOR - (cluster->offset & (SECTOR - 1)));
  if (cluster->offset >= file_size)
    return refuse (fault, offset,
                   "a compressed cluster lies beyond the end of the file");
  cluster->size = (uint32_t) MIN (cluster->size, file_size - cluster->offset);
  return 0;
}

/* "Extended L2 Entries": what the bitmap makes of a cluster. */
static int
decode_subclusters (uint64_t states, uint64_t offset,
                    struct qcow2_cluster *cluster, struct qcow2_fault *fault)
{
  const uint32_t allocated = bitmap_allocated (states);
  const uint32_t zero = bitmap_zero (states);

  if (allocated & zero)
    return refuse (fault, offset, "a subcluster is both allocated and zero");
  if (allocated && cluster->offset == 0)
    return refuse (fault, offset,
                   "an allocated subcluster lies nowhere in the file");

  cluster->subclusters = states;
  if (allocated == UINT32_MAX)
    cluster->kind = QCOW2_DATA;
  else if (zero == UINT32_MAX)
    cluster->kind = QCOW2_ZERO;
  else if (states == 0)
    cluster->kind = QCOW2_UNALLOCATED;
  else
    cluster->kind = QCOW2_MIXED;
  if (!allocated)
    cluster->offset = 0;
  return 0;
}

/* Of the REACH first bytes of a cluster, as far as they must be in the file. */
static uint64_t
bytes_in_file (const struct qcow2_header *h,
               const struct qcow2_cluster *cluster, uint64_t reach)
{
  const uint32_t allocated = bitmap_allocated (cluster->subclusters);

  if (cluster->kind != QCOW2_MIXED || !allocated)
    return reach;

  const unsigned last = 31 - (unsigned) __builtin_clz (allocated);
  return MIN (reach, (uint64_t) (last + 1) << (h->cluster_bits - 5));
}

int
qcow2_decode_l2_entry (const struct qcow2_header *h, uint64_t file_size,
                       const void *table, unsigned index, uint64_t offset,
                       uint64_t reach, struct qcow2_cluster *cluster,
                       struct qcow2_fault *fault)
{
  const size_t at = (size_t) index * (h->extended_l2 ? 16 : 8);
  const uint64_t entry = get64 (table, at);

  offset += at;
  memset (cluster, 0, sizeof *cluster);
  if (entry & ENTRY_COMPRESSED) {
    if (h->extended_l2 && get64 (table, at + 8) != 0)
      return refuse (fault, offset, "a compressed cluster has subclusters");
    return decode_compressed (h, file_size, entry, offset, cluster, fault);
  }

  cluster->offset = entry & ENTRY_OFFSET;
  if (h->extended_l2) {
    if (decode_subclusters (get64 (table, at + 8), offset, cluster, fault)
        == -1)
      return -1;
  }
  else if (entry & ENTRY_ZERO) {
    if (h->version == 2)
      return refuse (fault, offset,
                     "a zero cluster, which version 2 does not have");
    cluster->kind = QCOW2_ZERO;
  }
  else
    cluster->kind = cluster->offset ? QCOW2_DATA : QCOW2_UNALLOCATED;

  if (cluster->kind != QCOW2_DATA && cluster->kind != QCOW2_MIXED)
    return 0;
  if (cluster->offset & (qcow2_cluster_size (h) - 1))
    return refuse (fault, offset, "a cluster is not aligned");
  if (cluster->offset
      && !is_inside (file_size, cluster->offset,
                     bytes_in_file (h, cluster, reach)))
    return refuse (fault, offset, "a cluster goes beyond the end of the file");
  return 0;
}
