/* SPDX-License-Identifier: BSD-3-Clause */

/* The map without a server: lookups, growth, runs and address nodes, the order of stores,
 * threads, frozen maps, their dead lists and their release.
 */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bitmap.h"
#include "common/lock.h"
#include "overlay/dead.h"
#include "overlay/map.h"

/* Linked with --wrap=calloc, --wrap=malloc, --wrap=free. */
extern void *__real_calloc (size_t n, size_t size);
extern void *__wrap_calloc (size_t n, size_t size);
extern void *__real_malloc (size_t size);
extern void *__wrap_malloc (size_t size);
extern void __real_free (void *pointer);
extern void __wrap_free (void *pointer);
static int failing_alloc;     /* fail the n-th from now on, 1 is the next */
static atomic_long nr_allocs; /* that were not freed */

static bool
alloc_fails (void)
{
  if (failing_alloc > 0 && --failing_alloc == 0) {
    errno = ENOMEM;
    return true;
  }
  nr_allocs++;
  return false;
}

void *
__wrap_calloc (size_t n, size_t size)
{
  return alloc_fails () ? NULL : __real_calloc (n, size);
}

void *
__wrap_malloc (size_t size)
{
  return alloc_fails () ? NULL : __real_malloc (size);
}

void
__wrap_free (void *pointer)
{
  if (pointer)
    nr_allocs--;
  __real_free (pointer);
}

/*----------------------------------------------------------------------
 * Slots
 */

/* Give the FRESH blocks of a slot the addresses in TO, and the slot a new state, as a
 * request does.
 */
static void
step_slot (struct map *map, uint64_t nr, uint64_t new_state, uint32_t fresh,
           const uint32_t *to)
{
  struct slot *slot = map_touch (map, nr);

  assert_non_null (slot);
  struct slot_step step = {
    .found = slot_load (slot), .state = new_state, .fresh = fresh, .to = to
  };

  assert_int_equal (slot_prepare (map, &step), 0);
  slot_store (slot, &step);

  const struct slot_pair pair = slot_load (slot);

  assert_true (pair.state == new_state && pair.where == step.where);
}

/* The slot gets a new state, in which block 0 lies at BASE, and the others behind it. */
static void
set_slot (struct map *map, uint64_t nr, uint32_t base, uint64_t new_state)
{
  uint32_t to[SLOT_BLOCKS];

  for (uint32_t i = 0; i < SLOT_BLOCKS; ++i)
    to[i] = base + i;
  step_slot (map, nr, new_state, bitmap_allocated (new_state), to);
}

static struct slot_pair
pair_in (const struct map *map, uint64_t nr)
{
  const struct slot *slot = map_find (map, nr);

  return slot ? slot_load (slot) : (struct slot_pair) { .where = 0 };
}

/* Where a block lies; 0: it is not allocated. */
static uint32_t
address_in (const struct map *map, uint64_t nr, unsigned block)
{
  const struct slot_pair pair = pair_in (map, nr);

  return bitmap_state (pair.state, block) == BLOCK_ALLOCATED
           ? slot_address (pair, block)
           : 0;
}

/* A node's address is even. */
static bool
is_spread (struct slot_pair pair)
{
  return pair.where && pair.where % 2 == 0;
}

static unsigned seed;

static unsigned
below (unsigned n)
{
  return (unsigned) rand_r (&seed) / 7 % n;
}

static const uint64_t sizes[] = {
  1,
  2,
  255,
  256,
  257,
  256 * 512,
  256 * 512 + 1,
  UINT64_C (1) << 23,
  UINT64_C (1) << 46, /* 8 EiB in slots of 128 KiB */
};

#define NR_SIZES (sizeof sizes / sizeof sizes[0])

static void
untouched_is_not_there (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_SIZES; ++i) {
    struct map map;

    map_init (&map, sizes[i]);
    assert_null (map_find (&map, 0));
    assert_null (map_find (&map, sizes[i] - 1));
    assert_true (map_next (&map, 0) == sizes[i]);
    assert_true (map_next (&map, sizes[i] - 1) == sizes[i]);
    map_destroy (&map);
  }
}

static void
touched_is_found_again (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_SIZES; ++i) {
    const uint64_t n = sizes[i];
    const uint64_t nrs[] = { 0, n / 3, n / 2, n - 1 };
    struct map map;

    map_init (&map, n);
    for (unsigned j = 0; j < 4; ++j) {
      struct slot *slot = map_touch (&map, nrs[j]);

      assert_non_null (slot);
      assert_ptr_equal (map_touch (&map, nrs[j]), slot);
      set_slot (&map, nrs[j], (uint32_t) nrs[j] + 1, 1);
    }
    for (unsigned j = 0; j < 4; ++j) {
      const struct slot_pair pair = slot_load (map_find (&map, nrs[j]));

      assert_int_equal (slot_address (pair, 0), (uint32_t) nrs[j] + 1);
      assert_true (pair.state == 1);
    }
    map_destroy (&map);
  }
}

/* A size of 0, as a disk of 0 bytes has. */
static void
no_slots (void **state)
{
  struct map map;

  (void) state;
  map_init (&map, 0);
  assert_true (map_next (&map, 0) == 0);
  map_destroy (&map);
}

/* map_next finds each leaf that is there, and in few steps. */
static void
next_skips_what_is_not_there (void **state)
{
  const uint64_t n = UINT64_C (1) << 46;
  const uint64_t leaf = UINT64_C (12345678901);
  struct map map;

  (void) state;
  map_init (&map, n);
  assert_non_null (map_touch (&map, leaf * 256 + 7));
  assert_true (map_next (&map, 0) == leaf * 256);
  assert_true (map_next (&map, leaf * 256 + 9) == leaf * 256 + 9);
  assert_true (map_next (&map, leaf * 256 + 255) == leaf * 256 + 255);
  assert_true (map_next (&map, (leaf + 1) * 256) == n);
  map_destroy (&map);
}

/* As many slots as map_in_row says are where it says, and no more: walking over the
 * map by rows comes to each slot, and takes as few steps as there are leaves.
 */
static void
slots_in_a_row (void **state)
{
  const uint64_t n = 3 * 256 + 5;
  uint64_t rows = 0;
  struct map map;

  (void) state;
  map_init (&map, n);
  for (uint64_t nr = 0; nr < n; ++rows) {
    struct slot *slot = map_touch (&map, nr);
    const uint64_t in_row = map_in_row (&map, nr);

    assert_in_range (in_row, 1, n - nr);
    for (uint64_t i = 0; i < in_row; ++i)
      assert_ptr_equal (map_touch (&map, nr + i), slot + i);
    nr += in_row;
  }
  assert_int_equal (rows, 4);
  assert_int_equal (map_in_row (&map, 255), 1);
  assert_int_equal (map_in_row (&map, n - 2), 2);
  map_destroy (&map);
}

/* Release FROZEN, with nothing in its dead list or its neighbour's. */
static void
unlink_and_release (struct map *map, struct frozen_map *frozen)
{
  map_unlink (map, frozen);
  map_release (frozen);
  dead_destroy (&frozen->map.dead);
}

/* A leaf becomes zero without memory of its own, as often as one likes, until one of its
 * slots is touched, with or without frozen maps.
 */
static void
whole_leaves_become_zero (void **state)
{
  const struct slot_pair zero = { .state = bitmap_set_zero (0, UINT32_MAX) };

  (void) state;
  for (unsigned with_frozen = 0; with_frozen < 2; ++with_frozen)
    for (unsigned i = 3; i < NR_SIZES; ++i) {
      const uint64_t n = sizes[i];
      const uint64_t first = (n / LEAF_SLOTS - 1) * LEAF_SLOTS;
      const uint64_t last = first + LEAF_SLOTS - 1;
      struct frozen_map before, after;
      struct map map;

      nr_allocs = 0;
      map_init (&map, n);
      if (with_frozen)
        map_freeze (&map, &before);
      assert_true (map_ready_leaf (&map, first));
      assert_null (map_find (&map, first));
      assert_int_equal (nr_allocs, map.levels);
      map_zero_leaf (&map, first);
      assert_true (map_ready_leaf (&map, first));
      map_zero_leaf (&map, first);
      assert_int_equal (nr_allocs, map.levels);
      assert_true (map_next (&map, 0) == first);
      for (uint64_t nr = first; nr <= last; ++nr) {
        const struct slot_pair pair = slot_load (map_find (&map, nr));

        assert_true (pair.where == 0 && pair.state == zero.state);
      }
      if (with_frozen)
        map_freeze (&map, &after);

      /* In a leaf of its own, in which the others stay zero. */
      struct slot *slot = map_touch (&map, last);
      assert_true (slot_load (slot).state == zero.state);
      set_slot (&map, last, 7, 1);
      assert_ptr_equal (map_touch (&map, last), slot);
      assert_true (slot_load (map_find (&map, first)).state == zero.state);
      assert_false (map_ready_leaf (&map, first));

      if (with_frozen) {
        assert_null (map_find (&before.map, first));
        assert_true (slot_load (map_find (&after.map, last)).state
                     == zero.state);
        unlink_and_release (&map, &after);
        unlink_and_release (&map, &before);
      }
      assert_int_equal (nr_allocs, map.levels + 1);
      assert_true (address_in (&map, last, 0) == 7);
      map_destroy (&map);
      assert_int_equal (nr_allocs, 0);
    }
}

static void
no_memory_for_whole_leaves (void **state)
{
  struct frozen_map frozen;
  struct map map;

  (void) state;
  nr_allocs = 0;
  map_init (&map, UINT64_C (1) << 35);
  for (int n = 1; n <= 3; ++n) {
    failing_alloc = n;
    assert_false (map_ready_leaf (&map, 0));
    assert_int_equal (failing_alloc, 0);
    assert_null (map_find (&map, 0));
    map_destroy (&map);
    map_init (&map, UINT64_C (1) << 35);
  }

  /* Also where only the nodes above are to be copied. */
  assert_true (map_ready_leaf (&map, 0));
  map_zero_leaf (&map, 0);
  map_freeze (&map, &frozen);
  failing_alloc = 2;
  assert_false (map_ready_leaf (&map, 0));
  assert_true (map_ready_leaf (&map, 0));
  failing_alloc = 1;
  map_zero_leaf (&map, 0);
  assert_int_equal (failing_alloc, 1);
  failing_alloc = 0;
  unlink_and_release (&map, &frozen);
  map_destroy (&map);
  assert_int_equal (nr_allocs, 0);
}

static void
out_of_memory_changes_nothing (void **state)
{
  (void) state;
  for (int n = 1;; ++n) {
    struct map map;

    map_init (&map, UINT64_C (1) << 46);
    failing_alloc = n;
    struct slot *slot = map_touch (&map, 4711);
    const bool failed = !slot;

    failing_alloc = 0;
    if (failed) {
      assert_null (map_find (&map, 4711));
      slot = map_touch (&map, 4711);
      assert_non_null (slot);
    }
    assert_ptr_equal (map_find (&map, 4711), slot);
    map_destroy (&map);
    if (!failed) {
      assert_true (n > 4);
      break;
    }
  }
}

/*----------------------------------------------------------------------
 * Runs and address nodes
 */

/* What is written in order, in pieces, lies in a row, and the word for that is stored once
 * only.  Zeroes change nothing of it.
 */
static void
what_is_in_order_is_a_run (void **state)
{
  const uint64_t all = bitmap_set_allocated (0, UINT32_MAX);
  uint32_t to[SLOT_BLOCKS], address = 0;
  uint64_t word = 0, where = 0;
  struct map map;

  (void) state;
  nr_allocs = 0;
  map_init (&map, 1);
  for (uint32_t i = 0; i < SLOT_BLOCKS; ++i)
    to[i] = 1000 + i;
  for (unsigned i = 0; i < SLOT_BLOCKS; i += 4) {
    word = bitmap_set_allocated (word, bitmap_mask (i, 4));
    step_slot (&map, 0, word, bitmap_mask (i, 4), to);
    if (i == 0)
      where = pair_in (&map, 0).where;
    assert_true (pair_in (&map, 0).where == where);
  }
  assert_true (word == all && !is_spread (pair_in (&map, 0)));
  for (unsigned i = 0; i < SLOT_BLOCKS; ++i)
    assert_int_equal (slot_address (pair_in (&map, 0), i), 1000 + i);
  assert_int_equal (slot_in_row (pair_in (&map, 0), 3, 29, &address), 29);
  assert_int_equal (address, 1003);

  step_slot (&map, 0, bitmap_set_zero (all, 0xff00), 0, NULL);
  assert_true (pair_in (&map, 0).where == where);
  step_slot (&map, 0, all, 0xff00, to);
  assert_true (pair_in (&map, 0).where == where);
  assert_int_equal (nr_allocs, 1);
  map_destroy (&map);
  assert_int_equal (nr_allocs, 0);
}

/* A run that moves gets a word that the slot never had, also where it comes back: at 50,
 * and in front of the log's first address.
 */
static void
moved_runs_have_other_words (void **state)
{
  uint64_t words[40];
  struct map map;

  (void) state;
  map_init (&map, 1);
  for (unsigned i = 0; i < 40; ++i) {
    /* By turns with some that stay allocated, and after none was left. */
    if (i % 4 == 3)
      step_slot (&map, 0, bitmap_set_zero (0, 0x1c), 0, NULL);
    set_slot (&map, 0, i % 2 ? 50 : UINT32_MAX, i % 3 ? 0xc : 0x18);
    words[i] = pair_in (&map, 0).where;
    assert_int_equal (address_in (&map, 0, 3), i % 2 ? 53 : 2);
    for (unsigned j = 0; j < i; ++j)
      assert_true (words[i] != words[j]);
    assert_false (is_spread (pair_in (&map, 0)));
  }
  map_destroy (&map);
}

/* The first and the last addresses that there are, whichever block has them. */
static void
bases_at_both_ends (void **state)
{
  const uint32_t ends[] = { 1, 2, 31, 32, UINT32_MAX - 31, UINT32_MAX };

  (void) state;
  for (unsigned i = 0; i < sizeof ends / sizeof ends[0]; ++i)
    for (unsigned block = 0; block < SLOT_BLOCKS; ++block) {
      uint32_t to[SLOT_BLOCKS] = { 0 };
      struct map map;

      nr_allocs = 0;
      map_init (&map, 1);
      set_slot (&map, 0, ends[i] - block, UINT64_C (1) << block);
      assert_true (address_in (&map, 0, block) == ends[i]);
      if (block > 0 && ends[i] > 1) {
        const uint64_t where = pair_in (&map, 0).where;

        set_slot (&map, 0, ends[i] - block, UINT64_C (3) << (block - 1));
        assert_true (pair_in (&map, 0).where == where);
        assert_true (address_in (&map, 0, block - 1) == ends[i] - 1);
        assert_true (address_in (&map, 0, block) == ends[i]);
      }
      assert_int_equal (nr_allocs, 1);

      /* What would follow the last address, or come before the first, does not. */
      const unsigned other = block < 31 ? 31 : 0;
      to[other] = ends[i] + (other - block);
      if (block < 31 && ends[i] > UINT32_MAX - (31 - block)) {
        step_slot (&map, 0, UINT64_C (1) << block | UINT64_C (1) << 31,
                   UINT32_C (1) << 31, to);
        assert_true (is_spread (pair_in (&map, 0)));
        assert_true (address_in (&map, 0, 31) == to[31]);
        assert_true (address_in (&map, 0, block) == ends[i]);
      }
      map_destroy (&map);
      assert_int_equal (nr_allocs, 0);
    }
}

/* Blocks in any order: a node, which stays, also when they lie in a row again. */
static void
what_is_not_in_order_is_spread (void **state)
{
  const uint64_t all = bitmap_set_allocated (0, UINT32_MAX);
  uint32_t to[SLOT_BLOCKS], address = 0;
  struct map map;

  (void) state;
  nr_allocs = 0;
  map_init (&map, 1);
  set_slot (&map, 0, 1000, all);
  for (uint32_t i = 0; i < SLOT_BLOCKS; ++i)
    to[i] = 2000 + (i < 16 ? i : 3 * i);

  /* Some blocks leave the run. */
  step_slot (&map, 0, all, 0x00ff00f0, to);
  assert_true (is_spread (pair_in (&map, 0)));
  assert_int_equal (nr_allocs, 2);
  const struct slot_pair first = pair_in (&map, 0);
  for (unsigned i = 0; i < SLOT_BLOCKS; ++i)
    assert_int_equal (slot_address (first, i),
                      0x00ff00f0 >> i & 1 ? to[i] : 1000 + i);
  assert_int_equal (slot_in_row (first, 0, 32, &address), 4);
  assert_int_equal (address, 1000);
  assert_int_equal (slot_in_row (first, 5, 27, &address), 3);
  assert_int_equal (address, 2005);
  assert_int_equal (slot_in_row (first, 5, 2, &address), 2);
  assert_int_equal (slot_in_row (first, 16, 16, &address), 1);
  assert_int_equal (slot_in_row (first, 31, 1, &address), 1);
  assert_int_equal (address, 1031);

  /* In its own node. */
  step_slot (&map, 0, bitmap_set_zero (all, 0xf0), 0x80000001, to);
  assert_int_equal (address_in (&map, 0, 0), 2000);
  assert_int_equal (address_in (&map, 0, 1), 1001);
  assert_int_equal (address_in (&map, 0, 4), 0);
  assert_int_equal (address_in (&map, 0, 31), to[31]);
  set_slot (&map, 0, 5000, all);
  assert_true (pair_in (&map, 0).where == first.where);
  assert_int_equal (slot_in_row (pair_in (&map, 0), 0, 32, &address), 32);
  assert_int_equal (address, 5000);
  step_slot (&map, 0, bitmap_set_zero (0, UINT32_MAX), 0, NULL);
  set_slot (&map, 0, 6000, 1);
  assert_true (pair_in (&map, 0).where == first.where);
  assert_int_equal (address_in (&map, 0, 0), 6000);
  assert_int_equal (nr_allocs, 2);
  map_destroy (&map);
  assert_int_equal (nr_allocs, 0);
}

/* A node that a frozen map has is copied, once, and so only if addresses change. */
static void
address_nodes_are_copied_once_for_each_freeze (void **state)
{
  const uint32_t to[SLOT_BLOCKS] = { 10, 20, 30, 40, 50 };
  struct frozen_map frozen[3];
  struct map map;

  (void) state;
  nr_allocs = 0;
  map_init (&map, 1);
  step_slot (&map, 0, 3, 3, to);
  assert_int_equal (nr_allocs, 2);
  map_freeze (&map, &frozen[0]);
  step_slot (&map, 0, bitmap_set_zero (3, 1), 0, NULL);
  assert_int_equal (nr_allocs, 3); /* the leaf */
  assert_true (pair_in (&map, 0).where == pair_in (&frozen[0].map, 0).where);

  step_slot (&map, 0, bitmap_set_zero (2, 1) | 4, 4, to);
  assert_int_equal (nr_allocs, 4);
  assert_true (pair_in (&map, 0).where != pair_in (&frozen[0].map, 0).where);
  set_slot (&map, 0, 77, 0x17);
  assert_int_equal (nr_allocs, 4);
  assert_int_equal (address_in (&frozen[0].map, 0, 0), 10);
  assert_int_equal (address_in (&frozen[0].map, 0, 1), 20);
  assert_int_equal (address_in (&map, 0, 4), 81);

  /* Two at once have the same one; a leaf is copied without it. */
  map_freeze (&map, &frozen[1]);
  map_freeze (&map, &frozen[2]);
  assert_non_null (map_touch (&map, 0));
  assert_int_equal (nr_allocs, 5);
  unlink_and_release (&map, &frozen[1]);
  assert_int_equal (nr_allocs, 5);
  unlink_and_release (&map, &frozen[0]);
  assert_int_equal (nr_allocs, 3);
  unlink_and_release (&map, &frozen[2]);
  assert_int_equal (nr_allocs, 2);
  assert_int_equal (address_in (&map, 0, 4), 81);

  /* It is the live map's alone now. */
  step_slot (&map, 0, 0x17, 0x10, to);
  assert_int_equal (nr_allocs, 2);
  assert_int_equal (address_in (&map, 0, 4), 50);
  map_destroy (&map);
  assert_int_equal (nr_allocs, 0);
}

/* Three slots of which a node is to be made: a new one, one that is a run, and one whose
 * node a frozen map has.
 */
static const uint32_t steps_to[SLOT_BLOCKS] = { 10, 20, 30, 40, 50 };
static const struct {
  uint64_t run, spread;  /* blocks allocated before; runs begin at 100 */
  uint32_t fresh;        /* of blocks 1 to 4, which are allocated then */
  uint32_t frozen_block; /* where block 1 lies before */
} node_steps[] = {
  { 0, 0, 0x1e, 0 },
  { 3, 0, 0x1c, 101 },
  { 0, 3, 0x1e, 20 },
};

/* Where there is no memory for the node, nothing is changed; and no more is what is not
 * stored after all.
 */
static void
no_node_no_change (void **state)
{
  (void) state;
  for (unsigned i = 0; i < 3; ++i) {
    struct frozen_map frozen;
    struct map map;

    nr_allocs = 0;
    map_init (&map, 1);
    if (node_steps[i].run)
      set_slot (&map, 0, 100, node_steps[i].run);
    if (node_steps[i].spread)
      step_slot (&map, 0, node_steps[i].spread,
                 (uint32_t) node_steps[i].spread, steps_to);
    map_freeze (&map, &frozen);

    const struct slot *slot = map_touch (&map, 0);
    const struct slot_pair found = slot_load (slot);
    const long before = nr_allocs;
    struct slot_step step = { .found = found,
                              .state = 0x1e,
                              .fresh = node_steps[i].fresh,
                              .to = steps_to };

    failing_alloc = 1;
    errno = 0;
    assert_int_equal (slot_prepare (&map, &step), -1);
    assert_int_equal (errno, ENOMEM);
    assert_int_equal (failing_alloc, 0);
    assert_int_equal (nr_allocs, before);
    assert_int_equal (slot_prepare (&map, &step), 0);
    assert_int_equal (nr_allocs, before + 1);
    slot_cancel (&step);
    assert_int_equal (nr_allocs, before);
    assert_true (slot_load (slot).state == found.state);
    assert_true (slot_load (slot).where == found.where);
    assert_int_equal (address_in (&map, 0, 1), node_steps[i].frozen_block);
    unlink_and_release (&map, &frozen);
    map_destroy (&map);
    assert_int_equal (nr_allocs, 0);
  }
}

/* Memory is for a new node only. */
static void
other_steps_need_no_memory (void **state)
{
  (void) state;
  for (unsigned i = 0; i < 3; ++i) {
    struct slot_step step = { .state = 8, .fresh = 8, .to = steps_to };
    struct frozen_map frozen;
    struct map map;

    nr_allocs = 0;
    map_init (&map, 1);
    map_freeze (&map, &frozen);
    if (node_steps[i].run)
      set_slot (&map, 0, 100, node_steps[i].run);
    if (node_steps[i].spread)
      step_slot (&map, 0, node_steps[i].spread,
                 (uint32_t) node_steps[i].spread, steps_to);

    struct slot *slot = map_touch (&map, 0);

    /* A run, or in the own node; and no addresses at all. */
    failing_alloc = 1;
    for (unsigned j = 0; j < 2; ++j) {
      step.found = slot_load (slot);
      assert_int_equal (slot_prepare (&map, &step), 0);
      slot_cancel (&step);
      assert_int_equal (slot_prepare (&map, &step), 0);
      slot_store (slot, &step);
      assert_int_equal (address_in (&map, 0, 3), j == 0 ? 40 : 0);
      step = (struct slot_step) { .state = bitmap_set_zero (0, 8) };
    }
    assert_int_equal (failing_alloc, 1);
    failing_alloc = 0;
    unlink_and_release (&map, &frozen);
    map_destroy (&map);
    assert_int_equal (nr_allocs, 0);
  }
}

/*----------------------------------------------------------------------
 * Threads
 */

/* Rule 1: while a run moves, nobody sees a bit that is allocated with the base it was
 * not allocated at, and no zero block looks like a hole.  Block 0 is allocated at odd
 * bases only, block 1 at even ones; block 2 is never a hole.
 */
#define MOVES 200000

static void *
mover (void *arg)
{
  struct map *map = arg;
  struct slot *slot = map_touch (map, 0);

  for (uint32_t i = 3; i <= MOVES; ++i) {
    const uint64_t word = bitmap_set_allocated (0, i % 2 ? 1 : 2);
    const uint32_t to[SLOT_BLOCKS] = { i, i + 1, i + 2 };
    struct slot_step step = { .found = slot_load (slot), .to = to };

    step.state
      = i % 3 ? bitmap_set_zero (word, 4) : bitmap_set_allocated (word, 4);
    step.fresh = bitmap_allocated (step.state);
    if (slot_prepare (map, &step) == 0)
      slot_store (slot, &step);
  }
  return NULL;
}

static void
readers_see_consistent_pairs (void **state)
{
  struct map map;
  pthread_t thread;

  (void) state;
  map_init (&map, 1);
  set_slot (&map, 0, 2, 2 | 4);
  const struct slot *slot = map_find (&map, 0);

  assert_int_equal (pthread_create (&thread, NULL, mover, &map), 0);
  for (;;) {
    const struct slot_pair pair = slot_load (slot);

    if (bitmap_state (pair.state, 0) == BLOCK_ALLOCATED)
      assert_int_equal (slot_address (pair, 0) % 2, 1);
    if (bitmap_state (pair.state, 1) == BLOCK_ALLOCATED)
      assert_int_equal (slot_address (pair, 1) % 2, 1);
    assert_int_not_equal (bitmap_state (pair.state, 2), BLOCK_HOLE);
    if (slot_address (pair, 0) == MOVES)
      break;
  }
  pthread_join (thread, NULL);
  map_destroy (&map);
}

/* Slots whose blocks get fresh addresses and become zero, in a map that is frozen now and
 * then, so that there are runs, nodes, and copies of nodes.  What a reader finds of a
 * block is that block's, and not older than what was there before it looked.
 */
#define WRITES 60000
#define WRITES_TO_SLOT 500
#define DISK_SLOTS (WRITES / WRITES_TO_SLOT + 1)
#define WRITTEN 6 /* blocks of a slot */

static struct {
  struct rwlock request_lock;
  struct map map;
  /* What is written at an address.  These are no atomic stores: that who finds an
   * address finds its bytes too is up to the map.
   */
  struct {
    uint64_t nr;
    unsigned block;
    uint64_t version;
  } file[WRITES * WRITTEN + 1];
  uint32_t next_address;
  struct {
    _Atomic uint64_t zero; /* version of the last zero that was begun */
    _Atomic uint64_t done; /* twice the last version that is done; and 1 if it
                            * is a zero */
  } blocks[DISK_SLOTS][WRITTEN];
  _Atomic uint64_t version;
} disk;

/* Put what is written to BLOCKS of slot NR where it gets its addresses, TO. */
static void
write_disk (uint64_t version, uint32_t blocks, uint32_t *to)
{
  for (unsigned i = 0; i < WRITTEN; ++i)
    if (blocks >> i & 1) {
      to[i] = disk.next_address++;
      disk.file[to[i]].nr = version / WRITES_TO_SLOT;
      disk.file[to[i]].block = i;
      disk.file[to[i]].version = version;
    }
}

static void
change_disk (uint64_t version)
{
  const uint64_t nr = version / WRITES_TO_SLOT;
  struct slot *slot = map_touch (&disk.map, nr);
  const uint32_t blocks = below (1 << WRITTEN);
  const bool zero = below (3) == 0;
  uint32_t to[SLOT_BLOCKS];

  assert_non_null (slot);
  struct slot_step step = { .found = slot_load (slot), .to = to };

  step.state = zero ? bitmap_set_zero (step.found.state, blocks)
                    : bitmap_set_allocated (step.found.state, blocks);
  step.fresh = zero ? 0 : blocks;
  if (!zero)
    write_disk (version, blocks, to);
  for (unsigned i = 0; i < WRITTEN; ++i)
    if (zero && blocks >> i & 1)
      atomic_store (&disk.blocks[nr][i].zero, version);

  assert_int_equal (slot_prepare (&disk.map, &step), 0);
  if (below (10) == 0) {
    slot_cancel (&step);
    assert_int_equal (slot_prepare (&disk.map, &step), 0);
  }
  slot_store (slot, &step);
  for (unsigned i = 0; i < WRITTEN; ++i)
    if (blocks >> i & 1)
      atomic_store (&disk.blocks[nr][i].done, 2 * version + zero);
}

static void
freeze_or_release_disk (struct frozen_map *frozen, bool *is_held)
{
  {
    HOLD_EXCLUSIVE (&disk.request_lock);
    if (*is_held)
      map_unlink (&disk.map, frozen);
    else
      map_freeze (&disk.map, frozen);
  }
  if (*is_held)
    map_release (frozen);
  *is_held = !*is_held;
}

static void *
disk_writer (void *arg)
{
  struct frozen_map frozen[2];
  bool is_held[2] = { false };

  for (uint64_t version = 1; version < WRITES; ++version) {
    const unsigned i = below (2);

    {
      HOLD_SHARED (&disk.request_lock);
      change_disk (version);
    }
    atomic_store (&disk.version, version);
    if (below (20) == 0)
      freeze_or_release_disk (&frozen[i], &is_held[i]);
  }
  for (unsigned i = 0; i < 2; ++i)
    if (is_held[i])
      freeze_or_release_disk (&frozen[i], &is_held[i]);
  atomic_store (&disk.version, WRITES);
  return arg;
}

static void
look_at_disk (uint64_t nr, unsigned block)
{
  HOLD_SHARED (&disk.request_lock);
  const uint64_t before = atomic_load (&disk.blocks[nr][block].done);
  const struct slot_pair pair = pair_in (&disk.map, nr);
  uint64_t found = 0;

  switch (bitmap_state (pair.state, block)) {
  case BLOCK_ALLOCATED: {
    const uint32_t address = slot_address (pair, block);

    assert_true (disk.file[address].nr == nr);
    assert_int_equal (disk.file[address].block, block);
    found = 2 * disk.file[address].version;
    break;
  }
  case BLOCK_ZERO:
    found = 2 * atomic_load (&disk.blocks[nr][block].zero) + 1;
    break;
  case BLOCK_HOLE:
  default:
    break;
  }
  assert_true (found >= before);
}

static void *
disk_reader (void *arg)
{
  uint64_t version;

  for (unsigned n = 0; (version = atomic_load (&disk.version)) < WRITES; ++n)
    look_at_disk ((version + 1) / WRITES_TO_SLOT, n % WRITTEN);
  return arg;
}

static void
readers_find_nothing_old_or_foreign (void **state)
{
  pthread_t writer, reader;

  (void) state;
  nr_allocs = 0;
  seed = 5;
  rwlock_init (&disk.request_lock, RANK_REQUEST);
  map_init (&disk.map, DISK_SLOTS);
  disk.map.guard = &disk.request_lock;
  disk.next_address = 1;
  assert_int_equal (pthread_create (&writer, NULL, disk_writer, NULL), 0);
  assert_int_equal (pthread_create (&reader, NULL, disk_reader, NULL), 0);
  disk_reader (NULL);
  pthread_join (writer, NULL);
  pthread_join (reader, NULL);
  for (uint64_t nr = 0; nr < DISK_SLOTS; ++nr)
    for (unsigned i = 0; i < WRITTEN; ++i)
      look_at_disk (nr, i);
  map_destroy (&disk.map);
  rwlock_destroy (&disk.request_lock);
  assert_int_equal (nr_allocs, 0);
}

/* Threads that grow one tree all find the same slots. */
#define THREADS 4
#define SLOTS 3000

static struct map shared;

static void *
toucher (void *arg)
{
  struct slot **slots = arg;

  for (uint64_t i = 0; i < SLOTS; ++i)
    slots[i] = map_touch (&shared, i * 1000003);
  return NULL;
}

static void
threads_grow_one_tree (void **state)
{
  static struct slot *slots[THREADS][SLOTS];
  pthread_t threads[THREADS];

  (void) state;
  map_init (&shared, UINT64_C (1) << 46);
  for (unsigned i = 0; i < THREADS; ++i)
    assert_int_equal (pthread_create (&threads[i], NULL, toucher, slots[i]),
                      0);
  for (unsigned i = 0; i < THREADS; ++i)
    pthread_join (threads[i], NULL);
  for (unsigned i = 0; i < SLOTS; ++i) {
    assert_non_null (slots[0][i]);
    for (unsigned j = 1; j < THREADS; ++j)
      assert_ptr_equal (slots[j][i], slots[0][i]);
  }
  map_destroy (&shared);
}

/*----------------------------------------------------------------------
 * Freezing
 */

/* Maps without, with one, and with three levels of inner nodes, and slots of each that
 * share all nodes, some, and only the root.
 */
#define WATCHED 6

static const struct {
  uint64_t nr_slots;
  unsigned levels;
  uint64_t nrs[WATCHED];
} shapes[] = {
  { 256, 0, { 0, 1, 2, 100, 254, 255 } },
  { 256 * 512, 1, { 0, 255, 256, 300, 256 * 511, 256 * 512 - 1 } },
  { UINT64_C (1) << 35,
    3,
    { 0, 1, 256, UINT64_C (1) << 17, UINT64_C (1) << 26,
      (UINT64_C (1) << 35) - 1 } },
};

#define NR_SHAPES (sizeof shapes / sizeof shapes[0])

static void
nodes_are_copied_once_for_each_freeze (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_SHAPES; ++i) {
    const long nodes = shapes[i].levels + 1;
    const uint64_t nr = shapes[i].nrs[0];
    struct frozen_map frozen[3];
    struct map map;

    nr_allocs = 0;
    map_init (&map, shapes[i].nr_slots);
    assert_int_equal (map.levels, shapes[i].levels);
    set_slot (&map, nr, 10, 1);
    assert_int_equal (nr_allocs, nodes);
    const struct slot *first = map_find (&map, nr);

    /* Looking copies nothing. */
    map_freeze (&map, &frozen[0]);
    assert_int_equal (nr_allocs, nodes);
    assert_ptr_equal (map_find (&map, nr), first);
    assert_ptr_equal (map_find (&frozen[0].map, nr), first);

    /* The first touch copies the path, later ones nothing. */
    set_slot (&map, nr, 11, 2);
    assert_int_equal (nr_allocs, 2 * nodes);
    set_slot (&map, nr, 12, 2);
    set_slot (&map, nr ^ 1, 13, 2);
    assert_int_equal (nr_allocs, 2 * nodes);
    assert_ptr_equal (map_find (&frozen[0].map, nr), first);
    assert_int_equal (address_in (&frozen[0].map, nr, 0), 10);
    assert_int_equal (address_in (&frozen[0].map, nr ^ 1, 1), 0);
    assert_int_equal (address_in (&map, nr, 1), 13);

    /* Two at once, with nothing between them, have the same nodes. */
    map_freeze (&map, &frozen[1]);
    map_freeze (&map, &frozen[2]);
    set_slot (&map, nr, 14, 2);
    assert_int_equal (nr_allocs, 3 * nodes);
    assert_int_equal (address_in (&frozen[1].map, nr, 1), 13);
    assert_int_equal (address_in (&frozen[2].map, nr, 1), 13);

    unlink_and_release (&map, &frozen[1]);
    assert_int_equal (nr_allocs, 3 * nodes);
    unlink_and_release (&map, &frozen[0]);
    assert_int_equal (nr_allocs, 2 * nodes);
    assert_int_equal (address_in (&frozen[2].map, nr, 1), 13);
    unlink_and_release (&map, &frozen[2]);
    assert_int_equal (nr_allocs, nodes);
    assert_int_equal (address_in (&map, nr, 1), 15);
    map_destroy (&map);
    assert_int_equal (nr_allocs, 0);
  }
}

/* A map that was frozen before it had any node. */
static void
frozen_while_empty (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_SHAPES; ++i) {
    const long nodes = shapes[i].levels + 1;
    struct frozen_map frozen;
    struct map map;

    nr_allocs = 0;
    map_init (&map, shapes[i].nr_slots);
    map_freeze (&map, &frozen);
    set_slot (&map, 5, 10, 1);
    set_slot (&map, 6, 11, 1);
    assert_int_equal (nr_allocs, nodes);
    assert_null (map_find (&frozen.map, 5));
    assert_true (map_next (&frozen.map, 0) == shapes[i].nr_slots);
    assert_int_equal (map_shared_blocks (&map, 5, pair_in (&map, 5)), 0);
    unlink_and_release (&map, &frozen);
    assert_int_equal (nr_allocs, nodes);
    map_destroy (&map);
    assert_int_equal (nr_allocs, 0);
  }
}

/* What no held map has is changed in place: a node that was made since the newest of
 * them, though it was in one that was released.
 */
static void
changed_in_place_where_no_frozen_map_has_it (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_SHAPES; ++i) {
    const long nodes = shapes[i].levels + 1;
    struct frozen_map a, b;
    struct map map;

    nr_allocs = 0;
    map_init (&map, shapes[i].nr_slots);
    set_slot (&map, 0, 10, 1);
    map_freeze (&map, &a);
    set_slot (&map, 0, 11, 1);
    const struct slot *copy = map_find (&map, 0);

    /* Only B had the copy. */
    map_freeze (&map, &b);
    unlink_and_release (&map, &b);
    assert_ptr_equal (map_touch (&map, 0), copy);
    assert_int_equal (nr_allocs, 2 * nodes);

    /* A has what B had: the copy is needed, though B is gone. */
    unlink_and_release (&map, &a);
    assert_int_equal (nr_allocs, nodes);
    assert_ptr_equal (map_touch (&map, 0), copy);
    map_freeze (&map, &a);
    map_freeze (&map, &b);
    unlink_and_release (&map, &b);
    assert_ptr_not_equal (map_touch (&map, 0), copy);
    assert_ptr_equal (map_find (&a.map, 0), copy);
    assert_int_equal (nr_allocs, 2 * nodes);

    unlink_and_release (&map, &a);
    assert_int_equal (nr_allocs, nodes);
    map_destroy (&map);
    assert_int_equal (nr_allocs, 0);
  }
}

static uint32_t
shared_in (const struct map *map, uint64_t nr)
{
  return map_shared_blocks (map, nr, pair_in (map, nr));
}

/* Of two runs, of a run and a node, and of two nodes. */
static void
shared_blocks_of_all_kinds (void **state)
{
  const uint32_t to[SLOT_BLOCKS] = { 50, 60, 70, 80 };
  const uint32_t other[SLOT_BLOCKS] = { 51, 61, 71, 13 };

  (void) state;
  for (unsigned i = 0; i < NR_SHAPES; ++i) {
    const uint64_t nr = shapes[i].nrs[3];
    struct frozen_map a, b;
    struct map map;

    map_init (&map, shapes[i].nr_slots);
    assert_int_equal (shared_in (&map, nr), 0);
    set_slot (&map, nr, 10, 0x7);
    assert_int_equal (shared_in (&map, nr), 0);
    map_freeze (&map, &a);
    assert_int_equal (shared_in (&map, nr), 0x7);
    assert_int_equal (shared_in (&map, nr ^ 1), 0);

    /* The same run, in another state: what both have. */
    step_slot (&map, nr, bitmap_set_zero (0xe, 1), 8, other);
    assert_int_equal (shared_in (&map, nr), 0x6);
    step_slot (&map, nr, bitmap_set_zero (0x8, 7), 0, NULL);
    assert_int_equal (shared_in (&map, nr), 0);
    set_slot (&map, nr, 20, 0x7);
    assert_int_equal (shared_in (&map, nr), 0);
    unlink_and_release (&map, &a);

    map_freeze (&map, &a);
    step_slot (&map, nr, 0xf, 0xa, to);
    assert_int_equal (shared_in (&map, nr), 0x5);
    assert_int_equal (map_shared_blocks (&map, nr, pair_in (&a.map, nr)), 0x7);

    /* The newest one counts, and no other. */
    map_freeze (&map, &b);
    assert_int_equal (shared_in (&map, nr), 0xf);
    assert_int_equal (map_shared_blocks (&map, nr, pair_in (&a.map, nr)), 0x5);
    step_slot (&map, nr, bitmap_set_zero (0x7, 0x8), 0x1, other);
    assert_int_equal (shared_in (&map, nr), 0x6);
    step_slot (&map, nr, 0xf, 0xe, other);
    assert_int_equal (shared_in (&map, nr), 0);
    unlink_and_release (&map, &b);
    unlink_and_release (&map, &a);
    map_destroy (&map);
  }
}

static void
neighbours (void **state)
{
  struct frozen_map a, b, c, d;
  struct map map;

  (void) state;
  map_init (&map, 1);
  map_freeze (&map, &a);
  map_freeze (&map, &b);
  map_freeze (&map, &c);
  map_freeze (&map, &d);
  assert_ptr_equal (map_next_newer (&map, &a), &b.map);
  assert_ptr_equal (map_next_newer (&map, &b), &c.map);
  assert_ptr_equal (map_next_newer (&map, &d), &map);

  /* The same of one that was taken out. */
  map_unlink (&map, &c);
  assert_ptr_equal (map_next_newer (&map, &c), &d.map);
  assert_ptr_equal (map_next_newer (&map, &b), &d.map);
  map_release (&c);
  map_unlink (&map, &d);
  assert_ptr_equal (map_next_newer (&map, &d), &map);
  map_release (&d);
  unlink_and_release (&map, &a);
  map_freeze (&map, &a); /* the neighbour of B is a frozen map again */
  assert_ptr_equal (map_next_newer (&map, &b), &a.map);
  unlink_and_release (&map, &b);
  unlink_and_release (&map, &a);
  map_destroy (&map);
}

/* A list goes from the live map to the frozen one, and from one that is released to its
 * newer neighbour, whose own it gets.
 */
static void
dead_lists_go_with_their_maps (void **state)
{
  struct frozen_map a, b;
  struct map map;

  (void) state;
  nr_allocs = 0;
  map_init (&map, 1);
  for (uint32_t count = 1; count <= 3; ++count) {
    assert_int_equal (dead_reserve (&map.dead, 1), 0);
    dead_add (&map.dead, (struct dead_run) { 0, 10 * count, count });
    if (count < 3)
      map_freeze (&map, count == 1 ? &a : &b);
  }
  assert_true (a.map.dead.nr_blocks == 1);
  assert_true (b.map.dead.nr_blocks == 2);
  assert_true (map.dead.nr_blocks == 3);
  map_unlink (&map, &a);
  assert_true (a.map.dead.nr_blocks == 2);
  assert_true (b.map.dead.nr_blocks == 1);
  dead_join (&map_next_newer (&map, &a)->dead, &a.map.dead);
  assert_true (b.map.dead.nr_blocks == 3);
  map_release (&a);
  map_unlink (&map, &b);
  assert_true (b.map.dead.nr_blocks == 3);
  assert_true (map.dead.nr_blocks == 3);
  map_release (&b);
  dead_destroy (&b.map.dead);
  map_destroy (&map);
  assert_int_equal (nr_allocs, 0);
}

static void
out_of_memory_while_copying_changes_nothing (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_SHAPES; ++i)
    for (int n = 1;; ++n) {
      struct frozen_map frozen;
      struct map map;

      nr_allocs = 0;
      map_init (&map, shapes[i].nr_slots);
      set_slot (&map, 0, 10, 1);
      const struct slot *old = map_find (&map, 0);
      map_freeze (&map, &frozen);
      failing_alloc = n;
      const struct slot *slot = map_touch (&map, 0);
      const bool failed = !slot;

      failing_alloc = 0;
      assert_ptr_equal (map_find (&frozen.map, 0), old);
      assert_int_equal (address_in (&map, 0, 0), 10);
      slot = map_touch (&map, 0);
      assert_non_null (slot);
      assert_ptr_not_equal (slot, old);
      assert_int_equal (nr_allocs, 2 * (shapes[i].levels + 1));
      unlink_and_release (&map, &frozen);
      map_destroy (&map);
      assert_int_equal (nr_allocs, 0);
      if (!failed) {
        assert_int_equal (n, shapes[i].levels + 2);
        break;
      }
    }
}

/* Threads that change a frozen tree copy each node once. */
static void
threads_copy_one_tree (void **state)
{
  static struct slot *slots[THREADS][SLOTS];
  struct frozen_map frozen;
  pthread_t threads[THREADS];

  (void) state;
  nr_allocs = 0;
  map_init (&shared, UINT64_C (1) << 46);
  toucher (slots[0]);
  const long nodes = nr_allocs;
  map_freeze (&shared, &frozen);
  for (unsigned i = 0; i < THREADS; ++i)
    assert_int_equal (pthread_create (&threads[i], NULL, toucher, slots[i]),
                      0);
  for (unsigned i = 0; i < THREADS; ++i)
    pthread_join (threads[i], NULL);
  assert_int_equal (nr_allocs, 2 * nodes);
  for (unsigned i = 0; i < SLOTS; ++i) {
    assert_ptr_not_equal (slots[0][i],
                          map_find (&frozen.map, i * UINT64_C (1000003)));
    for (unsigned j = 1; j < THREADS; ++j)
      assert_ptr_equal (slots[j][i], slots[0][i]);
  }
  unlink_and_release (&shared, &frozen);
  assert_int_equal (nr_allocs, nodes);
  map_destroy (&shared);
  assert_int_equal (nr_allocs, 0);
}

/*----------------------------------------------------------------------
 * Releasing
 */

/* A map, frozen ones, and what each of them must have in the watched slots. */
#define MAX_HELD 5
#define MAX_ADDRESSES 20000

struct watched_slot {
  uint64_t state;
  uint32_t address[SLOT_BLOCKS]; /* 0 where nothing is allocated */
};

struct watched {
  struct watched_slot slots[WATCHED];
};

static struct {
  unsigned shape;
  struct map map;
  struct watched live;
  struct held {
    bool is_held;
    struct frozen_map frozen;
    struct watched watched;
  } held[MAX_HELD];
  uint32_t next_address;
  bool is_free[MAX_ADDRESSES]; /* was given back */
  uint32_t free[MAX_ADDRESSES];
  unsigned nr_free;
  unsigned nr_zeroed; /* leaves */
} world;

static void
world_init (unsigned shape)
{
  memset (&world, 0, sizeof world);
  world.shape = shape;
  world.next_address = 1;
  nr_allocs = 0;
  map_init (&world.map, shapes[shape].nr_slots);
}

/* An address that nobody has: one that was given back, or a new one. */
static uint32_t
take_address (bool new)
{
  if (world.nr_free > 0 && !new) {
    const unsigned i = below (world.nr_free);
    const uint32_t address = world.free[i];

    world.free[i] = world.free[--world.nr_free];
    world.is_free[address] = false;
    return address;
  }
  assert_true (world.next_address < MAX_ADDRESSES);
  return world.next_address++;
}

static bool
has_address (const struct watched *watched, uint32_t address)
{
  for (unsigned i = 0; i < WATCHED; ++i)
    for (unsigned j = 0; j < SLOT_BLOCKS; ++j)
      if (watched->slots[i].address[j] == address)
        return true;
  return false;
}

/* Does any map own it? */
static bool
is_owned (uint32_t address)
{
  for (unsigned i = 0; i < MAX_HELD; ++i)
    if (world.held[i].is_held && has_address (&world.held[i].watched, address))
      return true;
  return has_address (&world.live, address);
}

static void
free_address (uint32_t address)
{
  assert_true (address > 0 && address < world.next_address);
  assert_false (world.is_free[address]);
  assert_false (is_owned (address));
  world.is_free[address] = true;
  world.free[world.nr_free++] = address;
}

static void
check_watched (const struct map *map, const struct watched *expected)
{
  for (unsigned i = 0; i < WATCHED; ++i) {
    const uint64_t nr = shapes[world.shape].nrs[i];
    const struct watched_slot *slot = &expected->slots[i];
    const struct slot_pair pair = pair_in (map, nr);

    assert_true (pair.state == slot->state);
    for (uint32_t left = bitmap_allocated (pair.state); left;
         left &= left - 1) {
      const unsigned block = (unsigned) __builtin_ctz (left);

      assert_int_equal (slot_address (pair, block), slot->address[block]);
    }
  }
}

static void
check_world (void)
{
  check_watched (&world.map, &world.live);
  for (unsigned i = 0; i < MAX_HELD; ++i)
    if (world.held[i].is_held)
      check_watched (&world.held[i].frozen.map, &world.held[i].watched);
}

/* Make the leaf of slot NR zero, if it is so that it can be. */
static bool
zero_leaf (struct map *map, uint64_t nr)
{
  const bool ready = map_ready_leaf (map, nr / LEAF_SLOTS * LEAF_SLOTS);

  if (ready)
    map_zero_leaf (map, nr / LEAF_SLOTS * LEAF_SLOTS);
  return ready;
}

static bool
zero_leaf_of_world (uint64_t nr)
{
  if (below (2) > 0 || !zero_leaf (&world.map, nr))
    return false;
  for (unsigned i = 0; i < WATCHED; ++i)
    if (shapes[world.shape].nrs[i] / LEAF_SLOTS == nr / LEAF_SLOTS)
      world.live.slots[i]
        = (struct watched_slot) { .state = bitmap_set_zero (0, UINT32_MAX) };
  world.nr_zeroed++;
  return true;
}

/* What the newest frozen map has at the same addresses as the live one. */
static uint32_t
expected_shared (unsigned i)
{
  const struct held *newest = NULL;
  uint32_t shared = 0;

  for (unsigned j = 0; j < MAX_HELD; ++j) {
    const struct held *h = &world.held[j];

    if (h->is_held
        && (!newest || h->frozen.generation > newest->frozen.generation))
      newest = h;
  }
  for (unsigned j = 0; newest && j < SLOT_BLOCKS; ++j)
    if (world.live.slots[i].address[j]
        && world.live.slots[i].address[j]
             == newest->watched.slots[i].address[j])
      shared |= bitmap_mask (j, 1);
  return shared;
}

/* The DYING blocks of a slot, which lay as BEFORE says. */
static void
let_die (uint64_t nr, const struct watched_slot *before, uint32_t dying,
         uint32_t shared)
{
  for (uint32_t left = dying; left; left &= left - 1) {
    const unsigned block = (unsigned) __builtin_ctz (left);
    const uint32_t address = before->address[block];

    if (shared >> block & 1) {
      assert_int_equal (dead_reserve (&world.map.dead, 1), 0);
      dead_add (&world.map.dead,
                (struct dead_run) { nr * SLOT_BLOCKS + block, address, 1 });
    }
    else
      free_address (address);
  }
}

/* Change a slot as requests do: write to some blocks, those that are shared go
 * elsewhere; or zero them; or all slots of a leaf.
 */
static void
change_world (void)
{
  const unsigned i = below (WATCHED);
  const uint64_t nr = shapes[world.shape].nrs[i];
  const unsigned first = below (SLOT_BLOCKS);
  const uint32_t blocks
    = bitmap_mask (first, 1 + below (MIN (8, SLOT_BLOCKS - first)));
  const bool zero = below (3) == 0, new = below (2) == 0;
  struct watched_slot *now = &world.live.slots[i];
  const struct watched_slot before = *now;
  uint32_t to[SLOT_BLOCKS];

  if (zero_leaf_of_world (nr))
    return;
  struct slot *slot = map_touch (&world.map, nr);
  assert_non_null (slot);
  struct slot_step step = { .found = slot_load (slot), .to = to };
  const uint32_t allocated = bitmap_allocated (step.found.state);
  const uint32_t shared = map_shared_blocks (&world.map, nr, step.found);

  assert_int_equal (shared, expected_shared (i));
  step.fresh = zero ? 0 : blocks & (~allocated | shared);
  for (unsigned j = 0; j < SLOT_BLOCKS; ++j)
    if (step.fresh >> j & 1)
      now->address[j] = to[j] = take_address (new);
    else if (zero && blocks >> j & 1)
      now->address[j] = 0;
  step.state = zero ? bitmap_set_zero (before.state, blocks)
                    : bitmap_set_allocated (before.state, blocks);
  now->state = step.state;

  assert_int_equal (slot_prepare (&world.map, &step), 0);
  if (below (4) == 0) {
    slot_cancel (&step);
    assert_int_equal (slot_prepare (&world.map, &step), 0);
  }
  slot_store (slot, &step);
  let_die (nr, &before, allocated & (zero ? blocks : step.fresh), shared);
}

static void
freeze_world (struct held *h)
{
  map_freeze (&world.map, &h->frozen);
  h->watched = world.live;
  h->is_held = true;
}

/* For dead_filter, as in overlay.c: what the older map owns stays. */
static uint32_t
bury (void *opaque, struct dead_run run, bool *stays)
{
  const struct frozen_map *older = opaque;
  const uint64_t nr = run.block / SLOT_BLOCKS;
  const unsigned block = run.block % SLOT_BLOCKS;

  *stays = older && address_in (&older->map, nr, block) == run.address;
  if (!*stays)
    free_address (run.address);
  return 1;
}

/* The second half of a release.  What H alone owned is free then. */
static void
bury_and_release (struct held *h)
{
  dead_filter (&h->frozen.map.dead, bury, h->frozen.older);
  dead_join (&map_next_newer (&world.map, &h->frozen)->dead,
             &h->frozen.map.dead);
  map_release (&h->frozen);
  for (unsigned i = 0; i < WATCHED; ++i)
    for (unsigned j = 0; j < SLOT_BLOCKS; ++j) {
      const uint32_t address = h->watched.slots[i].address[j];

      if (address)
        assert_true (is_owned (address) != world.is_free[address]);
    }
}

static void
release_world (struct held *h)
{
  map_unlink (&world.map, &h->frozen);
  h->is_held = false;
  bury_and_release (h);
}

/* No frozen map is held: every address that was not given back is the live map's, nothing
 * is dead, and there are as many nodes as a map has that was never frozen.
 */
static void
world_destroy (void)
{
  long nodes, nr_spread = 0;
  struct map fresh;

  for (uint32_t i = 1; i < world.next_address; ++i)
    assert_true (has_address (&world.live, i) != world.is_free[i]);
  assert_true (world.map.dead.nr_blocks == 0);
  dead_destroy (&world.map.dead);
  nodes = nr_allocs;

  map_init (&fresh, shapes[world.shape].nr_slots);
  for (unsigned i = 0; i < WATCHED; ++i) {
    const uint64_t nr = shapes[world.shape].nrs[i];

    nr_spread += is_spread (pair_in (&world.map, nr));
    if (map_find (&world.map, nr)
        && map_ready_leaf (&world.map, nr / LEAF_SLOTS * LEAF_SLOTS))
      assert_true (zero_leaf (&fresh, nr));
    else if (world.live.slots[i].state)
      set_slot (&fresh, nr, 1, 1);
  }
  assert_int_equal (nr_allocs, 2 * nodes - nr_spread);
  map_destroy (&fresh);
  map_destroy (&world.map);
  assert_int_equal (nr_allocs, 0);
}

/* The N-th order of 4. */
static void
permutation (unsigned n, unsigned order[4])
{
  bool used[4] = { false };

  for (unsigned i = 0, left = 24; i < 4; ++i) {
    left /= 4 - i;
    unsigned skip = n / left;
    n %= left;
    for (order[i] = 0; used[order[i]] || skip > 0; ++order[i])
      skip -= !used[order[i]];
    used[order[i]] = true;
  }
}

static void
released_in_every_order (void **state)
{
  (void) state;
  for (unsigned shape = 0; shape < NR_SHAPES; ++shape)
    for (unsigned n = 0; n < 24; ++n)
      for (unsigned run = 0; run < 8; ++run) {
        unsigned order[4];

        seed = 1000 * run + n + 1;
        permutation (n, order);
        world_init (shape);
        for (unsigned i = 0; i < WATCHED; ++i)
          change_world ();
        for (unsigned i = 0; i < 4; ++i) {
          freeze_world (&world.held[i]);
          for (unsigned j = below (2 * WATCHED); j > 0; --j)
            change_world ();
        }
        const bool changing = run % 2;
        for (unsigned i = 0; i < 4; ++i) {
          release_world (&world.held[order[i]]);
          check_world ();
          for (unsigned j = changing ? below (WATCHED) : 0; j > 0; --j)
            change_world ();
          check_world ();
        }
        world_destroy ();
      }
}

/* Freezing, changing and releasing in any order, for long. */
static void
frozen_and_released_at_random (void **state)
{
  unsigned nr_zeroed = 0;

  (void) state;
  for (unsigned shape = 0; shape < NR_SHAPES; ++shape) {
    seed = shape + 77;
    world_init (shape);
    for (unsigned n = 0; n < 3000; ++n) {
      struct held *h = &world.held[below (MAX_HELD)];

      switch (below (4)) {
      case 0:
        if (h->is_held)
          release_world (h);
        else
          freeze_world (h);
        break;
      default:
        change_world ();
      }
      check_world ();
    }
    for (unsigned i = 0; i < MAX_HELD; ++i)
      if (world.held[i].is_held)
        release_world (&world.held[i]);
    check_world ();
    nr_zeroed += world.nr_zeroed;
    world_destroy ();
  }
  assert_true (nr_zeroed >= 3);
}

/* Between the unlinking and the rest the live map goes on to change, and is frozen
 * again.  What was noted at the unlinking decides.
 */
static void
changed_and_frozen_before_the_walk (void **state)
{
  (void) state;
  for (unsigned shape = 0; shape < NR_SHAPES; ++shape)
    for (unsigned run = 0; run < 200; ++run) {
      struct held *const first
        = &world.held[0],
        *const second = &world.held[1], *const third = &world.held[2];

      seed = run + 1;
      world_init (shape);
      for (unsigned i = 0; i < 2 * WATCHED; ++i)
        change_world ();
      if (below (2))
        freeze_world (second);
      for (unsigned i = below (WATCHED); i > 0; --i)
        change_world ();
      freeze_world (first);
      for (unsigned i = below (WATCHED); i > 0; --i)
        change_world ();

      map_unlink (&world.map, &first->frozen);
      first->is_held = false;
      const bool freeze = below (2);
      for (unsigned i = below (WATCHED); i > 0; --i)
        change_world ();
      if (freeze)
        freeze_world (third);
      for (unsigned i = freeze ? below (WATCHED) : 0; i > 0; --i)
        change_world ();
      bury_and_release (first);
      check_world ();

      if (third->is_held)
        release_world (third);
      check_world ();
      if (second->is_held)
        release_world (second);
      check_world ();
      world_destroy ();
    }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (untouched_is_not_there),
    cmocka_unit_test (touched_is_found_again),
    cmocka_unit_test (no_slots),
    cmocka_unit_test (next_skips_what_is_not_there),
    cmocka_unit_test (slots_in_a_row),
    cmocka_unit_test (whole_leaves_become_zero),
    cmocka_unit_test (no_memory_for_whole_leaves),
    cmocka_unit_test (out_of_memory_changes_nothing),
    cmocka_unit_test (what_is_in_order_is_a_run),
    cmocka_unit_test (moved_runs_have_other_words),
    cmocka_unit_test (bases_at_both_ends),
    cmocka_unit_test (what_is_not_in_order_is_spread),
    cmocka_unit_test (address_nodes_are_copied_once_for_each_freeze),
    cmocka_unit_test (no_node_no_change),
    cmocka_unit_test (other_steps_need_no_memory),
    cmocka_unit_test (readers_see_consistent_pairs),
    cmocka_unit_test (readers_find_nothing_old_or_foreign),
    cmocka_unit_test (threads_grow_one_tree),
    cmocka_unit_test (nodes_are_copied_once_for_each_freeze),
    cmocka_unit_test (frozen_while_empty),
    cmocka_unit_test (changed_in_place_where_no_frozen_map_has_it),
    cmocka_unit_test (shared_blocks_of_all_kinds),
    cmocka_unit_test (neighbours),
    cmocka_unit_test (dead_lists_go_with_their_maps),
    cmocka_unit_test (out_of_memory_while_copying_changes_nothing),
    cmocka_unit_test (threads_copy_one_tree),
    cmocka_unit_test (released_in_every_order),
    cmocka_unit_test (frozen_and_released_at_random),
    cmocka_unit_test (changed_and_frozen_before_the_walk),
  };

  return cmocka_run_group_tests_name ("map", tests, NULL, NULL);
}
