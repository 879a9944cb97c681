/* SPDX-License-Identifier: BSD-3-Clause */

/* Where the tables of a qcow2 image lie in an overlay file, and the space for them.
 *
 * An overlay file becomes an image where it lies (image.h).  Its head has room for
 * the header, the L1 table and most often the refcount table; L2 tables and refcount
 * blocks go into places that are taken for them.  Their space is set aside when the
 * request is made that will need it, so that saving does not fail on a full file
 * system.
 */

#ifndef COW_TABLES_H
#define COW_TABLES_H

#include <stdatomic.h>
#include <stdint.h>

#include "common/lock.h"
#include "format/qcow2.h"
#include "overlay/places.h"

/* Is space set aside? */
enum tables_space {
  TABLES_UNPLANNED, /* no: the file is not meant to be saved in place */
  TABLES_SET_ASIDE,
};

struct tables {
  struct qcow2_geometry geometry; /* constant, as are the next three */
  struct places *places;
  enum tables_space space;
  uint64_t l1_offset;

  _Atomic uint64_t covered; /* a file of this length has its refcount blocks;
                             * changes only under the lock */
  struct mutex lock;        /* taken before the places'; guards what follows */
  uint64_t nr_l2;           /* L2 tables asked for */
  uint64_t *l1_pages;       /* bitmap: pages of the L1 table with space */
  uint64_t reftable_offset; /* where the refcount table lies, */
  uint64_t reftable_room;   /* how many bytes it can have there, */
  uint64_t reftable_space;  /* and for how many there is space */
  struct place_run reftable_row; /* its places; none: it lies in the head */
  struct place_run *runs;        /* places taken for tables */
  size_t nr_runs, max_runs;
  uint64_t nr_clusters;   /* in them */
  uint64_t nr_with_space; /* the first so many of them */
  uint64_t nr_used;       /* the first so many, by tables_take */
};

/* The size of the head that a file for images of this geometry has, in bytes. */
extern uint64_t tables_head_size (const struct qcow2_geometry *g);

/* PLACES have a head of at least that size.  -1 and ENOMEM. */
extern int tables_init (struct tables *tables, const struct qcow2_geometry *g,
                        struct places *places, enum tables_space space);
extern void tables_destroy (struct tables *tables);

/* Set space aside for the L2 table numbered NR, which is needed for the first
 * time, and for NR's part of the L1 table.  Asked twice, it is set aside twice,
 * which is a waste and no more.  -1 and errno.
 */
extern int tables_reserve_l2 (struct tables *tables, uint64_t nr);

/* Set space aside for the refcounts of the file, of which places have been taken.
 * To be called before they are used.  -1 and errno.
 */
extern int tables_reserve_refcounts (struct tables *tables);

/* The requests that COUNT calls of tables_reserve_l2 were made for have failed. */
extern void tables_cancel_l2 (struct tables *tables, uint64_t count);

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

/* Punch what was set aside and not taken.  As above. */
extern void tables_give_back (struct tables *tables);

#endif /* COW_TABLES_H */
