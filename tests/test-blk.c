/* SPDX-License-Identifier: BSD-3-Clause */

/* Block operations without a server: interleavings that are forced, calls that
 * fail one after the other, and many threads.
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
#include <unistd.h>

#include <cmocka.h>

#include "blk.h"
#include "common/cleanup.h"
#include "faults.h"
#include "nbdkit-stubs.h"
#include "overlay/private.h"

#define BLOCK UINT32_C (4096)
#define SLOT (32 * BLOCK)
/* Four slots and a bit; the last block is not a whole one. */
#define SIZE (4 * SLOT + 3 * BLOCK + 777)

static uint8_t base_bytes[SIZE];
static struct fake_base fake;
static struct base base;
static struct overlay *overlay;
static int err;

static struct overlay_options options = { .block_size = BLOCK };

static struct overlay *
new_overlay (uint64_t size, const char *dir)
{
  options.dir = dir;
  return overlay_new (size, &options);
}

static int
set_up (void **state)
{
  (void) state;
  for (unsigned i = 0; i < SIZE; ++i)
    base_bytes[i] = (uint8_t) (1 + i % 251); /* never 0 */
  fake = (struct fake_base) {
    .bytes = base_bytes,
    .size = SIZE,
    .can_extents = true,
    .can_cache = NBDKIT_CACHE_NATIVE,
  };
  assert_int_equal (base_init (&base, fake_next (&fake)), 0);
  overlay = new_overlay (SIZE, "/var/tmp");
  assert_non_null (overlay);
  err = 0;
  nr_errors = 0;
  nr_punches = 0;
  longest_punch = 0;
  return 0;
}

static int
tear_down (void **state)
{
  (void) state;
  fail_calls_from (0, 0);
  short_transfers = fail_punches = no_tmpfile = false;
  overlay_free (overlay);
  return 0;
}

#define WITH_OVERLAY(test)                                                    \
  cmocka_unit_test_setup_teardown (test, set_up, tear_down)

/* The disk as it is now, in BYTES. */
static void
read_disk (uint8_t bytes[SIZE])
{
  assert_int_equal (
    blk_read (live_disk (overlay), &base, ON_READ_PASS, bytes, SIZE, 0, &err),
    0);
}

/*----------------------------------------------------------------------
 * Operations, as data
 */

enum kind {
  WRITE,
  ZERO,
  FAST_ZERO,
  READ_AND_KEEP,
  CACHE_AND_KEEP,
};

struct op {
  enum kind kind;
  uint32_t count;
  uint64_t offset;
  uint8_t fill; /* of a write */
};

/* BUF has SIZE bytes. */
static int
run_op_with (uint8_t *buf, const struct op *op, int *op_err)
{
  switch (op->kind) {
  case WRITE:
    memset (buf, op->fill, op->count);
    return blk_write (overlay, &base, buf, op->count, op->offset, op_err);
  case ZERO:
    return blk_zero (overlay, &base, ZERO_ANY, op->count, op->offset, op_err);
  case FAST_ZERO:
    return blk_zero (overlay, &base, ZERO_FAST, op->count, op->offset, op_err);
  case READ_AND_KEEP:
    return blk_read (live_disk (overlay), &base, ON_READ_KEEP, buf, op->count,
                     op->offset, op_err);
  case CACHE_AND_KEEP:
  default:
    return blk_cache (overlay, &base, ON_CACHE_KEEP, op->count, op->offset,
                      op_err);
  }
}

static int
run_op (const struct op *op, int *op_err)
{
  static _Thread_local uint8_t buf[SIZE];

  return run_op_with (buf, op, op_err);
}

/* What the operation does to a disk in memory. */
static void
model_op (const struct op *op, uint8_t *model)
{
  if (op->kind == WRITE)
    memset (model + op->offset, op->fill, op->count);
  else if (op->kind == ZERO || op->kind == FAST_ZERO)
    memset (model + op->offset, 0, op->count);
}

static void
check_disk (const uint8_t *model)
{
  static uint8_t bytes[SIZE];

  read_disk (bytes);
  for (unsigned i = 0; i < SIZE; ++i)
    if (bytes[i] != model[i])
      fail_msg ("byte %u: expected %u, got %u", i, model[i], bytes[i]);
}

static void
do_op (struct op op)
{
  assert_int_equal (run_op (&op, &err), 0);
}

/*----------------------------------------------------------------------
 * Plain behaviour
 */

static void
untouched_disk_reads_as_the_base (void **state)
{
  (void) state;
  check_disk (base_bytes);
  assert_false (overlay_is_changed (overlay));
  assert_int_equal (fake.nr_reads, 1); /* one run, one request */
}

/* Each operation at each kind of edge, from each of the three states. */
static void
every_edge_from_every_state (void **state)
{
  static const uint64_t edges[] = {
    0,          1,          BLOCK - 1, BLOCK,    BLOCK + 1,
    2 * BLOCK,  SLOT - 1,   SLOT,      SLOT + 5, 2 * SLOT + 3 * BLOCK,
    SIZE - 778, SIZE - 777, SIZE - 1,  SIZE,
  };
  const unsigned n = sizeof edges / sizeof edges[0];
  static uint8_t model[SIZE];

  for (unsigned from = 0; from < 3; ++from)
    for (enum kind kind = WRITE; kind <= CACHE_AND_KEEP; ++kind)
      for (unsigned i = 0; i < n; ++i)
        for (unsigned j = i + 1; j < n; ++j) {
          const struct op op = {
            .kind = kind,
            .offset = edges[i],
            .count = (uint32_t) (edges[j] - edges[i]),
            .fill = 'x',
          };

          tear_down (state);
          set_up (state);
          memcpy (model, base_bytes, SIZE);
          if (from > 0) {
            const struct op first = { .kind = from == 1 ? WRITE : ZERO,
                                      .count = SIZE,
                                      .fill = 'o' };

            do_op (first);
            model_op (&first, model);
          }
          if (run_op (&op, &err) == -1) {
            assert_int_equal (kind, FAST_ZERO);
            assert_int_equal (err, ENOTSUP);
            assert_int_equal (from, 0);
            assert_false (overlay_is_changed (overlay));
          }
          else
            model_op (&op, model);
          assert_int_equal (nr_errors, 0);
          if (from > 0)
            assert_int_equal (fake.nr_reads, 0);
          check_disk (model);
        }
}

/* Reads of the base, in requests and in bytes. */
static void
base_is_read_once_and_no_more (void **state)
{
  static const struct {
    struct op op;
    unsigned requests;
    uint64_t bytes;
  } cases[] = {
    { { WRITE, BLOCK, 0, 'x' }, 0, 0 },
    { { WRITE, 3 * SLOT, BLOCK, 'x' }, 0, 0 },
    { { WRITE, SIZE - 2 * BLOCK, 2 * BLOCK, 'x' }, 0, 0 },
    { { WRITE, 777, SIZE - 777, 'x' }, 0, 0 },
    { { WRITE, 776, SIZE - 776, 'x' }, 1, 1 },
    { { WRITE, 10, 100, 'x' }, 1, BLOCK },
    { { WRITE, BLOCK, 100, 'x' }, 1, 2 * BLOCK },
    { { WRITE, 2 * BLOCK, 100, 'x' }, 2, BLOCK },
    { { WRITE, BLOCK - 100, 100, 'x' }, 1, 100 },
    { { WRITE, BLOCK + 100, 0, 'x' }, 1, BLOCK - 100 },
    { { ZERO, SIZE, 0, 0 }, 0, 0 },
    { { ZERO, BLOCK + 10, BLOCK, 0 }, 1, BLOCK - 10 },
    { { READ_AND_KEEP, 10, 100, 0 }, 1, BLOCK },
    { { READ_AND_KEEP, SIZE, 0, 0 }, 1, SIZE },
    { { CACHE_AND_KEEP, SLOT, 5, 0 }, 1, SLOT + BLOCK },
  };

  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    tear_down (state);
    set_up (state);
    do_op (cases[i].op);
    if (fake.nr_reads != cases[i].requests
        || fake.bytes_read != cases[i].bytes)
      fail_msg ("case %u: %u requests of %lu bytes", i, fake.nr_reads,
                (unsigned long) fake.bytes_read);
    do_op (cases[i].op);
    assert_int_equal (fake.nr_reads, cases[i].requests);
  }
}

/* The same disk on a base with a minimum and a maximum of its own; the stub
 * checks every request.
 */
static void
base_with_block_sizes (void **state)
{
  static const uint32_t minima[] = { 512, 4096, 65536 };
  static uint8_t model[SIZE];

  for (unsigned i = 0; i < 3; ++i) {
    tear_down (state);
    set_up (state);
    fake.minimum = minima[i];
    fake.maximum = 2 * minima[i];
    fake.extent_size = 3 * BLOCK + 512;
    assert_int_equal (base_init (&base, fake_next (&fake)), 0);
    memcpy (model, base_bytes, SIZE);
    srandom (i);
    for (unsigned n = 0; n < 300; ++n) {
      struct op op = {
        .kind = (unsigned) random () % (CACHE_AND_KEEP + 1),
        .offset = (unsigned) random () % SIZE,
        .fill = (uint8_t) random (),
      };
      op.count = 1
                 + (unsigned) random ()
                     % MIN (3 * BLOCK, SIZE - (uint32_t) op.offset);
      if (run_op (&op, &err) == 0)
        model_op (&op, model);
      else
        assert_int_equal (err, ENOTSUP);

      struct nbdkit_extents *x = nbdkit_extents_new (op.offset, SIZE);
      assert_int_equal (blk_extents (live_disk (overlay), &base, op.count,
                                     op.offset,
                                     n % 2 ? NBDKIT_FLAG_REQ_ONE : 0, x, &err),
                        0);
      assert_true (nbdkit_extents_count (x) > 0);
      nbdkit_extents_free (x);
      assert_int_equal (
        blk_cache (overlay, &base, ON_CACHE_PASS, op.count, op.offset, &err),
        0);
    }
    check_disk (model);
  }
}

/*----------------------------------------------------------------------
 * A request arrives while another one reads the base
 */

static void
run_inner (void *arg)
{
  static uint8_t buf[SIZE];
  int inner_err;

  /* A lock that is still held would hang here. */
  assert_int_equal (run_op_with (buf, arg, &inner_err), 0);
}

static void
nothing_is_lost_while_the_base_is_read (void **state)
{
  static const struct op outer[] = {
    { WRITE, 512, BLOCK + 1024, 'o' },
    { WRITE, BLOCK, BLOCK + 100, 'o' },
    { WRITE, 2 * SLOT, BLOCK + 100, 'o' },
    { ZERO, 512, BLOCK + 1024, 0 },
    { ZERO, BLOCK, BLOCK + 100, 0 },
    { READ_AND_KEEP, 512, BLOCK + 1024, 0 },
    { READ_AND_KEEP, 3 * BLOCK, 0, 0 },
    { CACHE_AND_KEEP, 3 * BLOCK, 0, 0 },
  };
  static struct op inner[] = {
    { WRITE, BLOCK, BLOCK, 'i' },
    { WRITE, 3 * BLOCK, 0, 'i' },
    { WRITE, 512, BLOCK + 512, 'i' },
    { WRITE, 512, 2 * BLOCK + 3000, 'i' },
    { WRITE, 10, 5, 'i' },
    { ZERO, BLOCK, BLOCK, 0 },
    { ZERO, 3 * BLOCK, 0, 0 },
    { ZERO, 100, BLOCK + 900, 0 },
    { READ_AND_KEEP, 3 * BLOCK, 0, 0 },
    { CACHE_AND_KEEP, BLOCK, BLOCK, 0 },
  };
  static uint8_t model[SIZE];

  for (unsigned o = 0; o < sizeof outer / sizeof outer[0]; ++o)
    for (unsigned i = 0; i < sizeof inner / sizeof inner[0]; ++i) {
      tear_down (state);
      set_up (state);
      fake.during_read = run_inner;
      fake.during_read_arg = &inner[i];
      do_op (outer[o]);
      assert_null (fake.during_read); /* it did happen */

      /* The outer one changes something only after the inner one is done. */
      memcpy (model, base_bytes, SIZE);
      model_op (&inner[i], model);
      model_op (&outer[o], model);
      check_disk (model);
    }
}

/* A block turns from hole to zero, whole or with its neighbours. */
static void
zeroed_while_the_base_is_read (void **state)
{
  static struct op first = { WRITE, BLOCK, BLOCK, 'i' };
  static uint8_t model[SIZE];

  (void) state;
  fake.during_read = run_inner;
  fake.during_read_arg = &first;
  do_op ((struct op) { WRITE, 512, BLOCK, 'o' });
  do_op ((struct op) { ZERO, BLOCK, BLOCK, 0 });
  do_op ((struct op) { WRITE, 512, BLOCK + 512, 'p' });
  memcpy (model, base_bytes, SIZE);
  memset (model + BLOCK, 0, BLOCK);
  memset (model + BLOCK + 512, 'p', 512);
  check_disk (model);
}

/* A request arrives between any two steps of one that takes no slot lock, a
 * write to allocated blocks or a read.  The slots stand in the file in another
 * order than on the disk.
 */
static void *
run_ops (void *arg)
{
  static uint8_t buf[SIZE];
  const struct op *const *ops = arg;
  int inner_err;

  for (; *ops; ++ops)
    if (run_op_with (buf, *ops, &inner_err) == -1)
      abort ();
  return NULL;
}

/* In a thread of its own, as the interrupted one may hold the request lock. */
static void
run_in_thread (void *arg)
{
  pthread_t thread;

  assert_int_equal (pthread_create (&thread, NULL, run_ops, arg), 0);
  pthread_join (thread, NULL);
}

/* Is every byte as one of the orders of the two requests leaves it? */
static void
check_either (const uint8_t *got, const uint8_t *one, const uint8_t *other)
{
  for (unsigned i = 0; i < SIZE; ++i)
    if (got[i] != one[i] && got[i] != other[i])
      fail_msg ("byte %u: expected %u or %u, got %u", i, one[i], other[i],
                got[i]);
}

static void
requests_without_slot_locks_are_interrupted (void **state)
{
  static const struct op zero = { ZERO, 2 * SLOT, SLOT / 2, 0 };
  static const struct op zero_block = { ZERO, BLOCK, SLOT, 0 };
  static const struct op small = { WRITE, 10, SLOT + 5, 's' };
  static const struct op big = { WRITE, 3 * SLOT, 0, 'b' };
  static const struct op *const inner[][4] = {
    { &zero, NULL },         { &zero_block, NULL },
    { &zero, &small, NULL }, { &zero_block, &small, NULL },
    { &zero, &big, NULL },   { &big, &zero, &small, NULL },
  };
  static const struct op outer[] = {
    { WRITE, SIZE - 200, 100, 'o' },
    { WRITE, 100, SLOT + 100, 'o' },
    { WRITE, 2 * BLOCK, 2 * SLOT - BLOCK, 'o' },
  };
  static uint8_t model[SIZE], inner_last[SIZE], outer_last[SIZE], got[SIZE];
  bool interrupted;

  for (unsigned o = 0; o < 2 * sizeof outer / sizeof outer[0]; ++o)
    for (unsigned i = 0; i < sizeof inner / sizeof inner[0]; ++i)
      for (int n = 1;; ++n) {
        const struct op *op = &outer[o / 2];

        tear_down (state);
        set_up (state);
        for (int slot = 4; slot >= 0; --slot)
          do_op ((struct op) {
            .kind = WRITE,
            .count = MIN (SLOT, SIZE - (uint32_t) slot * SLOT),
            .offset = (uint64_t) slot * SLOT,
            .fill = (uint8_t) ('0' + slot),
          });
        read_disk (model);
        memcpy (inner_last, model, SIZE);
        if (o % 2 == 0)
          model_op (op, inner_last);
        for (const struct op *const *in = inner[i]; *in; ++in)
          model_op (*in, inner_last);

        interrupt_call (n, run_in_thread, (void *) inner[i]);
        if (o % 2 == 0)
          do_op (*op);
        else
          read_disk (got);
        interrupted = call_was_interrupted ();
        if (!interrupted) {
          assert_true (n > 2);
          break;
        }

        if (o % 2 == 0) {
          memcpy (outer_last, inner_last, SIZE);
          model_op (op, outer_last);
          read_disk (got);
          check_either (got, inner_last, outer_last);
        }
        else {
          check_either (got, model, inner_last);
          check_disk (inner_last);
        }
      }
}

/* Rule 6: a zero punches late, and then only what is still zero.  In front of
 * the last lock that it takes, the one for punching, the block is written
 * again.
 */
static void
written_again_before_the_punch (void **state)
{
  static const struct op again = { WRITE, BLOCK, SLOT, 'a' };
  static const struct op *const inner[] = { &again, NULL };
  static uint8_t model[SIZE];
  bool last_was_kept = false;

  for (int n = 1;; ++n) {
    tear_down (state);
    set_up (state);
    do_op ((struct op) { WRITE, BLOCK, SLOT, 'w' });
    memcpy (model, base_bytes, SIZE);
    interrupt_mutex (n, run_in_thread, (void *) inner);
    do_op ((struct op) { ZERO, BLOCK, SLOT, 0 });
    if (!call_was_interrupted ())
      break;

    uint8_t byte;
    assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_PASS,
                                &byte, 1, SLOT, &err),
                      0);
    last_was_kept = byte == 'a';
    memset (model + SLOT, last_was_kept ? 'a' : 0, BLOCK);
    check_disk (model);
  }
  assert_true (last_was_kept);
}

/* Where the client wants whole blocks, what is kept of them is read right to where the
 * client gets it; but not at the ragged end of the disk, as a kept block is whole.
 */
static void
read_into_clients_buffer (void **state)
{
  const struct {
    uint64_t offset;
    uint32_t count;
    bool direct;
  } reads[] = {
    { 2 * BLOCK, 3 * BLOCK, true },
    { 8 * BLOCK, BLOCK + 1, false },
    { 12 * BLOCK + 1, 2 * BLOCK - 1, false },
    { SIZE - 777 - BLOCK, BLOCK + 777, false },
  };
  static uint8_t buf[SIZE];

  (void) state;
  for (unsigned i = 0; i < sizeof reads / sizeof reads[0]; ++i)
    for (unsigned n = 1; n <= 2; ++n) {
      memset (buf, 0, sizeof buf);
      assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_KEEP,
                                  buf, reads[i].count, reads[i].offset, &err),
                        0);
      assert_memory_equal (buf, base_bytes + reads[i].offset, reads[i].count);
      assert_int_equal (fake.read_into == buf, reads[i].direct);
      assert_int_equal (fake.nr_reads,
                        i + 1); /* the second time it is there */
    }
}

/* All extents of the disk, asked for until there is no more; one character for
 * each block.
 */
static void
read_extents (char types[SIZE / BLOCK + 2])
{
  uint64_t pos = 0;

  while (pos < SIZE) {
    struct nbdkit_extents *x = nbdkit_extents_new (pos, SIZE);

    assert_int_equal (blk_extents (live_disk (overlay), &base,
                                   (uint32_t) (SIZE - pos), pos, 0, x, &err),
                      0);
    assert_true (nbdkit_extents_count (x) > 0);
    for (size_t i = 0; i < nbdkit_extents_count (x); ++i) {
      const struct nbdkit_extent e = nbdkit_get_extent (x, i);

      for (; pos < e.offset + e.length; pos += BLOCK)
        types[pos / BLOCK] = e.type == 0 ? 'd' : 'z';
    }
    nbdkit_extents_free (x);
  }
  types[(SIZE - 1) / BLOCK + 1] = '\0';
}

/* However little the base answers at once, and however few extents a list holds, the
 * extents are the same.
 */
static void
extents_in_pieces (void **state)
{
  const struct op ops[] = {
    { .kind = WRITE, .count = BLOCK, .offset = 3 * BLOCK },
    { .kind = WRITE, .count = 3 * BLOCK, .offset = 8 * BLOCK },
    { .kind = ZERO, .count = 2 * BLOCK, .offset = 10 * BLOCK },
    { .kind = ZERO, .count = BLOCK, .offset = 20 * BLOCK },
    { .kind = WRITE, .count = 2 * BLOCK, .offset = SLOT - BLOCK },
  };
  char expected[SIZE / BLOCK + 2], found[SIZE / BLOCK + 2];

  (void) state;
  fake.extent_size = BLOCK;
  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i)
    do_op (ops[i]);
  for (unsigned i = 0; i <= (SIZE - 1) / BLOCK; ++i)
    expected[i] = i % 2 ? 'z' : 'd';
  expected[(SIZE - 1) / BLOCK + 1] = '\0';
  expected[3] = expected[8] = expected[9] = 'd';
  expected[10] = expected[11] = expected[20] = 'z';
  expected[31] = expected[32] = 'd';

  for (unsigned i = 0; i < 4; ++i) {
    fake.one_extent = i % 2;
    longest_list = i < 2 ? SIZE_MAX : 3;
    fake.nr_extents = 0;
    read_extents (found);
    assert_string_equal (found, expected);
    /* From blocks 0, 4, 12 and 36 on; as far as 3, 12, 36 and the end. */
    if (i == 0)
      assert_int_equal (fake.nr_extents, 4);
  }
  longest_list = SIZE_MAX;
}

/*----------------------------------------------------------------------
 * Failures
 */

/* The states of all blocks, one character each. */
static void
read_states (char states[SIZE / BLOCK + 2])
{
  unsigned n = 0;

  /* The base says "data" where it is asked, so have it say "hole". */
  for (uint64_t offset = 0; offset < SIZE; offset += BLOCK) {
    struct nbdkit_extents *x = nbdkit_extents_new (offset, SIZE);
    const unsigned asked = fake.nr_extents;

    assert_int_equal (blk_extents (live_disk (overlay), &base,
                                   (uint32_t) MIN (BLOCK, SIZE - offset),
                                   offset, 0, x, &err),
                      0);
    states[n++] = fake.nr_extents != asked             ? 'h'
                  : nbdkit_get_extent (x, 0).type == 0 ? 'a'
                                                       : 'z';
    nbdkit_extents_free (x);
  }
  states[n] = '\0';
}

/* Every call that an operation makes fails in turn; then the operation gets
 * the error, all states are what they were, and so is every byte but those of
 * the request in blocks that had been allocated.  After that it succeeds.
 */
static void
check_every_failure (void **state, struct op op, int with)
{
  const struct op before[] = {
    { WRITE, 5 * BLOCK, 3 * BLOCK + 1000, 'b' },
    { ZERO, 3 * BLOCK, 20 * BLOCK, 0 },
    { WRITE, 10, SLOT + 5 * BLOCK, 'c' },
    { ZERO, SLOT, SLOT + 10 * BLOCK, 0 },
  };
  static uint8_t model[SIZE], bytes[SIZE];
  char states[SIZE / BLOCK + 2], states_after[SIZE / BLOCK + 2];

  for (int n = 1;; ++n) {
    int r, failed, op_err = 0;

    tear_down (state);
    set_up (state);
    memcpy (model, base_bytes, SIZE);
    for (unsigned i = 0; i < sizeof before / sizeof before[0]; ++i) {
      do_op (before[i]);
      model_op (&before[i], model);
    }
    read_states (states);
    const unsigned long long used = bytes_of_last_file ();

    fail_calls_from (n, with);
    r = run_op (&op, &op_err);
    failed = call_has_failed ();

    if (!failed) {
      assert_int_equal (r, 0);
      model_op (&op, model);
      check_disk (model);
      assert_true (n > 1);
      return;
    }
    if (op.kind == READ_AND_KEEP && r == 0) /* not kept, but read */
      ;
    else {
      assert_int_equal (r, -1);
      /* A read goes on after it could not keep something, to the next call
       * that fails.
       */
      if (!(op.kind == READ_AND_KEEP
            && (op_err == ENOMEM || op_err == EIO || op_err == with)))
        assert_int_equal (op_err, failed == EOPNOTSUPP ? EIO : failed);
      assert_true (nr_errors > 0);
    }

    /* What the file system itself needs may have grown a little. */
    if (op.kind == WRITE || op.kind == ZERO)
      assert_true (bytes_of_last_file () <= used + 4 * BLOCK);
    read_states (states_after);
    if (op.kind == READ_AND_KEEP || op.kind == CACHE_AND_KEEP) {
      /* One step for each run of holes: those before may have been kept. */
      for (unsigned i = 0; states[i]; ++i)
        if (states[i] == 'h' && states_after[i] == 'a')
          states_after[i] = 'h';
    }
    assert_string_equal (states_after, states);
    read_disk (bytes);
    for (uint64_t i = 0; i < SIZE; ++i) {
      if (bytes[i] == model[i])
        continue;
      if (states[i / BLOCK] == 'a' && i - op.offset < op.count)
        continue;
      fail_msg ("call %d failed: byte %lu: expected %u, got %u", n,
                (unsigned long) i, model[i], bytes[i]);
    }

    do_op (op);
    model_op (&op, model);
    check_disk (model);
  }
}

static void
every_failure_leaves_the_map_as_it_was (void **state)
{
  static const struct op ops[] = {
    { WRITE, SIZE, 0, 'x' },
    { WRITE, SLOT + 100, BLOCK + 100, 'x' },
    { WRITE, 100, 21 * BLOCK + 5, 'x' },
    { WRITE, 100, SIZE - 100, 'x' },
    { WRITE, BLOCK, 4 * BLOCK, 'x' },
    { ZERO, SLOT + 100, BLOCK + 100, 0 },
    { ZERO, SIZE, 0, 0 },
    { ZERO, 100, SIZE - 200, 0 },
    { READ_AND_KEEP, SLOT + 100, BLOCK + 100, 0 },
    { CACHE_AND_KEEP, SIZE - 5, 5, 0 },
  };
  static const int errors[] = { ENOSPC, EOPNOTSUPP };

  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i)
    for (unsigned j = 0; j < 2; ++j)
      check_every_failure (state, ops[i], errors[j]);
}

static void
first_write_cannot_make_the_file (void **state)
{
  static uint8_t buf[BLOCK];

  (void) state;
  overlay_free (overlay);
  overlay = new_overlay (SIZE, "/nonexistent/dir");
  assert_int_equal (blk_write (overlay, &base, buf, BLOCK, 0, &err), -1);
  assert_int_equal (err, EIO); /* NBD has no ENOENT */
  assert_non_null (strstr (last_error, "/nonexistent/dir"));
  assert_false (overlay_is_changed (overlay));
  check_disk (base_bytes);
}

static void
failing_punches_fail_nothing (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  fail_punches = true;
  do_op ((struct op) { WRITE, SIZE, 0, 'x' });
  do_op ((struct op) { ZERO, SIZE, 0, 0 });
  assert_true (nr_punches > 0);
  check_disk (model);
  /* What was not punched must not come back. */
  do_op ((struct op) { WRITE, 1, 100, 'y' });
  model[100] = 'y';
  check_disk (model);
}

static void
short_transfers_lose_nothing (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  short_transfers = true;
  memcpy (model, base_bytes, SIZE);
  const struct op ops[] = {
    { WRITE, 100, BLOCK - 50, 'x' },
    { WRITE, 2 * BLOCK, SLOT - 50, 'y' },
    { ZERO, BLOCK + 20, 77, 0 },
  };
  for (unsigned i = 0; i < 3; ++i) {
    do_op (ops[i]);
    model_op (&ops[i], model);
  }
  short_transfers = false;
  check_disk (model);
}

/* nbdkit aborts on ENOTSUP where the client did not ask for a fast zero. */
static void
base_that_fails_with_enotsup (void **state)
{
  (void) state;
  fake.fail_with = ENOTSUP;
  assert_int_equal (blk_zero (overlay, &base, ZERO_ANY, 100, 100, &err), -1);
  assert_int_equal (err, EIO);
  assert_int_equal (blk_zero (overlay, &base, ZERO_FAST, 100, 100, &err), -1);
  assert_int_equal (err, ENOTSUP);
  assert_false (overlay_is_changed (overlay));
}

static void
punches_of_what_is_zero_already (void **state)
{
  (void) state;
  do_op ((struct op) { ZERO, SIZE, 0, 0 });
  assert_int_equal (nr_punches, 0); /* never allocated, costs nothing */
  do_op ((struct op) { WRITE, BLOCK, BLOCK, 'x' });
  nr_punches = 0;
  do_op ((struct op) { ZERO, SIZE, 0, 0 });
  assert_int_equal (nr_punches, 1);
  do_op ((struct op) { ZERO, SIZE, 0, 0 });
  assert_int_equal (nr_punches, 1);
}

/*----------------------------------------------------------------------
 * Requests for more slots than there are locks
 */

#define MANY_SLOTS 300

static struct fake_base many_fake;
static pthread_t inner_thread;
static atomic_bool inner_done;

static void *
write_behind_the_big_one (void *arg)
{
  static uint8_t buf[BLOCK];
  int inner_err;

  (void) arg;
  memset (buf, 'i', sizeof buf);
  if (blk_write (overlay, &base, buf, sizeof buf,
                 (MANY_SLOTS - 1) * SLOT + 20 * BLOCK, &inner_err)
      == -1)
    abort ();
  inner_done = true;
  return NULL;
}

/* It has to wait for the big one.  So that it has the time to do harm if it does
 * not, the big one waits a little for it.
 */
static void
start_inner (void *arg)
{
  assert_int_equal (
    pthread_create (&inner_thread, NULL, write_behind_the_big_one, arg), 0);
  for (unsigned i = 0; i < 200 && !inner_done; ++i)
    usleep (1000);
}

static void
requests_for_many_slots (void **state)
{
  const uint64_t size = MANY_SLOTS * (uint64_t) SLOT;
  uint8_t *buf = malloc (size), byte;

  (void) state;
  memset (buf, 'b', size);
  many_fake = (struct fake_base) { .bytes = buf, .size = size };
  assert_int_equal (base_init (&base, fake_next (&many_fake)), 0);
  overlay_free (overlay);
  overlay = new_overlay (size, "/var/tmp");

  /* A big write, and another one to the end of its last slot. */
  interrupt_call (2, start_inner, NULL); /* its write to the file */
  assert_int_equal (
    blk_write (overlay, &base, buf, (uint32_t) (size - SLOT / 2), 0, &err), 0);
  assert_true (call_was_interrupted ());
  pthread_join (inner_thread, NULL);
  assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_PASS, &byte,
                              1, size - SLOT + 20 * BLOCK, &err),
                    0);
  assert_int_equal (byte, 'i');

  /* The same disk, written from its end: few punches, none of them long. */
  overlay_free (overlay);
  overlay = new_overlay (size, "/var/tmp");
  for (int i = MANY_SLOTS - 1; i >= 0; --i)
    assert_int_equal (
      blk_write (overlay, &base, buf, SLOT, (uint64_t) i * SLOT, &err), 0);
  nr_punches = 0;
  assert_int_equal (
    blk_zero (overlay, &base, ZERO_ANY, (uint32_t) size, 0, &err), 0);
  assert_true (longest_punch <= 16 << 20);
  assert_int_equal (nr_punches, (size + (16 << 20) - 1) / (16 << 20));
  free (buf);
}

/*----------------------------------------------------------------------
 * Leaves that become zero as a whole: of this disk the first two
 */

#define LEAF (LEAF_SLOTS * SLOT)
#define LARGE (2 * LEAF + 3 * SLOT + 777)

static uint8_t *large_base, *large_model;

static int
set_up_large (void **state)
{
  (void) state;
  if (!large_base) {
    large_base = malloc (LARGE);
    large_model = malloc (LARGE);
    for (uint64_t i = 0; i < LARGE; ++i)
      large_base[i] = (uint8_t) (1 + i % 251);
  }
  many_fake = (struct fake_base) { .bytes = large_base, .size = LARGE };
  assert_int_equal (base_init (&base, fake_next (&many_fake)), 0);
  overlay = new_overlay (LARGE, "/var/tmp");
  memcpy (large_model, large_base, LARGE);
  nr_punches = 0;
  return 0;
}

static int
tear_down_large (void **state)
{
  free (large_base);
  free (large_model);
  large_base = NULL;
  return tear_down (state);
}

#define WITH_LARGE_OVERLAY(test)                                              \
  cmocka_unit_test_setup_teardown (test, set_up_large, tear_down_large)

static void
start_large_over (void **state)
{
  tear_down (state);
  set_up_large (state);
}

static int
run_large (const struct op *op, int *op_err)
{
  CLEANUP_FREE uint8_t *buf = malloc (op->count);

  return run_op_with (buf, op, op_err);
}

static void
do_large (struct op op)
{
  assert_int_equal (run_large (&op, &err), 0);
  model_op (&op, large_model);
}

/* All of the disk, or a block of each slot and all of one slot of the second leaf. */
#define FOCUS (LEAF + 5 * SLOT)

static void
check_large (bool all)
{
  static uint8_t buf[SLOT];

  for (uint64_t at = 0; at < LARGE; at += SLOT) {
    const uint32_t count
      = (uint32_t) MIN (LARGE - at, all || at == FOCUS ? SLOT : BLOCK);

    assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_PASS, buf,
                                count, at, &err),
                      0);
    assert_memory_equal (buf, large_model + at, count);
  }
}

/* The leaf that has the byte at OFFSET of the disk. */
static const struct slot *
leaf_at (uint64_t offset)
{
  HOLD_SHARED (&overlay->request_lock);

  return map_find (&overlay->map, ROUND_DOWN (offset / SLOT, LEAF_SLOTS));
}

static void
leaves_that_become_zero (void **state)
{
  const struct op all = { ZERO, LARGE, 0, 0 };
  struct nbdkit_extents *x;

  /* The second leaf is the only one that is covered. */
  do_large ((struct op) { ZERO, LARGE - BLOCK - 300, BLOCK + 100, 0 });
  check_large (true);
  assert_ptr_not_equal (leaf_at (0), leaf_at (LEAF));
  do_large (all);
  check_large (true);

  start_large_over (state);
  do_large (all);
  check_large (true);
  assert_ptr_equal (leaf_at (0), leaf_at (LEAF));
  assert_ptr_not_equal (leaf_at (0), leaf_at (2 * LEAF));
  x = nbdkit_extents_new (0, LARGE);
  assert_int_equal (
    blk_extents (live_disk (overlay), &base, LARGE, 0, 0, x, &err), 0);
  assert_int_equal (nbdkit_extents_count (x), 1);
  assert_int_equal (nbdkit_get_extent (x, 0).type,
                    NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO);
  nbdkit_extents_free (x);
  assert_int_equal (nr_punches, 0);

  /* Written to, a leaf is one of its own from then on. */
  do_large ((struct op) { WRITE, 100, FOCUS + 50, 'w' });
  check_large (true);
  assert_ptr_not_equal (leaf_at (0), leaf_at (LEAF));
  do_large (all);
  check_large (true);
  assert_int_equal (nr_punches, 1);
  assert_ptr_not_equal (leaf_at (0), leaf_at (LEAF));
  assert_int_equal (many_fake.nr_reads, 0);
}

/* Whatever fails of a request, it has changed nothing of such a leaf. */
static void
no_leaf_becomes_zero_where_a_call_fails (void **state)
{
  const struct op op = { ZERO, LARGE - BLOCK - 300, BLOCK + 100, 0 };

  for (int n = 1;; ++n) {
    int r, failed, op_err = 0;

    start_large_over (state);
    fail_calls_from (n, ENOSPC);
    r = run_large (&op, &op_err);
    failed = call_has_failed ();
    if (!failed) {
      assert_int_equal (r, 0);
      assert_true (n > 6);
      break;
    }
    assert_int_equal (r, -1);
    assert_int_equal (op_err, failed);
    assert_null (leaf_at (LEAF));
    check_large (false);
    do_large (op);
    check_large (false);
  }
}

static void *
run_large_inner (void *arg)
{
  int inner_err;

  if (run_large (arg, &inner_err) == -1)
    abort ();
  inner_done = true;
  return NULL;
}

/* It may have to wait for the other one. */
static void
start_large_inner (void *arg)
{
  assert_int_equal (pthread_create (&inner_thread, NULL, run_large_inner, arg),
                    0);
  for (unsigned i = 0; i < 10 && !inner_done; ++i)
    usleep (1000);
}

/* In front of each call of one request another one begins: one of them zeroes the
 * second leaf, the other one is for a part of it.
 */
static void
interrupted_while_a_leaf_becomes_zero (void **state)
{
  static struct op zero = { ZERO, LARGE - BLOCK - 300, BLOCK + 100, 0 };
  static struct op others[] = {
    { WRITE, 100, FOCUS + 50, 'w' },
    { WRITE, SLOT, FOCUS, 'w' },
    { WRITE, 2 * SLOT, LEAF - SLOT, 'w' },
    { ZERO, 100, FOCUS + 50, 0 },
    { READ_AND_KEEP, 3 * BLOCK, FOCUS + BLOCK, 0 },
  };

  for (unsigned i = 0; i < sizeof others / sizeof others[0]; ++i)
    for (unsigned inside = 0; inside < 2; ++inside)
      for (int n = 1;; ++n) {
        struct op *outer = inside ? &zero : &others[i];
        struct op *inner = inside ? &others[i] : &zero;
        uint8_t byte;

        start_large_over (state);
        inner_done = false;
        interrupt_call (n, start_large_inner, inner);
        assert_int_equal (run_large (outer, &err), 0);
        if (!call_was_interrupted ()) {
          assert_true (n > 2);
          break;
        }
        pthread_join (inner_thread, NULL);

        /* Which one was the last is seen where the other one wrote. */
        assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_PASS,
                                    &byte, 1, others[i].offset, &err),
                          0);
        if (byte) {
          assert_int_equal (others[i].kind, WRITE);
          model_op (&zero, large_model);
          model_op (&others[i], large_model);
        }
        else {
          model_op (&others[i], large_model);
          model_op (&zero, large_model);
        }
        check_large (false);
      }
}

/*----------------------------------------------------------------------
 * Threads
 */

/* Each byte belongs to one thread, in pieces that are not aligned, so that
 * most blocks belong to several.  Each keeps a model of its own bytes.
 */
#define THREADS 4
#define OPS 4000

static uint8_t shared_model[SIZE];

static uint64_t
piece_start (unsigned i)
{
  return MIN ((uint64_t) i * (i % 7 == 0 ? 1000 : 1001) + (i / 40) * 9000,
              (uint64_t) SIZE);
}

static void *
stress (void *arg)
{
  const unsigned me = *(unsigned *) arg;
  unsigned seed = me + 1;
  uint8_t *buf = malloc (SIZE);

  for (unsigned n = 0; n < OPS; ++n) {
    const unsigned piece
      = (unsigned) rand_r (&seed) / THREADS % 160 * THREADS + me;
    const uint64_t start = piece_start (piece), end = piece_start (piece + 1);
    int my_err;

    if (start >= end)
      continue;
    struct op op = {
      .offset = start + (unsigned) rand_r (&seed) % (end - start),
      .fill = (uint8_t) rand_r (&seed),
      .kind = (unsigned) rand_r (&seed) % (CACHE_AND_KEEP + 1),
    };
    op.count = 1 + (uint32_t) ((unsigned) rand_r (&seed) % (end - op.offset));

    if (run_op (&op, &my_err) == 0)
      model_op (&op, shared_model);
    else if (op.kind != FAST_ZERO || my_err != ENOTSUP)
      abort ();

    if (blk_read (live_disk (overlay), &base, ON_READ_PASS, buf,
                  (uint32_t) (end - start), start, &my_err)
          == -1
        || memcmp (buf, shared_model + start, end - start) != 0)
      abort ();
  }
  free (buf);
  return NULL;
}

static void
threads_that_share_blocks (void **state)
{
  pthread_t threads[THREADS];
  unsigned numbers[THREADS];

  (void) state;
  memcpy (shared_model, base_bytes, SIZE);
  for (unsigned i = 0; i < THREADS; ++i) {
    numbers[i] = i;
    assert_int_equal (pthread_create (&threads[i], NULL, stress, &numbers[i]),
                      0);
  }
  for (unsigned i = 0; i < THREADS; ++i)
    pthread_join (threads[i], NULL);
  check_disk (shared_model);
}

/* One thread writes and zeroes whole slots, back and forth, while another one
 * writes single bytes between: late punches must hit nothing.
 */
static void *
zero_whole_slots (void *arg)
{
  int my_err;

  (void) arg;
  for (unsigned n = 0; n < 3000; ++n) {
    const struct op op = {
      .kind = n % 2 ? ZERO : WRITE,
      .count = SLOT - 2 * BLOCK,
      .offset = (n / 2 % 4) * SLOT + BLOCK,
      .fill = 'z',
    };

    if (run_op (&op, &my_err) == -1)
      abort ();
  }
  return NULL;
}

static void
punches_hit_nothing_else (void **state)
{
  pthread_t thread;
  uint8_t buf[2 * BLOCK];

  (void) state;
  assert_int_equal (pthread_create (&thread, NULL, zero_whole_slots, NULL), 0);
  for (unsigned n = 0; n < 3000; ++n) {
    const uint64_t offset = (1 + n % 3) * SLOT - BLOCK;
    const uint8_t fill = (uint8_t) (1 + n % 200);

    if (n % 5 == 0) {
      assert_int_equal (
        blk_zero (overlay, &base, ZERO_ANY, 2 * BLOCK, offset, &err), 0);
    }
    memset (buf, fill, sizeof buf);
    assert_int_equal (
      blk_write (overlay, &base, buf, sizeof buf, offset, &err), 0);
    assert_int_equal (blk_read (live_disk (overlay), &base, ON_READ_PASS, buf,
                                sizeof buf, offset, &err),
                      0);
    for (unsigned i = 0; i < sizeof buf; ++i)
      assert_int_equal (buf[i], fill);
  }
  pthread_join (thread, NULL);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    WITH_OVERLAY (untouched_disk_reads_as_the_base),
    WITH_OVERLAY (every_edge_from_every_state),
    WITH_OVERLAY (base_is_read_once_and_no_more),
    WITH_OVERLAY (base_with_block_sizes),
    WITH_OVERLAY (read_into_clients_buffer),
    WITH_OVERLAY (extents_in_pieces),
    WITH_OVERLAY (nothing_is_lost_while_the_base_is_read),
    WITH_OVERLAY (zeroed_while_the_base_is_read),
    WITH_OVERLAY (requests_without_slot_locks_are_interrupted),
    WITH_OVERLAY (written_again_before_the_punch),
    WITH_OVERLAY (every_failure_leaves_the_map_as_it_was),
    WITH_OVERLAY (first_write_cannot_make_the_file),
    WITH_OVERLAY (failing_punches_fail_nothing),
    WITH_OVERLAY (short_transfers_lose_nothing),
    WITH_OVERLAY (base_that_fails_with_enotsup),
    WITH_OVERLAY (punches_of_what_is_zero_already),
    WITH_OVERLAY (requests_for_many_slots),
    WITH_LARGE_OVERLAY (leaves_that_become_zero),
    WITH_LARGE_OVERLAY (no_leaf_becomes_zero_where_a_call_fails),
    WITH_LARGE_OVERLAY (interrupted_while_a_leaf_becomes_zero),
    WITH_OVERLAY (threads_that_share_blocks),
    WITH_OVERLAY (punches_hit_nothing_else),
  };

  return cmocka_run_group_tests_name ("blk", tests, NULL, NULL);
}
