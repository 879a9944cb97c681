/* SPDX-License-Identifier: BSD-3-Clause */

/* See freezing.h. */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "bitmap.h"
#include "blk.h"
#include "common/cleanup.h"
#include "faults.h"
#include "freezing.h"
#include "overlay/cleaner.h"
#include "overlay/private.h"

uint8_t base_bytes[SIZE];
struct fake_base fake;
struct base base;
struct overlay_options options;
struct overlay *overlay;
int err;

static struct held all_held[MAX_HELD];
struct held *held[MAX_HELD];
unsigned nr_held;

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

int
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

void
release_all (void)
{
  while (nr_held > 0)
    overlay_release (overlay, held[--nr_held]->frozen);
}

int
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

void
start_over (void)
{
  tear_down (NULL);
  make_overlay ();
}

void
die (const char *what, int error)
{
  fprintf (stderr, "%s: error %d (last reported: %s)\n", what, error,
           last_error);
  abort ();
}

struct slot_pair
live_slot (uint64_t nr)
{
  HOLD_SHARED (&overlay->request_lock);
  const struct slot *slot = map_find (&overlay->map, nr);

  return slot ? slot_load (slot) : (struct slot_pair) { .where = 0 };
}

struct slot_pair
frozen_slot (const struct frozen_map *frozen, uint64_t nr)
{
  const struct slot *slot = map_find (&frozen->map, nr);

  return slot ? slot_load (slot) : (struct slot_pair) { .where = 0 };
}

uint32_t
live_address (uint64_t block)
{
  HOLD_SHARED (&overlay->request_lock);
  const struct slot *slot = map_find (&overlay->map, block / SLOT_BLOCKS);

  assert_non_null (slot);
  return slot_address (slot_load (slot), block % SLOT_BLOCKS);
}

/*----------------------------------------------------------------------
 * Operations, as data
 */

static bool
is_end (const struct op *op)
{
  return op->kind == WRITE && op->count == 0;
}

void
model_op (const struct op *op, uint8_t *model)
{
  if (op->kind == WRITE)
    memset (model + op->offset, op->fill, op->count);
  else if (op->kind == ZERO || op->kind == ZERO_WITH_SPACE)
    memset (model + op->offset, 0, op->count);
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

void
release_nr (unsigned i)
{
  struct held *h = held[i];

  nr_held--;
  memmove (&held[i], &held[i + 1], (nr_held - i) * sizeof held[0]);
  held[nr_held] = h;
  overlay_release (overlay, h->frozen);
}

int
run_op (uint8_t *buf, const struct op *op, const uint8_t *model,
        const uint8_t *other, int *op_err)
{
  switch (op->kind) {
  case WRITE:
    memset (buf, op->fill, op->count);
    return blk_write (overlay, &base, buf, op->count, op->offset, op_err);
  case ZERO:
  case ZERO_WITH_SPACE:
    return blk_zero (overlay, &base, ZERO_ANY,
                     op->kind == ZERO ? ZERO_GIVES_BACK : ZERO_HAS_SPACE,
                     op->count, op->offset, op_err);
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
  case CLEAN:
    overlay_clean (overlay);
    return 0;
  case FREEZE:
    freeze_as (model, other);
    return 0;
  case RELEASE_OLDEST:
    release_nr (0);
    return 0;
  case RELEASE_SECOND:
    release_nr (1);
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

void
do_op (struct op op, uint8_t *model)
{
  static uint8_t buf[SIZE];

  assert_int_equal (run_op (buf, &op, model, NULL, &err), 0);
  model_op (&op, model);
}

void
do_ops (const struct op *op, uint8_t *model)
{
  for (; !is_end (op); ++op)
    do_op (*op, model);
}

unsigned seed;

unsigned
below (unsigned n)
{
  return (unsigned) rand_r (&seed) / 7 % n;
}

struct op
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

/*----------------------------------------------------------------------
 * What the disk and frozen maps hold
 */

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

void
check_disk (const uint8_t *model)
{
  static uint8_t bytes[SIZE];

  assert_int_equal (
    blk_read (live_disk (overlay), &base, ON_READ_PASS, bytes, SIZE, 0, &err),
    0);
  check_bytes ("live disk", bytes, model);
}

void
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
 * To whom addresses belong
 */

bool
has_data (uint64_t offset, uint64_t count)
{
  const off_t data = lseek (overlay->store.file.fd, (off_t) offset, SEEK_DATA);

  return data >= 0 && (uint64_t) data < offset + count;
}

/* What a map owns: for each address the number of the block, and 1. */
struct owned {
  uint64_t head, end;
  uint64_t *block;
  uint64_t count;
};

static struct owned
find_owned (const struct map *map)
{
  struct log *log = &overlay->log;
  struct owned owned
    = { .head = log->head, .end = log_end (log) >> log->block_shift };

  owned.block = calloc (owned.end, sizeof *owned.block);
  assert_non_null (owned.block);
  HOLD_SHARED (&overlay->request_lock);
  for (uint64_t nr = map_next (map, 0); nr < map->nr_slots;
       nr = map_next (map, nr + 1)) {
    const struct slot_pair pair = slot_load (map_find (map, nr));

    for (unsigned i = 0; i < SLOT_BLOCKS; ++i) {
      if (bitmap_state (pair.state, i) != BLOCK_ALLOCATED)
        continue;
      const uint32_t address = slot_address (pair, i);

      if (address < owned.head || address >= owned.end || owned.block[address])
        fail_msg ("slot %u, block %u: address %u", (unsigned) nr, i, address);
      owned.block[address] = nr * SLOT_BLOCKS + i + 1;
      owned.count++;
    }
  }
  return owned;
}

/* On its way over a dead list. */
struct listed {
  const struct owned *older, *newer;
  bool *seen;
  uint64_t count;
};

static uint32_t
look_at_dead (void *opaque, struct dead_run run, bool *stays)
{
  struct listed *l = opaque;

  for (uint32_t i = 0; i < run.count; ++i) {
    const uint64_t address = (uint64_t) run.address + i;

    if (address < l->older->head || address >= l->older->end)
      fail_msg ("dead: address %u", (unsigned) address);
    if (l->older->block[address] != run.block + i + 1)
      fail_msg ("dead: address %u, block %u: it is not the older map's",
                (unsigned) address, (unsigned) (run.block + i));
    if (l->newer->block[address])
      fail_msg ("dead: address %u, block %u: it is the newer map's",
                (unsigned) address, (unsigned) (run.block + i));
    if (l->seen[address])
      fail_msg ("dead: address %u twice", (unsigned) address);
    l->seen[address] = true;
    l->count++;
  }
  *stays = true;
  return run.count;
}

/* What OLDER owns, which may be NULL, and NEWER does not is in LIST, and nothing else. */
static void
check_dead (struct dead_list *list, const struct owned *older,
            const struct owned *newer)
{
  assert_int_equal (list->reserved, 0);
  if (!older) {
    assert_int_equal (list->nr_blocks, 0);
    return;
  }

  CLEANUP_FREE bool *seen = calloc (older->end, sizeof *seen);
  struct listed listed = { .older = older, .newer = newer, .seen = seen };
  const uint64_t nr_blocks = list->nr_blocks;

  assert_non_null (seen);
  dead_filter (list, look_at_dead, &listed);
  assert_int_equal (nr_blocks, listed.count);
  assert_int_equal (list->nr_blocks, listed.count);
  for (uint64_t i = older->head; i < older->end; ++i)
    if (older->block[i] && !newer->block[i] && !seen[i])
      fail_msg ("address %u, block %u: died and is in no dead list",
                (unsigned) i, (unsigned) older->block[i] - 1);
}

/* All that the maps own, at the same addresses. */
static void
add_owned (struct owned *all, const struct owned *owned)
{
  for (uint64_t i = all->head; i < all->end; ++i) {
    if (owned->block[i] && all->block[i] && all->block[i] != owned->block[i])
      fail_msg ("address %u belongs to blocks %u and %u", (unsigned) i,
                (unsigned) all->block[i] - 1, (unsigned) owned->block[i] - 1);
    if (owned->block[i] && !all->block[i]) {
      all->block[i] = owned->block[i];
      all->count++;
    }
  }
}

struct log_counts
check_accounts (void)
{
  struct log *log = &overlay->log;
  const struct log_counts counts = log_count (log);
  struct log_counts seen = { .owned = 0 };
  struct owned newer = find_owned (&overlay->map);
  struct owned all = find_owned (&overlay->map);
  struct dead_list *list = &overlay->map.dead;

  for (struct frozen_map *f = overlay->map.newest; f; f = f->older) {
    struct owned older = find_owned (&f->map);

    check_dead (list, &older, &newer);
    add_owned (&all, &older);
    free (newer.block);
    newer = older;
    list = &f->map.dead;
  }
  check_dead (list, NULL, &newer);
  free (newer.block);

  for (uint64_t i = all.head; i < all.end; ++i) {
    const enum log_kind kind = log_kind_of (log, i);

    if ((kind == LOG_OWNED) != (all.block[i] != 0))
      fail_msg ("address %u, of block %d, is %d", (unsigned) i,
                (int) all.block[i] - 1, kind);
    seen.owned += kind == LOG_OWNED;
    seen.waiting += kind == LOG_WAITING;
    seen.taken += kind == LOG_TAKEN;
    seen.free += kind == LOG_FREE;
  }
  assert_int_equal (seen.owned, all.count);
  free (all.block);
  assert_memory_equal (&seen, &counts, sizeof counts);
  return counts;
}

void
check_clean (void)
{
  const struct log_counts before = check_accounts ();

  overlay_clean (overlay);

  const struct log_counts after = check_accounts ();
  assert_int_equal (after.owned, before.owned);
  assert_int_equal (after.waiting, 0);
  assert_int_equal (after.taken, 0);
}

void
check_all_released (const uint8_t *model, bool oldest_first)
{
  check_held ();
  check_accounts ();
  while (nr_held > 0) {
    release_nr (oldest_first ? 0 : nr_held - 1);
    check_held ();
    check_accounts ();
  }
  check_clean ();
  check_disk (model);
}

/*----------------------------------------------------------------------
 * Something else happens in the middle of a request
 */

struct action action;

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

void
interrupt_at (enum where where, int n, const struct op *outer,
              const struct op *ops, const uint8_t *model)
{
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
}

bool
interrupt_is_over (enum where where)
{
  const bool interrupted
    = where == AT_BASE_READ ? action.started : call_was_interrupted ();

  if (action.started)
    pthread_join (action.thread, NULL);
  fake.during_read = NULL;
  assert_false (action.broke_in);
  return interrupted;
}

/* What OUTER has read, GOT, was there before or after what came in between. */
static void
check_read (const struct op *outer, const uint8_t *got, const uint8_t *before,
            const uint8_t *after)
{
  const uint64_t end = outer->offset + outer->count;

  if (outer->kind == READ_FROZEN)
    before = after = held[0]->one;
  else if (outer->kind != READ && outer->kind != READ_AND_KEEP)
    return;
  for (uint64_t i = outer->offset; i < end; ++i)
    if (got[i] != before[i] && got[i] != after[i])
      fail_msg ("read byte %u: expected %u or %u, got %u", (unsigned) i,
                before[i], after[i], got[i]);
}

void
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
      memcpy (got, model, SIZE);

      interrupt_at (where, n, outer, ops, model);
      assert_int_equal (
        run_op (got + outer->offset, outer, without, NULL, &err), 0);
      model_op (outer, model);
      if (!interrupt_is_over (where))
        break;
      nr_interrupted++;
      for (const struct op *op = ops; !is_end (op); ++op)
        model_op (op, model);

      check_read (outer, got, without, model);
      check_disk (model);
      check_all_released (model, n % 2);
      if (where == AT_BASE_READ)
        break;
    }
  assert_true (nr_interrupted > 1);
}
