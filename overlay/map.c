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
 * - An address node hangs below a slot of a leaf, is made by slot_prepare and stored by
 *   slot_store (release), both under the slot lock.  For all else it is a node like the
 *   others.
 *
 * - The two words of a slot, and the addresses in a node that belongs to the live map
 *   alone, are changed by slot_store only, whose caller holds the slot lock, so that there
 *   is one writer at a time.  Readers take no slot lock and use slot_load.
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

/* The addresses of the blocks of a slot.  Those of blocks that are not allocated mean
 * nothing.
 */
struct spread {
  struct node node;
  _Atomic uint32_t address[SLOT_BLOCKS];
};

struct inner {
  struct node node;
  _Atomic (void *) child[1 << INNER_BITS]; /* changes under lock */
  struct mutex lock;                       /* guards the setting of child */
};

/* All blocks of a whole leaf are zero, and none has an address. */
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
  map->dead = (struct dead_list) { .open = NULL };
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

/* Where the blocks of a slot lie is one of these (struct slot's where):
 *
 *   0           nowhere: none was ever allocated
 *   a pointer   to its address node, which is aligned, so bit 0 is clear
 *   a run       bit 0 is set.  Bits 1 to 33: the base, and 32 more, as block 0 would lie up
 *               to 31 in front of the log's first address.  Bits 34 to 63: the change
 *               count, which is another one each time a run is stored.
 */
#define RUN_BIAS SLOT_BLOCKS
#define COUNT_SHIFT 34
#define BASE_MASK ((UINT64_C (1) << 33) - 1)

_Static_assert(_Alignof(struct spread) > 1, "bit 0 tells runs from nodes");

static bool
is_run (uint64_t where)
{
  return where & 1;
}

static struct spread *
spread_of (uint64_t where)
{
  return is_run (where) ? NULL : (struct spread *) (uintptr_t) where;
}

/* BIASED is the base and RUN_BIAS. */
static uint64_t
run_word (uint64_t biased, uint64_t count)
{
  return 1 | biased << 1 | count << COUNT_SHIFT;
}

static uint64_t
biased_base (uint64_t where)
{
  return where >> 1 & BASE_MASK;
}

/* Free a leaf, or an inner node, and all below it. */
static void
free_tree (void *node, unsigned level)
{
  if (!node || node == &zero_leaf)
    return;
  if (level > 0) {
    struct inner *inner = node;

    for (unsigned i = 0; i < 1 << INNER_BITS; ++i)
      free_tree (atomic_load (&inner->child[i]), level - 1);
  }
  else {
    struct leaf *leaf = node;

    for (unsigned i = 0; i < LEAF_SLOTS; ++i)
      free (spread_of (atomic_load (&leaf->slots[i].where)));
  }
  free_node (node, level);
}

void
map_destroy (struct map *map)
{
  free_tree (atomic_load (&map->root), map->levels);
  dead_destroy (&map->dead);
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

/*----------------------------------------------------------------------
 * Slots
 */

/* A `where' that is found twice was there all the time between: no run is stored twice,
 * as it has a count, and a node that the slot has left does not come back to it, nor is its
 * memory used again before the caller lets go of the lock.  So both words were there at
 * once, when the state was looked at between those two looks.
 *
 * In terms of the stores (release) and loads (acquire): slot_store stores a state, then
 * `where', then a state.  Whoever finds a `where' finds the state that was stored before
 * it, or a later one, when he looks at that afterwards; and whoever finds a state that was
 * stored after a `where' finds that one, or a later one, and not the one before.
 */
struct slot_pair
slot_load (const struct slot *slot)
{
  struct slot_pair pair, again;

  again.state = atomic_load_explicit (&slot->state, memory_order_acquire);
  again.where = atomic_load_explicit (&slot->where, memory_order_acquire);
  do {
    pair = again;
    again.state = atomic_load_explicit (&slot->state, memory_order_acquire);
    again.where = atomic_load_explicit (&slot->where, memory_order_acquire);
  } while (pair.state != again.state || pair.where != again.where);
  return pair;
}

uint32_t
slot_address (struct slot_pair pair, unsigned block)
{
  if (is_run (pair.where))
    return (uint32_t) (biased_base (pair.where) + block - RUN_BIAS);

  /* The node was complete when `where' was stored, and each address that changed since was
   * stored before the state in which PAIR has it allocated (both release; slot_load
   * acquires).  So it is that one or a newer one.  That a newer one has its bytes too is
   * what the acquire here is for: they were in the file when it was stored (release).
   */
  return atomic_load_explicit (&spread_of (pair.where)->address[block],
                               memory_order_acquire);
}

unsigned
slot_in_row (struct slot_pair pair, unsigned first, unsigned count,
             uint32_t *address)
{
  unsigned in_row = 1;

  *address = slot_address (pair, first);
  if (is_run (pair.where))
    return count;
  while (in_row < count
         && slot_address (pair, first + in_row) == *address + in_row)
    in_row++;
  return in_row;
}

/* Without the slot lock, addresses may be newer than PAIR.  As long as the request lock is
 * held, a block that is not shared does not become shared: no address that a frozen map has
 * is given out.  So who looks at addresses again afterwards finds none that is shared.
 */
uint32_t
map_shared_blocks (const struct map *map, uint64_t nr, struct slot_pair pair)
{
  assert_guarded (map);

  const struct slot *slot
    = map->newest && pair.where ? map_find (&map->newest->map, nr) : NULL;
  const struct slot_pair frozen
    = slot ? slot_load (slot) : (struct slot_pair) { .where = 0 };
  uint32_t both
    = bitmap_allocated (pair.state) & bitmap_allocated (frozen.state);

  if (!both || frozen.where == pair.where)
    return both;
  if (is_run (frozen.where) && is_run (pair.where))
    return biased_base (frozen.where) == biased_base (pair.where) ? both : 0;
  for (uint32_t left = both; left; left &= left - 1) {
    const unsigned block = (unsigned) __builtin_ctz (left);

    if (slot_address (frozen, block) != slot_address (pair, block))
      both &= ~bitmap_mask (block, 1);
  }
  return both;
}

/* Where a block lies when the step is done. */
static uint32_t
address_after (const struct slot_step *step, unsigned block)
{
  return step->fresh >> block & 1 ? step->to[block]
                                  : slot_address (step->found, block);
}

/* Do all blocks lie in a row then?  Its base, and RUN_BIAS, in *BIASED. */
static bool
is_row_after (const struct slot_step *step, uint64_t *biased)
{
  uint32_t left = bitmap_allocated (step->state);
  unsigned block = (unsigned) __builtin_ctz (left);

  *biased = (uint64_t) address_after (step, block) + RUN_BIAS - block;
  while (left &= left - 1) {
    block = (unsigned) __builtin_ctz (left);
    if ((uint64_t) address_after (step, block) + RUN_BIAS - block != *biased)
      return false;
  }
  return true;
}

/* Blocks get their addresses in the slot's own node, if it has one; else in a run, if that
 * is possible, and if not, in a new node.  A slot that has a node does not become a run
 * again.
 */
int
slot_prepare (const struct map *map, struct slot_step *step)
{
  assert_guarded (map);

  const uint64_t found = step->found.where;
  struct spread *node = spread_of (found);
  uint64_t biased;

  step->where = found;
  if (!step->fresh || (node && !is_to_be_made (map, &node->node)))
    return 0;
  if (!node && is_row_after (step, &biased)) {
    if (!is_run (found) || biased_base (found) != biased)
      step->where = run_word (biased, (found >> COUNT_SHIFT) + 1);
    return 0;
  }

  node = calloc (1, sizeof *node);
  if (!node)
    return -1;
  /* Nobody else sees the node before slot_store stores the pointer to it (release). */
  node->node.generation = map->generation;
  for (uint32_t left = bitmap_allocated (step->state); left;
       left &= left - 1) {
    const unsigned block = (unsigned) __builtin_ctz (left);

    atomic_init (&node->address[block], address_after (step, block));
  }
  step->where = (uintptr_t) node;
  return 0;
}

void
slot_cancel (const struct slot_step *step)
{
  if (step->where != step->found.where)
    free (spread_of (step->where));
}

void
slot_store (struct slot *slot, const struct slot_step *step)
{
  /* Rule 1: bits that stop being allocated, then addresses, then bits that become
   * allocated.  Blocks of the last kind keep their old state until then: never does a block
   * look like a hole in between.
   *
   * Each store is a release, so whoever finds it (acquire) finds those before it too, and
   * the bytes.  A block that stays allocated and moves has its bytes at both addresses, of
   * before and of now, so that it does not matter which one is found with the same state.
   */
  if (step->fresh) {
    const uint64_t later
      = bitmap_allocated (step->state) & ~bitmap_allocated (step->found.state);
    const uint64_t both = later | later << 32;
    const uint64_t between
      = (step->state & ~both) | (step->found.state & both);

    atomic_store_explicit (&slot->state, between, memory_order_release);
    if (step->where != step->found.where)
      atomic_store_explicit (&slot->where, step->where, memory_order_release);
    else if (!is_run (step->where))
      for (uint32_t left = step->fresh; left; left &= left - 1) {
        const unsigned block = (unsigned) __builtin_ctz (left);

        atomic_store_explicit (&spread_of (step->where)->address[block],
                               step->to[block], memory_order_release);
      }
  }
  atomic_store_explicit (&slot->state, step->state, memory_order_release);
}

/*----------------------------------------------------------------------
 * Comparing
 */

uint32_t
slot_different_blocks (struct slot_pair one, struct slot_pair other)
{
  const uint64_t states = one.state ^ other.state;
  uint32_t different = bitmap_allocated (states) | bitmap_zero (states);
  uint32_t left
    = bitmap_allocated (one.state) & bitmap_allocated (other.state);

  if (one.where == other.where)
    return different;
  for (; left; left &= left - 1) {
    const unsigned block = (unsigned) __builtin_ctz (left);

    if (slot_address (one, block) != slot_address (other, block))
      different |= bitmap_mask (block, 1);
  }
  return different;
}

uint64_t
map_next_different (const struct map *one, const struct map *other,
                    uint64_t nr)
{
  while (nr < one->nr_slots) {
    void *a = atomic_load (&one->root), *b = atomic_load (&other->root);
    unsigned level = one->levels;

    for (; a != b && level > 0; --level) {
      const unsigned i = child_index (nr, level);

      a = a ? atomic_load (&((struct inner *) a)->child[i]) : NULL;
      b = b ? atomic_load (&((struct inner *) b)->child[i]) : NULL;
    }
    if (a != b)
      return nr;

    /* Go on behind the subtree that both have, or that none has. */
    nr = (nr | ((UINT64_C (1) << bits_below (level + 1)) - 1)) + 1;
  }
  return one->nr_slots;
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
  dead_swap (&frozen->map.dead, &map->dead);
  frozen->generation = map->generation++;
  frozen->older = map->newest;
  map->newest = frozen;
}

struct map *
map_next_newer (struct map *map, const struct frozen_map *frozen)
{
  assert_guarded (map);

  struct map *next = map;

  for (struct frozen_map *f = map->newest;
       f && f->generation > frozen->generation; f = f->older)
    next = &f->map;
  return next;
}

void
map_unlink (struct map *map, struct frozen_map *frozen)
{
  assert_guarded_exclusively (map);

  struct map *newer = map_next_newer (map, frozen);
  struct frozen_map **link = &map->newest;

  while (*link != frozen)
    link = &(*link)->older;
  *link = frozen->older;
  dead_swap (&newer->dead, &frozen->map.dead);

  frozen->newer_root = atomic_load (&newer->root);
  frozen->older_root
    = frozen->older ? atomic_load (&frozen->older->map.root) : NULL;
}

/* What the released map and its neighbours have at one place of the tree. */
struct trio {
  void *mine, *older, *newer;
};

static uint64_t
where_in (const struct leaf *leaf, unsigned i)
{
  return leaf
           ? atomic_load_explicit (&leaf->slots[i].where, memory_order_acquire)
           : 0;
}

/* Free the address nodes that are only in T.MINE, a leaf. */
static void
release_spread (struct trio t)
{
  for (unsigned i = 0; i < LEAF_SLOTS; ++i) {
    const uint64_t where = where_in (t.mine, i);

    if (where != where_in (t.older, i) && where != where_in (t.newer, i))
      free (spread_of (where));
  }
}

/* Free what is only in T.MINE. */
static void
release_tree (struct trio t, unsigned level)
{
  if (!t.mine || t.mine == t.older || t.mine == t.newer)
    return;

  if (level == 0)
    release_spread (t);
  else
    for (unsigned i = 0; i < 1 << INNER_BITS; ++i) {
      const struct inner *const inner[] = { t.mine, t.older, t.newer };
      void *child[] = { NULL, NULL, NULL };

      for (unsigned j = 0; j < 3; ++j)
        if (inner[j])
          child[j]
            = atomic_load_explicit (&inner[j]->child[i], memory_order_acquire);
      release_tree ((struct trio) { child[0], child[1], child[2] }, level - 1);
    }
  free_node (t.mine, level);
}

void
map_release (struct frozen_map *frozen)
{
  assert_none_held_from (RANK_SLOT);
  release_tree ((struct trio) { .mine = atomic_load (&frozen->map.root),
                                .older = frozen->older_root,
                                .newer = frozen->newer_root },
                frozen->map.levels);
  mutex_destroy (&frozen->map.lock);
}
