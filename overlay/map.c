/* SPDX-License-Identifier: BSD-3-Clause */

/* The map: a radix tree of slots (see map.h).
 *
 * Who may do what at the same time:
 *
 * - A node is added, or takes the place of one that a frozen map has, under the lock
 *   of the node above it; the pointer to it is looked at again after taking that
 *   lock, and stored (release) when the node is complete.  Whoever follows it
 *   (acquire) needs no lock and sees an initialized node.
 *
 * - A node of a generation that is not newer than the newest frozen map that is held
 *   belongs to frozen maps, perhaps to the live one as well.  It does not change.
 *   All other nodes, but for the next one, belong to the live map alone.  Which is
 *   which changes under the exclusive request lock only, so a request that has touched
 *   a node may change it as long as it holds the request lock.
 *
 * - All leaves that map_zero_leaf makes are one, which is constant and belongs to no
 *   map: it is copied before it is changed, and never freed.
 *
 * - The two words of a slot are changed by slot_store only, whose caller holds
 *   the slot lock, so that there is one writer at a time.  Readers take no slot
 *   lock and use slot_load.
 *
 * - A node is freed by map_release only, one at a time.  It is in neither neighbour
 *   of the released map, so nobody can come to it any more: not from older or newer
 *   frozen maps, and not from the live one, whose nodes come from its root at the
 *   time of the unlinking or are newer.  For the same reason the walk never looks at
 *   the live map's present root: a node below the noted one is in the live map
 *   still, or in a map that was frozen since, which cannot be released meanwhile.
 *
 * Knows nothing of files, of blocks' bytes, or of nbdkit.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "overlay/map.h"

#define LEAF_BITS 8
#define INNER_BITS 9

_Static_assert(LEAF_SLOTS == 1 << LEAF_BITS, "both say how large a leaf is");

/* What both kinds begin with. */
struct node {
  uint64_t generation; /* constant */
};

struct leaf {
  struct node node;
  struct slot slots[1 << LEAF_BITS];
};

struct inner {
  struct node node;
  _Atomic (void *) child[1 << INNER_BITS]; /* changes under lock */
  struct mutex lock;                       /* guards the setting of child */
};

/* All blocks of a whole leaf are zero, and none has a place. */
static const struct leaf zero_leaf = {
  .slots = { [0 ... LEAF_SLOTS - 1] = { .state = UINT64_MAX << 32 } },
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
  mutex_init (&map->lock, RANK_NODE);
  atomic_init (&map->root, NULL);
  map->generation = 1;
  map->newest = NULL;
  map->guard = NULL;
}

/* What is asked of all who look at a live map. */
static void
assert_guarded (const struct map *map)
{
  if (map->guard)
    assert_held (map->guard);
}

static void
assert_guarded_exclusively (const struct map *map)
{
  if (map->guard)
    assert_held_exclusively (map->guard);
}

static void
free_node (void *node, unsigned level)
{
  if (node == &zero_leaf)
    return;
  if (node && level > 0)
    mutex_destroy (&((struct inner *) node)->lock);
  free (node);
}

static void
free_tree (void *node, unsigned level)
{
  if (node && level > 0) {
    struct inner *inner = node;

    for (unsigned i = 0; i < 1 << INNER_BITS; ++i)
      free_tree (atomic_load (&inner->child[i]), level - 1);
  }
  free_node (node, level);
}

void
map_destroy (struct map *map)
{
  free_tree (atomic_load (&map->root), map->levels);
  mutex_destroy (&map->lock);
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

const struct slot *
map_find (const struct map *map, uint64_t nr)
{
  assert_guarded (map);

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
  assert_guarded (map);

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

/* A node for LEVEL with the content of OLD, which nobody changes, or if that is NULL
 * with none.  NULL and ENOMEM.
 */
static void *
new_node (const struct map *map, unsigned level, const void *old)
{
  const size_t size
    = level == 0 ? sizeof (struct leaf) : sizeof (struct inner);
  struct node *node = old ? malloc (size) : calloc (1, size);

  if (!node)
    return NULL;
  if (old)
    memcpy (node, old, size);
  node->generation = map->generation;
  if (level > 0)
    mutex_init (&((struct inner *) node)->lock, RANK_NODE);
  return node;
}

/* Is there no node, or one that does not belong to the live map alone? */
static bool
is_to_be_made (const struct map *map, const struct node *node)
{
  return !node || node == &zero_leaf.node
         || (map->newest && node->generation <= map->newest->generation);
}

/* The node that LINK points to; made or copied, for LEVEL, where it cannot be changed.
 * LOCK is the one that guards LINK.  NULL and ENOMEM if there is no memory.
 */
static void *
touch_node (const struct map *map, _Atomic (void *) *link, struct mutex *lock,
            unsigned level)
{
  void *node = atomic_load_explicit (link, memory_order_acquire);

  if (!is_to_be_made (map, node))
    return node;

  HOLD (lock);
  node = atomic_load_explicit (link, memory_order_relaxed);
  if (is_to_be_made (map, node)) {
    node = new_node (map, level, node);
    if (node)
      atomic_store_explicit (link, node, memory_order_release);
  }
  return node;
}

/* Where a node is pointed to. */
struct link {
  _Atomic (void *) *pointer; /* NULL: there was no memory */
  struct mutex *lock;        /* guards the setting of it */
};

/* The link to the leaf of slot NR, with all nodes above made or copied as touch_node
 * does.
 */
static struct link
touch_link (struct map *map, uint64_t nr)
{
  assert_guarded (map);

  struct link link = { .pointer = &map->root, .lock = &map->lock };

  for (unsigned level = map->levels; level > 0; --level) {
    struct inner *inner = touch_node (map, link.pointer, link.lock, level);

    if (!inner)
      return (struct link) { .pointer = NULL };
    link.pointer = &inner->child[child_index (nr, level)];
    link.lock = &inner->lock;
  }
  return link;
}

struct slot *
map_touch (struct map *map, uint64_t nr)
{
  const struct link link = touch_link (map, nr);
  struct leaf *leaf
    = link.pointer ? touch_node (map, link.pointer, link.lock, 0) : NULL;

  return leaf ? slot_in_leaf (leaf, nr) : NULL;
}

bool
map_ready_leaf (struct map *map, uint64_t nr)
{
  const struct slot *slot = map_find (map, nr);

  return (!slot || slot == zero_leaf.slots) && touch_link (map, nr).pointer;
}

void
map_zero_leaf (struct map *map, uint64_t nr)
{
  const struct link link = touch_link (map, nr); /* what is ready is there */

  HOLD (link.lock);
  atomic_store_explicit (link.pointer, (void *) &zero_leaf,
                         memory_order_release);
}

uint64_t
map_in_row (const struct map *map, uint64_t nr)
{
  const uint64_t leaf_end = (nr | (LEAF_SLOTS - 1)) + 1;

  return MIN (leaf_end, map->nr_slots) - nr;
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

/*----------------------------------------------------------------------
 * Frozen maps
 */

void
map_freeze (struct map *map, struct frozen_map *frozen)
{
  assert_guarded_exclusively (map);

  map_init (&frozen->map, map->nr_slots);
  atomic_init (&frozen->map.root, atomic_load (&map->root));
  frozen->generation = map->generation++;
  frozen->older = map->newest;
  map->newest = frozen;
}

bool
map_is_shared (const struct map *map, uint64_t nr, uint64_t place)
{
  assert_guarded (map);

  const struct slot *slot
    = map->newest && place ? map_find (&map->newest->map, nr) : NULL;

  return slot && slot_load (slot).place == place;
}

uint32_t
map_frozen_blocks (const struct map *map, uint64_t nr, uint64_t place)
{
  assert_guarded (map);

  uint32_t blocks = 0;

  /* Those that have the place follow one another: a slot that has left a place does
   * not come back to it as long as any map has it.
   */
  for (const struct frozen_map *f = map->newest; f; f = f->older) {
    const struct slot *slot = map_find (&f->map, nr);
    const struct slot_pair pair
      = slot ? slot_load (slot) : (struct slot_pair) { .place = 0 };

    if (pair.place != place)
      break;
    blocks |= bitmap_allocated (pair.state);
  }
  return blocks;
}

const struct map *
map_next_newer (const struct map *map, const struct frozen_map *frozen)
{
  assert_guarded (map);

  const struct map *next = map;

  for (const struct frozen_map *f = map->newest;
       f && f->generation > frozen->generation; f = f->older)
    next = &f->map;
  return next;
}

void
map_unlink (struct map *map, struct frozen_map *frozen)
{
  assert_guarded_exclusively (map);

  const struct map *newer = map_next_newer (map, frozen);
  struct frozen_map **link = &map->newest;

  while (*link != frozen)
    link = &(*link)->older;
  *link = frozen->older;

  frozen->newer_root = atomic_load (&newer->root);
  frozen->older_root
    = frozen->older ? atomic_load (&frozen->older->map.root) : NULL;
}

/* What the released map and its neighbours have at one place of the tree. */
struct trio {
  void *mine, *older, *newer;
};

static void
release_slots (struct trio t, uint64_t first,
               const struct map_release *release)
{
  for (unsigned i = 0; i < 1 << LEAF_BITS; ++i) {
    const struct slot_pair none = { .place = 0 };
    const struct slot_pair mine = slot_load (slot_in_leaf (t.mine, i));
    const struct slot_pair older
      = t.older ? slot_load (slot_in_leaf (t.older, i)) : none;
    const struct slot_pair newer
      = t.newer ? slot_load (slot_in_leaf (t.newer, i)) : none;

    if (mine.place == 0 || mine.place == older.place)
      continue;
    if (mine.place != newer.place)
      release->place_is_free (release->opaque, mine.place);
    else {
      const uint32_t blocks
        = bitmap_allocated (mine.state) & ~bitmap_allocated (newer.state);

      if (blocks)
        release->blocks_are_free (release->opaque, first + i, mine.place,
                                  blocks);
    }
  }
}

/* Free what is only in T.MINE, whose first slot is FIRST. */
static void
release_tree (struct trio t, unsigned level, uint64_t first,
              const struct map_release *release)
{
  if (!t.mine || t.mine == t.older || t.mine == t.newer)
    return;

  if (level == 0) {
    if (release)
      release_slots (t, first, release);
  }
  else
    for (unsigned i = 0; i < 1 << INNER_BITS; ++i) {
      const struct inner *const inner[] = { t.mine, t.older, t.newer };
      void *child[] = { NULL, NULL, NULL };

      for (unsigned j = 0; j < 3; ++j)
        if (inner[j])
          child[j]
            = atomic_load_explicit (&inner[j]->child[i], memory_order_acquire);
      release_tree ((struct trio) { child[0], child[1], child[2] }, level - 1,
                    first + ((uint64_t) i << bits_below (level)), release);
    }
  free_node (t.mine, level);
}

void
map_release (struct frozen_map *frozen, const struct map_release *release)
{
  assert_none_held_from (RANK_SLOT);
  release_tree ((struct trio) { .mine = atomic_load (&frozen->map.root),
                                .older = frozen->older_root,
                                .newer = frozen->newer_root },
                frozen->map.levels, 0, release);
  mutex_destroy (&frozen->map.lock);
}
