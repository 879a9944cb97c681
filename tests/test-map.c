/* SPDX-License-Identifier: BSD-3-Clause */

/* The map without a server: lookups, growth, the order of stores, threads, frozen
 * maps and their release.
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
      slot_store (slot,
                  (struct slot_pair) { .place = nrs[j] + 1, .state = 1 });
    }
    for (unsigned j = 0; j < 4; ++j) {
      const struct slot_pair pair = slot_load (map_find (&map, nrs[j]));

      assert_true (pair.place == nrs[j] + 1);
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

/* Release FROZEN, and say what nobody asks for. */
static void
unlink_and_release (struct map *map, struct frozen_map *frozen)
{
  map_unlink (map, frozen);
  map_release (frozen, NULL);
}

/* A leaf becomes zero without memory of its own, as often as one likes, until one of its
 * slots is touched, with or without frozen maps.
 */
static void
whole_leaves_become_zero (void **state)
{
  const struct slot_pair zero = { .state = bitmap_set_zero (0, UINT32_MAX) };
  const struct slot_pair written = { .place = 7, .state = 1 };

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

        assert_true (pair.place == 0 && pair.state == zero.state);
      }
      if (with_frozen)
        map_freeze (&map, &after);

      /* In a leaf of its own, in which the others stay zero. */
      struct slot *slot = map_touch (&map, last);
      assert_true (slot_load (slot).state == zero.state);
      slot_store (slot, written);
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
      assert_true (slot_load (map_find (&map, last)).place == written.place);
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

/* Rule 1: while a slot moves, nobody sees a bit that is allocated with the
 * place it was not allocated in, and no zero block looks like a hole.  Block 0
 * is allocated in odd places only, block 1 in even ones; block 2 is never a
 * hole.
 */
#define MOVES 200000

static void *
mover (void *arg)
{
  struct slot *slot = arg;

  for (uint64_t i = 1; i <= MOVES; ++i) {
    const uint64_t word = bitmap_set_allocated (0, i % 2 ? 1 : 2);

    slot_store (slot, (struct slot_pair) {
                        .place = i,
                        .state = i % 3 ? bitmap_set_zero (word, 4)
                                       : bitmap_set_allocated (word, 4),
                      });
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
  struct slot *slot = map_touch (&map, 0);
  slot_store (slot, (struct slot_pair) { .place = 2, .state = 2 | 4 });

  assert_int_equal (pthread_create (&thread, NULL, mover, slot), 0);
  for (;;) {
    const struct slot_pair pair = slot_load (slot);

    if (bitmap_state (pair.state, 0) == BLOCK_ALLOCATED)
      assert_true (pair.place % 2 == 1);
    if (bitmap_state (pair.state, 1) == BLOCK_ALLOCATED)
      assert_true (pair.place % 2 == 0);
    assert_int_not_equal (bitmap_state (pair.state, 2), BLOCK_HOLE);
    if (pair.place == MOVES)
      break;
  }
  pthread_join (thread, NULL);
  map_destroy (&map);
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
set_slot (struct map *map, uint64_t nr, uint64_t place, uint64_t state)
{
  struct slot *slot = map_touch (map, nr);

  assert_non_null (slot);
  slot_store (slot, (struct slot_pair) { .place = place, .state = state });
}

static uint64_t
place_in (const struct map *map, uint64_t nr)
{
  const struct slot *slot = map_find (map, nr);

  return slot ? slot_load (slot).place : 0;
}

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
    assert_true (place_in (&frozen[0].map, nr) == 10);
    assert_true (place_in (&frozen[0].map, nr ^ 1) == 0);
    assert_true (place_in (&map, nr) == 12);

    /* Two at once, with nothing between them, have the same nodes. */
    map_freeze (&map, &frozen[1]);
    map_freeze (&map, &frozen[2]);
    set_slot (&map, nr, 14, 2);
    assert_int_equal (nr_allocs, 3 * nodes);
    assert_true (place_in (&frozen[1].map, nr) == 12);
    assert_true (place_in (&frozen[2].map, nr) == 12);

    unlink_and_release (&map, &frozen[1]);
    assert_int_equal (nr_allocs, 3 * nodes);
    unlink_and_release (&map, &frozen[0]);
    assert_int_equal (nr_allocs, 2 * nodes);
    assert_true (place_in (&frozen[2].map, nr) == 12);
    unlink_and_release (&map, &frozen[2]);
    assert_int_equal (nr_allocs, nodes);
    assert_true (place_in (&map, nr) == 14);
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
    assert_false (map_is_shared (&map, 5, 10));
    assert_int_equal (map_frozen_blocks (&map, 5, 10), 0);
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

static void
shared_places_and_neighbours (void **state)
{
  (void) state;
  for (unsigned i = 0; i < NR_SHAPES; ++i) {
    const uint64_t nr = shapes[i].nrs[3];
    struct frozen_map a, b, c, d;
    struct map map;

    map_init (&map, shapes[i].nr_slots);
    assert_false (map_is_shared (&map, nr, 10));
    set_slot (&map, nr, 10, 0x7);
    assert_false (map_is_shared (&map, nr, 10));
    assert_int_equal (map_frozen_blocks (&map, nr, 10), 0);

    /* A and B have place 10, in other states; C and D place 20. */
    map_freeze (&map, &a);
    assert_true (map_is_shared (&map, nr, 10));
    assert_false (map_is_shared (&map, nr, 20));
    assert_false (map_is_shared (&map, nr, 0));
    assert_false (map_is_shared (&map, nr ^ 1, 0)); /* has none: not shared */
    set_slot (&map, nr, 10, bitmap_set_zero (0x7, 0x1));
    assert_true (map_is_shared (&map, nr, 10));
    assert_int_equal (map_frozen_blocks (&map, nr, 10), 0x7);
    map_freeze (&map, &b);
    set_slot (&map, nr, 10, bitmap_set_zero (0x7, 0x3));
    assert_int_equal (map_frozen_blocks (&map, nr, 10), 0x7);
    set_slot (&map, nr, 20, 0x18);
    assert_false (map_is_shared (&map, nr, 20));
    map_freeze (&map, &c);
    map_freeze (&map, &d);
    assert_true (map_is_shared (&map, nr, 20));
    /* The newest one has left it, so nobody can be about to write there. */
    assert_false (map_is_shared (&map, nr, 10));
    assert_int_equal (map_frozen_blocks (&map, nr, 20), 0x18);

    assert_ptr_equal (map_next_newer (&map, &a), &b.map);
    assert_ptr_equal (map_next_newer (&map, &b), &c.map);
    assert_ptr_equal (map_next_newer (&map, &d), &map);

    /* The same of one that was taken out. */
    map_unlink (&map, &c);
    assert_ptr_equal (map_next_newer (&map, &c), &d.map);
    assert_ptr_equal (map_next_newer (&map, &b), &d.map);
    map_release (&c, NULL);
    map_unlink (&map, &d);
    assert_ptr_equal (map_next_newer (&map, &d), &map);
    map_release (&d, NULL);
    assert_false (map_is_shared (&map, nr, 20));
    assert_int_equal (map_frozen_blocks (&map, nr, 20), 0);
    assert_int_equal (map_frozen_blocks (&map, nr, 10), 0x7);
    unlink_and_release (&map, &a);
    assert_int_equal (map_frozen_blocks (&map, nr, 10), 0x6);
    map_freeze (&map, &a); /* the neighbour of B is a frozen map again */
    assert_ptr_equal (map_next_newer (&map, &b), &a.map);
    unlink_and_release (&map, &b);
    assert_true (map_is_shared (&map, nr, 20));
    unlink_and_release (&map, &a);
    map_destroy (&map);
  }
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
      assert_true (place_in (&map, 0) == 10);
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
#define MAX_PLACES 4096

struct watched {
  struct slot_pair slots[WATCHED];
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
  uint64_t next_place;
  bool is_free[MAX_PLACES]; /* was given back */
  const struct held *releasing;
  unsigned nr_freed, nr_blocks_freed;
  unsigned nr_zeroed; /* leaves */
} world;

static unsigned seed;

static unsigned
below (unsigned n)
{
  return (unsigned) rand_r (&seed) / 7 % n;
}

static void
world_init (unsigned shape)
{
  memset (&world, 0, sizeof world);
  world.shape = shape;
  world.next_place = 1;
  nr_allocs = 0;
  map_init (&world.map, shapes[shape].nr_slots);
}

/* A place that nobody has: one that was given back, or a new one. */
static uint64_t
take_place (void)
{
  for (uint64_t i = 1; i < world.next_place; ++i)
    if (world.is_free[i] && below (2)) {
      world.is_free[i] = false;
      return i;
    }
  assert_true (world.next_place < MAX_PLACES);
  return world.next_place++;
}

static void
check_watched (const struct map *map, const struct watched *expected)
{
  for (unsigned i = 0; i < WATCHED; ++i) {
    const struct slot *slot = map_find (map, shapes[world.shape].nrs[i]);
    const struct slot_pair none = { .place = 0 };
    const struct slot_pair pair = slot ? slot_load (slot) : none;

    assert_true (pair.place == expected->slots[i].place);
    assert_true (pair.state == expected->slots[i].state);
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

/* The neighbours of a frozen map: the next newer one may be the live map. */
static const struct watched *
neighbour (const struct held *of, bool newer)
{
  const struct held *best = NULL;

  for (unsigned i = 0; i < MAX_HELD; ++i) {
    const struct held *h = &world.held[i];

    if (!h->is_held || h == of
        || (h->frozen.generation > of->frozen.generation) != newer)
      continue;
    if (!best || (h->frozen.generation < best->frozen.generation) == newer)
      best = h;
  }
  return best ? &best->watched : newer ? &world.live : NULL;
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

/* Change a slot as requests do: a write to a shared slot moves it, a zero does not; or
 * all slots of a leaf.
 */
static void
change_world (void)
{
  const unsigned i = below (WATCHED);
  const uint64_t nr = shapes[world.shape].nrs[i];
  const uint32_t blocks = 1u << below (4);
  struct slot_pair pair = world.live.slots[i];
  bool shared = false;

  if (below (4) == 0 && zero_leaf (&world.map, nr)) {
    for (unsigned j = 0; j < WATCHED; ++j)
      if (shapes[world.shape].nrs[j] / LEAF_SLOTS == nr / LEAF_SLOTS)
        world.live.slots[j]
          = (struct slot_pair) { .state = bitmap_set_zero (0, UINT32_MAX) };
    world.nr_zeroed++;
    return;
  }
  for (unsigned j = 0; j < MAX_HELD; ++j)
    shared |= pair.place != 0 && world.held[j].is_held
              && world.held[j].watched.slots[i].place == pair.place;
  assert_int_equal (map_is_shared (&world.map, nr, pair.place), shared);

  if (below (3) == 0)
    pair.state = bitmap_set_zero (pair.state, blocks);
  else {
    if (pair.place == 0 || shared)
      pair.place = take_place ();
    pair.state = bitmap_set_allocated (pair.state, blocks);
  }
  set_slot (&world.map, nr, pair.place, pair.state);
  world.live.slots[i] = pair;
}

static void
freeze_world (struct held *h)
{
  map_freeze (&world.map, &h->frozen);
  h->watched = world.live;
  h->is_held = true;
}

static bool
has_place (const struct watched *watched, uint64_t place)
{
  for (unsigned i = 0; watched && i < WATCHED; ++i)
    if (watched->slots[i].place == place)
      return true;
  return false;
}

static void
place_is_free (void *opaque, uint64_t place)
{
  assert_ptr_equal (opaque, &world);
  assert_true (place > 0 && place < world.next_place);
  assert_false (world.is_free[place]);
  assert_true (has_place (&world.releasing->watched, place));
  assert_false (has_place (&world.live, place));
  for (unsigned i = 0; i < MAX_HELD; ++i)
    if (world.held[i].is_held && &world.held[i] != world.releasing)
      assert_false (has_place (&world.held[i].watched, place));
  world.is_free[place] = true;
  world.nr_freed++;
}

static void
blocks_are_free (void *opaque, uint64_t nr, uint64_t place, uint32_t blocks)
{
  const struct watched *older = neighbour (world.releasing, false);
  const struct watched *newer = neighbour (world.releasing, true);
  unsigned i = 0;

  assert_ptr_equal (opaque, &world);
  while (shapes[world.shape].nrs[i] != nr)
    assert_true (++i < WATCHED);
  const struct slot_pair mine = world.releasing->watched.slots[i];

  assert_true (mine.place == place);
  assert_true (newer->slots[i].place == place);
  assert_true (!older || older->slots[i].place != place);
  assert_int_equal (blocks, bitmap_allocated (mine.state)
                              & ~bitmap_allocated (newer->slots[i].state));
  assert_int_not_equal (blocks, 0);
  world.nr_blocks_freed++;
}

/* What the callbacks hear is right; and they hear everything. */
static void
release_world (struct held *h)
{
  const struct map_release release = { .place_is_free = place_is_free,
                                       .blocks_are_free = blocks_are_free,
                                       .opaque = &world };
  const struct watched *older = neighbour (h, false);
  const struct watched *newer = neighbour (h, true);
  unsigned freed = 0, blocks_freed = 0;

  for (unsigned i = 0; i < WATCHED; ++i) {
    const struct slot_pair none = { .place = 0 };
    const struct slot_pair mine = h->watched.slots[i];
    const struct slot_pair o = older ? older->slots[i] : none;
    const struct slot_pair n = newer->slots[i];

    if (mine.place == 0 || mine.place == o.place)
      continue;
    freed += mine.place != n.place;
    blocks_freed
      += mine.place == n.place
         && (bitmap_allocated (mine.state) & ~bitmap_allocated (n.state));
  }

  world.nr_freed = world.nr_blocks_freed = 0;
  world.releasing = h;
  map_unlink (&world.map, &h->frozen);
  map_release (&h->frozen, &release);
  h->is_held = false;
  assert_int_equal (world.nr_freed, freed);
  assert_int_equal (world.nr_blocks_freed, blocks_freed);
}

/* No frozen map is held: every place that was not given back is the live map's, and
 * there are as many nodes as a map has that was never frozen.
 */
static void
world_destroy (void)
{
  const long nodes = nr_allocs;
  long places = 0, expected = 0;
  struct map fresh;

  for (unsigned i = 0; i < WATCHED; ++i)
    places += world.live.slots[i].place != 0;
  for (uint64_t i = 1; i < world.next_place; ++i)
    expected += !world.is_free[i];
  assert_int_equal (places, expected);

  map_init (&fresh, shapes[world.shape].nr_slots);
  for (unsigned i = 0; i < WATCHED; ++i) {
    const uint64_t nr = shapes[world.shape].nrs[i];

    if (map_find (&world.map, nr)
        && map_ready_leaf (&world.map, nr / LEAF_SLOTS * LEAF_SLOTS))
      assert_true (zero_leaf (&fresh, nr));
    else if (world.live.slots[i].place || world.live.slots[i].state)
      set_slot (&fresh, nr, 1, 1);
  }
  assert_int_equal (nr_allocs, 2 * nodes);
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

/* Between the unlinking and the walk the live map goes on to change, and is frozen
 * again.  What was noted at the unlinking decides.
 */
static void
changed_and_frozen_before_the_walk (void **state)
{
  const struct map_release release = { .place_is_free = place_is_free,
                                       .blocks_are_free = blocks_are_free,
                                       .opaque = &world };

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

      world.releasing = first;
      map_unlink (&world.map, &first->frozen);
      first->is_held = false;
      const bool freeze = below (2);
      for (unsigned i = below (WATCHED); i > 0; --i)
        change_world ();
      if (freeze)
        freeze_world (third);
      /* A place that is free after the walk cannot be taken before it. */
      for (unsigned i = freeze ? below (WATCHED) : 0; i > 0; --i)
        change_world ();
      map_release (&first->frozen, &release);
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
    cmocka_unit_test (readers_see_consistent_pairs),
    cmocka_unit_test (threads_grow_one_tree),
    cmocka_unit_test (nodes_are_copied_once_for_each_freeze),
    cmocka_unit_test (frozen_while_empty),
    cmocka_unit_test (changed_in_place_where_no_frozen_map_has_it),
    cmocka_unit_test (shared_places_and_neighbours),
    cmocka_unit_test (out_of_memory_while_copying_changes_nothing),
    cmocka_unit_test (threads_copy_one_tree),
    cmocka_unit_test (released_in_every_order),
    cmocka_unit_test (frozen_and_released_at_random),
    cmocka_unit_test (changed_and_frozen_before_the_walk),
  };

  return cmocka_run_group_tests_name ("map", tests, NULL, NULL);
}
