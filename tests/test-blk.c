/* SPDX-License-Identifier: BSD-3-Clause */

/* Block operations without a server: interleavings that are forced, calls that
 * fail one after the other, and many threads.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
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
#include "overlay/cleaner.h"
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

/* Can the file system set space aside that reads as zeroes? */
static bool space_is_fast;

static void
find_out_if_space_is_fast (void)
{
  char name[] = "/var/tmp/test-blk-XXXXXX";
  const int fd = mkstemp (name);

  if (fd == -1)
    abort ();
  unlink (name);
  space_is_fast = fallocate (fd, FALLOC_FL_ZERO_RANGE, 0, BLOCK) == 0;
  close (fd);
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

/*----------------------------------------------------------------------
 * Accounts: each address of the log is owned by one block, or it waits, or it is taken, or
 * it is free
 */

/* Which block of the disk owns an address, and 1; 0: none does. */
struct owners {
  uint64_t *of;
  uint64_t head, end, nr;
};

/* All maps may have the same block at the same address, but no other one. */
static void
find_owners (const struct map *map, struct owners *owners)
{
  for (uint64_t nr = map_next (map, 0); nr < map->nr_slots;
       nr = map_next (map, nr + 1)) {
    const struct slot *slot = map_find (map, nr);
    const struct slot_pair pair = slot_load (slot);

    for (unsigned i = 0; i < SLOT_BLOCKS; ++i) {
      if (bitmap_state (pair.state, i) != BLOCK_ALLOCATED)
        continue;

      const uint32_t address = slot_address (pair, i);
      const uint64_t me = nr * SLOT_BLOCKS + i + 1;

      if (address < owners->head || address >= owners->end)
        fail_msg ("block %lu lies at %u", (unsigned long) me - 1, address);
      if (owners->of[address] != 0 && owners->of[address] != me)
        fail_msg ("blocks %lu and %lu lie at %u",
                  (unsigned long) owners->of[address] - 1,
                  (unsigned long) me - 1, address);
      owners->nr += owners->of[address] == 0;
      owners->of[address] = me;
    }
  }
}

/* No request may be under way, nor the cleaner be at work. */
static struct log_counts
check_accounts (void)
{
  struct log *log = &overlay->log;
  const struct log_counts counts = log_count (log);
  struct owners owners
    = { .head = log->head, .end = log_end (log) >> log->block_shift };
  uint64_t nr[LOG_OWNED + 1] = { 0 };

  owners.of = calloc (owners.end, sizeof *owners.of);
  assert_non_null (owners.of);
  {
    HOLD_SHARED (&overlay->request_lock);

    find_owners (&overlay->map, &owners);
    for (const struct frozen_map *f = overlay->map.newest; f; f = f->older)
      find_owners (&f->map, &owners);
  }
  for (uint64_t i = owners.head; i < owners.end; ++i) {
    const enum log_kind kind = log_kind_of (log, i);

    if ((kind == LOG_OWNED) != (owners.of[i] != 0))
      fail_msg ("address %lu: kind %d, but owner %lu", (unsigned long) i, kind,
                (unsigned long) owners.of[i]);
    nr[kind]++;
  }
  free (owners.of);
  assert_int_equal (counts.owned, owners.nr);
  assert_int_equal (counts.owned, nr[LOG_OWNED]);
  assert_int_equal (counts.waiting, nr[LOG_WAITING]);
  assert_int_equal (counts.taken, nr[LOG_TAKEN]);
  assert_int_equal (counts.free, nr[LOG_FREE]);
  assert_int_equal (counts.taken, 0);
  return counts;
}

/* A round of the cleaner: after it, nothing waits. */
static void
clean (void)
{
  const struct log_counts before = check_accounts ();

  overlay_clean (overlay);

  const struct log_counts after = check_accounts ();

  assert_int_equal (after.owned, before.owned);
  assert_int_equal (after.waiting, 0);
}

static int
tear_down (void **state)
{
  (void) state;
  fail_calls_from (0, 0);
  call_was_interrupted ();
  before_punch = NULL;
  short_transfers = fail_punches = no_tmpfile = false;
  clean ();
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
  ZERO_WITH_SPACE,
  FAST_ZERO_WITH_SPACE,
  READ_AND_KEEP,
  CACHE_AND_KEEP,
  NR_KINDS,
};

static bool
is_zeroing (enum kind kind)
{
  return kind >= ZERO && kind <= FAST_ZERO_WITH_SPACE;
}

static bool
is_fast (enum kind kind)
{
  return kind == FAST_ZERO || kind == FAST_ZERO_WITH_SPACE;
}

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
  case FAST_ZERO:
  case ZERO_WITH_SPACE:
  case FAST_ZERO_WITH_SPACE:
    return blk_zero (overlay, &base, is_fast (op->kind) ? ZERO_FAST : ZERO_ANY,
                     op->kind >= ZERO_WITH_SPACE ? ZERO_HAS_SPACE
                                                 : ZERO_GIVES_BACK,
                     op->count, op->offset, op_err);
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
  else if (is_zeroing (op->kind))
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
    for (enum kind kind = WRITE; kind < NR_KINDS; ++kind)
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
            assert_true (is_fast (kind));
            assert_int_equal (err, ENOTSUP);
            assert_true (from == 0 || !space_is_fast);
            if (from == 0)
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
    { { ZERO_WITH_SPACE, SIZE, 0, 0 }, 0, 0 },
    { { ZERO_WITH_SPACE, BLOCK + 10, BLOCK, 0 }, 1, BLOCK - 10 },
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
        .kind = (unsigned) random () % NR_KINDS,
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
    { ZERO_WITH_SPACE, 3 * BLOCK, BLOCK + 100, 0 },
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
    { ZERO_WITH_SPACE, 3 * BLOCK, 0, 0 },
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

/* Is every byte as it was at one of these NR moments? */
#define MAX_MOMENTS 4

static void
check_any (const uint8_t *got, uint8_t moments[][SIZE], unsigned nr)
{
  for (unsigned i = 0; i < SIZE; ++i) {
    bool found = false;

    for (unsigned j = 0; j < nr; ++j)
      found |= got[i] == moments[j][i];
    if (!found)
      fail_msg ("byte %u: expected %u or %u, got %u", i, moments[0][i],
                moments[nr - 1][i], got[i]);
  }
}

static void
write_backwards (void)
{
  for (int slot = 4; slot >= 0; --slot)
    do_op ((struct op) {
      .kind = WRITE,
      .count = MIN (SLOT, SIZE - (uint32_t) slot * SLOT),
      .offset = (uint64_t) slot * SLOT,
      .fill = (uint8_t) ('0' + slot),
    });
}

static void
requests_without_slot_locks_are_interrupted (void **state)
{
  static const struct op zero = { ZERO, 2 * SLOT, SLOT / 2, 0 };
  static const struct op zero_block = { ZERO, BLOCK, SLOT, 0 };
  static const struct op space = { ZERO_WITH_SPACE, 2 * SLOT, SLOT / 2, 0 };
  static const struct op small = { WRITE, 10, SLOT + 5, 's' };
  static const struct op big = { WRITE, 3 * SLOT, 0, 'b' };
  static const struct op *const inner[][4] = {
    { &zero, NULL },         { &zero_block, NULL },
    { &zero, &small, NULL }, { &zero_block, &small, NULL },
    { &zero, &big, NULL },   { &big, &zero, &small, NULL },
    { &space, NULL },        { &space, &small, NULL },
  };
  static const struct op outer[] = {
    { WRITE, SIZE - 200, 100, 'o' },
    { WRITE, 100, SLOT + 100, 'o' },
    { WRITE, 2 * BLOCK, 2 * SLOT - BLOCK, 'o' },
  };
  static uint8_t moments[MAX_MOMENTS][SIZE], got[SIZE];

  for (unsigned o = 0; o < 2 * sizeof outer / sizeof outer[0]; ++o)
    for (unsigned i = 0; i < sizeof inner / sizeof inner[0]; ++i)
      for (int n = 1;; ++n) {
        const struct op *op = &outer[o / 2];
        unsigned nr = 1;

        tear_down (state);
        set_up (state);
        write_backwards ();
        read_disk (moments[0]);
        if (o % 2 == 0)
          model_op (op, moments[0]);
        for (const struct op *const *in = inner[i]; *in; ++in, ++nr) {
          memcpy (moments[nr], moments[nr - 1], SIZE);
          model_op (*in, moments[nr]);
        }

        interrupt_call (n, run_in_thread, (void *) inner[i]);
        if (o % 2 == 0)
          do_op (*op);
        else
          read_disk (got);
        if (!call_was_interrupted ()) {
          assert_true (n > 2);
          break;
        }

        if (o % 2 == 0) {
          /* Either of both requests was the last one. */
          memcpy (moments[0], moments[nr - 1], SIZE);
          memcpy (moments[1], moments[nr - 1], SIZE);
          model_op (op, moments[0]);
          read_disk (got);
          check_any (got, moments, 2);
        }
        else {
          check_any (got, moments, nr);
          check_disk (moments[nr - 1]);
        }
      }
}

/* Rule 6: what is punched belongs to nobody.  In front of each lock that the cleaner takes,
 * and of its punch, the block is written again.
 */
static const struct op again = { WRITE, BLOCK, SLOT, 'a' };

static void
write_again (void)
{
  do_op (again);
}

static void
written_again_while_it_is_cleaned (void **state)
{
  static const struct op *const inner[] = { &again, NULL };
  static uint8_t model[SIZE];
  bool interrupted = true;

  memcpy (model, base_bytes, SIZE);
  model_op (&again, model);
  for (int n = 0; interrupted; ++n) {
    tear_down (state);
    set_up (state);
    do_op ((struct op) { WRITE, BLOCK, SLOT, 'w' });
    do_op ((struct op) { ZERO, BLOCK, SLOT, 0 });
    if (n == 0)
      before_punch = write_again;
    else
      interrupt_mutex (n, run_in_thread, (void *) inner);
    overlay_clean (overlay);
    interrupted = n == 0 ? !before_punch : call_was_interrupted ();
    assert_true (interrupted || n > 3);
    if (interrupted)
      check_disk (model);
  }
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
      /* A read goes on after it could not keep something, and what finds the disk full
       * tries again, to the next call that fails.
       */
      if (op.kind == READ_AND_KEEP || failed == ENOSPC)
        assert_true (op_err == ENOMEM || op_err == EIO || op_err == with);
      else
        assert_int_equal (op_err, failed == EOPNOTSUPP ? EIO : failed);
      assert_true (nr_errors > 0);
    }
    check_accounts ();

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
    { ZERO_WITH_SPACE, SLOT + 100, BLOCK + 100, 0 },
    { ZERO_WITH_SPACE, SIZE, 0, 0 },
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
  assert_int_equal (nr_punches, 0);
  clean ();
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
  for (enum kind kind = ZERO; is_zeroing (kind); ++kind) {
    const struct op op = { kind, 100, 100, 0 };

    assert_int_equal (run_op (&op, &err), -1);
    assert_int_equal (err, is_fast (kind) ? ENOTSUP : EIO);
  }
  assert_false (overlay_is_changed (overlay));
}

static void
punches_of_what_is_zero_already (void **state)
{
  (void) state;
  do_op ((struct op) { ZERO, SIZE, 0, 0 });
  clean ();
  assert_int_equal (nr_punches, 0); /* never allocated, costs nothing */
  do_op ((struct op) { WRITE, BLOCK, BLOCK, 'x' });
  do_op ((struct op) { ZERO, SIZE, 0, 0 });
  assert_int_equal (nr_punches, 0);
  clean ();
  assert_int_equal (nr_punches, 1);
  do_op ((struct op) { ZERO, SIZE, 0, 0 });
  clean ();
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
  assert_int_equal (blk_zero (overlay, &base, ZERO_ANY, ZERO_GIVES_BACK,
                              (uint32_t) size, 0, &err),
                    0);
  assert_int_equal (nr_punches, 0);
  clean ();
  assert_true (longest_punch <= 16 << 20);
  /* The first addresses share 64 KiB with what is never given out. */
  assert_in_range (nr_punches, 1, size / (16 << 20) + 2);
  free (buf);
}

/*----------------------------------------------------------------------
 * Zeroes that have space
 */

enum before {
  BEFORE_HOLE,
  BEFORE_WRITTEN,
  BEFORE_ZERO,
  BEFORE_FROZEN, /* written, and a frozen map has it too */
  NR_BEFORE,
};

static void
check_frozen (const struct frozen_map *frozen, const uint8_t *model)
{
  static uint8_t bytes[SIZE];

  assert_int_equal (blk_read (frozen_disk (overlay, frozen), &base,
                              ON_READ_PASS, bytes, SIZE, 0, &err),
                    0);
  assert_memory_equal (bytes, model, SIZE);
}

/* Where a block of the disk lies, which is allocated. */
static uint32_t
address_at (uint64_t offset)
{
  HOLD_SHARED (&overlay->request_lock);

  return slot_address (slot_load (map_find (&overlay->map, offset / SLOT)),
                       offset / BLOCK % SLOT_BLOCKS);
}

/* OP from one state of all blocks.  All blocks that it touches have space then. */
static void
check_space (enum before from, const struct op *op)
{
  const struct op first = { .kind = from == BEFORE_ZERO ? ZERO : WRITE,
                            .count = SIZE,
                            .fill = 'o' };
  const uint64_t start = op->offset / BLOCK;
  const uint64_t end = (op->offset + op->count - 1) / BLOCK + 1;
  const uint64_t whole_start = ROUND_UP (op->offset, BLOCK) / BLOCK;
  const uint64_t whole_end
    = op->offset + op->count == SIZE ? end : (op->offset + op->count) / BLOCK;
  const uint64_t nr_whole
    = whole_end > whole_start ? whole_end - whole_start : 0;
  static uint8_t old[SIZE], model[SIZE];
  struct frozen_map *frozen = NULL;
  char states[SIZE / BLOCK + 2];

  memcpy (old, base_bytes, SIZE);
  if (from != BEFORE_HOLE) {
    do_op (first);
    model_op (&first, old);
  }
  if (from == BEFORE_FROZEN)
    frozen = overlay_freeze (overlay);
  memcpy (model, old, SIZE);
  model_op (op, model);

  const struct log_counts before = check_accounts ();
  do_op (*op);
  struct log_counts after = check_accounts ();

  assert_int_equal (after.owned - before.owned,
                    from == BEFORE_WRITTEN ? 0 : end - start);
  assert_int_equal (after.waiting, from == BEFORE_WRITTEN ? nr_whole : 0);
  assert_int_equal (after.free, 0);
  read_states (states);
  for (uint64_t i = start; i < end; ++i)
    assert_int_equal (states[i], 'a');
  check_disk (model);
  if (space_is_fast)
    assert_true (bytes_of_last_file () >= after.owned * BLOCK);

  if (frozen) {
    check_frozen (frozen, old);
    overlay_release (overlay, frozen);
    assert_int_equal (check_accounts ().owned, before.owned);
  }
  clean ();
  check_disk (model);

  /* To write there takes no address. */
  const struct op again_there
    = { .kind = WRITE, .count = op->count, .offset = op->offset, .fill = 'n' };
  const uint64_t owned = check_accounts ().owned;

  do_op (again_there);
  model_op (&again_there, model);
  check_disk (model);
  after = check_accounts ();
  assert_int_equal (after.owned, owned);
  assert_int_equal (after.waiting, 0);
}

static void
zeroes_that_have_space (void **state)
{
  static const struct op ops[] = {
    { ZERO_WITH_SPACE, SIZE, 0, 0 },
    { ZERO_WITH_SPACE, 1, 5 * BLOCK + 7, 0 },
    { ZERO_WITH_SPACE, BLOCK, 5 * BLOCK, 0 },
    { ZERO_WITH_SPACE, BLOCK, 5 * BLOCK + 7, 0 },
    { ZERO_WITH_SPACE, 4 * BLOCK, SLOT - 2 * BLOCK + 7, 0 },
    { ZERO_WITH_SPACE, 2 * SLOT, SLOT + BLOCK, 0 },
    { ZERO_WITH_SPACE, SLOT + BLOCK, 1, 0 },
    { ZERO_WITH_SPACE, 777, SIZE - 777, 0 },
    { ZERO_WITH_SPACE, 776, SIZE - 776, 0 },
    { ZERO_WITH_SPACE, 776, SIZE - 777, 0 },
    { ZERO_WITH_SPACE, 3 * BLOCK + 777, SIZE - 3 * BLOCK - 777, 0 },
  };

  for (enum before from = 0; from < NR_BEFORE; ++from)
    for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i) {
      tear_down (state);
      set_up (state);
      check_space (from, &ops[i]);
    }
}

/* Where there is no space that is zero to be had in no time, it is written; but not by
 * somebody who is in a hurry.
 */
static void
space_that_takes_time (void **state)
{
  const struct op op = { ZERO_WITH_SPACE, SLOT, SLOT - 5 * BLOCK, 0 };
  const struct op fast = { FAST_ZERO_WITH_SPACE, SLOT, SLOT - 5 * BLOCK, 0 };
  char states[SIZE / BLOCK + 2], states_after[SIZE / BLOCK + 2];
  static uint8_t model[SIZE];

  (void) state;
  /* What was freed has bytes still. */
  fail_punches = true;
  do_op ((struct op) { WRITE, 2 * SLOT, 0, 'o' });
  do_op ((struct op) { ZERO, 2 * SLOT - 3 * BLOCK, 0, 0 });
  do_op ((struct op) { WRITE, 3 * BLOCK, 3 * SLOT, 'p' });
  clean ();
  read_disk (model);
  read_states (states);

  const struct log_counts before = check_accounts ();

  assert_int_equal (run_op (&fast, &err), -1);
  assert_int_equal (err, ENOTSUP);
  assert_int_equal (nr_errors, 0);
  assert_int_equal (check_accounts ().owned, before.owned);
  read_states (states_after);
  assert_string_equal (states_after, states);
  check_disk (model);

  do_op (op);
  model_op (&op, model);
  check_disk (model);
  assert_int_equal (check_accounts ().owned, before.owned + SLOT_BLOCKS);
}

/* Blocks at the ends are allocated where they are zero, too: that needs nobody's time. */
static void
edges_that_have_space (void **state)
{
  const struct op op = { FAST_ZERO_WITH_SPACE, 100, 5 * BLOCK + 7, 0 };
  char states[SIZE / BLOCK + 2];

  (void) state;
  do_op ((struct op) { ZERO, SLOT, 0, 0 });
  do_op (op);
  read_states (states);
  assert_int_equal (states[4], 'z');
  assert_int_equal (states[5], 'a');
  assert_int_equal (states[6], 'z');
}

/*----------------------------------------------------------------------
 * Where blocks lie
 */

static bool
is_run_at (uint64_t offset)
{
  HOLD_SHARED (&overlay->request_lock);

  return slot_load (map_find (&overlay->map, offset / SLOT)).where & 1;
}

static void
do_and_check (struct op op, uint8_t *model)
{
  do_op (op);
  model_op (&op, model);
  check_disk (model);
  check_accounts ();
}

/* Blocks of a run that are zeroed and written again, with the cleaner in between, and
 * without it.
 */
static void
blocks_of_runs_written_again (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  memcpy (model, base_bytes, SIZE);

  /* A run grows, at its end and into the middle. */
  for (unsigned i = 5; i < 20; ++i)
    do_and_check ((struct op) { WRITE, BLOCK, i * BLOCK, 'w' }, model);
  assert_true (is_run_at (0));
  const uint32_t was_at = address_at (7 * BLOCK);

  /* The very address that was freed: it is the same run. */
  do_and_check ((struct op) { ZERO, BLOCK, 7 * BLOCK, 0 }, model);
  clean ();
  do_and_check ((struct op) { WRITE, BLOCK, 7 * BLOCK, 'x' }, model);
  assert_int_equal (address_at (7 * BLOCK), was_at);
  assert_true (is_run_at (0));

  /* It waits: the block gets another one. */
  do_and_check ((struct op) { ZERO, BLOCK, 7 * BLOCK, 0 }, model);
  do_and_check ((struct op) { WRITE, 10, 7 * BLOCK + 50, 'y' }, model);
  assert_int_not_equal (address_at (7 * BLOCK), was_at);
  assert_false (is_run_at (0));
  clean ();

  /* Once spread, a slot stays so. */
  do_and_check ((struct op) { ZERO, SLOT, 0, 0 }, model);
  do_and_check ((struct op) { WRITE, SLOT, 0, 'z' }, model);
  assert_false (is_run_at (0));
  for (unsigned i = 0; i < SLOT_BLOCKS; i += 3)
    do_and_check ((struct op) { ZERO, BLOCK, i * BLOCK, 0 }, model);
  clean ();
  for (unsigned i = SLOT_BLOCKS; i-- > 0;)
    do_and_check ((struct op) { WRITE, BLOCK - 1, i * BLOCK + 1, 'b' }, model);
}

/* A run of which nothing is left gets another base. */
static void
runs_that_move (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  memcpy (model, base_bytes, SIZE);
  do_and_check ((struct op) { WRITE, SLOT, SLOT, 'r' }, model);
  const uint32_t base_was = address_at (SLOT);

  do_and_check ((struct op) { ZERO, SLOT, SLOT, 0 }, model);
  do_and_check ((struct op) { WRITE, SLOT - BLOCK, SLOT + BLOCK, 's' }, model);
  assert_int_not_equal (address_at (SLOT + BLOCK), base_was + 1);
  assert_true (is_run_at (SLOT));
  do_and_check ((struct op) { WRITE, BLOCK, SLOT, 't' }, model);
  assert_false (is_run_at (SLOT));

  /* So does one whose blocks all move. */
  do_and_check ((struct op) { WRITE, SLOT, 2 * SLOT, 'r' }, model);
  do_and_check ((struct op) { ZERO_WITH_SPACE, SLOT, 2 * SLOT, 0 }, model);
  assert_true (is_run_at (2 * SLOT));
  do_and_check ((struct op) { WRITE, 3 * BLOCK, 2 * SLOT + BLOCK, 'u' },
                model);
  assert_true (is_run_at (2 * SLOT));
  do_and_check (
    (struct op) { ZERO_WITH_SPACE, 3 * BLOCK, 2 * SLOT + BLOCK, 0 }, model);
  assert_false (is_run_at (2 * SLOT));
}

/* Any operations on a disk that is frozen now and then; of each one, every call fails in
 * turn.  Each time all addresses are accounted for, and in the end none is left.
 */
#define MAX_HELD 3

struct held {
  struct frozen_map *frozen;
  uint8_t model[SIZE];
};

static void
freeze_or_release (struct held *held, const uint8_t *model)
{
  struct held *h = &held[(unsigned) random () % MAX_HELD];

  if (h->frozen) {
    check_frozen (h->frozen, h->model);
    overlay_release (overlay, h->frozen);
    h->frozen = NULL;
  }
  else {
    h->frozen = overlay_freeze (overlay);
    assert_non_null (h->frozen);
    memcpy (h->model, model, SIZE);
  }
  check_accounts ();
}

static void
random_op_with_every_failure (uint8_t *model)
{
  static const int errors[] = { ENOSPC, EIO, EDQUOT };
  struct op op = {
    .kind = (unsigned) random () % NR_KINDS,
    .offset = (unsigned) random () % SIZE,
    .fill = (uint8_t) random (),
  };
  const uint32_t longest = (random () % 2 ? 3 : 40) * BLOCK;
  int r, failed;

  if (random () % 3 == 0)
    op.offset = ROUND_DOWN (op.offset, BLOCK);
  op.count
    = 1 + (unsigned) random () % MIN (longest, SIZE - (uint32_t) op.offset);

  for (int n = 1;; ++n) {
    fail_calls_from (n, errors[n % 3]);
    r = run_op (&op, &err);
    failed = call_has_failed ();
    check_accounts ();
    if (!failed)
      break;
    if (random () % 4 == 0)
      clean ();
  }
  if (r == 0)
    model_op (&op, model);
  else {
    assert_true (is_fast (op.kind));
    assert_int_equal (err, ENOTSUP);
  }
  check_disk (model);
}

static void
every_address_is_accounted_for (void **state)
{
  static struct held held[MAX_HELD];
  static uint8_t model[SIZE];

  for (unsigned seed = 0; seed < 6; ++seed) {
    tear_down (state);
    set_up (state);
    options.detect_zeroes = seed % 2;
    srandom (seed);
    memcpy (model, base_bytes, SIZE);
    for (unsigned n = 0; n < 50; ++n) {
      random_op_with_every_failure (model);
      if (random () % 4 == 0)
        freeze_or_release (held, model);
      if (random () % 5 == 0)
        clean ();
    }

    do_op ((struct op) { ZERO, SIZE, 0, 0 });
    for (unsigned i = 0; i < MAX_HELD; ++i)
      if (held[i].frozen) {
        check_frozen (held[i].frozen, held[i].model);
        overlay_release (overlay, held[i].frozen);
        held[i].frozen = NULL;
      }
    clean ();
    assert_int_equal (log_end (&overlay->log),
                      log_offset (&overlay->log, overlay->log.head));
  }
  options.detect_zeroes = false;
}

/*----------------------------------------------------------------------
 * Grace: who found an address may use it as long as the request lasts
 */

static const struct op grace_zero = { ZERO, BLOCK, 3 * BLOCK, 0 };
static const struct op grace_other = { WRITE, BLOCK, 2 * SLOT, 'n' };
static pthread_t cleaner_thread;
static atomic_bool cleaned;
static uint32_t dead_address;
static bool held_up;

static void *
clean_in_thread (void *arg)
{
  (void) arg;
  overlay_clean (overlay);
  cleaned = true;
  return NULL;
}

static void
start_cleaner (void)
{
  if (pthread_create (&cleaner_thread, NULL, clean_in_thread, NULL) != 0)
    abort ();
  while (log_count (&overlay->log).taken == 0 && !cleaned)
    usleep (100);
}

/* While a request is under way, a block that it may have found is zeroed, and the cleaner
 * comes; then something else is written.
 */
static void
zero_and_clean (void *arg)
{
  const struct op *zero[] = { &grace_zero, NULL };
  const struct op *other[] = { &grace_other, NULL };

  (void) arg;
  run_in_thread (zero);
  start_cleaner ();
  usleep (3000);
  held_up = !cleaned && log_kind_of (&overlay->log, dead_address) == LOG_TAKEN;
  run_in_thread (other);
}

static void
addresses_wait_for_requests (void **state)
{
  static const struct op outer[] = {
    { WRITE, BLOCK, 3 * BLOCK, 'o' },
    { WRITE, 100, 3 * BLOCK + 5, 'o' },
    { WRITE, 3 * BLOCK + 10, 2 * BLOCK - 5, 'o' },
    { READ_AND_KEEP, 5 * BLOCK, BLOCK, 0 },
    { CACHE_AND_KEEP, 5 * BLOCK, BLOCK, 0 },
  };
  static uint8_t moments[2][SIZE], got[SIZE];

  for (unsigned o = 0; o < sizeof outer / sizeof outer[0]; ++o)
    for (int n = 1;; ++n) {
      tear_down (state);
      set_up (state);
      do_op ((struct op) { WRITE, SLOT, 0, 'w' });
      dead_address = address_at (grace_zero.offset);
      cleaned = held_up = false;

      read_disk (moments[0]);
      model_op (&outer[o], moments[0]);
      model_op (&grace_zero, moments[0]);
      model_op (&grace_other, moments[0]);
      memcpy (moments[1], moments[0], SIZE);
      model_op (&outer[o], moments[1]);

      interrupt_call (n, zero_and_clean, NULL);
      do_op (outer[o]);
      if (!call_was_interrupted ()) {
        assert_true (n > 1);
        break;
      }
      pthread_join (cleaner_thread, NULL);
      assert_true (held_up);
      assert_int_not_equal (address_at (grace_other.offset), dead_address);
      check_accounts ();
      read_disk (got);
      check_any (got, moments, 2);
    }
}

/* The base may take as long as it likes. */
static void
clean_in_between (void *arg)
{
  (void) arg;
  do_op (grace_zero);
  overlay_clean (overlay);
  cleaned = log_kind_of (&overlay->log, dead_address) == LOG_FREE;
}

static void
addresses_do_not_wait_for_the_base (void **state)
{
  static const struct op outer[] = {
    { WRITE, 100, 40 * BLOCK + 5, 'o' },
    { ZERO, 100, 40 * BLOCK + 5, 0 },
    { READ_AND_KEEP, BLOCK, 40 * BLOCK, 0 },
    { CACHE_AND_KEEP, BLOCK, 40 * BLOCK, 0 },
  };

  for (unsigned o = 0; o < sizeof outer / sizeof outer[0]; ++o) {
    tear_down (state);
    set_up (state);
    do_op ((struct op) { WRITE, SLOT, 0, 'w' });
    dead_address = address_at (grace_zero.offset);
    cleaned = false;
    fake.during_read = clean_in_between;
    do_op (outer[o]);
    assert_null (fake.during_read);
    assert_true (cleaned);
  }
}

/* Requests that begin while the cleaner waits are not waited for, however long they take.
 * One is under way when the cleaner comes, and the next one from then on until the
 * cleaner has gone.
 */
static const struct op second_op = { WRITE, 100, 5 * BLOCK, 's' };
static pthread_t second_thread;
static atomic_bool second_is_there, waited_in_vain;

static void
stay_until_cleaned (void *arg)
{
  (void) arg;
  second_is_there = true;
  for (unsigned i = 0; i < 30000 && !cleaned; ++i)
    usleep (1000);
  waited_in_vain = !cleaned;
}

static void
start_cleaner_and_second (void *arg)
{
  static const struct op *const zero[] = { &grace_zero, NULL };
  static const struct op *const second[] = { &second_op, NULL };
  const unsigned phase = overlay->grace.phase;

  (void) arg;
  run_in_thread ((void *) zero);
  start_cleaner ();
  for (unsigned i = 0; i < 10000 && overlay->grace.phase == phase; ++i)
    usleep (100);
  interrupt_call (2, stay_until_cleaned, NULL);
  if (pthread_create (&second_thread, NULL, run_ops, (void *) second) != 0)
    abort ();
  while (!second_is_there)
    usleep (100);
}

static void
later_requests_are_not_waited_for (void **state)
{
  (void) state;
  do_op ((struct op) { WRITE, SLOT, 0, 'w' });
  dead_address = address_at (grace_zero.offset);
  cleaned = second_is_there = waited_in_vain = false;
  interrupt_call (3, start_cleaner_and_second, NULL);
  do_op ((struct op) { WRITE, 100, 10 * BLOCK, 'f' });
  assert_true (call_was_interrupted ());
  pthread_join (cleaner_thread, NULL);
  pthread_join (second_thread, NULL);
  assert_false (waited_in_vain);
  assert_int_equal (log_kind_of (&overlay->log, dead_address), LOG_FREE);
}

/*----------------------------------------------------------------------
 * A full disk
 */

/* Ten blocks at addresses in a row, and the log can be no longer; then every other one of
 * the first NR_ZERO * 2 becomes zero.
 */
static void
fill_log (uint8_t *model, unsigned nr_zero)
{
  struct op op = { WRITE, BLOCK, 0, 'w' };

  memcpy (model, base_bytes, SIZE);
  for (unsigned i = 0; i < 10; ++i) {
    op.offset = i * BLOCK;
    do_op (op);
    model_op (&op, model);
  }
  overlay->log.end_limit = log_end (&overlay->log) / BLOCK;
  op.kind = ZERO;
  for (unsigned i = 0; i < nr_zero; ++i) {
    op.offset = 2 * i * BLOCK;
    do_op (op);
    model_op (&op, model);
  }
  assert_int_equal (check_accounts ().waiting, nr_zero);
}

/* Each needs three blocks. */
static const struct op ops_of_three[] = {
  { WRITE, 3 * BLOCK, 40 * BLOCK, 'n' },
  { WRITE, 3 * BLOCK - 200, 40 * BLOCK + 100, 'n' },
  { ZERO_WITH_SPACE, 3 * BLOCK, 40 * BLOCK, 0 },
  { ZERO_WITH_SPACE, 3 * BLOCK - 200, 40 * BLOCK + 100, 0 },
  { CACHE_AND_KEEP, 3 * BLOCK, 40 * BLOCK, 0 },
};

#define NR_OPS_OF_THREE (sizeof ops_of_three / sizeof ops_of_three[0])

/* What waits is freed, and is used although it does not lie in a row. */
static void
full_log_uses_what_is_freed (void **state)
{
  static uint8_t model[SIZE];

  for (unsigned i = 0; i < NR_OPS_OF_THREE; ++i) {
    const struct op *op = &ops_of_three[i];
    char states[SIZE / BLOCK + 2];

    tear_down (state);
    set_up (state);
    fill_log (model, 3);
    do_and_check (*op, model);
    assert_int_equal (nr_errors, 0);
    read_states (states);
    assert_memory_equal (states + 40, "aaa", 3);

    const struct log_counts counts = check_accounts ();
    assert_int_equal (counts.owned, 10);
    assert_int_equal (counts.waiting + counts.free, 0);

    /* That was all.  What is there can be written to. */
    const struct op one = { WRITE, BLOCK, 60 * BLOCK, 'x' };

    assert_int_equal (run_op (&one, &err), -1);
    assert_int_equal (err, EFBIG);
    assert_int_equal (nr_errors, 1);
    check_disk (model);
    assert_int_equal (check_accounts ().owned, 10);
    do_and_check ((struct op) { WRITE, 3 * BLOCK, 40 * BLOCK, 'y' }, model);
  }
}

/* A read has its bytes, and does not wait for room to keep them. */
static void
full_log_keeps_nothing (void **state)
{
  static uint8_t model[SIZE];
  char states[SIZE / BLOCK + 2], states_after[SIZE / BLOCK + 2];

  (void) state;
  fill_log (model, 3);
  read_states (states);
  do_and_check ((struct op) { READ_AND_KEEP, 3 * BLOCK, 40 * BLOCK, 0 },
                model);
  do_and_check (
    (struct op) { READ_AND_KEEP, 3 * BLOCK - 200, 40 * BLOCK + 100, 0 },
    model);
  read_states (states_after);
  assert_string_equal (states, states_after);
  assert_int_equal (nr_errors, 0);
  assert_int_equal (check_accounts ().waiting, 3);
}

/* What is not enough is given back. */
static void
full_log_that_does_not_suffice (void **state)
{
  static uint8_t model[SIZE];

  for (unsigned i = 0; i < NR_OPS_OF_THREE; ++i)
    for (unsigned nr = 0; nr < 3; ++nr) {
      const struct op *op = &ops_of_three[i];
      char states[SIZE / BLOCK + 2], states_after[SIZE / BLOCK + 2];

      tear_down (state);
      set_up (state);
      fill_log (model, nr);
      read_states (states);
      assert_int_equal (run_op (op, &err), -1);
      assert_int_equal (err, EFBIG);
      assert_int_equal (nr_errors, 1);
      assert_non_null (strstr (last_error, "trimming some of it makes room"));
      check_disk (model);
      read_states (states_after);
      assert_string_equal (states, states_after);

      const struct log_counts counts = check_accounts ();
      assert_int_equal (counts.owned, 10 - nr);
      assert_int_equal (counts.waiting, 0);
      assert_int_equal (counts.free, nr);
      if (nr > 0)
        do_and_check ((struct op) { WRITE, nr * BLOCK, 50 * BLOCK, 'x' },
                      model);

      /* Trimming does make room. */
      do_and_check ((struct op) { ZERO, 4 * BLOCK, 6 * BLOCK, 0 }, model);
      do_and_check (*op, model);
    }
}

/* Every call fails in turn, but no longer when something is punched first: that of a
 * request that lets go, or of the cleaner.  So the second try succeeds.  No lock is
 * held then: a request for the same slot is done meanwhile.
 */
static const struct op meanwhile_op = { WRITE, 10, SLOT + 30 * BLOCK, 'm' };
static int failed_before_room;

static void
make_room (void)
{
  static const struct op *const inner[] = { &meanwhile_op, NULL };

  failed_before_room = call_has_failed ();
  run_in_thread ((void *) inner);
}

static void
full_disk_that_gets_room (void **state)
{
  static const struct op ops[] = {
    { WRITE, 3 * BLOCK, 40 * BLOCK, 'n' },
    { WRITE, SLOT, 20 * BLOCK + 100, 'n' },
    { WRITE, BLOCK, 5 * BLOCK, 'n' },
    { ZERO, SLOT, 20 * BLOCK + 100, 0 },
    { ZERO_WITH_SPACE, SLOT, 20 * BLOCK + 100, 0 },
    { CACHE_AND_KEEP, SLOT, 20 * BLOCK, 0 },
    { READ_AND_KEEP, SLOT, 20 * BLOCK, 0 },
  };
  static uint8_t model[SIZE];

  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i) {
    unsigned second_tries = 0;
    bool done = false;

    for (int n = 1; !done; ++n) {
      tear_down (state);
      set_up (state);
      memcpy (model, base_bytes, SIZE);
      do_and_check ((struct op) { WRITE, 3 * BLOCK, 4 * BLOCK, 'w' }, model);
      do_and_check ((struct op) { WRITE, 3 * BLOCK, 10 * BLOCK, 'w' }, model);
      do_and_check ((struct op) { ZERO, 2 * BLOCK, 11 * BLOCK, 0 }, model);
      model_op (&meanwhile_op, model);

      before_punch = make_room;
      failed_before_room = 0;
      fail_calls_from (n, ENOSPC);

      const int r = run_op (&ops[i], &err);
      const int failed = call_has_failed ();
      const bool made_room = !before_punch;

      before_punch = NULL;
      if (!made_room)
        do_op (meanwhile_op);
      done = !failed && !failed_before_room;
      if (done)
        assert_int_equal (r, 0);
      else if (made_room && failed_before_room == ENOSPC) {
        second_tries++;
        assert_int_equal (r, 0);
        assert_int_equal (nr_errors, 0);
      }
      else if (ops[i].kind != READ_AND_KEEP)
        assert_int_equal (r, -1);
      check_accounts ();
      if (r == -1)
        do_op (ops[i]);
      model_op (&ops[i], model);
      check_disk (model);
    }
    assert_true (second_tries > 0);
  }
}

/*----------------------------------------------------------------------
 * Who saves an overlay has its file alone
 */

static atomic_bool is_cut;
static bool cut_too_soon;

static void *
close_and_cut (void *arg)
{
  (void) arg;
  overlay_close (overlay);
  overlay_cut_views (overlay);
  is_cut = true;
  return NULL;
}

static void
start_cut (void)
{
  if (pthread_create (&inner_thread, NULL, close_and_cut, NULL) != 0)
    abort ();
  for (unsigned i = 0; i < 20 && !is_cut; ++i)
    usleep (1000);
  cut_too_soon = is_cut;
}

/* A request that failed gives its addresses back, and they are punched, when it holds no
 * lock that a request takes any more.
 */
static void
cut_while_addresses_are_given_back (void **state)
{
  const struct op op = { WRITE, SLOT, 0, 'x' };

  (void) state;
  is_cut = false;
  do_op ((struct op) { WRITE, SLOT, 2 * SLOT, 'w' });
  before_punch = start_cut;
  fail_calls_from (1, EIO);
  assert_int_equal (run_op (&op, &err), -1);
  assert_int_equal (call_has_failed (), EIO);
  assert_null (before_punch);
  pthread_join (inner_thread, NULL);
  assert_false (cut_too_soon);
}

/* So does one that takes space before it takes any lock. */
static void
cut_before_space_is_taken (void **state)
{
  const struct op op = { ZERO_WITH_SPACE, SLOT, 0, 0 };
  uint64_t size, size_after;

  (void) state;
  do_op ((struct op) { WRITE, SLOT, 2 * SLOT, 'w' });
  overlay_close (overlay);
  overlay_cut_views (overlay);
  assert_int_equal (store_truncate (&overlay->store, SLOT + BLOCK), 0);
  assert_int_equal (store_size (&overlay->store, &size), 0);
  nr_punches = 0;
  assert_int_equal (run_op (&op, &err), -1);
  assert_int_equal (err, ESHUTDOWN);
  assert_int_equal (nr_errors, 0);
  assert_int_equal (nr_punches, 0);
  assert_int_equal (store_size (&overlay->store, &size_after), 0);
  assert_int_equal (size_after, size);
}

static void *
close_overlay (void *arg)
{
  (void) arg;
  overlay_close (overlay);
  return NULL;
}

static void
close_and_let_calls_fail (void *arg)
{
  (void) arg;
  if (pthread_create (&inner_thread, NULL, close_overlay, NULL) != 0)
    abort ();
  pthread_join (inner_thread, NULL);
  fail_calls_from (
    3, EIO); /* the one in front of which this is, another, and no more */
}

/* It stops taking space when the overlay is closed: who saves is not to wait for all. */
static void
closed_while_space_is_taken (void **state)
{
  const struct op op = { ZERO_WITH_SPACE, 4 * SLOT, 0, 0 };

  for (int n = 1; n <= 4; ++n) {
    tear_down (state);
    set_up (state);
    fail_punches = true;
    interrupt_call (n, close_and_let_calls_fail, NULL);
    assert_int_equal (run_op (&op, &err), -1);
    assert_true (call_was_interrupted ());
    assert_int_equal (call_has_failed (), 0);
    assert_int_equal (err, ESHUTDOWN);
    assert_int_equal (nr_errors, 0);
  }
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
  clean ();
  assert_int_equal (nr_punches, 0);

  /* Written to, a leaf is one of its own from then on. */
  do_large ((struct op) { WRITE, 100, FOCUS + 50, 'w' });
  check_large (true);
  assert_ptr_not_equal (leaf_at (0), leaf_at (LEAF));
  do_large (all);
  check_large (true);
  clean ();
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
    if (op_err != ENOMEM) /* of the second try */
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
static bool may_be_full; /* so that requests fail */
static atomic_uint nr_full;

/* OP has failed for want of room: of its bytes, those that had some may be new. */
static void
model_half_op (const struct op *op, uint8_t *buf)
{
  int my_err;

  nr_full++;
  if (blk_read (live_disk (overlay), &base, ON_READ_PASS, buf, op->count,
                op->offset, &my_err)
      == -1)
    abort ();
  for (uint32_t i = 0; i < op->count; ++i) {
    uint8_t *byte = &shared_model[op->offset + i];

    if (buf[i] != *byte && buf[i] != (op->kind == WRITE ? op->fill : 0))
      abort ();
    *byte = buf[i];
  }
}

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
      .kind = (unsigned) rand_r (&seed) % NR_KINDS,
    };
    op.count = 1 + (uint32_t) ((unsigned) rand_r (&seed) % (end - op.offset));

    if (run_op (&op, &my_err) == 0)
      model_op (&op, shared_model);
    else if (may_be_full && my_err == EFBIG)
      model_half_op (&op, buf);
    else if (!is_fast (op.kind) || my_err != ENOTSUP)
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

/* The cleaner comes again and again meanwhile. */
static atomic_bool end_cleaning;

static void *
clean_until_end (void *arg)
{
  (void) arg;
  while (!end_cleaning) {
    overlay_clean (overlay);
    usleep (100);
  }
  return NULL;
}

static void
start_cleaning (void)
{
  end_cleaning = false;
  assert_int_equal (
    pthread_create (&cleaner_thread, NULL, clean_until_end, NULL), 0);
}

static void
stop_cleaning (void)
{
  end_cleaning = true;
  pthread_join (cleaner_thread, NULL);
}

static void
stress_in_threads (void)
{
  pthread_t threads[THREADS];
  unsigned numbers[THREADS];

  memcpy (shared_model, base_bytes, SIZE);
  for (unsigned i = 0; i < THREADS; ++i) {
    numbers[i] = i;
    assert_int_equal (pthread_create (&threads[i], NULL, stress, &numbers[i]),
                      0);
  }
  for (unsigned i = 0; i < THREADS; ++i)
    pthread_join (threads[i], NULL);
}

static void
threads_that_share_blocks (void **state)
{
  (void) state;
  start_cleaning ();
  stress_in_threads ();
  stop_cleaning ();
  check_disk (shared_model);
}

/* The cleaner has its own thread, and they need it: there is room for two blocks of three,
 * so that some requests fail.
 */
static void
threads_on_a_full_log (void **state)
{
  tear_down (state);
  options.cleaner = cleaner_new ();
  assert_non_null (options.cleaner);
  set_up (state);
  overlay->log.end_limit = overlay->log.head + SIZE / BLOCK * 2 / 3;
  may_be_full = true;
  nr_full = 0;
  stress_in_threads ();
  may_be_full = false;
  assert_true (nr_full > 0);
  check_disk (shared_model);
  cleaner_round (&overlay->cleaning);
  cleaner_leave (&overlay->cleaning);
  tear_down (state);
  cleaner_free (options.cleaner);
  options.cleaner = NULL;
  set_up (state);
}

/* One thread writes and zeroes whole slots, back and forth, while another one
 * writes single bytes between: punches must hit nothing.
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
  start_cleaning ();
  assert_int_equal (pthread_create (&thread, NULL, zero_whole_slots, NULL), 0);
  for (unsigned n = 0; n < 3000; ++n) {
    const uint64_t offset = (1 + n % 3) * SLOT - BLOCK;
    const uint8_t fill = (uint8_t) (1 + n % 200);

    if (n % 5 == 0) {
      const struct op op = { ZERO, 2 * BLOCK, offset, 0 };

      assert_int_equal (run_op (&op, &err), 0);
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
  stop_cleaning ();
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
    WITH_OVERLAY (written_again_while_it_is_cleaned),
    WITH_OVERLAY (every_failure_leaves_the_map_as_it_was),
    WITH_OVERLAY (first_write_cannot_make_the_file),
    WITH_OVERLAY (failing_punches_fail_nothing),
    WITH_OVERLAY (short_transfers_lose_nothing),
    WITH_OVERLAY (base_that_fails_with_enotsup),
    WITH_OVERLAY (punches_of_what_is_zero_already),
    WITH_OVERLAY (requests_for_many_slots),
    WITH_OVERLAY (zeroes_that_have_space),
    WITH_OVERLAY (space_that_takes_time),
    WITH_OVERLAY (edges_that_have_space),
    WITH_OVERLAY (blocks_of_runs_written_again),
    WITH_OVERLAY (runs_that_move),
    WITH_OVERLAY (every_address_is_accounted_for),
    WITH_OVERLAY (addresses_wait_for_requests),
    WITH_OVERLAY (addresses_do_not_wait_for_the_base),
    WITH_OVERLAY (later_requests_are_not_waited_for),
    WITH_OVERLAY (full_log_uses_what_is_freed),
    WITH_OVERLAY (full_log_keeps_nothing),
    WITH_OVERLAY (full_log_that_does_not_suffice),
    WITH_OVERLAY (full_disk_that_gets_room),
    WITH_OVERLAY (cut_while_addresses_are_given_back),
    WITH_OVERLAY (cut_before_space_is_taken),
    WITH_OVERLAY (closed_while_space_is_taken),
    WITH_LARGE_OVERLAY (leaves_that_become_zero),
    WITH_LARGE_OVERLAY (no_leaf_becomes_zero_where_a_call_fails),
    WITH_LARGE_OVERLAY (interrupted_while_a_leaf_becomes_zero),
    WITH_OVERLAY (threads_that_share_blocks),
    WITH_OVERLAY (threads_on_a_full_log),
    WITH_OVERLAY (punches_hit_nothing_else),
  };

  find_out_if_space_is_fast ();
  return cmocka_run_group_tests_name ("blk", tests, NULL, NULL);
}
