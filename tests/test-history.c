/* SPDX-License-Identifier: BSD-3-Clause */

/* Frozen maps of an overlay without a server: that they may come and go in any order, to
 * whom each address belongs then, how it ends, and many threads.
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
#include "freezing.h"
#include "overlay/cleaner.h"
#include "overlay/giveback.h"
#include "overlay/private.h"

/*----------------------------------------------------------------------
 * In any order
 */

static void
change_a_few_times (uint8_t *model)
{
  for (unsigned n = 1 + below (4); n > 0; --n)
    do_op (random_op (), model);
}

/* 2 to 4 frozen maps, with changes between them, are released in every order there is, again
 * with changes between them.  After each step all frozen maps, all dead lists and all
 * addresses are right.
 */
static void
released_in_every_order (void **state)
{
  static const unsigned nr_orders[] = { 0, 1, 2, 6, 24 };
  static uint8_t model[SIZE];

  (void) state;
  for (unsigned nr = 2; nr <= 4; ++nr)
    for (unsigned order = 0; order < 4 * nr_orders[nr]; ++order) {
      unsigned left = order;

      options.detect_zeroes = order % 2;
      start_over ();
      seed = 100 * nr + order;
      memcpy (model, base_bytes, SIZE);
      for (unsigned i = 0; i < nr; ++i) {
        change_a_few_times (model);
        do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
        check_accounts ();
      }
      while (nr_held > 0) {
        if (below (2))
          change_a_few_times (model);
        const unsigned i = left % nr_held;

        left /= nr_held;
        release_nr (i);
        check_accounts ();
        check_held ();
        if (below (3) == 0)
          check_clean ();
      }
      check_all_released (model, true);
    }
}

/* Changes, freezes and releases at random, one after the other: each address is accounted
 * for after every step.
 */
static void
every_address_is_accounted_for (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  for (unsigned run = 0; run < 8; ++run) {
    options.detect_zeroes = run % 2;
    start_over ();
    seed = run + 1;
    memcpy (model, base_bytes, SIZE);
    for (unsigned n = 0; n < 150; ++n) {
      const unsigned what = below (11);

      if (what < 2 && nr_held < 5)
        do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
      else if (what < 4 && nr_held > 0)
        release_nr (below (nr_held));
      else if (what == 10)
        check_clean ();
      else
        do_op (random_op (), model);
      check_accounts ();
      if (n % 10 == 0) {
        check_disk (model);
        check_held ();
      }
    }
    check_disk (model);
    while (nr_held > 0) {
      check_held ();
      release_nr (below (nr_held));
      check_accounts ();
    }
    check_disk (model);

    /* What is left is given up as well. */
    do_op ((struct op) { ZERO, SIZE, 0, 0 }, model);
    check_clean ();
    check_disk (model);
    assert_int_equal (check_accounts ().owned, 0);
    assert_true (log_end (&overlay->log)
                 == log_offset (&overlay->log, overlay->log.head));
  }
}

/* More than a dead list has in one piece of memory, in runs and alone. */
static void
many_addresses_are_released (void **state)
{
  enum { MANY = 3000 };
  const uint64_t size = MANY * (uint64_t) SLOT;
  static uint8_t zeroes[1], block[BLOCK];
  static struct fake_base many = { .size = size };

  (void) state;
  overlay_free (overlay);
  many.bytes = zeroes; /* never read: whole blocks are written */
  assert_int_equal (base_init (&base, fake_next (&many)), 0);
  overlay = overlay_new (size, &options);
  assert_non_null (overlay);
  memset (block, 'x', sizeof block);

  for (unsigned round = 0; round < 3; ++round) {
    struct frozen_map *frozen[2];

    for (unsigned f = 0; f < 2; ++f) {
      for (uint64_t nr = 0; nr < MANY; ++nr)
        if (f == 0 || round == 0 || nr % 3)
          assert_int_equal (blk_write (overlay, &base, block, BLOCK,
                                       nr * SLOT + f * BLOCK, &err),
                            0);
      frozen[f] = overlay_freeze (overlay);
      assert_non_null (frozen[f]);
    }

    /* All of them die, or two of three. */
    for (uint64_t nr = 0; nr < MANY; ++nr)
      if (round == 0 || nr % 3)
        assert_int_equal (blk_write (overlay, &base, block, BLOCK,
                                     nr * SLOT + (nr % 2) * BLOCK, &err),
                          0);
    check_accounts ();
    overlay_release (overlay, frozen[round % 2]);
    check_accounts ();
    overlay_release (overlay, frozen[1 - round % 2]);
    check_clean ();
  }
}

/*----------------------------------------------------------------------
 * A map of many leaves
 */

/* Blocks are small, so that leaves are; all requests are for whole ones. */
#define TINY UINT32_C (512)
#define LEAF_BLOCKS (LEAF_SLOTS * SLOT_BLOCKS)
#define LARGE_BLOCKS (2 * LEAF_BLOCKS + 1000)
#define LARGE_SIZE (LARGE_BLOCKS * (uint64_t) TINY)

struct large_held {
  struct frozen_map *frozen;
  uint8_t model[LARGE_BLOCKS]; /* what its blocks are full of */
};

/* Reads all, and compares. */
static void
check_large (struct disk disk, const uint8_t *model)
{
  static uint8_t bytes[LARGE_SIZE];

  assert_int_equal (
    blk_read (disk, &base, ON_READ_PASS, bytes, LARGE_SIZE, 0, &err), 0);
  for (unsigned b = 0; b < LARGE_BLOCKS; ++b)
    for (unsigned i = 0; i < TINY; ++i)
      if (bytes[b * TINY + i] != model[b])
        fail_msg ("block %u: expected %u, got %u", b, model[b],
                  bytes[b * TINY + i]);
}

/* Some blocks near the ends of leaves, or any; or a whole leaf. */
static void
change_large (uint8_t *model)
{
  static uint8_t bytes[200 * TINY];
  const bool whole = below (8) == 0;
  const unsigned kind = below (10);
  unsigned first = whole       ? below (2) * LEAF_BLOCKS
                   : below (2) ? below (LARGE_BLOCKS)
                   : below (2) ? LEAF_BLOCKS - below (100)
                               : 2 * LEAF_BLOCKS - below (100);
  unsigned count = whole ? LEAF_BLOCKS : 1 + below (below (3) ? 10 : 200);
  const uint8_t fill = (uint8_t) (1 + below (127));

  count = MIN (count, LARGE_BLOCKS - first);
  if (whole || kind < 3) {
    assert_int_equal (
      blk_zero (overlay, &base, ZERO_ANY,
                kind == 0 && !whole ? ZERO_HAS_SPACE : ZERO_GIVES_BACK,
                count * TINY, first * (uint64_t) TINY, &err),
      0);
    memset (model + first, 0, count);
  }
  else {
    memset (bytes, fill, count * TINY);
    assert_int_equal (blk_write (overlay, &base, bytes, count * TINY,
                                 first * (uint64_t) TINY, &err),
                      0);
    memset (model + first, fill, count);
  }
}

static void
history_of_many_leaves (void **state)
{
  static uint8_t base_of_large[LARGE_SIZE], model[LARGE_BLOCKS];
  static struct large_held large[4];
  static struct fake_base many = { .size = LARGE_SIZE };
  unsigned nr = 0;

  (void) state;
  overlay_free (overlay);
  memset (base_of_large, 'b', sizeof base_of_large);
  many.bytes = base_of_large;
  assert_int_equal (base_init (&base, fake_next (&many)), 0);
  options.block_size = TINY;
  overlay = overlay_new (LARGE_SIZE, &options);
  assert_non_null (overlay);
  assert_true (overlay->map.levels > 0);
  memset (model, 'b', sizeof model);
  seed = 1;

  for (unsigned n = 0; n < 500; ++n) {
    const unsigned what = below (10);

    if (what == 0 && nr < 4) {
      large[nr].frozen = overlay_freeze (overlay);
      assert_non_null (large[nr].frozen);
      memcpy (large[nr++].model, model, sizeof model);
    }
    else if (what == 1 && nr > 0) {
      const unsigned i = below (nr);

      overlay_release (overlay, large[i].frozen);
      large[i] = large[--nr];
      check_accounts ();
    }
    else if (what == 2)
      check_clean ();
    else
      change_large (model);
    if (n % 25 == 0) {
      check_accounts ();
      check_large (live_disk (overlay), model);
      for (unsigned i = 0; i < nr; ++i)
        check_large (frozen_disk (overlay, large[i].frozen), large[i].model);
    }
  }
  while (nr > 0) {
    overlay_release (overlay, large[--nr].frozen);
    check_accounts ();
  }
  check_clean ();
  check_large (live_disk (overlay), model);
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
    { ZERO, 100, SLOT, 0 },          { ZERO, SIZE, 0, 0 },
    { ZERO, BLOCK, BLOCK, 0 },       { CACHE_AND_KEEP, 100, 0, 0 },
    { ZERO_WITH_SPACE, SIZE, 0, 0 },
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
    assert_true (after[i].where == before[i].where);
    assert_true (after[i].state == before[i].state);
    const struct slot_pair last
      = slot_load (map_find (overlay_map (overlay), i));
    assert_true (last.where == before[i].where);
    assert_true (last.state == before[i].state);
  }
  check_disk (model);

  /* Frozen maps are read, and released, until they are cut off; what they alone had is
   * free then.
   */
  check_all_released (model, true);
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
    { WRITE, 100, 100, 'o' },
    { WRITE, SLOT, 5 * BLOCK, 'o' },
    { WRITE, 100, SLOT, 'o' },
    { ZERO, 4 * BLOCK, 4 * BLOCK + 100, 0 },
    { ZERO, SIZE, 0, 0 },
    { CACHE_AND_KEEP, SLOT, 0, 0 },
    { ZERO_WITH_SPACE, SLOT, 5 * BLOCK + 100, 0 },
  };
  static uint8_t model[SIZE], buf[SIZE];

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (enum where where = 0; where < NR_WHERE; ++where)
      for (int n = 1;; ++n) {
        start_over ();
        memcpy (model, base_bytes, SIZE);
        do_ops (before, model);
        interrupt_at (where, n, &outer[i], close, model);
        err = 0;
        const int r = run_op (buf, &outer[i], NULL, NULL, &err);

        if (!interrupt_is_over (where))
          break;
        if (r == -1)
          assert_int_equal (err, ESHUTDOWN);
        else
          model_op (&outer[i], model);
        if (where == AT_BASE_READ)
          assert_int_equal (r, -1);
        check_disk (model);
        check_held ();
        check_accounts ();

        /* What is to be saved is what the disk is. */
        for (unsigned nr = 0; nr < 2; ++nr) {
          const struct slot_pair live = live_slot (nr);
          const struct slot_pair last
            = slot_load (map_find (overlay_map (overlay), nr));

          assert_true (live.where == last.where);
          assert_true (live.state == last.state);
        }
        if (where == AT_BASE_READ)
          break;
      }
}

/* Of what is in the file, the image of the live disk needs this. */
static struct image_used
used_by_live_disk (void)
{
  const uint64_t end = log_end (&overlay->log);
  struct image_used used = { .end = end, .nr_words = end / BLOCK / 64 + 1 };

  used.words = calloc (used.nr_words, sizeof *used.words);
  assert_non_null (used.words);
  for (uint64_t i = 0; i < overlay->log.head; ++i)
    used.words[i / 64] |= UINT64_C (1) << i % 64;
  for (uint64_t block = 0; block < NR_SLOTS * SLOT_BLOCKS; ++block)
    if (bitmap_state (live_slot (block / SLOT_BLOCKS).state,
                      block % SLOT_BLOCKS)
        == BLOCK_ALLOCATED) {
      const uint32_t address = live_address (block);

      used.words[address / 64] |= UINT64_C (1) << address % 64;
    }
  return used;
}

static bool
is_used (const struct image_used *used, uint64_t address)
{
  return used->words[address / 64] >> address % 64 & 1;
}

/* Where there was something in the file of a closed overlay, and the live disk has it, it is
 * there; what only frozen maps had, or nobody had any more, if it was LEFT.
 */
static void
check_file (const struct image_used *used, const bool *was_there, bool left)
{
  for (uint64_t i = overlay->log.head; i < used->end / BLOCK; ++i) {
    const bool data = has_data (log_offset (&overlay->log, i), BLOCK);

    if (data != (was_there[i] && (left || is_used (used, i))))
      fail_msg ("address %u: %s", (unsigned) i, data ? "data" : "no data");
  }
}

static void
views_are_cut_off (void **state)
{
  static uint8_t model[SIZE], buf[SIZE];

  (void) state;
  for (unsigned in_place = 0; in_place < 2; ++in_place) {
    options.fate = in_place ? OVERLAY_SAVED_IN_PLACE : OVERLAY_SAVED;
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_op ((struct op) { WRITE, 3 * SLOT, 0, 'b' }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { ZERO, 4 * BLOCK, 4 * BLOCK, 0 }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { WRITE, 100, SLOT + 100, 'c' }, model);
    do_op ((struct op) { ZERO, 4 * BLOCK, 10 * BLOCK, 0 }, model);
    do_op ((struct op) { WRITE, BLOCK, SLOT + 5 * BLOCK, 'd' }, model);
    do_op ((struct op) { ZERO, BLOCK, SLOT + 5 * BLOCK, 0 }, model);
    check_held ();

    const uint64_t end = log_end (&overlay->log);
    struct image_used used = used_by_live_disk ();

    CLEANUP_FREE bool *was_there = calloc (end / BLOCK, sizeof (bool));
    unsigned nr_others = 0;

    assert_non_null (was_there);
    for (uint64_t i = overlay->log.head; i < end / BLOCK; ++i) {
      was_there[i] = has_data (log_offset (&overlay->log, i), BLOCK);
      if (is_used (&used, i))
        assert_true (was_there[i]);
      else
        nr_others += was_there[i];
    }
    assert_int_equal (nr_others, 11); /* all that died */

    overlay_close (overlay);
    check_held (); /* not yet cut off */
    const unsigned punches = nr_punches;

    overlay_cut_views (overlay);
    check_file (&used, was_there, true);
    if (in_place) {
      struct giveback_budget budget
        = { .nanoseconds = INT64_C (1) << 60, .extents = UINT32_MAX };

      giveback (&overlay->store, BLOCK, &used, &budget);
      check_file (&used, was_there, false);
    }
    else
      assert_int_equal (nr_punches, punches);
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

    /* Releasing touches nothing of the file, in whichever order. */
    const unsigned punches_after = nr_punches;
    release_nr (in_place);
    check_disk (model);
    release_nr (0);
    assert_int_equal (nr_punches, punches_after);
    check_file (&used, was_there, !in_place);
    assert_true (log_end (&overlay->log) == end);
    check_disk (model);
    free (used.words);
  }
}

/* Nor does the cleaner, whatever it was about to do. */
static void
cleaner_leaves_when_views_are_cut_off (void **state)
{
  struct cleaner *cleaner = cleaner_new ();
  static uint8_t model[SIZE];

  (void) state;
  assert_non_null (cleaner);
  options.cleaner = cleaner;
  for (unsigned n = 0; n < 40; ++n) {
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_op ((struct op) { WRITE, 3 * SLOT, 0, 'b' }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { WRITE, SLOT, SLOT, 'c' }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { ZERO, 3 * SLOT, 0, 0 }, model);
    do_op ((struct op) { WRITE, 100, SLOT, 'd' }, model);
    overlay_close (overlay);
    release_nr (n % 2);
    usleep (n % 10 * 30);
    overlay_cut_views (overlay);

    /* Now nobody but this thread is there. */
    const unsigned punches = nr_punches;
    const struct log_counts counts = check_accounts ();

    release_nr (0);
    usleep (100);
    assert_int_equal (nr_punches, punches);
    assert_true (check_accounts ().free == counts.free);
    check_disk (model);
  }
  tear_down (NULL);
  cleaner_free (cleaner);
}

/*----------------------------------------------------------------------
 * Threads
 */

/* Some threads write, zero and keep at random, while others freeze, read what is
 * frozen again and again, and release in any order, and one cleans all the time.  Every request covers whole sectors and writes
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
  unsigned snapshots_at_most; /* of a freezer */
  struct request *requests;   /* 1 + WRITERS * ops */
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
    longest = 80 * per_block;                        /* some slots */
  if (how == 1 && stress.nr_sectors > LEAF_BLOCKS) { /* a leaf and more */
    *first = 0;
    *count = pick (my_seed, 2) ? LEAF_BLOCKS : stress.nr_sectors - 3;
    return;
  }
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
      r = blk_zero (overlay, &base, ZERO_ANY,
                    kind == 9 ? ZERO_HAS_SPACE : ZERO_GIVES_BACK, count,
                    offset, &my_err);
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

    if (what < 2 && count < HELD_AT_ONCE && n < stress.snapshots_at_most) {
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

/* By hand, where there is no other cleaner. */
static void *
clean_all_the_time (void *arg)
{
  while (stress.writers > 0) {
    overlay_clean (overlay);
    usleep (50);
  }
  return arg;
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
  stress.snapshots_at_most
    = size > 8 << 20 ? MAX_SNAPSHOTS / 5 : MAX_SNAPSHOTS;
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
  pthread_t by_hand;

  prepare_stress (size, bs, detect_zeroes);
  for (unsigned i = 0; i < MAX (WRITERS, FREEZERS); ++i)
    numbers[i] = i;
  for (unsigned i = 0; i < WRITERS; ++i)
    assert_int_equal (pthread_create (&writers[i], NULL, writer, &numbers[i]),
                      0);
  for (unsigned i = 0; i < FREEZERS; ++i)
    assert_int_equal (
      pthread_create (&freezers[i], NULL, freezer, &numbers[i]), 0);
  if (!options.cleaner)
    assert_int_equal (
      pthread_create (&by_hand, NULL, clean_all_the_time, NULL), 0);
  for (unsigned i = 0; i < WRITERS; ++i)
    pthread_join (writers[i], NULL);
  for (unsigned i = 0; i < FREEZERS; ++i)
    pthread_join (freezers[i], NULL);
  if (!options.cleaner) {
    pthread_join (by_hand, NULL);
    check_accounts ();
  }

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
        if (!options.cleaner)
          check_accounts ();
      }
      free (s->shown);
    }
  printf ("%u requests, %u frozen maps\n", WRITERS * stress.ops, nr_snapshots);
  assert_true (nr_snapshots > 0);
  free_histories ();

  /* What the live disk needs is left. */
  assert_null (overlay->map.newest);
  cleaner_round (&overlay->cleaning);
  check_clean ();

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

/* Three leaves; some requests are for whole ones. */
static void
threads_freeze_many_leaves (void **state)
{
  (void) state;
  run_stress (9 << 20, 512, false);
}

static void
threads_freeze_beside_the_cleaner (void **state)
{
  struct cleaner *cleaner = cleaner_new ();

  (void) state;
  assert_non_null (cleaner);
  options.cleaner = cleaner;
  run_stress (3 << 20, 4096, false);
  cleaner_free (cleaner);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    WITH_OVERLAY (released_in_every_order),
    WITH_OVERLAY (every_address_is_accounted_for),
    WITH_OVERLAY (many_addresses_are_released),
    WITH_OVERLAY (history_of_many_leaves),
    WITH_OVERLAY (closed_to_changes),
    WITH_OVERLAY (closed_in_the_middle_of_a_request),
    WITH_OVERLAY (views_are_cut_off),
    WITH_OVERLAY (cleaner_leaves_when_views_are_cut_off),
    WITH_OVERLAY (threads_freeze_and_change),
    WITH_OVERLAY (threads_freeze_an_odd_disk),
    WITH_OVERLAY (threads_freeze_large_blocks),
    WITH_OVERLAY (threads_freeze_many_leaves),
    WITH_OVERLAY (threads_freeze_beside_the_cleaner),
  };

#ifdef __SANITIZE_THREAD__
  /* All others have one thread, or force what it does between two steps of another. */
  cmocka_set_test_filter ("threads_*");
#endif
  return cmocka_run_group_tests_name ("history", tests, NULL, NULL);
}
