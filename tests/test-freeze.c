/* SPDX-License-Identifier: BSD-3-Clause */

/* Frozen maps of an overlay without a server: interleavings that are forced, calls
 * that fail one after the other, what the file holds, and many threads.
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "bitmap.h"
#include "blk.h"
#include "common/cleanup.h"
#include "faults.h"
#include "overlay/giveback.h"
#include "nbdkit-stubs.h"
#include "overlay/private.h"

#define BLOCK UINT32_C (4096)
#define SLOT (32 * BLOCK)
/* Four slots and a bit; the last block is not a whole one. */
#define SIZE (4 * SLOT + 3 * BLOCK + 777)
/* Every other 20 blocks of the base are a hole. */
#define BASE_EXTENT (20 * BLOCK)

static uint8_t base_bytes[SIZE];
static struct fake_base fake;
static struct base base;
static struct overlay *overlay;
static int err;

static struct overlay_options options;

/* A frozen map that is held, what it must hold (ONE, or where a request was under way
 * when it was frozen, perhaps OTHER), and what it says of its extents.
 */
#define MAX_EXTENTS 200

struct extents {
  size_t count;
  struct nbdkit_extent list[MAX_EXTENTS];
};

struct held {
  struct frozen_map *frozen;
  uint8_t one[SIZE], other[SIZE];
  struct extents extents;
};

/* Those that are held come first, in the order in which they were frozen. */
#define MAX_HELD 6

static struct held all_held[MAX_HELD], *held[MAX_HELD];
static unsigned nr_held;

static void
make_overlay (void)
{
  options.dir = "/var/tmp";
  options.block_size = BLOCK;
  overlay = overlay_new (SIZE, &options);
  assert_non_null (overlay);
  err = 0;
  for (nr_held = MAX_HELD; nr_held > 0; --nr_held)
    held[nr_held - 1] = &all_held[nr_held - 1];
  nr_errors = 0;
  nr_punches = 0;
}

static int
set_up (void **state)
{
  (void) state;
  for (unsigned i = 0; i < SIZE; ++i)
    base_bytes[i]
      = i / BASE_EXTENT % 2 ? 0 : (uint8_t) (128 + i % 127); /* never 0 */
  fake = (struct fake_base) {
    .bytes = base_bytes,
    .size = SIZE,
    .can_extents = true,
    .extent_size = BASE_EXTENT,
    .can_cache = NBDKIT_CACHE_NATIVE,
  };
  assert_int_equal (base_init (&base, fake_next (&fake)), 0);
  options = (struct overlay_options) { .block_size = 0 };
  make_overlay ();
  return 0;
}

static void
release_all (void)
{
  while (nr_held > 0)
    overlay_release (overlay, held[--nr_held]->frozen);
}

static int
tear_down (void **state)
{
  (void) state;
  fail_calls_from (0, 0);
  short_transfers = fail_punches = false;
  before_punch = NULL;
  release_all ();
  overlay_free (overlay);
  overlay = NULL;
  return 0;
}

/* The same options again. */
static void
start_over (void)
{
  tear_down (NULL);
  make_overlay ();
}

#define WITH_OVERLAY(test)                                                    \
  cmocka_unit_test_setup_teardown (test, set_up, tear_down)

/* What the live map has of slot NR. */
static struct slot_pair
live_slot (uint64_t nr)
{
  HOLD_SHARED (&overlay->request_lock);
  const struct slot *slot = map_find (&overlay->map, nr);

  return slot ? slot_load (slot) : (struct slot_pair) { .place = 0 };
}

/*----------------------------------------------------------------------
 * Operations, as data
 */

enum kind {
  WRITE,
  ZERO,
  READ_AND_KEEP,
  CACHE_AND_KEEP,
  /* These change nothing that can be read. */
  READ,
  READ_FROZEN, /* of the oldest that is held */
  FREEZE,
  RELEASE_OLDEST,
  RELEASE_NEWEST,
  CLOSE,
};

struct op {
  enum kind kind;
  uint32_t count;
  uint64_t offset;
  uint8_t fill; /* of a write */
};

/* Lists of them end with one of no bytes. */
#define END                                                                   \
  {                                                                           \
    WRITE, 0, 0, 0                                                            \
  }

static bool
is_end (const struct op *op)
{
  return op->kind == WRITE && op->count == 0;
}

/* What the operation does to a disk in memory. */
static void
model_op (const struct op *op, uint8_t *model)
{
  if (op->kind == WRITE)
    memset (model + op->offset, op->fill, op->count);
  else if (op->kind == ZERO)
    memset (model + op->offset, 0, op->count);
}

/* Whoever finds something wrong in a thread cannot use cmocka's functions. */
static void
die (const char *what, int error)
{
  fprintf (stderr, "%s: error %d (last reported: %s)\n", what, error,
           last_error);
  abort ();
}

static void
read_extents (const struct frozen_map *frozen, struct extents *extents)
{
  struct nbdkit_extents *x = nbdkit_extents_new (0, SIZE);
  int my_err;

  if (!x)
    die ("nbdkit_extents_new", ENOMEM);
  /* The end of one type for nbdkit is that of its run; a read of all asks in pieces. */
  if (blk_extents (frozen_disk (overlay, frozen), &base, SIZE, 0, 0, x,
                   &my_err)
      == -1)
    die ("blk_extents", my_err);
  extents->count = nbdkit_extents_count (x);
  if (extents->count > MAX_EXTENTS)
    die ("extents", 0);
  for (size_t i = 0; i < extents->count; ++i)
    extents->list[i] = nbdkit_get_extent (x, i);
  nbdkit_extents_free (x);
}

/* Freeze; MODEL is what that must be, or OTHER if it is not NULL. */
static void
freeze_as (const uint8_t *model, const uint8_t *other)
{
  if (nr_held == MAX_HELD)
    die ("held", 0);

  struct held *h = held[nr_held];
  h->frozen = overlay_freeze (overlay);
  if (!h->frozen)
    die ("overlay_freeze", errno);
  memcpy (h->one, model, SIZE);
  memcpy (h->other, other ? other : model, SIZE);
  read_extents (h->frozen, &h->extents);
  nr_held++;
}

static void
release_nr (unsigned i)
{
  struct held *h = held[i];

  nr_held--;
  memmove (&held[i], &held[i + 1], (nr_held - i) * sizeof held[0]);
  held[nr_held] = h;
  overlay_release (overlay, h->frozen);
}

/* Run it, with BUF of SIZE bytes; MODEL and OTHER are for who freezes. */
static int
run_op (uint8_t *buf, const struct op *op, const uint8_t *model,
        const uint8_t *other, int *op_err)
{
  switch (op->kind) {
  case WRITE:
    memset (buf, op->fill, op->count);
    return blk_write (overlay, &base, buf, op->count, op->offset, op_err);
  case ZERO:
    return blk_zero (overlay, &base, ZERO_ANY, op->count, op->offset, op_err);
  case READ_AND_KEEP:
    return blk_read (live_disk (overlay), &base, ON_READ_KEEP, buf, op->count,
                     op->offset, op_err);
  case CACHE_AND_KEEP:
    return blk_cache (overlay, &base, ON_CACHE_KEEP, op->count, op->offset,
                      op_err);
  case READ:
    return blk_read (live_disk (overlay), &base, ON_READ_PASS, buf, op->count,
                     op->offset, op_err);
  case READ_FROZEN:
    return blk_read (frozen_disk (overlay, held[0]->frozen), &base,
                     ON_READ_PASS, buf, op->count, op->offset, op_err);
  case FREEZE:
    freeze_as (model, other);
    return 0;
  case RELEASE_OLDEST:
    release_nr (0);
    return 0;
  case RELEASE_NEWEST:
    release_nr (nr_held - 1);
    return 0;
  case CLOSE:
  default:
    overlay_close (overlay);
    return 0;
  }
}

/* Run it now, on the disk and on MODEL. */
static void
do_op (struct op op, uint8_t *model)
{
  static uint8_t buf[SIZE];

  assert_int_equal (run_op (buf, &op, model, NULL, &err), 0);
  model_op (&op, model);
}

static void
do_ops (const struct op *op, uint8_t *model)
{
  for (; !is_end (op); ++op)
    do_op (*op, model);
}

static void
check_bytes (const char *what, const uint8_t *got, const uint8_t *expected)
{
  if (memcmp (got, expected, SIZE) == 0)
    return;
  for (unsigned i = 0; i < SIZE; ++i)
    if (got[i] != expected[i])
      fail_msg ("%s, byte %u (block %u): expected %u, got %u", what, i,
                i / BLOCK, expected[i], got[i]);
}

static void
check_disk (const uint8_t *model)
{
  static uint8_t bytes[SIZE];

  assert_int_equal (
    blk_read (live_disk (overlay), &base, ON_READ_PASS, bytes, SIZE, 0, &err),
    0);
  check_bytes ("live disk", bytes, model);
}

static void
check_held (void)
{
  static uint8_t bytes[SIZE];
  static struct extents extents;

  for (unsigned i = 0; i < nr_held; ++i) {
    struct held *h = held[i];

    assert_int_equal (blk_read (frozen_disk (overlay, h->frozen), &base,
                                ON_READ_PASS, bytes, SIZE, 0, &err),
                      0);
    if (memcmp (bytes, h->other, SIZE) == 0)
      memcpy (h->one, h->other, SIZE);
    check_bytes ("frozen map", bytes, h->one);
    memcpy (h->other, h->one, SIZE); /* and so it has to stay */

    read_extents (h->frozen, &extents);
    assert_int_equal (extents.count, h->extents.count);
    for (size_t j = 0; j < extents.count; ++j) {
      const struct nbdkit_extent *x = &extents.list[j];

      assert_true (x->offset == h->extents.list[j].offset
                   && x->length == h->extents.list[j].length
                   && x->type == h->extents.list[j].type);
      if (x->type & NBDKIT_EXTENT_ZERO)
        assert_true (
          bytes[x->offset] == 0
          && memcmp (&bytes[x->offset], &bytes[x->offset + 1], x->length - 1)
               == 0);
    }
  }
}

/*----------------------------------------------------------------------
 * What the file holds
 */

static bool
has_data (uint64_t offset, uint64_t count)
{
  const off_t data = lseek (overlay->store.file.fd, (off_t) offset, SEEK_DATA);

  return data >= 0 && (uint64_t) data < offset + count;
}

/* No request is under way: each place below the end of what was given out is a slot's
 * (the same one's in all maps that are held) or free, and has bytes exactly in those
 * blocks that are allocated in one of these maps.  LAX is what may be otherwise.
 */
enum {
  LOST_PLACES = 1, /* there was no memory to remember that they are free */
  ZERO_BLOCKS
  = 2, /* in blocks that are zero there may be bytes: a write that had looked
                    * before the zero, and wrote after its punch */
};

static void
add_blocks (const struct map *map, uint32_t *blocks, uint64_t *owner)
{
  for (uint64_t nr = map_next (map, 0); nr < map->nr_slots;
       nr = map_next (map, nr + 1)) {
    const struct slot_pair pair = slot_load (map_find (map, nr));

    if (pair.place == 0) {
      assert_int_equal (bitmap_allocated (pair.state), 0);
      continue;
    }
    assert_true (pair.place < overlay->places.next);
    assert_true (owner[pair.place] == 0 || owner[pair.place] == nr + 1);
    owner[pair.place] = nr + 1;
    blocks[pair.place] |= bitmap_allocated (pair.state);
  }
}

static void
check_space (unsigned lax)
{
  const struct places *places = &overlay->places;
  const uint64_t end = places->next;
  const uint64_t bs = block_size (overlay);
  CLEANUP_FREE uint32_t *blocks = calloc (end, sizeof *blocks);
  CLEANUP_FREE uint64_t *owner = calloc (end, sizeof *owner);
  uint64_t nr_free = 0, needed = 0;

  assert_true (blocks && owner);
  if (overlay->store.file.fd < 0)
    return;
  {
    HOLD_SHARED (&overlay->request_lock);
    add_blocks (&overlay->map, blocks, owner);
  }
  for (const struct frozen_map *f = overlay->map.newest; f; f = f->older)
    add_blocks (&f->map, blocks, owner);

  for (uint64_t place = 1; place < end; ++place) {
    const bool is_free = place / 64 < places->nr_free_words
                         && (places->free_words[place / 64] >> place % 64 & 1);

    nr_free += is_free;
    if (is_free && owner[place])
      fail_msg ("place %u is free and slot %u's", (unsigned) place,
                (unsigned) owner[place] - 1);
    if (!is_free && !owner[place] && !(lax & LOST_PLACES))
      fail_msg ("place %u was not given back", (unsigned) place);
    for (unsigned i = 0; i < SLOT_BLOCKS; ++i) {
      const bool expected = blocks[place] >> i & 1;

      needed += expected;
      if (owner[place] && !expected && (lax & ZERO_BLOCKS))
        continue;
      if (has_data ((place << overlay->slot_shift) + i * bs, bs) != expected)
        fail_msg ("place %u (slot %d), block %u: %s", (unsigned) place,
                  (int) owner[place] - 1, i,
                  expected ? "no bytes" : "bytes that nobody needs");
    }
  }
  assert_true (nr_free == places->nr_free);
  assert_false (has_data (end << overlay->slot_shift, UINT64_C (1) << 40));

  /* The file system itself needs a few. */
  if (!(lax & ZERO_BLOCKS))
    assert_true (bytes_of_last_file () <= needed * bs + 16 * 4096);
}

/* Release all, in the order of age or the other one: then the file has what the live
 * disk needs and no more.
 */
static void
check_space_when_released (const uint8_t *model, bool oldest_first)
{
  check_held ();
  check_space (0);
  while (nr_held > 0) {
    release_nr (oldest_first ? 0 : nr_held - 1);
    check_held ();
    check_space (0);
  }
  check_disk (model);
}

/*----------------------------------------------------------------------
 * Something else happens in the middle of a request
 */

static struct {
  const struct op *ops;
  const struct op *outer; /* the request that is interrupted */
  uint8_t model[SIZE];    /* without it */
  pthread_t thread;
  bool started;
  bool lock_was_held; /* the request lock, when it was interrupted */
  bool excludes;      /* an operation takes that lock exclusively */
  bool broke_in;      /* and yet was done while it was held */
  atomic_bool done;
} action;

static void *
run_action (void *arg)
{
  static uint8_t buf[SIZE], with_outer[SIZE];

  (void) arg;
  for (const struct op *op = action.ops; !is_end (op); ++op) {
    int op_err = 0;

    memcpy (with_outer, action.model, SIZE);
    model_op (action.outer, with_outer);
    if (run_op (buf, op, action.model, with_outer, &op_err) == -1)
      die ("operation in between", op_err);
    model_op (op, action.model);
  }
  action.done = true;
  return NULL;
}

/* In a thread of its own, as the interrupted request may hold locks that it has to wait
 * for.  Where it need not wait it gets the time to be done.
 */
static void
start_action (void *arg)
{
  unsigned patience = 30;

  (void) arg;
  if (pthread_rwlock_trywrlock (&overlay->request_lock.pthread) == 0)
    pthread_rwlock_unlock (&overlay->request_lock.pthread);
  else {
    action.lock_was_held = true;
    if (action.excludes)
      patience = 5;
  }

  if (pthread_create (&action.thread, NULL, run_action, NULL) != 0)
    die ("pthread_create", 0);
  action.started = true;
  for (unsigned i = 0; i < patience && !action.done; ++i)
    usleep (200);
  action.broke_in = action.excludes && action.lock_was_held && action.done;
}

/* The same in a read of the base: the request holds no lock (rule 3), so that nothing is
 * waited for and all is done before the read goes on.
 */
static void
finish_action (void *arg)
{
  start_action (arg);
  while (!action.done)
    usleep (200);
}

static bool
excludes (const struct op *op)
{
  for (; !is_end (op); ++op)
    if (op->kind >= FREEZE)
      return true;
  return false;
}

/* Where a request is interrupted. */
enum where {
  AT_MUTEX,     /* in front of the n-th mutex that it takes */
  AT_CALL,      /* in front of the n-th system call or look at the map */
  AT_BASE_READ, /* in its read of the base */
  NR_WHERE,
};

/* Do BEFORE, and then OUTER, which is interrupted by OPS at each of its steps, one
 * after the other.  They overlap in no byte, unless both are zeroes; and whoever
 * freezes sees the outer one wholly or not at all.  Afterwards the disk and all
 * frozen maps are right, and when these are released, so is the space that the file
 * takes.
 */
static void
interrupt_every_step (const struct op *before, const struct op *outer,
                      const struct op *ops)
{
  static uint8_t model[SIZE], got[SIZE], without[SIZE];
  unsigned nr_interrupted = 0;

  for (enum where where = 0; where < NR_WHERE; ++where)
    for (int n = 1;; ++n) {
      start_over ();
      memcpy (model, base_bytes, SIZE);
      do_ops (before, model);
      memcpy (without, model, SIZE);

      memset (&action, 0, sizeof action);
      action.ops = ops;
      action.outer = outer;
      action.excludes = excludes (ops);
      memcpy (action.model, model, SIZE);
      switch (where) {
      case AT_MUTEX:
        interrupt_mutex (n, start_action, NULL);
        break;
      case AT_CALL:
        interrupt_call (n, start_action, NULL);
        break;
      case AT_BASE_READ:
      default:
        fake.during_read = finish_action;
        break;
      }

      memcpy (got, model, SIZE);
      assert_int_equal (run_op (got + outer->offset, outer, NULL, NULL, &err),
                        0);
      model_op (outer, model);
      const bool interrupted
        = where == AT_BASE_READ ? action.started : call_was_interrupted ();
      if (action.started)
        pthread_join (action.thread, NULL);
      fake.during_read = NULL;
      if (!interrupted)
        break;
      nr_interrupted++;
      assert_false (action.broke_in);
      for (const struct op *op = ops; !is_end (op); ++op)
        model_op (op, model);

      if (outer->kind == READ || outer->kind == READ_AND_KEEP)
        for (uint64_t i = outer->offset; i < outer->offset + outer->count; ++i)
          if (got[i] != without[i] && got[i] != model[i])
            fail_msg ("read byte %u: expected %u or %u, got %u", (unsigned) i,
                      without[i], model[i], got[i]);
      if (outer->kind == READ_FROZEN)
        for (uint64_t i = outer->offset; i < outer->offset + outer->count; ++i)
          assert_int_equal (got[i], held[0]->one[i]);

      check_disk (model);
      check_space_when_released (model, n % 2);
      if (where == AT_BASE_READ)
        break;
    }
  assert_true (nr_interrupted > 1);
}

/* A write looks at slots that are all allocated and not shared, and so needs no slot
 * lock; and then, before it writes, the disk is frozen.
 */
static void
frozen_between_a_look_and_its_write (void **state)
{
  static const struct op before[] = {
    { WRITE, 2 * SLOT, SLOT, 'b' },
    END,
  };
  static const struct op outer[] = {
    { WRITE, SLOT, SLOT + SLOT / 2 + 100, 'o' },
    { WRITE, 10, SLOT + 5, 'o' },
    { WRITE, BLOCK, 2 * SLOT - BLOCK, 'o' },
  };
  static const struct op once[] = { { FREEZE, 0, 0, 0 }, END };
  static const struct op twice[] = {
    { FREEZE, 0, 0, 0 },
    { WRITE, 100, SLOT + 3 * BLOCK, 'i' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static const struct op and_released[] = {
    { FREEZE, 0, 0, 0 },
    { RELEASE_NEWEST, 0, 0, 0 },
    END,
  };

  (void) state;
  for (unsigned i = 0; i < 3; ++i) {
    interrupt_every_step (before, &outer[i], once);
    interrupt_every_step (before, &outer[i], twice);
    interrupt_every_step (before, &outer[i], and_released);
  }
}

/* The same of requests that need slot locks, or the base. */
static void
frozen_in_the_middle_of_any_request (void **state)
{
  static const struct op before[] = {
    { WRITE, SLOT + 5 * BLOCK, 3 * BLOCK, 'b' },
    { ZERO, 3 * BLOCK, 10 * BLOCK, 0 },
    END,
  };
  static const struct op before_frozen[] = {
    { WRITE, SLOT + 5 * BLOCK, 3 * BLOCK, 'b' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 3 * BLOCK, 10 * BLOCK, 0 },
    END,
  };
  static const struct op outer[] = {
    { WRITE, SLOT + 2 * BLOCK, BLOCK + 100, 'o' },
    { WRITE, 100, 2 * BLOCK + 100, 'o' },
    { WRITE, 100, 11 * BLOCK + 100, 'o' },
    { WRITE, SIZE - 777 - 3 * SLOT, 3 * SLOT, 'o' },
    { ZERO, SLOT + 2 * BLOCK, BLOCK + 100, 0 },
    { ZERO, 100, 4 * BLOCK + 100, 0 },
    { ZERO, SIZE - SLOT, SLOT, 0 },
    { READ_AND_KEEP, 2 * SLOT, 100, 0 },
    { CACHE_AND_KEEP, 2 * SLOT, 100, 0 },
  };
  static const struct op once[] = { { FREEZE, 0, 0, 0 }, END };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i) {
    interrupt_every_step (before, &outer[i], once);
    interrupt_every_step (before_frozen, &outer[i], once);
  }
}

/* A release while another frozen map has the same place, or the same place with
 * blocks that are zero meanwhile; in front of each step of what changes that slot.
 */
static void
released_while_another_one_has_the_place (void **state)
{
  static const struct op before[] = {
    { WRITE, 2 * SLOT, 0, 'b' },       { FREEZE, 0, 0, 0 },
    { ZERO, 3 * BLOCK, 4 * BLOCK, 0 }, { FREEZE, 0, 0, 0 },
    { ZERO, 3 * BLOCK, SLOT, 0 },      END,
  };
  static const struct op outer[] = {
    { WRITE, 100, BLOCK + 100, 'o' },
    { WRITE, SLOT, SLOT / 2, 'o' },
    { WRITE, SLOT, SLOT, 'o' },
    { WRITE, 10, 5 * BLOCK + 10, 'o' },
    { ZERO, 2 * BLOCK, SLOT - BLOCK - 100, 0 },
    { ZERO, SLOT, 0, 0 },
  };
  static const struct op ops[][4] = {
    { { RELEASE_OLDEST, 0, 0, 0 }, END },
    { { RELEASE_NEWEST, 0, 0, 0 }, END },
    { { RELEASE_OLDEST, 0, 0, 0 }, { RELEASE_OLDEST, 0, 0, 0 }, END },
    { { RELEASE_NEWEST, 0, 0, 0 }, { RELEASE_NEWEST, 0, 0, 0 }, END },
    { { RELEASE_NEWEST, 0, 0, 0 }, { FREEZE, 0, 0, 0 }, END },
    { { RELEASE_OLDEST, 0, 0, 0 },
      { RELEASE_OLDEST, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'i' },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      interrupt_every_step (before, &outer[i], ops[j]);
}

/* Two requests copy one node: for two slots of it, or for the same one. */
static void
two_requests_copy_one_node (void **state)
{
  static const struct op before[] = {
    { WRITE, 3 * SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static const struct op outer[] = {
    { WRITE, 100, BLOCK + 100, 'o' },
    { ZERO, 5 * BLOCK, SLOT + 2 * BLOCK, 0 },
    { CACHE_AND_KEEP, SIZE - 4 * SLOT, 4 * SLOT, 0 },
  };
  static const struct op ops[][4] = {
    { { WRITE, 100, 2 * SLOT + 100, 'i' }, END },
    { { WRITE, 100, 20 * BLOCK, 'i' }, END },
    { { ZERO, 100, SLOT + 20 * BLOCK, 0 }, END },
    { { WRITE, 100, 2 * SLOT + 100, 'i' },
      { FREEZE, 0, 0, 0 },
      { WRITE, 100, 2 * SLOT + 20 * BLOCK, 'i' },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      interrupt_every_step (before, &outer[i], ops[j]);
}

/* A zero in a shared slot, and a write that moves this slot. */
static void
zero_races_a_move (void **state)
{
  static const struct op before[] = {
    { WRITE, 2 * SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static const struct op zeroes[] = {
    { ZERO, 100, BLOCK + 100, 0 },
    { ZERO, BLOCK, BLOCK, 0 },
    { ZERO, SLOT, SLOT / 2 + 100, 0 },
    { ZERO, 4 * BLOCK, BLOCK + 100, 0 },
  };
  static const struct op moves[][4] = {
    { { WRITE, 100, BLOCK + 300, 'm' }, END },
    { { WRITE, 5 * BLOCK, 8 * BLOCK, 'm' }, END },
    { { WRITE, 100, 8 * BLOCK, 'm' }, { RELEASE_NEWEST, 0, 0, 0 }, END },
    { { WRITE, 100, 8 * BLOCK, 'm' }, { FREEZE, 0, 0, 0 }, END },
    { { ZERO, BLOCK, 9 * BLOCK, 0 }, { RELEASE_NEWEST, 0, 0, 0 }, END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof zeroes / sizeof zeroes[0]; ++i)
    for (unsigned j = 0; j < sizeof moves / sizeof moves[0]; ++j) {
      const struct op zero_inside[] = { zeroes[i], END };

      /* The first move's bytes are part of the other zeroes'. */
      if (j == 0 && i > 0)
        continue;
      interrupt_every_step (before, &zeroes[i], moves[j]);
      interrupt_every_step (before, &moves[j][0], zero_inside);
    }
}

/* Requests and freezes in front of each step of a release: between the walk, which
 * finds blocks that were zeroed while they were shared, and their punch, these are
 * written again, in place, and perhaps frozen.
 */
static void
changed_in_the_middle_of_a_release (void **state)
{
  static const struct op before[] = {
    { WRITE, 3 * SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 3 * BLOCK, 4 * BLOCK, 0 },
    { WRITE, 100, 2 * SLOT + 100, 'm' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 3 * BLOCK, SLOT + 10 * BLOCK, 0 },
    { WRITE, 100, 2 * SLOT + 200, 'm' },
    END,
  };
  static const struct op before_one[] = {
    { WRITE, 3 * SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 3 * BLOCK, 4 * BLOCK, 0 },
    { ZERO, 3 * BLOCK, SLOT + 10 * BLOCK, 0 },
    { WRITE, 100, 2 * SLOT + 100, 'm' },
    END,
  };
  static const struct op oldest = { RELEASE_OLDEST, 0, 0, 0 };
  static const struct op newest = { RELEASE_NEWEST, 0, 0, 0 };
  static const struct op ops[][5] = {
    { { WRITE, BLOCK, 5 * BLOCK, 'i' }, END },
    { { WRITE, 2 * SLOT, 3 * BLOCK + 100, 'i' }, END },
    { { WRITE, 2 * BLOCK, 5 * BLOCK, 'i' },
      { FREEZE, 0, 0, 0 },
      { ZERO, BLOCK, 5 * BLOCK, 0 },
      END },
    { { FREEZE, 0, 0, 0 }, { WRITE, SLOT, 5 * BLOCK, 'i' }, END },
    { { FREEZE, 0, 0, 0 },
      { WRITE, 100, SLOT + 11 * BLOCK, 'i' },
      { FREEZE, 0, 0, 0 },
      { WRITE, 100, SLOT + 11 * BLOCK, 'j' },
      END },
    { { ZERO, SLOT, 100, 0 }, { WRITE, SLOT, 3 * SLOT, 'i' }, END },
    { { FREEZE, 0, 0, 0 },
      { RELEASE_NEWEST, 0, 0, 0 },
      { WRITE, SLOT, 2 * SLOT, 'i' },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i) {
    interrupt_every_step (before, &oldest, ops[i]);
    interrupt_every_step (before, &newest, ops[i]);
    interrupt_every_step (before_one, &oldest, ops[i]);
  }
}

/* A release is about to look whether blocks that were zeroed are so still, and a write
 * has put bytes into them, but not yet said so.  Only the slot lock keeps these two
 * apart.
 */
static const struct op half_done = { WRITE, 2 * BLOCK, SLOT - BLOCK, 'i' };
static int half_done_at;
static pthread_t half_done_thread;
static bool half_done_started;
static atomic_bool is_half_done, is_all_done;

static void
stay_half_done (void *arg)
{
  (void) arg;
  is_half_done = true;
  usleep (3000);
}

static void *
write_half_done (void *arg)
{
  static uint8_t buf[2 * BLOCK];
  int my_err = 0;

  (void) arg;
  if (run_op (buf, &half_done, NULL, NULL, &my_err) == -1)
    die ("half a write", my_err);
  is_all_done = true;
  return NULL;
}

static void
start_half_done (void *arg)
{
  /* From here on the other thread's calls count. */
  interrupt_call (half_done_at, stay_half_done, NULL);
  if (pthread_create (&half_done_thread, NULL, write_half_done, arg) != 0)
    die ("pthread_create", 0);
  half_done_started = true;
  for (unsigned i = 0; i < 20 && !is_half_done && !is_all_done; ++i)
    usleep (200);
}

static void
released_while_a_write_is_half_done (void **state)
{
  /* The slots do not touch in the file, so that each is a write of its own. */
  static const struct op before[] = {
    { WRITE, SLOT, SLOT, 'b' },
    { WRITE, SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 4 * BLOCK, SLOT - 2 * BLOCK, 0 },
    END,
  };
  static uint8_t model[SIZE];

  (void) state;
  for (half_done_at = 1; half_done_at < 16; ++half_done_at)
    for (int n = 1;; ++n) {
      start_over ();
      memcpy (model, base_bytes, SIZE);
      do_ops (before, model);
      is_half_done = is_all_done = half_done_started = false;
      interrupt_call (n, start_half_done, NULL);
      release_all ();
      if (half_done_started)
        pthread_join (half_done_thread, NULL);
      (void) call_was_interrupted (); /* it need not have come */
      if (!half_done_started) {
        assert_true (n > 1);
        break;
      }
      model_op (&half_done, model);
      check_disk (model);
      check_space (0);
    }
}

/* A place that is given back is punched before anybody else can take it. */
static void *
write_slot (void *arg)
{
  static uint8_t buf[SLOT];
  int my_err = 0;

  memset (buf, 'i', sizeof buf);
  if (blk_write (overlay, &base, buf, SLOT, 3 * SLOT, &my_err) == -1)
    die ("write in front of a punch", my_err);
  return arg;
}

/* In a thread of its own, as who punches holds the release lock. */
static void
write_elsewhere (void)
{
  pthread_t thread;

  if (pthread_create (&thread, NULL, write_slot, NULL) != 0)
    die ("pthread_create", 0);
  pthread_join (thread, NULL);
}

static void
written_in_front_of_the_punch_of_a_place (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  /* The place is in the middle of the file, or its last one. */
  for (unsigned last = 0; last < 2; ++last) {
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_op ((struct op) { WRITE, SLOT, 0, 'b' }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { WRITE, SLOT, 0, 'c' }, model);
    if (last) {
      do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
      release_nr (0);
      do_op ((struct op) { WRITE, SLOT, 0, 'd' }, model);
    }
    before_punch = write_elsewhere;
    release_nr (0);
    assert_null (before_punch);
    memset (model + 3 * SLOT, 'i', SLOT);
    check_disk (model);
    check_space (0);
  }
}

/* Blocks of a shared slot that are zeroed are punched when the last frozen map that
 * has them is released, whichever that is.
 */
static void
zeroed_while_shared_is_punched_in_the_end (void **state)
{
  static uint8_t model[SIZE];

  for (unsigned newest_first = 0; newest_first < 2; ++newest_first)
    for (unsigned when = 0; when < 3; ++when) {
      tear_down (state);
      set_up (state);
      memcpy (model, base_bytes, SIZE);
      do_op ((struct op) { WRITE, 2 * SLOT, 0, 'w' }, model);
      for (unsigned i = 0; i < 3; ++i) {
        do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
        if (when == i)
          do_op ((struct op) { ZERO, SLOT, SLOT / 2, 0 }, model);
      }
      const unsigned long long used = bytes_of_last_file ();

      check_space_when_released (model, !newest_first);
      assert_true (bytes_of_last_file () <= used - SLOT + 4 * BLOCK);
      assert_int_equal (overlay->places.next, 3); /* nothing has moved */
    }
}

/* Readers of the disk and of a frozen map: under them slots move, their places are
 * given back, and used again for others.
 */
static void
place_is_used_again_under_a_reader (void **state)
{
  static const struct op before[] = {
    { WRITE, SLOT, SLOT, '1' },
    { WRITE, SLOT, 0, '0' },
    { WRITE, SLOT, 2 * SLOT, '2' },
    { FREEZE, 0, 0, 0 },
    { WRITE, SLOT, SLOT, '3' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static const struct op outer[] = {
    { READ, SIZE, 0, 0 },
    { READ, 2 * SLOT, SLOT / 2, 0 },
    { READ_AND_KEEP, SIZE, 0, 0 },
    { READ_FROZEN, SIZE, 0, 0 },
  };
  static const struct op ops[][9] = {
    { { WRITE, SLOT, SLOT, 'a' },
      { RELEASE_NEWEST, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'b' },
      END },
    { { WRITE, 2 * SLOT, 0, 'a' },
      { FREEZE, 0, 0, 0 },
      { RELEASE_NEWEST, 0, 0, 0 },
      { RELEASE_NEWEST, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'b' },
      { WRITE, SIZE - 4 * SLOT, 4 * SLOT, 'c' },
      END },
    { { WRITE, 2 * SLOT, 0, 'a' },
      { RELEASE_OLDEST, 0, 0, 0 },
      { RELEASE_OLDEST, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'b' },
      { WRITE, SIZE - 4 * SLOT, 4 * SLOT, 'c' },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      if (!(outer[i].kind == READ_FROZEN && j == 2)) /* that is not released */
        interrupt_every_step (before, &outer[i], ops[j]);
}

/* Keeping what was read of the base, in a slot that is shared or becomes so. */
static void
kept_in_a_shared_slot (void **state)
{
  static const struct op before[] = {
    { WRITE, 3 * BLOCK, 5 * BLOCK, 'b' },
    { WRITE, 100, 4 * SLOT + BLOCK, 'b' },
    { FREEZE, 0, 0, 0 },
    { ZERO, BLOCK, 6 * BLOCK, 0 },
    END,
  };
  static const struct op outer[] = {
    { READ_AND_KEEP, 10 * BLOCK, 100, 0 },
    { READ_AND_KEEP, SIZE - 3 * SLOT, 3 * SLOT, 0 },
    { CACHE_AND_KEEP, 10 * BLOCK, 100, 0 },
    { CACHE_AND_KEEP, SIZE - 2 * SLOT, 2 * SLOT, 0 },
  };
  static const struct op ops[][4] = {
    { { FREEZE, 0, 0, 0 }, END },
    { { RELEASE_OLDEST, 0, 0, 0 }, END },
    { { WRITE, 100, 2 * BLOCK, 'i' }, { FREEZE, 0, 0, 0 }, END },
    { { ZERO, 4 * BLOCK, 4 * BLOCK, 0 }, { RELEASE_OLDEST, 0, 0, 0 }, END },
    { { FREEZE, 0, 0, 0 },
      { WRITE, 777, SIZE - 777, 'i' },
      { RELEASE_NEWEST, 0, 0, 0 },
      END },
  };
  static uint8_t model[SIZE];

  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      interrupt_every_step (before, &outer[i], ops[j]);

  /* It is really kept, and needs the base no more; the frozen map still does. */
  for (unsigned i = 0; i < 2; ++i) {
    tear_down (state);
    set_up (state);
    memcpy (model, base_bytes, SIZE);
    do_ops (before, model);
    do_op (outer[2 * i], model);
    const unsigned reads = fake.nr_reads;

    do_op ((struct op) { READ, 11 * BLOCK, 0, 0 }, model);
    assert_int_equal (fake.nr_reads, reads);
    check_held ();
    assert_true (fake.nr_reads > reads);
    check_space_when_released (model, true);
  }
}

/*----------------------------------------------------------------------
 * What a move brings along
 */

/* Bytes are brought along by reading them: the file system must not share them. */
static void
moves_bring_exactly_what_they_need (void **state)
{
  static const struct {
    struct op op;
    unsigned blocks; /* that are copied */
  } cases[] = {
    /* Of the first slot blocks 0, 2 and 3 are allocated, block 1 is zero. */
    { { WRITE, BLOCK, 0, 'x' }, 2 },
    { { WRITE, 1, 0, 'x' }, 3 },
    { { WRITE, BLOCK - 1, 0, 'x' }, 3 },
    { { WRITE, BLOCK + 1, 0, 'x' }, 2 },
    { { WRITE, BLOCK, 100, 'x' }, 3 },
    { { WRITE, 3 * BLOCK, 100, 'x' }, 2 },
    { { WRITE, 4 * BLOCK, 0, 'x' }, 0 },
    { { WRITE, SLOT, 0, 'x' }, 0 },
    { { WRITE, 5, 20 * BLOCK, 'x' }, 3 },
    { { ZERO, 100, 0, 0 }, 3 },
    { { ZERO, BLOCK + 100, 2 * BLOCK, 0 }, 2 },
    { { ZERO, 2 * BLOCK, 2 * BLOCK, 0 }, 0 },      /* does not move */
    { { ZERO, 100, BLOCK + 100, 0 }, 0 },          /* nor does this */
    { { ZERO, 100, 20 * BLOCK + 100, 0 }, 3 },     /* a hole */
    { { READ_AND_KEEP, 100, 20 * BLOCK, 0 }, 3 },  /* the same */
    { { CACHE_AND_KEEP, SLOT, 0, 0 }, 3 },         /* the same */
    { { READ_AND_KEEP, 2 * BLOCK, BLOCK, 0 }, 0 }, /* no holes */
    /* Of the last one blocks 1 and 3, which has 777 bytes; what lies behind them in
     * the file has to come along.
     */
    { { WRITE, 777, SIZE - 777, 'x' }, 2 },
    { { WRITE, 776, SIZE - 777, 'x' }, 2 },
    { { WRITE, 776, SIZE - 776, 'x' }, 2 },
    { { WRITE, 1, SIZE - 1, 'x' }, 2 },
    { { WRITE, 1, 4 * SLOT, 'x' }, 2 },
    { { WRITE, 2 * BLOCK + 777, SIZE - 777 - 2 * BLOCK, 'x' }, 1 },
    { { ZERO, 777, SIZE - 777, 0 }, 0 }, /* does not move */
    { { ZERO, 776, SIZE - 776, 0 }, 2 },
    { { ZERO, 776, SIZE - 777, 0 }, 2 },
    { { ZERO, BLOCK + 777, SIZE - 777 - BLOCK, 0 }, 0 },
    { { ZERO, BLOCK + 777, SIZE - 777 - BLOCK - 100, 0 }, 2 },
    { { CACHE_AND_KEEP, 1, SIZE - 778, 0 }, 2 },
  };
  static const struct op before[] = {
    { WRITE, 4 * BLOCK, 0, 'b' },
    { ZERO, BLOCK, BLOCK, 0 },
    { WRITE, BLOCK, 4 * SLOT + BLOCK, 'b' },
    { WRITE, 777, SIZE - 777, 'b' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static uint8_t model[SIZE];

  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const struct op *op = &cases[i].op;

    tear_down (state);
    set_up (state);
    atomic_store (&overlay->store.no_clone, true);
    memcpy (model, base_bytes, SIZE);
    do_ops (before, model);
    bytes_read_from_files = 0;
    const uint64_t end = overlay->places.next;

    do_op (*op, model);
    if (op->kind == READ_AND_KEEP && cases[i].blocks == 0)
      bytes_read_from_files -= BLOCK; /* the read itself */
    if (bytes_read_from_files != cases[i].blocks * (uint64_t) BLOCK)
      fail_msg ("case %u: %lu bytes brought along", i,
                (unsigned long) bytes_read_from_files);
    if (op->kind == ZERO && cases[i].blocks == 0)
      assert_true (overlay->places.next == end);

    /* A second one finds a slot that is not shared. */
    const uint64_t end_after = overlay->places.next;
    bytes_read_from_files = 0;
    if (op->kind == WRITE || op->kind == ZERO) {
      do_op (*op, model);
      assert_int_equal (bytes_read_from_files, 0);
    }
    assert_true (overlay->places.next == end_after);
    check_disk (model);
    check_space_when_released (model, true);
  }
}

/* The last block of the disk is not a whole one.  It moves several times, and each time
 * its place is the last of the file.
 */
static void
last_block_moves_again (void **state)
{
  static const struct op ops[] = {
    { WRITE, 777, SIZE - 777, 'x' }, /* all of it that is in the disk */
    { WRITE, BLOCK + 777, SIZE - 777 - BLOCK, 'x' },
    { WRITE, 777 + 100, SIZE - 777 - 100, 'x' },
    { WRITE, SIZE, 0, 'x' },
    { WRITE, 10, SIZE - 10, 'x' },
    { WRITE, 10, SIZE - 777, 'x' },
    { ZERO, 100, SIZE - 100, 0 },
    { CACHE_AND_KEEP, 1, SIZE - 1, 0 },
  };
  const unsigned n = sizeof ops / sizeof ops[0];
  static uint8_t model[SIZE];

  (void) state;
  for (unsigned i = 0; i < n * n; ++i) {
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_op (ops[i % n], model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op (ops[i / n], model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { WRITE, 1, SIZE - 3 * BLOCK, 'y' }, model);
    check_disk (model);
    check_space_when_released (model, i % 2);
  }
}

/* The slot becomes shared, moves, is zeroed, or stops being shared, while the request
 * reads the base for a block of it that is a hole.
 */
static void
moves_with_a_slow_base (void **state)
{
  static const struct op before[] = {
    { WRITE, 4 * BLOCK, 2 * BLOCK, 'b' },
    { WRITE, 2 * BLOCK, 4 * SLOT, 'b' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static const struct op outer[] = {
    { WRITE, BLOCK, BLOCK + 100, 'o' },  { WRITE, 10, 5, 'o' },
    { WRITE, 100, 10 * BLOCK + 5, 'o' }, { WRITE, 776, SIZE - 777, 'o' },
    { ZERO, BLOCK, BLOCK + 100, 0 },     { ZERO, 776, SIZE - 777, 0 },
  };
  static const struct op ops[][5] = {
    { { WRITE, 50, BLOCK + 10, 'i' }, { FREEZE, 0, 0, 0 }, END },
    { { RELEASE_OLDEST, 0, 0, 0 }, { WRITE, 1, SIZE - 1, 'i' }, END },
    { { ZERO, 2 * BLOCK, 3 * BLOCK, 0 }, { FREEZE, 0, 0, 0 }, END },
    { { FREEZE, 0, 0, 0 },
      { WRITE, 4 * BLOCK, 20 * BLOCK, 'i' },
      { RELEASE_OLDEST, 0, 0, 0 },
      { WRITE, BLOCK, 4 * SLOT, 'i' },
      END },
    { { CACHE_AND_KEEP, 20 * BLOCK, 0, 0 }, { FREEZE, 0, 0, 0 }, END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      interrupt_every_step (before, &outer[i], ops[j]);
}

static void
detected_zeroes_in_a_shared_slot (void **state)
{
  static const struct op before[] = {
    { WRITE, SLOT + 4 * BLOCK, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static const struct op outer[] = {
    { WRITE, BLOCK, BLOCK, 0 },    { WRITE, 3 * BLOCK, BLOCK + 100, 0 },
    { WRITE, SLOT, SLOT / 2, 0 },  { WRITE, 100, 8 * BLOCK, 0 },
    { WRITE, 777, SIZE - 777, 0 }, { WRITE, SIZE - SLOT, SLOT, 0 },
  };
  static const struct op ops[][4] = {
    { { FREEZE, 0, 0, 0 }, END },
    { { RELEASE_OLDEST, 0, 0, 0 }, END },
    { { WRITE, 100, 10, 'i' }, { FREEZE, 0, 0, 0 }, END },
  };
  static uint8_t model[SIZE];

  (void) state;
  options.detect_zeroes = true;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      interrupt_every_step (before, &outer[i], ops[j]);

  /* Whole blocks of zeroes need no place. */
  start_over ();
  memcpy (model, base_bytes, SIZE);
  do_ops (before, model);
  const uint64_t end = overlay->places.next;
  do_op (outer[0], model);
  do_op (outer[2], model);
  assert_true (overlay->places.next == end);
  check_disk (model);
  check_space_when_released (model, true);
}

/*----------------------------------------------------------------------
 * Failures
 */

/* The states and the places of all slots. */
static void
read_slots (struct slot_pair slots[5])
{
  for (unsigned i = 0; i < 5; ++i)
    slots[i] = live_slot (i);
}

/* Every call that an operation on shared slots makes fails in turn; then the
 * operation gets the error, and the disk, all states and places, the frozen maps
 * and the space that the file takes are what they were, as nothing is written to
 * what is shared.  After that it succeeds.
 */
static void
check_every_failure (struct op op, int with, bool no_clone)
{
  static const struct op before[] = {
    { WRITE, 5 * BLOCK, 3 * BLOCK + 1000, 'b' },
    { ZERO, 3 * BLOCK, 20 * BLOCK, 0 },
    { WRITE, 10, SLOT + 5 * BLOCK, 'c' },
    { ZERO, SLOT, SLOT + 10 * BLOCK, 0 },
    { WRITE, 100, 2 * SLOT + 20 * BLOCK, 'd' },
    { WRITE, 100, 3 * SLOT, 'd' },
    { WRITE, 2 * BLOCK, 4 * SLOT, 'e' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 2 * BLOCK, 4 * BLOCK, 0 },
    { FREEZE, 0, 0, 0 },
    { ZERO, BLOCK, 6 * BLOCK, 0 },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static uint8_t model[SIZE], buf[SIZE];
  struct slot_pair slots[5], slots_after[5];

  for (int n = 1;; ++n) {
    int r, failed, op_err = 0;

    start_over ();
    atomic_store (&overlay->store.no_clone, no_clone);
    memcpy (model, base_bytes, SIZE);
    do_ops (before, model);
    read_slots (slots);

    fail_calls_from (n, with);
    r = run_op (buf, &op, NULL, NULL, &op_err);
    failed = call_has_failed ();

    if (!failed) {
      assert_int_equal (r, 0);
      model_op (&op, model);
      check_disk (model);
      check_space_when_released (model, n % 2);
      assert_true (n > 1);
      return;
    }
    /* A read may succeed, though nothing was kept, or have failed later. */
    if (op.kind != READ_AND_KEEP) {
      assert_int_equal (r, -1);
      assert_int_equal (op_err, failed == EOPNOTSUPP ? EIO : failed);
      assert_true (nr_errors > 0);
    }

    check_disk (model);
    check_held ();
    check_space (LOST_PLACES);
    read_slots (slots_after);
    /* Keeping is done in several steps, one for each run of holes. */
    if (op.kind == WRITE || op.kind == ZERO)
      assert_memory_equal (slots_after, slots, sizeof slots);

    do_op (op, model);
    check_disk (model);
    check_held ();
    check_space (LOST_PLACES);
    release_all ();
    check_space (LOST_PLACES);
    check_disk (model);
  }
}

static void
every_failure_leaves_all_as_it_was (void **state)
{
  static const struct op ops[] = {
    { WRITE, SIZE, 0, 'x' },
    { WRITE, SLOT + 100, BLOCK + 100, 'x' },
    { WRITE, 100, 21 * BLOCK + 5, 'x' },
    { WRITE, 100, SIZE - 100, 'x' },
    { WRITE, BLOCK, 4 * BLOCK, 'x' },
    { WRITE, 2 * SLOT, 2 * BLOCK, 0 },
    { ZERO, SLOT + 100, BLOCK + 100, 0 },
    { ZERO, 100, 7 * BLOCK + 100, 0 },
    { ZERO, SIZE, 0, 0 },
    { ZERO, 100, SIZE - 200, 0 },
    { READ_AND_KEEP, SLOT + 100, BLOCK + 100, 0 },
    { CACHE_AND_KEEP, SIZE - 5, 5, 0 },
  };
  static const int errors[] = { ENOSPC, EOPNOTSUPP };

  (void) state;
  for (unsigned detect = 0; detect < 2; ++detect) {
    options.detect_zeroes = detect;
    for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i)
      check_every_failure (ops[i], errors[detect], detect == 0);
  }
}

/* There is no place to move to: what was zeroed in the shared one is still the frozen
 * map's.
 */
static void
no_place_to_move_to (void **state)
{
  static const struct op ops[] = {
    { WRITE, BLOCK, 5 * BLOCK, 'x' },
    { WRITE, SLOT, 5 * BLOCK, 'x' },
    { ZERO, 100, 20 * BLOCK + 100, 0 },
    { CACHE_AND_KEEP, SLOT / 2, SLOT / 2, 0 },
  };
  static uint8_t model[SIZE], buf[SIZE];

  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i) {
    tear_down (state);
    set_up (state);
    memcpy (model, base_bytes, SIZE);
    do_op ((struct op) { WRITE, 10 * BLOCK, 0, 'b' }, model);
    do_op ((struct op) { WRITE, 10 * BLOCK, SLOT, 'b' }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { ZERO, 2 * BLOCK, 5 * BLOCK, 0 }, model);
    do_op ((struct op) { ZERO, 2 * BLOCK, SLOT + 5 * BLOCK, 0 }, model);
    /* For the second case there is one, but not two. */
    const uint64_t limit = overlay->places.end_limit;
    overlay->places.end_limit = (overlay->places.next + (i == 1))
                                << overlay->slot_shift;

    assert_int_equal (run_op (buf, &ops[i], NULL, NULL, &err), -1);
    assert_int_equal (err, EFBIG);
    check_disk (model);
    check_held ();
    check_space (0);

    overlay->places.end_limit = limit;
    do_op (ops[i], model);
    check_disk (model);
    check_space_when_released (model, true);
  }
}

static void
no_memory_to_freeze (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  memcpy (model, base_bytes, SIZE);
  do_op ((struct op) { WRITE, SLOT, 100, 'x' }, model);
  fail_calls_from (1, ENOMEM);
  assert_null (overlay_freeze (overlay));
  assert_int_equal (errno, ENOMEM);
  assert_int_equal (call_has_failed (), ENOMEM);
  assert_null (overlay->map.newest);
  check_disk (model);
}

static void
short_transfers_lose_nothing (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  memcpy (model, base_bytes, SIZE);
  atomic_store (&overlay->store.no_clone, true);
  do_op ((struct op) { WRITE, 2 * SLOT, 100, 'b' }, model);
  do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  short_transfers = true;
  do_op ((struct op) { WRITE, 100, SLOT - 50, 'x' }, model);
  do_op ((struct op) { ZERO, BLOCK + 20, 2 * SLOT - 100, 0 }, model);
  short_transfers = false;
  check_disk (model);
  check_space_when_released (model, true);
}

/* What cannot be punched is not given out as if it had been, but only wasted. */
static void
failing_punches_fail_nothing (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  memcpy (model, base_bytes, SIZE);
  fail_punches = true;
  do_op ((struct op) { WRITE, 2 * SLOT, 0, 'b' }, model);
  do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  do_op ((struct op) { ZERO, 10 * BLOCK, SLOT, 0 }, model);
  do_op ((struct op) { WRITE, 100, BLOCK + 10, 'c' }, model);
  do_op ((struct op) { RELEASE_OLDEST, 0, 0, 0 }, model);
  /* In a place that was used, and in blocks that were. */
  do_op ((struct op) { WRITE, 100, 3 * SLOT + 100, 'd' }, model);
  do_op ((struct op) { WRITE, 100, SLOT + 100, 'e' }, model);
  check_disk (model);
}

/*----------------------------------------------------------------------
 * Accounting
 */

static unsigned seed;

static unsigned
below (unsigned n)
{
  return (unsigned) rand_r (&seed) / 7 % n;
}

static struct op
random_op (void)
{
  struct op op = {
    .kind = below (CACHE_AND_KEEP + 1),
    .offset = below (SIZE),
    .fill = (uint8_t) (1 + below (127)),
  };

  if (below (3) == 0)
    op.offset = ROUND_DOWN (op.offset, BLOCK);
  op.count = 1 + below (below (4) ? 3 * BLOCK : 2 * SLOT);
  if (below (3) == 0)
    op.count = ROUND_UP (op.count, BLOCK);
  op.count = MIN (op.count, SIZE - (uint32_t) op.offset);
  return op;
}

/* Changes, freezes and releases at random, one after the other: each place and each
 * block of the file is accounted for after every step.
 */
static void
file_holds_what_is_needed_and_no_more (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  for (unsigned run = 0; run < 6; ++run) {
    options.detect_zeroes = run % 2;
    start_over ();
    seed = run + 1;
    memcpy (model, base_bytes, SIZE);
    for (unsigned n = 0; n < 150; ++n) {
      const unsigned what = below (10);

      if (what < 2 && nr_held < 5)
        do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
      else if (what < 4 && nr_held > 0)
        release_nr (below (nr_held));
      else
        do_op (random_op (), model);
      check_space (0);
      if (n % 10 == 0) {
        check_disk (model);
        check_held ();
      }
    }
    check_disk (model);
    while (nr_held > 0) {
      check_held ();
      release_nr (below (nr_held));
      check_space (0);
    }
    check_disk (model);

    /* What is left is given up as well. */
    do_op ((struct op) { ZERO, SIZE, 0, 0 }, model);
    check_space (0);
    check_disk (model);
  }
}

/* More places than a release gives back at once, in runs and alone. */
static void
many_places_are_given_back (void **state)
{
  enum { MANY = 3000 };
  const uint64_t size = MANY * (uint64_t) SLOT;
  static uint8_t zeroes[1];
  static struct fake_base many = { .size = size };

  (void) state;
  overlay_free (overlay);
  many.bytes = zeroes; /* never read: whole blocks are written */
  assert_int_equal (base_init (&base, fake_next (&many)), 0);
  overlay = overlay_new (size, &options);
  assert_non_null (overlay);
  static uint8_t block[BLOCK];
  memset (block, 'x', sizeof block);

  for (unsigned round = 0; round < 2; ++round) {
    for (uint64_t nr = 0; nr < MANY; ++nr)
      assert_int_equal (
        blk_write (overlay, &base, block, BLOCK, nr * SLOT, &err), 0);
    struct frozen_map *frozen = overlay_freeze (overlay);

    /* All of them, or two of three. */
    for (uint64_t nr = 0; nr < MANY; ++nr)
      if (round == 0 || nr % 3)
        assert_int_equal (
          blk_write (overlay, &base, block, BLOCK, nr * SLOT + BLOCK, &err),
          0);
    overlay_release (overlay, frozen);
    check_space (0);
  }
}

/*----------------------------------------------------------------------
 * The end
 */

static void
closed_to_changes (void **state)
{
  static uint8_t model[SIZE], buf[SIZE];

  (void) state;
  memcpy (model, base_bytes, SIZE);
  do_op ((struct op) { WRITE, SLOT, BLOCK, 'b' }, model);
  do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  do_op ((struct op) { ZERO, 2 * BLOCK, 2 * BLOCK, 0 }, model);
  do_op ((struct op) { WRITE, 100, SLOT, 'c' }, model);
  overlay_close (overlay);
  overlay_close (overlay); /* a second time is none */

  static const struct op ops[] = {
    { WRITE, 100, SLOT, 'x' }, /* allocated, not shared */
    { WRITE, 100, 100, 'x' },  /* a hole */
    { WRITE, SIZE, 0, 'x' },   /* everything */
    { ZERO, 100, SLOT, 0 },    { ZERO, SIZE, 0, 0 },
    { ZERO, BLOCK, BLOCK, 0 }, { CACHE_AND_KEEP, 100, 0, 0 },
  };
  struct slot_pair before[2], after[2];

  for (unsigned i = 0; i < 2; ++i)
    before[i] = live_slot (i);
  nr_errors = 0;
  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i) {
    err = 0;
    assert_int_equal (run_op (buf, &ops[i], NULL, NULL, &err), -1);
    assert_int_equal (err, ESHUTDOWN);
  }
  assert_null (overlay_freeze (overlay));
  assert_int_equal (errno, ESHUTDOWN);

  /* Reading goes on; only nothing is kept. */
  do_op ((struct op) { READ_AND_KEEP, SIZE, 0, 0 }, model);
  assert_int_equal (nr_errors, 0);
  for (unsigned i = 0; i < 2; ++i) {
    after[i] = live_slot (i);
    assert_true (after[i].place == before[i].place);
    assert_true (after[i].state == before[i].state);
    const struct slot_pair last
      = slot_load (map_find (overlay_map (overlay), i));
    assert_true (last.place == before[i].place);
    assert_true (last.state == before[i].state);
  }
  check_disk (model);

  /* Frozen maps are read, and released, until they are cut off. */
  check_space_when_released (model, true);
}

/* Requests under way when the overlay is closed have been, or fail. */
static void
closed_in_the_middle_of_a_request (void **state)
{
  static const struct op before[] = {
    { WRITE, SLOT, BLOCK, 'b' },
    { FREEZE, 0, 0, 0 },
    { WRITE, 100, SLOT, 'c' },
    END,
  };
  static const struct op close[] = { { CLOSE, 0, 0, 0 }, END };
  static const struct op outer[] = {
    { WRITE, 100, 100, 'o' },  { WRITE, SLOT, 5 * BLOCK, 'o' },
    { WRITE, 100, SLOT, 'o' }, { ZERO, 4 * BLOCK, 4 * BLOCK + 100, 0 },
    { ZERO, SIZE, 0, 0 },      { CACHE_AND_KEEP, SLOT, 0, 0 },
  };
  static uint8_t model[SIZE], buf[SIZE];

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (enum where where = 0; where < NR_WHERE; ++where)
      for (int n = 1;; ++n) {
        start_over ();
        memcpy (model, base_bytes, SIZE);
        do_ops (before, model);
        memset (&action, 0, sizeof action);
        action.ops = close;
        action.outer = &outer[i];
        action.excludes = true;
        memcpy (action.model, model, SIZE);
        if (where == AT_MUTEX)
          interrupt_mutex (n, start_action, NULL);
        else if (where == AT_CALL)
          interrupt_call (n, start_action, NULL);
        else
          fake.during_read = finish_action;

        err = 0;
        const int r = run_op (buf, &outer[i], NULL, NULL, &err);
        const bool interrupted
          = where == AT_BASE_READ ? action.started : call_was_interrupted ();
        if (action.started)
          pthread_join (action.thread, NULL);
        fake.during_read = NULL;
        if (!interrupted)
          break;
        assert_false (action.broke_in);
        if (r == -1)
          assert_int_equal (err, ESHUTDOWN);
        else
          model_op (&outer[i], model);
        if (where == AT_BASE_READ)
          assert_int_equal (r, -1);
        check_disk (model);
        check_held ();

        /* What is to be saved is what the disk is. */
        for (unsigned nr = 0; nr < 2; ++nr) {
          const struct slot_pair live = live_slot (nr);
          const struct slot_pair last
            = slot_load (map_find (overlay_map (overlay), nr));

          assert_true (live.place == last.place);
          assert_true (live.state == last.state);
        }
        if (where == AT_BASE_READ)
          break;
      }
}

/* Once it is closed its file may be somebody else's: in front of the last lock that a
 * zero takes, the one for punching, it is closed, and so nothing is punched.
 */
static void
closed_in_front_of_a_punch (void **state)
{
  static const struct op close[] = { { CLOSE, 0, 0, 0 }, END };
  static const struct op zero = { ZERO, BLOCK, BLOCK, 0 };
  static uint8_t model[SIZE], buf[SIZE];
  unsigned punches = 1;

  (void) state;
  for (int n = 1;; ++n) {
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_op ((struct op) { WRITE, SLOT, 0, 'b' }, model);
    nr_punches = 0;
    memset (&action, 0, sizeof action);
    action.ops = close;
    action.outer = &zero;
    interrupt_mutex (n, start_action, NULL);
    (void) run_op (buf, &zero, NULL, NULL, &err);
    if (!call_was_interrupted ())
      break;
    pthread_join (action.thread, NULL);
    punches = nr_punches;
  }
  assert_int_equal (punches, 0);
}

static void
views_are_cut_off (void **state)
{
  static uint8_t model[SIZE], buf[SIZE], held_model[SIZE];

  (void) state;
  for (unsigned in_place = 0; in_place < 2; ++in_place) {
    options.fate = in_place ? OVERLAY_SAVED_IN_PLACE : OVERLAY_SAVED;
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_op ((struct op) { WRITE, 3 * SLOT, 0, 'b' }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    memcpy (held_model, model, SIZE);
    do_op ((struct op) { ZERO, 4 * BLOCK, 4 * BLOCK, 0 }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { WRITE, 100, SLOT + 100, 'c' }, model);
    do_op ((struct op) { ZERO, 4 * BLOCK, 10 * BLOCK, 0 }, model);
    do_op ((struct op) { WRITE, BLOCK, SLOT + 5 * BLOCK, 'd' }, model);
    check_held ();
    const uint64_t shared_place = live_slot (0).place;
    const uint64_t old_place
      = slot_load (map_find (&held[0]->frozen->map, 1)).place;
    const uint64_t end = overlay->places.next;

    overlay_close (overlay);
    check_held (); /* not yet cut off */
    const unsigned punches = nr_punches;

    overlay_cut_views (overlay);
    if (in_place) {
      struct giveback_budget budget
        = { .nanoseconds = INT64_C (1) << 60, .extents = UINT32_MAX };

      giveback (overlay, end << overlay->slot_shift, &budget);
    }
    nr_errors = 0;

    /* What is in the file cannot be had any more; the base and zeroes can. */
    assert_int_equal (blk_read (frozen_disk (overlay, held[0]->frozen), &base,
                                ON_READ_PASS, buf, SIZE, 0, &err),
                      -1);
    assert_int_equal (err, ESHUTDOWN);
    assert_int_equal (blk_read (frozen_disk (overlay, held[1]->frozen), &base,
                                ON_READ_PASS, buf, 1, SLOT + 100, &err),
                      -1);
    assert_int_equal (err, ESHUTDOWN);
    assert_int_equal (blk_read (frozen_disk (overlay, held[0]->frozen), &base,
                                ON_READ_PASS, buf, BLOCK, 3 * SLOT, &err),
                      0);
    assert_memory_equal (buf, base_bytes + 3 * SLOT, BLOCK);
    assert_int_equal (blk_read (frozen_disk (overlay, held[1]->frozen), &base,
                                ON_READ_PASS, buf, 4 * BLOCK, 4 * BLOCK, &err),
                      0);
    assert_memory_equal (buf, model + 4 * BLOCK, 4 * BLOCK);
    assert_int_equal (nr_errors, 0);
    check_disk (model);

    /* What only they had. */
    const uint64_t in_shared = shared_place << overlay->slot_shift;
    const bool left = !in_place;
    if (!in_place)
      assert_int_equal (nr_punches, punches);
    assert_int_equal (has_data (in_shared + 4 * BLOCK, 4 * BLOCK), left);
    assert_int_equal (has_data (in_shared + 10 * BLOCK, 4 * BLOCK), left);
    assert_int_equal (has_data (old_place << overlay->slot_shift, SLOT), left);
    assert_true (has_data (in_shared + 3 * BLOCK, BLOCK));
    assert_true (has_data (in_shared + 8 * BLOCK, BLOCK));
    assert_true (has_data (in_shared + 14 * BLOCK, BLOCK));

    /* Releasing touches nothing of the file, in whichever order. */
    const unsigned punches_after = nr_punches;
    const unsigned long long used = bytes_of_last_file ();
    release_nr (in_place);
    check_disk (model);
    release_nr (0);
    assert_int_equal (nr_punches, punches_after);
    assert_true (bytes_of_last_file () == used);
    assert_true (overlay->places.next == end);
    assert_int_equal (overlay->places.nr_free, 0);
    check_disk (model);
  }
}

/*----------------------------------------------------------------------
 * Threads
 */

/* Some threads write, zero and keep at random, while others freeze, read what is
 * frozen again and again, and release.  Every request covers whole sectors and writes
 * its own number to each; a clock that only counts says what was over before what.
 * When all is done each frozen map is compared with what it may hold:
 *
 * - a sector, what a request wrote that had begun when the freeze ended, unless another
 *   one began after that was over, and was over before the freeze began;
 * - a request, all of its sectors, but for those where another one shows that was not
 *   over when it began.
 */
#define SECTOR 512u
#define WRITERS 4
#define FREEZERS 2
#define MAX_SNAPSHOTS 150 /* of a freezer */
#define HELD_AT_ONCE 5

/* The thread sanitizer needs ten times as long. */
#ifndef __SANITIZE_THREAD__
#define DEFAULT_OPS 4000
#else
#define DEFAULT_OPS 1500
#endif

/* Number 0 is the base, which was there before everything else. */
struct request {
  uint64_t start, end; /* of the clock */
  uint32_t first, count;
  bool zero;
};

/* What a sector shows: the number of a request, or one of these. */
enum {
  SHOWS_ZERO = UINT32_MAX - 2,
  SHOWS_SEVERAL, /* of a live disk, a write was under way */
  SHOWS_NONSENSE,
};

struct snapshot {
  uint64_t start, end; /* of the clock, when it was taken */
  uint32_t first, count;
  uint32_t *shown;
  struct frozen_map *frozen; /* NULL: released */
};

static struct {
  uint64_t size;
  uint32_t nr_sectors;
  uint64_t base_extent; /* sectors; every other one is a hole */
  unsigned ops;         /* of a writer */
  unsigned seed;
  uint8_t *base_bytes;
  atomic_ullong clock;
  atomic_uint writers;
  struct request *requests; /* 1 + WRITERS * ops */
  struct snapshot snapshots[FREEZERS][MAX_SNAPSHOTS];
  unsigned nr_snapshots[FREEZERS];
  struct snapshot *reads; /* of the live disk, one for each request or none */
} stress;

static bool
base_is_zero (uint32_t sector)
{
  return sector / stress.base_extent % 2;
}

static uint32_t
sector_size (uint32_t sector)
{
  return (uint32_t) MIN (SECTOR, stress.size - (uint64_t) sector * SECTOR);
}

/* The number of a request, and where, so that no other place looks the same. */
static void
fill_sector (uint8_t *bytes, uint32_t sector, uint32_t nr)
{
  const uint64_t word = (uint64_t) (sector + 1) << 32 | nr;

  for (uint32_t i = 0; i < sector_size (sector); ++i)
    bytes[i] = (uint8_t) (word >> i % 8 * 8);
}

static uint32_t
decode_sector (const uint8_t *bytes, uint32_t sector)
{
  uint64_t word;

  memcpy (&word, bytes, sizeof word);
  if (memcmp (bytes, bytes + 8, sector_size (sector) - 8) != 0)
    return SHOWS_SEVERAL;
  if (word == 0)
    return SHOWS_ZERO;
  if (word >> 32 != sector + 1 || (uint32_t) word > WRITERS * stress.ops)
    return SHOWS_NONSENSE;
  return (uint32_t) word;
}

static uint32_t
bytes_of (uint32_t first, uint32_t count)
{
  return (uint32_t) (MIN ((uint64_t) (first + count) * SECTOR, stress.size)
                     - (uint64_t) first * SECTOR);
}

static unsigned
pick (unsigned *my_seed, unsigned n)
{
  return (unsigned) rand_r (my_seed) / 7 % n;
}

/* Sectors at random: some, or many; often whole blocks. */
static void
pick_range (unsigned *my_seed, uint32_t *first, uint32_t *count)
{
  const uint32_t per_block = (uint32_t) block_size (overlay) / SECTOR;
  const unsigned how = pick (my_seed, 16);
  uint32_t longest = how < 8 ? 3 * per_block : 20 * per_block;

  if (how == 0)
    longest = 80 * per_block; /* some slots */
  longest = MIN (longest, stress.nr_sectors);
  /* Half of all in a quarter of the disk, so that they meet. */
  *first = pick (my_seed, pick (my_seed, 2) ? stress.nr_sectors
                                            : stress.nr_sectors / 4);
  *count = 1 + pick (my_seed, longest);
  if (pick (my_seed, 2)) {
    *first = ROUND_DOWN (*first, per_block);
    *count = ROUND_UP (*count, per_block);
  }
  *count = MIN (*count, stress.nr_sectors - *first);
}

/* A whole range, decoded. */
static void
decode (struct snapshot *s, const uint8_t *buf)
{
  s->shown = malloc (s->count * sizeof *s->shown);
  if (!s->shown)
    die ("malloc", ENOMEM);
  for (uint32_t i = 0; i < s->count; ++i)
    s->shown[i] = decode_sector (buf + (size_t) i * SECTOR, s->first + i);
}

static void *
writer (void *arg)
{
  const unsigned me = *(unsigned *) arg;
  unsigned my_seed = stress.seed * 31 + me;
  uint8_t *buf = malloc (stress.size);

  for (unsigned n = 0; n < stress.ops; ++n) {
    const uint32_t nr = 1 + me * stress.ops + n;
    struct request *request = &stress.requests[nr];
    const unsigned kind = pick (&my_seed, 16);
    int r, my_err = 0;

    pick_range (&my_seed, &request->first, &request->count);
    const uint32_t count = bytes_of (request->first, request->count);
    const uint64_t offset = (uint64_t) request->first * SECTOR;
    request->zero = kind >= 8;
    if (kind < 8)
      for (uint32_t i = 0; i < request->count; ++i)
        fill_sector (buf + (size_t) i * SECTOR, request->first + i, nr);
    else if (kind == 8)
      memset (buf, 0, count);

    request->start = ++stress.clock;
    if (kind < 9)
      r = blk_write (overlay, &base, buf, count, offset, &my_err);
    else if (kind < 12)
      r = blk_zero (overlay, &base, ZERO_ANY, count, offset, &my_err);
    else if (kind < 15)
      r = blk_read (live_disk (overlay), &base,
                    kind == 12 ? ON_READ_PASS : ON_READ_KEEP, buf, count,
                    offset, &my_err);
    else
      r = blk_cache (overlay, &base, ON_CACHE_KEEP, count, offset, &my_err);
    request->end = ++stress.clock;
    if (r == -1)
      die ("request", my_err);

    if (kind >= 12 && kind < 15) {
      struct snapshot *s = &stress.reads[nr];

      *s = (struct snapshot) { .start = request->start,
                               .end = request->end,
                               .first = request->first,
                               .count = request->count };
      decode (s, buf);
    }
    if (kind >= 12)
      request->count = 0; /* it has changed nothing */
  }
  free (buf);
  stress.writers--;
  return NULL;
}

/* The frozen map has what it had when it was read first. */
static void
read_again (const struct snapshot *s, uint8_t *buf, uint32_t first,
            uint32_t count)
{
  int my_err;

  if (blk_read (frozen_disk (overlay, s->frozen), &base, ON_READ_PASS, buf,
                bytes_of (first, count), (uint64_t) first * SECTOR, &my_err)
      == -1)
    die ("blk_read", my_err);
  for (uint32_t i = 0; i < count; ++i)
    if (decode_sector (buf + (size_t) i * SECTOR, first + i)
        != s->shown[first + i])
      die ("a frozen map has changed, sector", (int) (first + i));
}

static void *
freezer (void *arg)
{
  const unsigned me = *(unsigned *) arg;
  unsigned my_seed = stress.seed * 37 + me;
  uint8_t *buf = malloc (stress.size);
  struct snapshot *all = stress.snapshots[me], *mine[HELD_AT_ONCE];
  unsigned count = 0, n = 0;

  while (stress.writers > 0) {
    const unsigned what = pick (&my_seed, 8);

    if (what < 2 && count < HELD_AT_ONCE && n < MAX_SNAPSHOTS) {
      struct snapshot *s = &all[n++];
      int my_err;

      s->start = ++stress.clock;
      s->frozen = overlay_freeze (overlay);
      s->end = ++stress.clock;
      if (!s->frozen)
        die ("overlay_freeze", errno);
      s->first = 0;
      s->count = stress.nr_sectors;
      if (blk_read (frozen_disk (overlay, s->frozen), &base, ON_READ_PASS, buf,
                    (uint32_t) stress.size, 0, &my_err)
          == -1)
        die ("blk_read", my_err);
      decode (s, buf);
      mine[count++] = s;
    }
    else if (count == 0)
      usleep (100);
    else if (what < 6) {
      uint32_t first, length;

      pick_range (&my_seed, &first, &length);
      read_again (mine[pick (&my_seed, count)], buf, first, length);
    }
    else {
      const unsigned i = pick (&my_seed, count);
      struct snapshot *s = mine[i];

      read_again (s, buf, 0, stress.nr_sectors);
      overlay_release (overlay, s->frozen);
      s->frozen = NULL;
      mine[i] = mine[--count];
    }
  }
  stress.nr_snapshots[me] = n;
  free (buf);
  return NULL;
}

/* For each sector: the requests that changed it, by their end, each with the latest
 * start of it and those before it; and those that zeroed it, by their start, each with
 * the latest end.
 */
struct entry {
  uint64_t key, latest;
};

struct history {
  struct entry *by_end, *zeroes_by_start;
  size_t nr, nr_zeroes;
};

static struct history *histories;

static int
compare_entries (const void *a, const void *b)
{
  const uint64_t key_a = ((const struct entry *) a)->key;
  const uint64_t key_b = ((const struct entry *) b)->key;

  return (key_a > key_b) - (key_a < key_b);
}

static void
sort_entries (struct entry *entries, size_t count)
{
  qsort (entries, count, sizeof *entries, compare_entries);
  for (size_t i = 1; i < count; ++i)
    entries[i].latest = MAX (entries[i].latest, entries[i - 1].latest);
}

static void
make_histories (void)
{
  histories = calloc (stress.nr_sectors, sizeof *histories);
  for (unsigned pass = 0; pass < 2; ++pass) {
    for (uint32_t nr = 1; nr <= WRITERS * stress.ops; ++nr) {
      const struct request *r = &stress.requests[nr];

      for (uint32_t s = r->first; s < r->first + r->count; ++s) {
        struct history *h = &histories[s];

        if (pass == 1) {
          h->by_end[h->nr]
            = (struct entry) { .key = r->end, .latest = r->start };
          if (r->zero)
            h->zeroes_by_start[h->nr_zeroes]
              = (struct entry) { .key = r->start, .latest = r->end };
        }
        h->nr++;
        h->nr_zeroes += r->zero;
      }
    }
    for (uint32_t s = 0; s < stress.nr_sectors; ++s) {
      struct history *h = &histories[s];

      if (pass == 0) {
        h->by_end = calloc (h->nr + 1, sizeof *h->by_end);
        h->zeroes_by_start
          = calloc (h->nr_zeroes + 1, sizeof *h->zeroes_by_start);
        h->nr = h->nr_zeroes = 0;
      }
      else {
        sort_entries (h->by_end, h->nr);
        sort_entries (h->zeroes_by_start, h->nr_zeroes);
      }
    }
  }
}

static void
free_histories (void)
{
  for (uint32_t s = 0; s < stress.nr_sectors; ++s) {
    free (histories[s].by_end);
    free (histories[s].zeroes_by_start);
  }
  free (histories);
}

/* How many entries have a key before TIME. */
static size_t
entries_before (const struct entry *entries, size_t count, uint64_t time)
{
  size_t low = 0;

  while (low < count) {
    const size_t middle = low + (count - low) / 2;

    if (entries[middle].key < time)
      low = middle + 1;
    else
      count = middle;
  }
  return low;
}

static void
complain (const char *what, const struct snapshot *s, uint32_t sector,
          uint32_t nr)
{
  const struct request *r
    = nr <= WRITERS * stress.ops ? &stress.requests[nr] : NULL;

  fail_msg ("%s: sector %u (block %u) of what was taken from %lu to %lu shows "
            "%s %u, of %lu to %lu, sectors %u + %u (FREEZE_SEED=%u)",
            what, sector,
            (unsigned) (sector * (uint64_t) SECTOR >> overlay->block_shift),
            (unsigned long) s->start, (unsigned long) s->end,
            nr == SHOWS_ZERO ? "zeroes" : "request", nr,
            r ? (unsigned long) r->start : 0, r ? (unsigned long) r->end : 0,
            r ? r->first : 0, r ? r->count : 0, stress.seed);
}

/* Of requests that show in SECTOR: when the last of them may have ended, that is, no
 * other one was surely between it and the snapshot.  0 is the base.
 */
static uint64_t
check_sector (const struct snapshot *s, uint32_t sector)
{
  const uint32_t nr = s->shown[sector - s->first];
  const struct history *h = &histories[sector];
  const size_t over = entries_before (h->by_end, h->nr, s->start);
  /* Nothing that ended before this can show. */
  const uint64_t oldest = over > 0 ? h->by_end[over - 1].latest : 0;

  if (nr == SHOWS_ZERO) {
    const size_t begun
      = entries_before (h->zeroes_by_start, h->nr_zeroes, s->end);
    const uint64_t latest
      = begun > 0 ? h->zeroes_by_start[begun - 1].latest : 0;

    if (latest < oldest || (latest == 0 && !base_is_zero (sector)))
      complain ("zeroes that cannot be", s, sector, nr);
    return latest;
  }

  if (nr == SHOWS_SEVERAL || nr == SHOWS_NONSENSE)
    complain ("nonsense", s, sector, nr);
  const struct request *r = &stress.requests[nr];
  if (nr == 0) {
    if (base_is_zero (sector) || oldest > 0)
      complain ("the base, which was overwritten", s, sector, nr);
    return 0;
  }
  if (r->zero || sector < r->first || sector - r->first >= r->count)
    complain ("foreign bytes", s, sector, nr);
  if (r->start >= s->end)
    complain ("bytes of the future", s, sector, nr);
  if (r->end < oldest)
    complain ("bytes that were overwritten", s, sector, nr);
  return r->end;
}

/* If exactly one request can have zeroed the sector, which?  Else 0. */
static uint32_t
only_zero (const struct snapshot *s, uint32_t sector)
{
  const struct history *h = &histories[sector];
  const size_t over = entries_before (h->by_end, h->nr, s->start);
  const uint64_t oldest = over > 0 ? h->by_end[over - 1].latest : 0;
  uint32_t found = 0;

  if (oldest == 0)
    return 0; /* perhaps the base */
  for (uint32_t nr = 1; nr <= WRITERS * stress.ops; ++nr) {
    const struct request *r = &stress.requests[nr];

    if (r->zero && sector >= r->first && sector - r->first < r->count
        && r->start < s->end && r->end >= oldest) {
      if (found)
        return 0;
      found = nr;
    }
  }
  return found;
}

/* Also whole requests, if it was taken at one moment. */
static void
check_snapshot (const struct snapshot *s, bool at_one_moment)
{
  uint64_t *ends = calloc (s->count, sizeof *ends);
  bool *seen = calloc (1 + WRITERS * (size_t) stress.ops, sizeof *seen);

  for (uint32_t i = 0; i < s->count; ++i) {
    uint32_t nr = s->shown[i];

    if (nr == SHOWS_SEVERAL && !at_one_moment)
      continue;
    ends[i] = check_sector (s, s->first + i);
    if (!at_one_moment)
      continue;

    /* To look for who has zeroed it takes long, so do that for some. */
    if (nr == SHOWS_ZERO)
      nr = i % 32 == 0 ? only_zero (s, s->first + i) : 0;
    if (nr == 0 || seen[nr])
      continue;
    seen[nr] = true;
  }

  for (uint32_t nr = 1; nr <= WRITERS * stress.ops; ++nr) {
    const struct request *r = &stress.requests[nr];

    for (uint32_t i = r->first; seen[nr] && i < r->first + r->count; ++i)
      if (s->shown[i] != nr && ends[i] < r->start) {
        printf ("request %u of %lu to %lu, sectors %u + %u is there only in "
                "part\n",
                nr, (unsigned long) r->start, (unsigned long) r->end, r->first,
                r->count);
        complain ("a part", s, i, s->shown[i]);
      }
  }
  free (ends);
  free (seen);
}

static unsigned
number_from_environment (const char *name, unsigned otherwise)
{
  const char *value = getenv (name);

  return value ? (unsigned) strtoul (value, NULL, 0) : otherwise;
}

static void
prepare_stress (uint64_t size, uint32_t bs, bool detect_zeroes)
{
  /* A request for so and so many blocks takes longer if these are large. */
  const unsigned ops = number_from_environment ("FREEZE_OPS", DEFAULT_OPS);
  static struct fake_base stress_fake;

  overlay_free (overlay);
  memset (&stress, 0, sizeof stress);
  stress.size = size;
  stress.nr_sectors = (uint32_t) (size / SECTOR + (size % SECTOR > 0));
  stress.base_extent = 90; /* not whole blocks */
  stress.ops = bs > BLOCK ? ops / 8 + 1 : ops;
  stress.seed = number_from_environment ("FREEZE_SEED",
                                         (unsigned) time (NULL) % 1000000);
  printf ("FREEZE_SEED=%u FREEZE_OPS=%u\n", stress.seed, ops);
  stress.writers = WRITERS;
  stress.base_bytes = calloc (1, size);
  stress.requests
    = calloc (1 + WRITERS * (size_t) stress.ops, sizeof *stress.requests);
  stress.reads
    = calloc (1 + WRITERS * (size_t) stress.ops, sizeof *stress.reads);
  assert_true (stress.base_bytes && stress.requests && stress.reads);
  for (uint32_t i = 0; i < stress.nr_sectors; ++i)
    if (!base_is_zero (i))
      fill_sector (stress.base_bytes + (size_t) i * SECTOR, i, 0);

  stress_fake = (struct fake_base) {
    .bytes = stress.base_bytes,
    .size = size,
    .can_extents = true,
    .extent_size = stress.base_extent * SECTOR,
  };
  assert_int_equal (base_init (&base, fake_next (&stress_fake)), 0);
  options.block_size = bs;
  options.detect_zeroes = detect_zeroes;
  overlay = overlay_new (size, &options);
  assert_non_null (overlay);
}

static void
run_stress (uint64_t size, uint32_t bs, bool detect_zeroes)
{
  pthread_t writers[WRITERS], freezers[FREEZERS];
  unsigned numbers[MAX (WRITERS, FREEZERS)];

  prepare_stress (size, bs, detect_zeroes);
  for (unsigned i = 0; i < MAX (WRITERS, FREEZERS); ++i)
    numbers[i] = i;
  for (unsigned i = 0; i < WRITERS; ++i)
    assert_int_equal (pthread_create (&writers[i], NULL, writer, &numbers[i]),
                      0);
  for (unsigned i = 0; i < FREEZERS; ++i)
    assert_int_equal (
      pthread_create (&freezers[i], NULL, freezer, &numbers[i]), 0);
  for (unsigned i = 0; i < WRITERS; ++i)
    pthread_join (writers[i], NULL);
  for (unsigned i = 0; i < FREEZERS; ++i)
    pthread_join (freezers[i], NULL);

  uint8_t *buf = malloc (size);
  struct snapshot live = { .start = ++stress.clock,
                           .end = ++stress.clock,
                           .count = stress.nr_sectors };
  assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_PASS, buf,
                              (uint32_t) size, 0, &err),
                    0);
  decode (&live, buf);

  make_histories ();
  check_snapshot (&live, true);
  free (live.shown);
  for (uint32_t nr = 1; nr <= WRITERS * stress.ops; ++nr)
    if (stress.reads[nr].shown) {
      check_snapshot (&stress.reads[nr], false);
      free (stress.reads[nr].shown);
    }
  unsigned nr_snapshots = 0;
  for (unsigned i = 0; i < FREEZERS; ++i)
    for (unsigned j = 0; j < stress.nr_snapshots[i]; ++j, ++nr_snapshots) {
      struct snapshot *s = &stress.snapshots[i][j];

      check_snapshot (s, true);
      if (s->frozen) {
        read_again (s, buf, 0, stress.nr_sectors);
        overlay_release (overlay, s->frozen);
        check_space (ZERO_BLOCKS);
      }
      free (s->shown);
    }
  printf ("%u requests, %u frozen maps\n", WRITERS * stress.ops, nr_snapshots);
  assert_true (nr_snapshots > 0);
  free_histories ();

  /* No block that is zero has bytes once it was zeroed with nobody else around. */
  assert_null (overlay->map.newest);
  for (uint64_t nr = 0; nr < overlay->map.nr_slots; ++nr) {
    const struct slot_pair pair = live_slot (nr);

    for (unsigned i = 0; i < SLOT_BLOCKS; ++i)
      if (bitmap_state (pair.state, i) == BLOCK_ZERO && pair.place) {
        const uint64_t offset = (nr << overlay->slot_shift)
                                + ((uint64_t) i << overlay->block_shift);
        const uint32_t count = (uint32_t) MIN (bs, size - offset);

        memset (buf, 1, count);
        assert_int_equal (blk_write (overlay, &base, buf, count, offset, &err),
                          0);
        assert_int_equal (
          blk_zero (overlay, &base, ZERO_ANY, count, offset, &err), 0);
      }
  }
  check_space (0);

  free (buf);
  free (stress.requests);
  free (stress.reads);
  overlay_free (overlay); /* while the base is there */
  overlay = NULL;
  free (stress.base_bytes);
}

static void
threads_freeze_and_change (void **state)
{
  (void) state;
  run_stress (3 << 20, 4096, false);
}

static void
threads_freeze_an_odd_disk (void **state)
{
  (void) state;
  run_stress ((2 << 20) + 5 * 4096 + 777, 4096, true);
}

static void
threads_freeze_large_blocks (void **state)
{
  (void) state;
  run_stress ((5 << 20) + 1000, 65536, false);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    WITH_OVERLAY (frozen_between_a_look_and_its_write),
    WITH_OVERLAY (frozen_in_the_middle_of_any_request),
    WITH_OVERLAY (released_while_another_one_has_the_place),
    WITH_OVERLAY (two_requests_copy_one_node),
    WITH_OVERLAY (zero_races_a_move),
    WITH_OVERLAY (changed_in_the_middle_of_a_release),
    WITH_OVERLAY (released_while_a_write_is_half_done),
    WITH_OVERLAY (written_in_front_of_the_punch_of_a_place),
    WITH_OVERLAY (zeroed_while_shared_is_punched_in_the_end),
    WITH_OVERLAY (place_is_used_again_under_a_reader),
    WITH_OVERLAY (kept_in_a_shared_slot),
    WITH_OVERLAY (moves_bring_exactly_what_they_need),
    WITH_OVERLAY (last_block_moves_again),
    WITH_OVERLAY (moves_with_a_slow_base),
    WITH_OVERLAY (detected_zeroes_in_a_shared_slot),
    WITH_OVERLAY (every_failure_leaves_all_as_it_was),
    WITH_OVERLAY (no_place_to_move_to),
    WITH_OVERLAY (no_memory_to_freeze),
    WITH_OVERLAY (short_transfers_lose_nothing),
    WITH_OVERLAY (failing_punches_fail_nothing),
    WITH_OVERLAY (file_holds_what_is_needed_and_no_more),
    WITH_OVERLAY (many_places_are_given_back),
    WITH_OVERLAY (closed_to_changes),
    WITH_OVERLAY (closed_in_the_middle_of_a_request),
    WITH_OVERLAY (closed_in_front_of_a_punch),
    WITH_OVERLAY (views_are_cut_off),
    WITH_OVERLAY (threads_freeze_and_change),
    WITH_OVERLAY (threads_freeze_an_odd_disk),
    WITH_OVERLAY (threads_freeze_large_blocks),
  };

#ifdef __SANITIZE_THREAD__
  /* All others force what one thread does between two steps of another. */
  cmocka_set_test_filter ("threads_*");
#endif
  return cmocka_run_group_tests_name ("freeze", tests, NULL, NULL);
}
