/* SPDX-License-Identifier: BSD-3-Clause */

/* Dead lists: promises, and what joining and filtering leave in them. */

#include <config.h>

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/cleanup.h"
#include "overlay/dead.h"

/* Linked with --wrap=malloc, --wrap=free. */
extern void *__real_malloc (size_t size);
extern void *__wrap_malloc (size_t size);
extern void __real_free (void *pointer);
extern void __wrap_free (void *pointer);
static int failing_malloc; /* fail the n-th from now on, 1 is the next */
static bool no_memory;     /* fail all */
static long nr_allocs;     /* that were not freed */
static long nr_mallocs;    /* ever */

void *
__wrap_malloc (size_t size)
{
  nr_mallocs++;
  if (no_memory || (failing_malloc > 0 && --failing_malloc == 0)) {
    errno = ENOMEM;
    return NULL;
  }
  nr_allocs++;
  return __real_malloc (size);
}

void
__wrap_free (void *pointer)
{
  if (pointer)
    nr_allocs--;
  __real_free (pointer);
}

static unsigned seed;

static unsigned
below (unsigned n)
{
  return (unsigned) rand_r (&seed) / 7 % n;
}

static void
add (struct dead_list *list, uint64_t block, uint32_t address, uint32_t count)
{
  assert_int_equal (dead_reserve (list, 1), 0);
  dead_add (list, (struct dead_run) { block, address, count });
}

/* What a walk over a list finds. */
struct found {
  size_t nr_runs;
  uint64_t nr_blocks, sum; /* of addresses */
};

static uint32_t
count_run (void *opaque, struct dead_run run, bool *stays)
{
  struct found *found = opaque;

  assert_true (run.count > 0);
  found->nr_runs++;
  found->nr_blocks += run.count;
  for (uint32_t i = 0; i < run.count; ++i)
    found->sum += run.address + i;
  *stays = true;
  return run.count;
}

static struct found
walk (struct dead_list *list)
{
  struct found found = { .nr_runs = 0 };

  dead_filter (list, count_run, &found);
  assert_true (found.nr_blocks == list->nr_blocks);
  assert_true (list->reserved == 0);
  return found;
}

static void
empty_lists (void **state)
{
  struct dead_list a = { .open = NULL }, b = { .open = NULL };

  (void) state;
  nr_allocs = 0;
  assert_int_equal (walk (&a).nr_runs, 0);
  dead_join (&a, &b);
  dead_swap (&a, &b);
  dead_unreserve (&a, 0);
  assert_int_equal (dead_reserve (&a, 0), 0);
  assert_int_equal (walk (&a).nr_runs, 0);
  assert_int_equal (nr_allocs, 0);
  dead_destroy (&a);
  dead_destroy (&a);

  /* A list without runs, but with room. */
  assert_int_equal (dead_reserve (&a, 1000), 0);
  dead_unreserve (&a, 1000);
  dead_join (&b, &a);
  assert_int_equal (nr_allocs, 0);
  dead_destroy (&a);
  dead_destroy (&b);
}

/* What was promised needs no memory; and who cannot have the promise has not changed
 * others'.
 */
static void
promises_are_kept (void **state)
{
  (void) state;
  for (int n = 1; n <= 4; ++n) {
    struct dead_list list = { .open = NULL };

    nr_allocs = 0;
    assert_int_equal (dead_reserve (&list, 70), 0);
    failing_malloc = n;
    errno = 0;
    assert_int_equal (dead_reserve (&list, 1000), -1);
    assert_int_equal (errno, ENOMEM);
    failing_malloc = 0;
    assert_true (list.reserved == 70 && list.nr_blocks == 0);

    no_memory = true;
    for (uint32_t i = 0; i < 70; ++i)
      dead_add (&list, (struct dead_run) { 2 * i, 2 * i + 1, 1 });
    no_memory = false;
    assert_int_equal (walk (&list).nr_runs, 70);
    dead_destroy (&list);
    assert_int_equal (nr_allocs, 0);
  }
}

/* Of a large promise that was not used little is left, whatever is in the list; and
 * promises that others have are not touched.
 */
static void
promises_are_taken_back (void **state)
{
  struct dead_list list = { .open = NULL };

  (void) state;
  nr_allocs = 0;
  assert_int_equal (dead_reserve (&list, 100), 0);
  assert_int_equal (dead_reserve (&list, 10000), 0);
  dead_add (&list, (struct dead_run) { 7, 9, 1 });
  assert_true (nr_allocs > 150);
  dead_unreserve (&list, 9999);
  assert_in_range (nr_allocs, 2, 10);
  assert_true (list.reserved == 100 && list.room >= 100);

  no_memory = true;
  for (uint32_t i = 0; i < 100; ++i)
    dead_add (&list, (struct dead_run) { 2 * i + 100, i + 100, 1 });
  no_memory = false;
  assert_int_equal (walk (&list).nr_runs, 101);
  dead_destroy (&list);
  assert_int_equal (nr_allocs, 0);
}

/* What is overwritten in order takes one run; what only looks so does not. */
static void
neighbours_become_one (void **state)
{
  struct dead_list list = { .open = NULL };

  (void) state;
  for (uint32_t i = 0; i < 1000; ++i)
    add (&list, 10 + i, 100 + i, 1);
  assert_int_equal (walk (&list).nr_runs, 1);
  add (&list, 1010, 2000, 1); /* elsewhere in the log */
  add (&list, 3000, 2001, 1); /* elsewhere on the disk */
  add (&list, 2999, 2000, 1); /* backwards */
  add (&list, 5, UINT32_MAX, 1);
  add (&list, 6, 0, 1); /* does not go on behind the last address */
  assert_int_equal (walk (&list).nr_runs, 6);
  assert_true (list.nr_blocks == 1005);
  dead_destroy (&list);
}

/* Joining many short lists leaves few chunks, and a long one needs no memory. */
static void
joined_lists (void **state)
{
  struct dead_list all = { .open = NULL };
  struct found expected = { .nr_runs = 0 };

  (void) state;
  nr_allocs = 0;
  for (uint32_t i = 1; i <= 2000; ++i) {
    const uint32_t count = i % 100 == 0 ? 500 : i % 3;
    struct dead_list list = { .open = NULL };

    for (uint32_t j = 0; j < count; ++j) {
      add (&list, 2 * j, i * 1000 + 2 * j, 1);
      expected.sum += i * 1000 + 2 * j;
    }
    expected.nr_runs += count;
    if (i % 7 == 0)
      assert_int_equal (dead_reserve (&all, 20), 0);
    no_memory = true;
    dead_join (&all, &list);
    no_memory = false;
    if (i % 7 == 0) {
      assert_true (all.reserved == 20 && all.room >= 20);
      dead_unreserve (&all, 20);
    }
    assert_true (list.nr_blocks == 0 && !list.open && !list.full);
  }
  assert_true (all.nr_blocks == expected.nr_runs);
  assert_in_range (nr_allocs, 1, 20 + expected.nr_runs / 40);

  struct dead_list other = { .open = NULL };
  dead_swap (&all, &other);
  assert_int_equal (walk (&all).nr_runs, 0);
  const struct found found = walk (&other);
  assert_true (found.nr_runs == expected.nr_runs);
  assert_true (found.sum == expected.sum);
  dead_destroy (&other);
  assert_int_equal (nr_allocs, 0);
}

/*----------------------------------------------------------------------
 * Filtering
 */

static uint32_t
keep_every_100th_run (void *opaque, struct dead_run run, bool *stays)
{
  (void) opaque;
  *stays = run.block % 100 == 0;
  return run.count;
}

/* Without a word of memory; and what is not needed any more is given back. */
static void
filtering_whole_runs_needs_no_memory (void **state)
{
  struct dead_list list = { .open = NULL };

  (void) state;
  nr_allocs = 0;
  for (uint32_t i = 0; i < 10000; ++i)
    add (&list, i, 2 * i, 2);
  no_memory = true;
  assert_int_equal (walk (&list).nr_runs, 10000);
  const long before = nr_allocs;
  dead_filter (&list, keep_every_100th_run, NULL);
  assert_true (list.nr_blocks == 200);
  assert_int_equal (walk (&list).nr_runs, 100);
  assert_in_range (nr_allocs, 1, before / 50);
  no_memory = false;
  dead_destroy (&list);
  assert_int_equal (nr_allocs, 0);
}

/* Block by block, of which the even ones stay. */
static uint32_t
keep_even (void *opaque, struct dead_run run, bool *stays)
{
  (void) opaque;
  *stays = run.block % 2 == 0;
  return 1;
}

static uint32_t
keep_all_by_ones (void *opaque, struct dead_run run, bool *stays)
{
  (void) opaque;
  assert_true (run.count > 0);
  *stays = true;
  return 1;
}

static void
filtering_that_splits (void **state)
{
  struct dead_list list = { .open = NULL };

  (void) state;
  nr_allocs = nr_mallocs = 0;
  for (uint32_t i = 0; i < 100; ++i)
    add (&list, 1000 * i, 2000 * i, 1000);
  const long mallocs = nr_mallocs;

  /* Pieces that follow each other remain one run. */
  dead_filter (&list, keep_all_by_ones, NULL);
  assert_true (list.nr_blocks == 100000);
  assert_int_equal (walk (&list).nr_runs, 100);
  assert_int_equal (nr_mallocs, mallocs);

  dead_filter (&list, keep_even, NULL);
  assert_true (list.nr_blocks == 50000);
  assert_int_equal (walk (&list).nr_runs, 50000);
  dead_destroy (&list);

  /* Without memory pieces are lost, and nothing else happens. */
  for (uint32_t i = 0; i < 100; ++i)
    add (&list, 1000 * i, 2000 * i, 1000);
  no_memory = true;
  dead_filter (&list, keep_even, NULL);
  no_memory = false;
  assert_in_range (list.nr_blocks, 63, 300);
  assert_true (walk (&list).nr_runs == list.nr_blocks);
  dead_destroy (&list);
  assert_int_equal (nr_allocs, 0);
}

/*----------------------------------------------------------------------
 * Lists against a model
 */

#define LISTS 4
#define ADDRESSES 5000

static struct {
  struct dead_list lists[LISTS];
  int in[ADDRESSES]; /* which list it is in, or -1 */
  uint64_t block[ADDRESSES];
} world;

/* A filter that looks at a list, and drops from it by chance. */
struct look {
  int list;
  bool dropping;
  uint64_t nr_blocks;
};

static uint32_t
look_at_run (void *opaque, struct dead_run run, bool *stays)
{
  struct look *look = opaque;
  const uint32_t count = look->dropping ? 1 + below (run.count) : run.count;

  *stays = !look->dropping || below (3) > 0;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t address = run.address + i;

    assert_true (address < ADDRESSES);
    assert_int_equal (world.in[address], look->list);
    assert_true (world.block[address] == run.block + i);
    world.in[address] = *stays ? -2 - look->list : -1; /* seen */
  }
  look->nr_blocks += count;
  return count;
}

static void
look_at_list (int nr, bool dropping)
{
  struct look look = { .list = nr, .dropping = dropping };
  uint64_t expected = 0, left = 0;

  for (uint32_t i = 0; i < ADDRESSES; ++i)
    expected += world.in[i] == nr;
  assert_true (world.lists[nr].nr_blocks == expected);
  dead_filter (&world.lists[nr], look_at_run, &look);
  assert_true (look.nr_blocks == expected);
  for (uint32_t i = 0; i < ADDRESSES; ++i)
    if (world.in[i] == -2 - nr) {
      world.in[i] = nr;
      left++;
    }
  assert_true (world.lists[nr].nr_blocks == left);
}

static void
add_to_list (int nr)
{
  const size_t promised = 1 + below (200), max = below (200);
  uint32_t address = below (ADDRESSES);
  size_t added = 0;

  assert_int_equal (dead_reserve (&world.lists[nr], promised), 0);
  for (; added < MIN (promised, max) && address < ADDRESSES; ++address) {
    struct dead_run run = { below (1000000), address, 0 };
    const uint32_t wanted = 1 + below (20);

    for (; run.count < wanted && address + run.count < ADDRESSES
           && world.in[address + run.count] == -1;
         ++run.count) {
      world.in[address + run.count] = nr;
      world.block[address + run.count] = run.block + run.count;
    }
    if (run.count > 0) {
      dead_add (&world.lists[nr], run);
      added++;
      address += run.count;
    }
  }
  dead_unreserve (&world.lists[nr], promised - added);
}

static void
join_or_swap (int a, int b)
{
  const bool join = below (3) == 0;

  if (a == b)
    return;
  if (join)
    dead_join (&world.lists[a], &world.lists[b]);
  else
    dead_swap (&world.lists[a], &world.lists[b]);
  for (uint32_t i = 0; i < ADDRESSES; ++i)
    if (world.in[i] == b)
      world.in[i] = a;
    else if (world.in[i] == a && !join)
      world.in[i] = b;
}

static void
lists_at_random (void **state)
{
  (void) state;
  seed = 4711;
  nr_allocs = 0;
  memset (&world, 0, sizeof world);
  for (uint32_t i = 0; i < ADDRESSES; ++i)
    world.in[i] = -1;
  for (unsigned n = 0; n < 3000; ++n) {
    const int nr = (int) below (LISTS);

    switch (below (8)) {
    case 0:
      look_at_list (nr, false);
      break;
    case 1:
    case 2:
      look_at_list (nr, true);
      break;
    case 3:
      join_or_swap (nr, (int) below (LISTS));
      break;
    default:
      add_to_list (nr);
    }
  }
  for (int i = 0; i < LISTS; ++i) {
    look_at_list (i, false);
    dead_destroy (&world.lists[i]);
  }
  assert_int_equal (nr_allocs, 0);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (empty_lists),
    cmocka_unit_test (promises_are_kept),
    cmocka_unit_test (promises_are_taken_back),
    cmocka_unit_test (neighbours_become_one),
    cmocka_unit_test (joined_lists),
    cmocka_unit_test (filtering_whole_runs_needs_no_memory),
    cmocka_unit_test (filtering_that_splits),
    cmocka_unit_test (lists_at_random),
  };

  return cmocka_run_group_tests_name ("dead", tests, NULL, NULL);
}
