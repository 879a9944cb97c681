/* SPDX-License-Identifier: BSD-3-Clause */

/* How fast the map and the state words are, without a server.
 *
 * Each measure runs with 1, 2, 4 and 8 threads, for a fixed time, several times, each
 * time with a map made anew; the median is shown.  "ns" is how long an operation takes
 * its thread (with more threads than processors also the wait for one), "Mop/s" what
 * all threads do together.
 *
 * What a slot holds follows from its number and from how often it was updated, so all
 * that is found is compared with what was stored.  Which slot is next depends on what
 * was found before: otherwise the processor would look for several at a time, and a
 * request does not.
 */

#include <config.h>

#include <malloc.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "overlay/map.h"

#define MAX_THREADS 8
#define MAX_REPEATS 5
#define CHUNK 1024           /* operations between two looks at the clock */
#define LEAF_BITS 8          /* as in map.c */
#define REQUEST_BITS 13      /* slots of a request that looks for runs */
#define BLOCKS UINT32_C (15) /* of a slot, those that are updated */

/* What the slots hold in the beginning. */
enum shape {
  EMPTY,  /* nothing */
  MIXED,  /* blocks in every state, at random */
  SPREAD, /* the same, and no two blocks lie in a row */
  WHOLE,  /* all allocated, 16 slots in one piece of the log */
  SPARSE, /* the same for one slot in 8 leaves, else nothing */
};

/* How it is measured. */
enum {
  AT_RANDOM = 1, /* else in sequence */
  FROZEN = 2,    /* the map has been frozen before */
  LOCKED = 4,    /* each operation holds the request lock */
  BESIDE = 8,    /* one more thread updates all slots */
};

struct worker;

struct measure {
  const char *name;
  uint64_t (*step) (struct worker *w); /* does some operations: how many; 0 if
                                        * none is left, or it has failed */
  enum shape shape;
  unsigned stride_bits; /* takes every 1 << stride_bits-th slot only */
  unsigned how;
};

/* A thread.  All slots are divided among those that measure. */
struct worker {
  const struct measure *measure;
  uint64_t (*step) (struct worker *w);
  uint64_t first;      /* index of its first slot; constant */
  unsigned bits;       /* it has 1 << bits slots; constant */
  uint64_t next;       /* how many it has taken, over and over */
  uint64_t nr_ops;     /* it has done */
  uint64_t begin, end; /* in ns */
  const char *failure; /* or NULL */
  pthread_t thread;
};

/* What the options choose. */
static unsigned slot_bits = 20; /* 128 GiB in blocks of 4 KiB */
static unsigned nr_repeats = MAX_REPEATS;
static uint64_t repeat_ns = 40000000;
static bool json;

static struct map map;
static struct frozen_map frozen;
static pthread_rwlock_t request_lock /* of the kind that overlay.c makes */
  = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;
static pthread_barrier_t barrier;

static void
require (bool holds, const char *failure)
{
  if (!holds) {
    (void) fprintf (stderr, "bench/map: %s\n", failure);
    exit (1);
  }
}

static uint64_t
now (void)
{
  struct timespec t = { .tv_sec = 0 };

  (void) clock_gettime (CLOCK_MONOTONIC, &t);
  return (uint64_t) t.tv_sec * 1000000000 + (uint64_t) t.tv_nsec;
}

/*----------------------------------------------------------------------
 * What slots hold
 */

/* What a slot holds: a block that is allocated, BASE + (its number ^ MIX) behind the log's
 * begin; those of MOVED somewhere else.
 */
struct content {
  uint64_t state;
  uint32_t base, mix;
  uint32_t moved, moved_base;
};

static uint32_t
address_of (const struct content *c, unsigned block)
{
  return (c->moved >> block & 1 ? c->moved_base : c->base) + (block ^ c->mix);
}

/* What slot NR holds after UPDATES: a write, a zero, a write, and so on. */
static struct content
content (const struct measure *m, uint64_t nr, uint64_t updates)
{
  const uint64_t bits = (nr + 1) * UINT64_C (0x9e3779b97f4a7c15);
  struct content c = { .base = (uint32_t) (nr + 1) * SLOT_BLOCKS };

  c.moved_base = c.base + (UINT32_C (2) << slot_bits) * SLOT_BLOCKS;
  c.mix = m->shape == SPREAD ? 3 : 0;
  if (m->shape == MIXED || m->shape == SPREAD)
    c.state = bitmap_set_zero (bits >> 32, (uint32_t) bits | BLOCKS);
  else if (m->shape == WHOLE
           || (m->shape == SPARSE && nr % (8 << LEAF_BITS) == 0)) {
    c.base += (uint32_t) nr / 16 * SLOT_BLOCKS;
    c.state = bitmap_set_allocated (0, UINT32_MAX);
  }

  if (updates > 0) {
    if (m->how & FROZEN)
      c.moved = BLOCKS;
    c.state = updates % 2 ? bitmap_set_allocated (c.state, BLOCKS)
                          : bitmap_set_zero (c.state, BLOCKS);
  }
  return c;
}

static struct slot_pair
look_up (const struct map *from, uint64_t nr)
{
  const struct slot *slot = map_find (from, nr);

  return slot ? slot_load (slot) : (struct slot_pair) { .where = 0 };
}

/* 0 if the first and the last one of those of BLOCKS that are allocated lie where they
 * should.
 */
static uint64_t
misplaced (struct slot_pair found, const struct content *c, uint32_t blocks)
{
  const uint32_t allocated = bitmap_allocated (found.state) & blocks;

  if (!allocated)
    return 0;
  if (!found.where)
    return 1;

  const unsigned first = (unsigned) __builtin_ctz (allocated);
  const unsigned last = SLOT_BLOCKS - 1 - (unsigned) __builtin_clz (allocated);

  return (slot_address (found, first) ^ address_of (c, first))
         | (slot_address (found, last) ^ address_of (c, last));
}

static uint64_t
difference (struct slot_pair found, const struct content *c)
{
  return misplaced (found, c, UINT32_MAX) | (found.state ^ c->state);
}

/* The I-th slot that a worker takes.  At random, they are a permutation of all. */
static uint64_t
slot_nr (const struct worker *w, uint64_t i)
{
  const unsigned stride_bits = w->measure->stride_bits;
  const uint64_t mask = (UINT64_C (1) << (slot_bits - stride_bits)) - 1;
  uint64_t index = w->first + (i & ((UINT64_C (1) << w->bits) - 1));

  if (w->measure->how & AT_RANDOM) {
    index = index * 0x9e3779b1 & mask;
    index ^= index >> 7;
    index = index * 0x85ebca6b & mask;
  }
  return index << stride_bits;
}

/*----------------------------------------------------------------------
 * What is measured
 */

static uint64_t
look (struct worker *w)
{
  const struct measure *m = w->measure;
  const uint64_t both = BLOCKS | (uint64_t) BLOCKS << 32;
  const uint64_t may_differ = m->how & BESIDE ? both : 0;
  uint64_t astray = 0, wrong = 0;
  int err = 0;

  for (unsigned i = 0; i < CHUNK; ++i) {
    const uint64_t nr = slot_nr (w, w->next + i + astray);
    const struct content expected = content (m, nr, 0);

    if (m->how & LOCKED)
      err |= pthread_rwlock_rdlock (&request_lock);
    const struct slot_pair found = look_up (&map, nr);

    astray = misplaced (found, &expected, ~BLOCKS);
    if (m->how & LOCKED)
      err |= pthread_rwlock_unlock (&request_lock);

    const uint64_t differ = found.state ^ expected.state;

    wrong |= astray | (differ == may_differ ? 0 : differ);
  }
  w->next += CHUNK;
  if (err)
    w->failure = "cannot take the request lock";
  else if (wrong)
    w->failure = "a slot is not as it was stored";
  return CHUNK;
}

/* Give a slot its NEXT content, which differs from the one that is FOUND in BLOCKS, as
 * change.c does it: those that become allocated, and those that are written to and shared,
 * get addresses.  Without slot locks: no two threads have the same slot.  False: no memory.
 */
static bool
set_slot (struct slot *slot, uint64_t nr, const struct content *next,
          uint32_t blocks, struct slot_pair *found)
{
  uint32_t to[SLOT_BLOCKS];
  struct slot_step step
    = { .found = slot_load (slot), .state = next->state, .to = to };
  const uint32_t shared = map_shared_blocks (&map, nr, step.found);

  step.fresh = blocks & bitmap_allocated (next->state)
               & (~bitmap_allocated (step.found.state) | shared);
  for (uint32_t left = step.fresh; left; left &= left - 1) {
    const unsigned block = (unsigned) __builtin_ctz (left);

    to[block] = address_of (next, block);
  }
  *found = step.found;
  if (slot_prepare (&map, &step) == -1)
    return false;
  slot_store (slot, &step);
  return true;
}

static uint64_t
update (struct worker *w)
{
  const struct measure *m = w->measure;
  const bool once = m->shape == EMPTY || m->how & FROZEN;
  const uint64_t left = (UINT64_C (1) << w->bits) - w->next;
  const uint64_t count = once ? MIN (left, CHUNK) : CHUNK;
  uint64_t astray = 0, wrong = 0;

  for (uint64_t i = w->next; i < w->next + count; ++i) {
    const uint64_t nr = slot_nr (w, i + astray), times = i >> w->bits;
    const struct content expected = content (m, nr, times);
    const struct content next = content (m, nr, times + 1);
    struct slot *slot = map_touch (&map, nr);
    struct slot_pair found;

    if (!slot || !set_slot (slot, nr, &next, BLOCKS, &found)) {
      w->failure = "out of memory for the map";
      return 0;
    }
    astray = misplaced (found, &expected, UINT32_MAX);
    wrong |= astray | (found.state ^ expected.state);
  }
  w->next += count;
  if (wrong)
    w->failure = "a slot to update is not as it was stored";
  return count;
}

static enum block_state
stored_state (const struct measure *m, uint64_t pos)
{
  return bitmap_state (content (m, pos / SLOT_BLOCKS, 0).state,
                       pos % SLOT_BLOCKS);
}

/* The length in blocks of the run that starts at block POS of the disk, and its
 * state.  This is find_run_of of look.c, which counts in bytes.
 */
static uint64_t
find_run (uint64_t pos, uint64_t end, enum block_state *state)
{
  const uint64_t begin = pos;
  uint64_t log_begin = 0;

  while (pos < end) {
    const uint64_t nr = pos / SLOT_BLOCKS;
    const struct slot *slot = map_find (&map, nr);
    enum block_state here = BLOCK_HOLE;
    uint32_t address = 0;
    uint64_t piece_end;

    if (slot) {
      const struct slot_pair pair = slot_load (slot);
      const unsigned block = pos % SLOT_BLOCKS;

      unsigned count = bitmap_run (pair.state, block);

      here = bitmap_state (pair.state, block);
      if (here == BLOCK_ALLOCATED)
        count = slot_in_row (pair, block, count, &address);
      piece_end = pos + count;
    }
    else
      piece_end = map_next (&map, nr) * SLOT_BLOCKS;

    if (pos == begin) {
      *state = here;
      log_begin = address;
    }
    else if (here != *state
             || (here == BLOCK_ALLOCATED
                 && address != log_begin + (pos - begin)))
      break;
    pos = MIN (piece_end, end);
  }
  return pos - begin;
}

/* All runs of one request.  The first and the last block of each are looked at. */
static uint64_t
walk (struct worker *w)
{
  uint64_t pos = slot_nr (w, w->next++) * SLOT_BLOCKS, count = 0;
  const uint64_t end = pos + ((uint64_t) SLOT_BLOCKS << REQUEST_BITS);

  for (; pos < end && !w->failure; ++count) {
    enum block_state state = BLOCK_HOLE;
    const uint64_t last = pos + find_run (pos, end, &state) - 1;

    if (state != stored_state (w->measure, pos)
        || state != stored_state (w->measure, last))
      w->failure = "a run is not as it was stored";
    pos = last + 1;
  }
  return count;
}

/* Have all updates come to their slots, and none to what is frozen? */
static bool
updates_are_right (const struct worker *w)
{
  const struct measure *m = w->measure;
  const uint64_t count = UINT64_C (1) << w->bits;
  uint64_t wrong = 0;

  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t nr = slot_nr (w, i);
    const uint64_t times = w->next / count + (i < w->next % count);
    const struct content now = content (m, nr, times);
    const struct content before = content (m, nr, 0);

    wrong |= difference (look_up (&map, nr), &now);
    if (m->how & FROZEN)
      wrong |= difference (look_up (&frozen.map, nr), &before);
  }
  return !wrong;
}

static const struct measure measures[] = {
  { "lookup in sequence", look, MIXED, 0, 0 },
  { "lookup at random", look, MIXED, 0, AT_RANDOM },
  { "lookup in sequence, request lock", look, MIXED, 0, LOCKED },
  { "lookup at random, request lock", look, MIXED, 0, AT_RANDOM | LOCKED },
  { "lookup at random beside updates", look, MIXED, 0, AT_RANDOM | BESIDE },
  { "lookup at random, spread", look, SPREAD, 0, AT_RANDOM },
  { "run of a block or two", walk, MIXED, REQUEST_BITS, 0 },
  { "run of a block or two, spread", walk, SPREAD, REQUEST_BITS, 0 },
  { "run of 16 slots", walk, WHOLE, REQUEST_BITS, 0 },
  { "run in a sparse map", walk, SPARSE, REQUEST_BITS, 0 },
  { "update in sequence", update, MIXED, 0, 0 },
  { "update at random", update, MIXED, 0, AT_RANDOM },
  { "update at random, spread", update, SPREAD, 0, AT_RANDOM },
  { "update in sequence, new map", update, EMPTY, 0, 0 },
  { "update that makes a node", update, EMPTY, LEAF_BITS, AT_RANDOM },
  { "update in sequence, after a freeze", update, MIXED, 0, FROZEN },
  { "update that copies a node", update, MIXED, LEAF_BITS,
    AT_RANDOM | FROZEN },
};

/*----------------------------------------------------------------------
 * Measuring
 */

static void
make_map (const struct measure *m)
{
  /* So that memory comes from the kernel again, as in a server that grows. */
  malloc_trim (0);
  map_init (&map, UINT64_C (1) << slot_bits);
  for (uint64_t nr = 0; nr < map.nr_slots; ++nr) {
    const struct content c = content (m, nr, 0);

    if (c.state) {
      struct slot *slot = map_touch (&map, nr);
      struct slot_pair found;

      require (slot && set_slot (slot, nr, &c, UINT32_MAX, &found),
               "out of memory for the map");
    }
  }
  if (m->how & FROZEN)
    map_freeze (&map, &frozen);
}

static void *
run_worker (void *arg)
{
  struct worker *w = arg;
  const int err = pthread_barrier_wait (&barrier);
  uint64_t count;

  if (err && err != PTHREAD_BARRIER_SERIAL_THREAD)
    w->failure = "cannot wait for the other threads";
  w->begin = now ();
  do {
    count = w->step (w);
    w->nr_ops += count;
    w->end = now ();
  } while (count > 0 && !w->failure && w->end - w->begin < repeat_ns);
  return NULL;
}

/* Millions of operations in a second, of all threads. */
static double
run_once (const struct measure *m, unsigned nr_threads)
{
  const unsigned nr_workers = nr_threads + (m->how & BESIDE ? 1 : 0);
  const unsigned bits = slot_bits - m->stride_bits;
  const unsigned share = bits - (unsigned) __builtin_ctz (nr_threads);
  struct worker workers[MAX_THREADS + 1];
  uint64_t begin = UINT64_MAX, end = 0, nr_ops = 0;

  make_map (m);
  require (pthread_barrier_init (&barrier, NULL, nr_workers) == 0,
           "cannot make a barrier");
  for (unsigned i = 0; i < nr_workers; ++i) {
    struct worker *w = &workers[i];

    *w = (struct worker) { .measure = m, .step = update, .bits = bits };
    if (i < nr_threads) {
      w->step = m->step;
      w->first = (uint64_t) i << share;
      w->bits = share;
    }
    require (pthread_create (&w->thread, NULL, run_worker, w) == 0,
             "cannot start a thread");
  }
  for (unsigned i = 0; i < nr_workers; ++i)
    require (pthread_join (workers[i].thread, NULL) == 0,
             "cannot wait for a thread");
  require (pthread_barrier_destroy (&barrier) == 0, "a barrier is in use");

  for (unsigned i = 0; i < nr_workers; ++i) {
    const struct worker *w = &workers[i];

    require (!w->failure, w->failure);
    require (w->step != update || updates_are_right (w),
             "not all updates are there");
    if (i < nr_threads) {
      begin = MIN (begin, w->begin);
      end = MAX (end, w->end);
      nr_ops += w->nr_ops;
    }
  }

  if (m->how & FROZEN) {
    map_unlink (&map, &frozen);
    map_release (&frozen);
  }
  map_destroy (&map);
  return (double) nr_ops * 1000 / (double) (end - begin);
}

static int
compare (const void *a, const void *b)
{
  const double x = *(const double *) a, y = *(const double *) b;

  return (x > y) - (x < y);
}

static void
run (const struct measure *m, unsigned nr_threads)
{
  double mops[MAX_REPEATS];

  for (unsigned i = 0; i < nr_repeats; ++i)
    mops[i] = run_once (m, nr_threads);
  qsort (mops, nr_repeats, sizeof mops[0], compare);

  const double median = mops[nr_repeats / 2];
  const double ns = nr_threads * 1000 / median;

  if (json)
    printf ("%s{\"name\": \"%s\", \"threads\": %u, \"ns\": %.2f, "
            "\"mops\": %.3f}",
            m == measures && nr_threads == 1 ? "[" : ",\n ", m->name,
            nr_threads, ns, median);
  else
    printf ("%-36s %7u %9.1f %9.2f\n", m->name, nr_threads, ns, median);
}

int
main (int argc, char *argv[])
{
  for (int i = 1; i < argc; ++i)
    if (strcmp (argv[i], "--json") == 0)
      json = true;
    else {
      require (strcmp (argv[i], "--quick") == 0,
               "usage: bench/map [--json] [--quick]");
      slot_bits = 16;
      nr_repeats = 3;
      repeat_ns = 2000000;
    }

  if (!json)
    printf ("%-36s %7s %9s %9s\n", "measure", "threads", "ns", "Mop/s");
  for (size_t i = 0; i < sizeof measures / sizeof measures[0]; ++i)
    for (unsigned nr_threads = 1; nr_threads <= MAX_THREADS; nr_threads *= 2)
      run (&measures[i], nr_threads);
  if (json)
    printf ("]\n");
  require (fflush (stdout) == 0 && !ferror (stdout),
           "cannot write to standard output");
  return 0;
}
