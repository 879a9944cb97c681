/* SPDX-License-Identifier: BSD-3-Clause */

/* The qcow2 format: geometry, and encoding and decoding of its structures.
 *
 * Pure: buffers in, buffers out, no I/O.  The specification is
 * docs/interop/qcow2.txt in qemu; its sections are cited by name.  All offsets
 * and sizes are in bytes unless the name says otherwise.
 *
 * What is written is version 3, with refcounts of 16 bits.  A block of the
 * overlay is a cluster ("portable"), or a subcluster of a cluster that has the
 * size of a slot ("extended"): the two halves of a state word (bitmap.h) are laid
 * out as in an extended L2 entry.
 */

#ifndef COW_QCOW2_H
#define COW_QCOW2_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap.h"

/* The largest L1 and refcount tables that qemu takes. */
#define QCOW2_MAX_L1_SIZE (UINT64_C (32) << 20)
#define QCOW2_MAX_REFTABLE_SIZE (UINT64_C (8) << 20)

/* Refcounts have 16 bits. */
#define QCOW2_MAX_REFCOUNT UINT64_C (65535)

/* Some readers refuse files that are shorter. */
#define QCOW2_MIN_FILE_SIZE (UINT64_C (192) << 10)

/* The longest name of a backing file, and of its format. */
#define QCOW2_MAX_BACKING_NAME 1023
#define QCOW2_MAX_FORMAT_NAME 15

/* What a diff of this filter says of the base that it was made over, so that it is not
 * laid over another one.  In the filter's header extension.
 */
#define QCOW2_MAX_BASE_ID 255
struct qcow2_base {
  bool known;        /* is anything of this said at all? */
  bool is_increment; /* it is over a later state of the disk than the base */
  bool has_checksum;
  uint32_t checksum; /* of the first bytes of the base */
  uint64_t size;     /* of the base, in bytes */
  char
    id[QCOW2_MAX_BASE_ID + 1]; /* what the user calls the base; "": nothing */
};

/* May TEXT be the name of a base?  1 to QCOW2_MAX_BASE_ID bytes, no control
 * characters.
 */
extern bool qcow2_is_base_id (const char *text);

/*----------------------------------------------------------------------
 * Geometry of images that are written
 */

enum qcow2_l2_format {
  QCOW2_PORTABLE, /* standard L2 entries: what every reader knows */
  QCOW2_EXTENDED, /* extended L2 entries: 32 subclusters */
};

/* What follows from the sizes of the disk and of its blocks. */
struct qcow2_geometry {
  uint64_t disk_size; /* as in the header, a multiple of 512 */
  enum qcow2_l2_format format;
  uint32_t block_size;
  uint32_t cluster_size;
  uint64_t slots_per_l2; /* slots of the disk that one L2 table describes */
  uint64_t l1_entries;   /* also the number of L2 tables at the most */
};

/* The largest block size that extended L2 entries allow: a cluster is at most
 * 2 MiB.
 */
#define QCOW2_MAX_EXTENDED_BLOCK_SIZE ((UINT32_C (2) << 20) / SLOT_BLOCKS)

/* Fill in G for a disk of DISK_SIZE bytes, which is rounded up to a multiple of
 * 512.  Where FORMAT is QCOW2_PORTABLE and its L1 table would be too large, the
 * format becomes QCOW2_EXTENDED.  -1 if the disk is too large for any format that
 * blocks of BLOCK_SIZE bytes allow.
 */
extern int qcow2_geometry_init (struct qcow2_geometry *g, uint64_t disk_size,
                                uint32_t block_size,
                                enum qcow2_l2_format format);

/* Refcounts in a refcount block, and entries in a cluster of a refcount table or
 * an L1 table.
 */
static inline uint64_t
qcow2_refcounts_per_block (const struct qcow2_geometry *g)
{
  return g->cluster_size / sizeof (uint16_t);
}

/* SIZE in clusters, rounded up. */
static inline uint64_t
qcow2_clusters (const struct qcow2_geometry *g, uint64_t size)
{
  return size / g->cluster_size + (size % g->cluster_size > 0);
}

/* The number of clusters of the file that slots of this state word take. */
static inline unsigned
qcow2_data_clusters (const struct qcow2_geometry *g, uint64_t state)
{
  const uint32_t allocated = bitmap_allocated (state);

  return g->format == QCOW2_EXTENDED
           ? allocated != 0
           : (unsigned) __builtin_popcount (allocated);
}

/*----------------------------------------------------------------------
 * Encoding
 */

/* What the header says beyond the geometry. */
struct qcow2_layout {
  uint64_t l1_offset;
  uint64_t reftable_offset;
  uint64_t reftable_clusters;
  const char *backing_file;      /* NULL: none */
  const char *backing_format;    /* NULL: not said */
  const struct qcow2_base *base; /* NULL: not said */
};

/* Fill a cluster with the header, its extensions, the name of the backing file,
 * and zeroes.  -1 if they do not fit ("Header", "Header extensions").
 */
extern int qcow2_encode_header (void *cluster, const struct qcow2_geometry *g,
                                const struct qcow2_layout *layout);

/* An entry of the L1 table, big-endian, for an L2 table at OFFSET that has so many
 * references ("L1 table entry").  Entries of a refcount table are just big-endian
 * offsets.
 */
extern uint64_t qcow2_l1_entry (uint64_t offset, uint64_t refcount);
extern uint64_t qcow2_reftable_entry (uint64_t offset);

/* Write the L2 entries of the slot that is number INDEX of those that the L2
 * TABLE (a cluster) describes.  The blocks have the states of STATE.  Those that are
 * allocated lie in the file one behind the other from OFFSET on; in an extended image the
 * whole slot does ("Standard Cluster Descriptor", "Extended L2 Entries").
 */
extern void qcow2_encode_slot (const struct qcow2_geometry *g, void *table,
                               uint64_t index, uint64_t state,
                               uint64_t offset);

/* The same of an image that is not extended, where the allocated blocks lie at OFFSETS. */
extern void qcow2_encode_scattered (void *table, uint64_t index,
                                    uint64_t state,
                                    const uint64_t offsets[SLOT_BLOCKS]);

/* Make an L2 TABLE all of whose clusters are zero. */
extern void qcow2_encode_zero_table (const struct qcow2_geometry *g,
                                     void *table);

/*----------------------------------------------------------------------
 * Decoding.  Nothing that is read from a file is believed before it was checked.
 */

/* The header of an image, of any version that qemu writes. */
struct qcow2_header {
  uint32_t version;
  unsigned cluster_bits;
  uint64_t disk_size;
  uint64_t l1_offset;
  uint64_t l1_entries; /* those that the disk needs; there may be more */
  uint64_t l1_size;    /* of all of the table, in bytes */
  uint64_t reftable_offset;
  uint64_t reftable_size; /* in bytes */
  uint32_t nr_snapshots;
  bool extended_l2;
  bool zstd; /* how clusters are compressed; else with zlib */
  bool ours; /* has the header extension of this filter */
  struct qcow2_base base;
  /* "": none, or not said.  Any bytes. */
  char backing_file[QCOW2_MAX_BACKING_NAME + 1];
  char backing_format[QCOW2_MAX_FORMAT_NAME + 1];
};

/* What is wrong with an image, and where. */
struct qcow2_fault {
  uint64_t offset;
  const char *what; /* constant text */
};

/* The number of bytes of a file that qcow2_decode_header wants to see, or all of
 * a shorter file.
 */
#define QCOW2_HEADER_BYTES 65536

/* Do these LENGTH bytes, with which a file or disk starts, look like a qcow2 image? */
extern bool qcow2_is_image (const void *buf, size_t length);

/* Decode and check the header of a file of FILE_SIZE bytes that starts with the
 * LENGTH bytes in BUF.  -1 and FAULT if this filter cannot or must not read such
 * an image: then H holds nothing.
 */
extern int qcow2_decode_header (const void *buf, size_t length,
                                uint64_t file_size, struct qcow2_header *h,
                                struct qcow2_fault *fault);

static inline uint64_t
qcow2_cluster_size (const struct qcow2_header *h)
{
  return UINT64_C (1) << h->cluster_bits;
}

static inline unsigned
qcow2_l2_entry_size (const struct qcow2_header *h)
{
  return h->extended_l2 ? 16 : 8;
}

static inline unsigned
qcow2_l2_entries (const struct qcow2_header *h)
{
  return 1u << (h->cluster_bits - (h->extended_l2 ? 4 : 3));
}

enum qcow2_cluster_kind {
  QCOW2_UNALLOCATED,
  QCOW2_ZERO,
  QCOW2_DATA,
  QCOW2_COMPRESSED,
  QCOW2_MIXED, /* its subclusters differ: extended L2 only */
};

/* An L2 entry: one cluster of the disk. */
struct qcow2_cluster {
  enum qcow2_cluster_kind kind;
  uint64_t offset; /* in the file, if DATA, COMPRESSED or MIXED (0 if none of
                      * its subclusters is allocated) */
  uint32_t size;   /* if COMPRESSED: bytes of the file that hold it, at most */
  uint64_t subclusters; /* if MIXED: their states, a state word */
};

/* Decode the entry of the L1 table that is at OFFSET of the file.  Gives the
 * offset of an L2 table, which lies in the file, or 0 for none; -1 and FAULT.
 */
extern int qcow2_decode_l1_entry (const struct qcow2_header *h,
                                  uint64_t file_size, uint64_t big_endian,
                                  uint64_t offset, uint64_t *l2_offset,
                                  struct qcow2_fault *fault);

/* The same of an entry of the refcount table, for a refcount block ("Host cluster
 * management").
 */
extern int qcow2_decode_reftable_entry (const struct qcow2_header *h,
                                        uint64_t file_size,
                                        uint64_t big_endian, uint64_t offset,
                                        uint64_t *block_offset,
                                        struct qcow2_fault *fault);

/* Decode entry INDEX of the L2 TABLE, or piece of one, that is at OFFSET of the
 * file.  It describes a cluster of the disk of which REACH bytes (> 0) are inside the
 * disk.  What of them is in the file lies inside the file; what is compressed
 * starts inside.  -1 and FAULT.
 */
extern int qcow2_decode_l2_entry (const struct qcow2_header *h,
                                  uint64_t file_size, const void *table,
                                  unsigned index, uint64_t offset,
                                  uint64_t reach,
                                  struct qcow2_cluster *cluster,
                                  struct qcow2_fault *fault);

#endif /* COW_QCOW2_H */
