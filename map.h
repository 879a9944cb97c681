/* SPDX-License-Identifier: BSD-3-Clause */

/* The map of an overlay: slot number → { place, state word }.
 *
 * A radix tree, whose nodes are made on first touch, so that memory follows
 * what was written and not the size of the disk.  A leaf has 256 slots
 * (4 KiB), an inner node 512 pointers; there are as many levels as the disk
 * needs.  See map.c for how it is read while it grows.
 */

#ifndef COW_MAP_H
#define COW_MAP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

/* One slot of the disk: SLOT_BLOCKS blocks. */
struct slot {
  _Atomic uint64_t place; /* where its bytes lie in the overlay file, in
                           * units of slots; 0: nowhere yet */
  _Atomic uint64_t state; /* state word, see bitmap.h */
};

/* Both words of a slot, as they were at one moment. */
struct slot_pair {
  uint64_t place;
  uint64_t state;
};

struct map {
  uint64_t nr_slots;     /* constant */
  unsigned levels;       /* of inner nodes above the leaves; constant */
  pthread_mutex_t lock;  /* guards the setting of root */
  _Atomic (void *) root; /* a leaf if levels is 0, else an inner node;
                           * NULL until the first touch */
};

/* Make an empty map for NR_SLOTS slots.  Allocates nothing. */
extern void map_init (struct map *map, uint64_t nr_slots);

/* Free all nodes.  Nobody else may use the map any more. */
extern void map_destroy (struct map *map);

/* The slot numbered NR (< nr_slots), or NULL if nothing near it was ever
 * touched: all its blocks are holes then.  Caller holds the request lock, and
 * the pointer is good no longer than that hold.
 */
extern struct slot *map_find (const struct map *map, uint64_t nr);

/* The same, but makes the nodes on the way.  NULL and ENOMEM if there is no
 * memory.  Caller holds the request lock.
 */
extern struct slot *map_touch (struct map *map, uint64_t nr);

/* The first slot number >= NR for which map_find may return a slot, or
 * nr_slots.  Skips whole subtrees that were never touched.  Caller holds the
 * request lock.
 */
extern uint64_t map_next (const struct map *map, uint64_t nr);

/* Both words of the slot as one consistent pair.  Needs no slot lock; the
 * caller holds the request lock.
 */
extern struct slot_pair slot_load (const struct slot *slot);

/* Change the slot to PAIR in the order that rule 1 of HACKING demands.  Caller
 * holds the slot lock and the request lock, and all bytes that this makes
 * visible are in the file.
 */
extern void slot_store (struct slot *slot, struct slot_pair pair);

#endif /* COW_MAP_H */
