/* SPDX-License-Identifier: BSD-3-Clause */

/* The map of an overlay: slot number → { where its blocks lie, state word }.
 *
 * A radix tree, whose nodes are made on first touch, so that memory follows
 * what was written and not the size of the disk.  A leaf has 256 slots
 * (4 KiB), an inner node 512 pointers; there are as many levels as the disk
 * needs.  Below a leaf come the address nodes of those slots whose blocks do not lie
 * in the log as on the disk.
 *
 * A map can be frozen, any number of times: that takes its root, and from then on a
 * node is copied before it is changed.  The frozen maps that are held form a list by
 * age.  See map.c for who may do what at the same time.
 */

#ifndef COW_MAP_H
#define COW_MAP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/lock.h"
#include "overlay/dead.h"

/* One slot of the disk: SLOT_BLOCKS blocks. */
struct slot {
  _Atomic uint64_t where; /* its allocated blocks lie in the log; see map.c */
  _Atomic uint64_t state; /* state word, see bitmap.h */
};

/* Both words of a slot, as they were at one moment. */
struct slot_pair {
  uint64_t where;
  uint64_t state;
};

/* Slots that lie one behind the other in memory: 4 KiB of them. */
#define LEAF_SLOTS (UINT64_C (1) << 8)

struct frozen_map;

struct map {
  uint64_t nr_slots;     /* constant */
  unsigned levels;       /* of inner nodes above the leaves; constant */
  struct mutex lock;     /* guards the setting of root */
  _Atomic (void *) root; /* a leaf if levels is 0, else an inner node;
                           * NULL until the first touch */
  uint64_t generation;   /* of nodes that are made now.  This and the next one
                           * change under the exclusive request lock only */
  struct frozen_map *newest; /* frozen map that is held, or NULL */
  struct dead_list
    dead; /* what the newest frozen map owns and this one does not */
  const struct rwlock
    *guard; /* the request lock; NULL: of a frozen map, or nobody
                               * else has it.  Constant */
};

/* A map as it was at one moment.  Its nodes do not change, so whoever holds it (from
 * map_freeze to map_unlink) reads it without a lock.
 */
struct frozen_map {
  struct map map; /* for map_find and map_next; constant but for map.dead: what
                        * the next older map owns and this one does not */
  uint64_t generation; /* of its newest nodes, at the most; constant */
  struct frozen_map
    *older; /* in the list of those that are held; changes under
                             * the exclusive request lock only */
  /* The roots of its neighbours when it was unlinked. */
  void *older_root, *newer_root;
};

/* Make an empty map for NR_SLOTS slots.  Allocates nothing. */
extern void map_init (struct map *map, uint64_t nr_slots);

/* Free all nodes.  Nobody else may use the map any more, and no frozen map of it
 * may be held.
 */
extern void map_destroy (struct map *map);

/* The slot numbered NR (< nr_slots), or NULL if nothing near it was ever
 * touched: all its blocks are holes then.  Caller holds the request lock, and
 * the pointer is good no longer than that hold; or holds the frozen map.
 */
extern const struct slot *map_find (const struct map *map, uint64_t nr);

/* The same, but makes the nodes on the way, or copies those that a frozen map
 * has or map_zero_leaf made, so that the slot can be changed.  NULL and ENOMEM if there
 * is no memory.  Caller holds the request lock.
 */
extern struct slot *map_touch (struct map *map, uint64_t nr);

/* May map_zero_leaf be called for the leaf whose first slot is NR?  Yes if none of its
 * slots was ever touched, or all are zero by map_zero_leaf, and there was memory to make
 * or copy the nodes above.  Caller holds the request lock.
 */
extern bool map_ready_leaf (struct map *map, uint64_t nr);

/* Make all blocks of that leaf zero, at once and without memory.  The leaf has no slot
 * past nr_slots, and map_ready_leaf said yes in the same hold of the request lock
 * and of the locks of all its slots.
 */
extern void map_zero_leaf (struct map *map, uint64_t nr);

/* How many slots from NR on, that one included, lie one behind the other in memory:
 * having found or touched NR, one has them all.
 */
extern uint64_t map_in_row (const struct map *map, uint64_t nr);

/* The first slot number >= NR for which map_find may return a slot, or
 * nr_slots.  Skips whole subtrees that were never touched.  Caller holds the
 * request lock, or the frozen map.
 */
extern uint64_t map_next (const struct map *map, uint64_t nr);

/*----------------------------------------------------------------------
 * A slot.  Addresses are those of the log: where a block lies, in blocks; 0: nowhere.
 */

/* Both words of the slot as one consistent pair.  Needs no slot lock; the
 * caller holds the request lock, or the frozen map.
 */
extern struct slot_pair slot_load (const struct slot *slot);

/* Where a BLOCK lies that PAIR says is allocated.  Of the live map it may be newer than
 * PAIR, never older: either has the block's bytes as long as the caller holds the request
 * lock.  Caller holds that, or the frozen map.
 */
extern uint32_t slot_address (struct slot_pair pair, unsigned block);

/* How many blocks from FIRST on, COUNT at the most (at least 1), lie one behind the
 * other.  PAIR says that they are all allocated.  The first of them lies at *ADDRESS.
 * Caller as above.
 */
extern unsigned slot_in_row (struct slot_pair pair, unsigned first,
                             unsigned count, uint32_t *address);

/* The blocks of slot NR that are allocated in PAIR and shared: the newest frozen map that
 * is held has them allocated at the same addresses.  Those are not written to.  Caller
 * holds the request lock.  Of the live map, addresses may be newer than PAIR; so whoever
 * does not hold the slot lock looks at them again afterwards, in the same hold.
 */
extern uint32_t map_shared_blocks (const struct map *map, uint64_t nr,
                                   struct slot_pair pair);

/* A slot of the live map on its way from one state to the next. */
struct slot_step {
  struct slot_pair found; /* under the slot lock */
  uint64_t state;         /* what it becomes */
  uint32_t fresh;     /* blocks, allocated in that, that get a new address; */
  const uint32_t *to; /* to[block] is it.  NULL if there are none */
  uint64_t where;     /* by slot_prepare */
};

/* Get what slot_store needs.  -1 and ENOMEM.  After 0 comes slot_store or slot_cancel, in
 * the same hold of the slot lock and the request lock.
 */
extern int slot_prepare (const struct map *map, struct slot_step *step);
extern void slot_cancel (const struct slot_step *step);

/* Change the slot, which map_touch found, in the order that rule 1 of HACKING
 * demands.  Caller holds the slot lock and the request lock, and all bytes that this makes
 * visible are in the file.
 */
extern void slot_store (struct slot *slot, const struct slot_step *step);

/*----------------------------------------------------------------------
 * Comparing
 */

/* The blocks of a slot that are not the same in both maps: their states differ, or both
 * are allocated, at different addresses.  Caller holds both maps, which are frozen and of
 * one log.
 */
extern uint32_t slot_different_blocks (struct slot_pair one,
                                       struct slot_pair other);

/* The first slot number >= NR that may be different in both maps, or nr_slots.  Skips what
 * they share, and what neither has.  Caller as above.
 */
extern uint64_t map_next_different (const struct map *one,
                                    const struct map *other, uint64_t nr);

/*----------------------------------------------------------------------
 * Frozen maps
 */

/* Freeze the map, into FROZEN, which gets its dead list.  Takes no longer for a large
 * map.  Caller holds the request lock exclusively.
 */
extern void map_freeze (struct map *map, struct frozen_map *frozen);

/* The oldest frozen map that is newer than FROZEN, else the live one.  Caller holds
 * the request lock.
 */
extern struct map *map_next_newer (struct map *map,
                                   const struct frozen_map *frozen);

/* Nobody reads the frozen map any more: take it out of the list.  Its next newer
 * neighbour gets its dead list, and it has that one's then: of what is in it, nobody owns
 * what FROZEN->older does not.  Caller holds the request lock exclusively, and the
 * release lock, which it keeps until map_release is done.
 */
extern void map_unlink (struct map *map, struct frozen_map *frozen);

/* Free the nodes that only the unlinked map had.  Caller holds the release lock and no
 * other.
 */
extern void map_release (struct frozen_map *frozen);

#endif /* COW_MAP_H */
