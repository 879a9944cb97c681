/* SPDX-License-Identifier: BSD-3-Clause */

/* Where the tables of a qcow2 image lie in an overlay file, and the space for them.
 *
 * An overlay file becomes an image where it lies (image.h).  Its head has room for
 * the header, the L1 table and most often the refcount table; L2 tables and refcount
 * blocks go into blocks of the log that are taken for them.  Their space is set aside when
 * the request is made that will need it, so that saving does not fail on a full file
 * system.  An image in the extended form is not made in place.
 */

#ifndef COW_TABLES_H
#define COW_TABLES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/lock.h"
#include "format/qcow2.h"
#include "overlay/log.h"

/* Is space set aside? */
enum tables_space {
  TABLES_UNPLANNED, /* no: the file is not meant to be saved in place */
  TABLES_SET_ASIDE,
};

/* The first so many of the clusters that were taken for tables. */
struct tables_part {
  uint64_t nr;
  size_t run; /* it ends behind so many of this run, or at its start */
  uint32_t in_run;
};

struct tables {
  struct qcow2_geometry geometry; /* constant, as are the next three */
  struct log *log;
  enum tables_space space;
  uint64_t l1_offset;

  _Atomic uint64_t covered; /* a file of this length has its refcount blocks;
                             * changes only under the lock */
  _Atomic uint64_t
    *l2_words;       /* two bits for each L2 table: whether it has space.  That
                               * changes under the lock */
  struct mutex lock; /* taken before the log's; guards what follows */
  uint64_t nr_l2;    /* how many have */
  bool some_zero;    /* there may be L2 tables that are all zero */
  uint64_t *l1_pages;          /* bitmap: pages of the L1 table with space */
  uint64_t nr_l1_pages;        /* bits in it */
  uint64_t reftable_offset;    /* where the refcount table lies, */
  uint64_t reftable_room;      /* how many bytes it can have there, */
  uint64_t reftable_space;     /* and for how many there is space */
  struct log_run reftable_row; /* its blocks; none: it lies in the head */
  struct log_run *runs;        /* blocks taken for tables */
  size_t nr_runs, max_runs;
  uint64_t nr_clusters;          /* in them */
  struct tables_part with_space; /* of them */
  struct tables_part used;       /* by tables_take */
};

/* The size of the head that a file for images of this geometry has, in bytes. */
extern uint64_t tables_head_size (const struct qcow2_geometry *g);

/* LOG has a head of at least that size, and blocks as large as clusters, or SPACE is
 * TABLES_UNPLANNED and no image is made in place.  -1 and ENOMEM.
 */
extern int tables_init (struct tables *tables, const struct qcow2_geometry *g,
                        struct log *log, enum tables_space space);
extern void tables_destroy (struct tables *tables);

/* Set space aside for the L2 table numbered NR and for its entry in the L1 table, if that
 * was not done before.  1 if it was set aside now, 0 if there is some; -1 and errno.
 */
extern int tables_reserve_l2 (struct tables *tables, uint64_t nr);

/* The request for which that has returned 1 has failed.  If no other one has asked for the
 * same table since, it needs the space no longer.
 */
extern void tables_cancel_l2 (struct tables *tables, uint64_t nr);

/* The same for COUNT L2 tables from FIRST on, all entries of which are going to be "zero",
 * so that they can be one and the same cluster.  0; -1 and errno.
 */
extern int tables_reserve_zero_l2 (struct tables *tables, uint64_t first,
                                   uint64_t count);

/* Set space aside for the refcounts of the file, of which addresses have been taken.
 * To be called before they are used.  -1 and errno.
 */
extern int tables_reserve_refcounts (struct tables *tables);

/* Take the next cluster for a table, its offset in *OFFSET; all over again after
 * tables_take_again.  For the one who saves, when nobody else changes the overlay
 * any more.  -1 and errno.
 */
extern void tables_take_again (struct tables *tables);
extern int tables_take (struct tables *tables, uint64_t *offset);

/* When all L2 tables have been taken: have clusters for the refcounts of the file, and a
 * refcount table (reftable_offset) that is long enough for them.  As above.
 */
extern int tables_have_refcounts (struct tables *tables);

#endif /* COW_TABLES_H */
