/* SPDX-License-Identifier: BSD-3-Clause */

/* A walk over a qcow2 image in the order of the disk, and what it needs: what
 * the check of an image (check.c) and bringing it in (load.c) have in common.
 *
 * What fails, and reports, returns -1 after "cow-load=NAME: ...".
 */

#ifndef COW_WALK_H
#define COW_WALK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "format/qcow2.h"

struct expander;

/* As much of a table is read at once; and where data starts in the file, so
 * much is taken for data, up to the next multiple.  A power of two.
 */
#define WALK_PIECE UINT64_C (65536)

/* What a walk has met: the size of the work. */
struct amounts {
  uint64_t l2_tables;
  uint64_t changed_bytes; /* of the disk */
  uint64_t data_bytes;    /* of these, what may be other than zero */
};

/* An image that was opened.  Constant from when it was checked. */
struct loaded {
  int fd;
  uint64_t file_size;
  struct timespec modified; /* the file, before it was checked */
  struct qcow2_header header;
  struct amounts checked;
  char name[]; /* for messages */
};

/* Messages.  They return -1. */
extern int walk_refuse (const struct loaded *image, uint64_t offset,
                        const char *what);
extern int walk_refuse_fault (const struct loaded *image,
                              const struct qcow2_fault *fault);
extern int walk_out_of_memory (const struct loaded *image);
extern int walk_cannot_read (const struct loaded *image); /* and errno */

/* Read a range that was inside the file when it was opened. */
extern int walk_read_file (const struct loaded *image, void *buf,
                           uint64_t count, uint64_t offset);

/* A range of the file that is a hole, so reads as zeroes, or is not known to be
 * one.
 */
struct stretch {
  uint64_t start, end;
  bool is_hole;
};

/* The stretch at OFFSET, a multiple of 512, from there on at least.  *LAST is
 * the answer to the question before, empty at first.
 */
extern struct stretch walk_find_stretch (const struct loaded *image,
                                         struct stretch *last,
                                         uint64_t offset);

/* A cluster of the disk that is not unallocated; or all of an L2 table, if they are zero. */
struct met {
  struct qcow2_cluster cluster;
  uint64_t entry;       /* offset of its L2 entry in the file */
  uint64_t disk_offset; /* of its first byte */
  uint64_t reach;       /* its bytes that are inside the disk */
};

struct walk {
  const struct loaded *image;
  /* The visitor, which returns -1 after reporting. */
  int (*visit_table) (struct walk *walk, uint64_t table, uint64_t entry);
  int (*visit_cluster) (struct walk *walk, const struct met *met);
  struct amounts limit; /* to be refused where there is more */
  struct amounts so_far;
  struct stretch tables; /* for find_stretch */
  uint64_t
    zero_table; /* the last L2 table all entries of which were zero, or 0 */
  uint64_t
    nr_zero;    /* entries that are, of the table that is being walked over */
  char *pieces; /* of an L1 and an L2 table, WALK_PIECE bytes each */
  /* To expand compressed clusters; made when the first one is met. */
  struct expander *expander;
  char *packed, *expanded;
};

#define CLEANUP_WALK __attribute__ ((cleanup (walk_cleanup)))
extern void walk_cleanup (struct walk *walk);

/* Walk over the whole image.  W is to be declared with CLEANUP_WALK, or so the
 * struct that it is in.
 */
extern int walk_image (struct walk *walk);

/* Read the next piece of a table that is not in a hole, between *OFFSET, which
 * goes there, and END.  *COUNT becomes its length, WALK_PIECE at the most, 0 at
 * the end of the table.
 */
extern int walk_read_piece (struct walk *walk, void *piece, uint64_t *offset,
                            uint64_t end, size_t *count);

/* Expand a compressed cluster into walk->expanded.  *TAKEN becomes the number of
 * bytes of the file that hold it.
 */
extern int walk_expand (struct walk *walk, const struct met *met,
                        size_t *taken);

#endif /* COW_WALK_H */
