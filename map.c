/* SPDX-License-Identifier: BSD-3-Clause */

/* The map: a radix tree of slots (see map.h).
 *
 * Who may do what at the same time:
 *
 * - Nodes are only ever added while the overlay lives.  A pointer to a node is
 *   stored (release) after the node is all zero bytes, under the lock of the
 *   node above it, and looked at again after taking that lock.  Whoever follows
 *   it (acquire) needs no lock and sees an initialized node.
 *
 * - The two words of a slot are changed by slot_store only, whose caller holds
 *   the slot lock, so that there is one writer at a time.  Readers take no slot
 *   lock and use slot_load.
 *
 * Knows nothing of files, of blocks' bytes, or of nbdkit.
 */

#include <config.h>

#include <stdlib.h>

#include "bitmap.h"
#include "cleanup.h"
#include "map.h"

#define LEAF_BITS 8
#define INNER_BITS 9

struct leaf {
  struct slot slots[1 << LEAF_BITS];
};

struct inner {
  _Atomic (void *) child[1 << INNER_BITS]; /* set once, under lock */
  pthread_mutex_t lock;                    /* guards the setting of child */
};

/* The number of bits of a slot number below an inner node that stands LEVEL
 * levels above the leaves (1 is right above them).
 */
static unsigned
bits_below (unsigned level)
{
  return LEAF_BITS + INNER_BITS * (level - 1);
}

void
map_init (struct map *map, uint64_t nr_slots)
{
  map->nr_slots = nr_slots;
  map->levels = 0;
  while (nr_slots > UINT64_C (1) << (LEAF_BITS + INNER_BITS * map->levels))
    map->levels++;
  pthread_mutex_init (&map->lock, NULL);
  atomic_init (&map->root, NULL);
}

static void
free_node (void *node, unsigned level)
{
  if (node && level > 0) {
    struct inner *inner = node;

    for (unsigned i = 0; i < 1 << INNER_BITS; ++i)
      free_node (atomic_load (&inner->child[i]), level - 1);
    pthread_mutex_destroy (&inner->lock);
  }
  free (node);
}

void
map_destroy (struct map *map)
{
  free_node (atomic_load (&map->root), map->levels);
  pthread_mutex_destroy (&map->lock);
}

/* Which child of an inner node at LEVEL leads to slot NR. */
static unsigned
child_index (uint64_t nr, unsigned level)
{
  return nr >> bits_below (level) & ((1 << INNER_BITS) - 1);
}

static struct slot *
slot_in_leaf (struct leaf *leaf, uint64_t nr)
{
  return &leaf->slots[nr & ((1 << LEAF_BITS) - 1)];
}

struct slot *
map_find (const struct map *map, uint64_t nr)
{
  void *node = atomic_load_explicit (&map->root, memory_order_acquire);

  for (unsigned level = map->levels; node && level > 0; --level) {
    struct inner *inner = node;

    node = atomic_load_explicit (&inner->child[child_index (nr, level)],
                                 memory_order_acquire);
  }
  return node ? slot_in_leaf (node, nr) : NULL;
}

uint64_t
map_next (const struct map *map, uint64_t nr)
{
  while (nr < map->nr_slots) {
    void *node = atomic_load_explicit (&map->root, memory_order_acquire);
    unsigned level = map->levels;

    if (!node)
      break;
    while (level > 0) {
      struct inner *inner = node;

      node = atomic_load_explicit (&inner->child[child_index (nr, level)],
                                   memory_order_acquire);
      if (!node)
        break;
      level--;
    }
    if (node)
      return nr;

    /* Go on behind the subtree that is not there. */
    nr = (nr | ((UINT64_C (1) << bits_below (level)) - 1)) + 1;
  }
  return map->nr_slots;
}

static void *
new_node (unsigned level)
{
  if (level == 0)
    return calloc (1, sizeof (struct leaf));

  struct inner *inner = calloc (1, sizeof *inner);
  if (inner)
    pthread_mutex_init (&inner->lock, NULL);
  return inner;
}

/* The node that LINK points to; made, for LEVEL, if there is none.  LOCK is
 * the one that guards LINK.  NULL and ENOMEM if there is no memory.
 */
static void *
touch_node (_Atomic (void *) *link, pthread_mutex_t *lock, unsigned level)
{
  void *node = atomic_load_explicit (link, memory_order_acquire);

  if (node)
    return node;

  LOCK_FOR_SCOPE (lock);
  node = atomic_load_explicit (link, memory_order_relaxed);
  if (!node) {
    node = new_node (level);
    atomic_store_explicit (link, node, memory_order_release);
  }
  return node;
}

struct slot *
map_touch (struct map *map, uint64_t nr)
{
  void *node = touch_node (&map->root, &map->lock, map->levels);

  for (unsigned level = map->levels; node && level > 0; --level) {
    struct inner *inner = node;

    node = touch_node (&inner->child[child_index (nr, level)], &inner->lock,
                       level - 1);
  }
  return node ? slot_in_leaf (node, nr) : NULL;
}

struct slot_pair
slot_load (const struct slot *slot)
{
  struct slot_pair pair, again;

  again.state = atomic_load_explicit (&slot->state, memory_order_acquire);
  again.place = atomic_load_explicit (&slot->place, memory_order_acquire);
  do {
    pair = again;
    again.state = atomic_load_explicit (&slot->state, memory_order_acquire);
    again.place = atomic_load_explicit (&slot->place, memory_order_acquire);
  } while (pair.state != again.state || pair.place != again.place);
  return pair;
}

void
slot_store (struct slot *slot, struct slot_pair pair)
{
  const uint64_t old_state
    = atomic_load_explicit (&slot->state, memory_order_relaxed);
  const uint64_t old_place
    = atomic_load_explicit (&slot->place, memory_order_relaxed);

  /* Rule 1: bits that stop being allocated, then the place, then bits that
   * become allocated.  Blocks of the last kind keep their old state until
   * then: never does a block look like a hole in between.
   */
  if (pair.place != old_place) {
    const uint64_t later
      = bitmap_allocated (pair.state) & ~bitmap_allocated (old_state);
    const uint64_t both = later | later << 32;
    const uint64_t between = (pair.state & ~both) | (old_state & both);

    atomic_store_explicit (&slot->state, between, memory_order_release);
    atomic_store_explicit (&slot->place, pair.place, memory_order_release);
  }
  atomic_store_explicit (&slot->state, pair.state, memory_order_release);
}
