/* SPDX-License-Identifier: BSD-3-Clause */

/* The map without a server: lookups, growth, the order of stores, threads. */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "bitmap.h"
#include "map.h"

/* Linked with --wrap=calloc. */
extern void *__real_calloc (size_t n, size_t size);
extern void *__wrap_calloc (size_t n, size_t size);
static int failing_calloc; /* fail the n-th from now on, 1 is the next */

void *
__wrap_calloc (size_t n, size_t size)
{
  if (failing_calloc > 0 && --failing_calloc == 0) {
    errno = ENOMEM;
    return NULL;
  }
  return __real_calloc (n, size);
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

static void
out_of_memory_changes_nothing (void **state)
{
  (void) state;
  for (int n = 1;; ++n) {
    struct map map;

    map_init (&map, UINT64_C (1) << 46);
    failing_calloc = n;
    struct slot *slot = map_touch (&map, 4711);
    const bool failed = !slot;

    failing_calloc = 0;
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

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (untouched_is_not_there),
    cmocka_unit_test (touched_is_found_again),
    cmocka_unit_test (no_slots),
    cmocka_unit_test (next_skips_what_is_not_there),
    cmocka_unit_test (out_of_memory_changes_nothing),
    cmocka_unit_test (readers_see_consistent_pairs),
    cmocka_unit_test (threads_grow_one_tree),
  };

  return cmocka_run_group_tests_name ("map", tests, NULL, NULL);
}
