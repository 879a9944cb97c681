/* SPDX-License-Identifier: BSD-3-Clause */

/* What an image is made of: a map that does not change any more, and for a full image
 * the data of the base.
 *
 * In an image allocated blocks are data clusters, zero blocks are zero clusters, and
 * holes are not allocated; in a full one holes where the base has data are data clusters
 * too.
 */

#ifndef COW_SOURCE_H
#define COW_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "format/qcow2.h"
#include "overlay/map.h"
#include "overlay/store.h"

/* Where the base has data, in blocks, in the order of the disk; no two of them touch. */
struct image_data {
  struct image_data_run {
    uint64_t start, end;
  } * runs;
  size_t nr_runs, max_runs;
};

/* Add a range of bytes that lies behind all others, or touches the last.  -1 and
 * ENOMEM.
 */
extern int image_data_add (struct image_data *data, uint32_t block_size,
                           uint64_t offset, uint64_t count);

/* What an image is made of. */
struct image_source {
  const struct map *map; /* changed by nobody */
  struct store *store;   /* for image_finish only */
  struct qcow2_geometry geometry;
  const char *backing_file;         /* NULL: none */
  const char *backing_format;       /* NULL: not said */
  const struct qcow2_base *base;    /* NULL: not said */
  const struct image_data *of_base; /* for a full image; NULL: a diff */
};

/* Name the backing file as the parameters cow-save-backing (NULL: the default) and
 * -format say.  *MADE_UP is what the caller has to free when SOURCE is not used any
 * more.  -1 and ENOMEM.
 */
extern int image_set_backing (struct image_source *source, const char *backing,
                              const char *format, char **made_up);

/*----------------------------------------------------------------------
 * For image.c and finish.c
 */

/* What is in a slot of an image. */
struct image_slot {
  struct slot_pair pair; /* the states of its blocks in the image */
  uint32_t of_base; /* the allocated blocks that come from the base; the others
                          * are in the file */
};

/* The first slot from NR on, before END, that has a block that is not unallocated in
 * the image; or END.  What is in it is in *SLOT.
 */
extern uint64_t next_slot (const struct image_source *s, uint64_t nr,
                           uint64_t end, struct image_slot *slot);

/* How many slots from NR on, before END, are all data of the base, as nothing near them
 * was ever written.
 */
extern uint64_t whole_slots_of_base (const struct image_source *s, uint64_t nr,
                                     uint64_t end);

/* Is each block of the L2 table numbered NR zero, also behind the end of the disk?  All such
 * tables are the same: one is written, for many entries of the L1 table.
 */
extern bool is_zero_table (const struct image_source *s, uint64_t nr);

/* Where in the file a block lies, in bytes, that is at ADDRESS. */
static inline uint64_t
address_offset (const struct image_source *s, uint32_t address)
{
  return (uint64_t) address * s->geometry.block_size;
}

static inline uint64_t
slot_size (const struct image_source *s)
{
  return (uint64_t) s->geometry.block_size * SLOT_BLOCKS;
}

/* Where the slots of the L2 table numbered NR end. */
static inline uint64_t
l2_end (const struct image_source *s, uint64_t nr)
{
  return MIN ((nr + 1) * s->geometry.slots_per_l2, s->map->nr_slots);
}

#endif /* COW_SOURCE_H */
