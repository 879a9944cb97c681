/* SPDX-License-Identifier: BSD-3-Clause */

/* Frozen maps of an overlay without a server: interleavings that are forced, what a write
 * brings along, and calls that fail one after the other.  test-history.c has the rest.
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
    { ZERO_WITH_SPACE, SLOT + 2 * BLOCK, BLOCK + 100, 0 },
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

/* A release while another frozen map has the same blocks, or the live disk, or blocks
 * that are zero meanwhile; in front of each step of what changes those slots, that is, a
 * block dies while it stops being shared, or is shared with another map than before.
 */
static void
released_while_others_have_the_blocks (void **state)
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
    { ZERO_WITH_SPACE, SLOT, BLOCK + 100, 0 },
  };
  static const struct op ops[][5] = {
    { { RELEASE_OLDEST, 0, 0, 0 }, END },
    { { RELEASE_NEWEST, 0, 0, 0 }, END },
    { { RELEASE_OLDEST, 0, 0, 0 }, { RELEASE_OLDEST, 0, 0, 0 }, END },
    { { RELEASE_NEWEST, 0, 0, 0 }, { RELEASE_NEWEST, 0, 0, 0 }, END },
    { { RELEASE_NEWEST, 0, 0, 0 }, { FREEZE, 0, 0, 0 }, END },
    { { RELEASE_OLDEST, 0, 0, 0 },
      { RELEASE_OLDEST, 0, 0, 0 },
      { CLEAN, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'i' },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      interrupt_every_step (before, &outer[i], ops[j]);
}

/* The other way round: a block that all maps have dies, in front of each step of a
 * release.
 */
static void
block_dies_in_the_middle_of_a_release (void **state)
{
  static const struct op before[] = {
    { WRITE, 2 * SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { WRITE, SLOT, SLOT / 2, 'c' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 3 * BLOCK, 4 * BLOCK, 0 },
    { WRITE, 100, SLOT + 100, 'd' },
    { FREEZE, 0, 0, 0 },
    { ZERO, BLOCK, 10 * BLOCK, 0 },
    { WRITE, 100, 11 * BLOCK, 'e' },
    END,
  };
  static const struct op release[] = {
    { RELEASE_OLDEST, 0, 0, 0 },
    { RELEASE_SECOND, 0, 0, 0 },
    { RELEASE_NEWEST, 0, 0, 0 },
  };
  /* Block 0 is in all maps, 20 in all but the oldest, 11 in none but the live one. */
  static const struct op ops[][5] = {
    { { ZERO, BLOCK, 0, 0 }, END },
    { { ZERO, BLOCK, 20 * BLOCK, 0 }, END },
    { { ZERO, BLOCK, 11 * BLOCK, 0 }, END },
    { { WRITE, 10, 100, 'i' }, { WRITE, BLOCK, 20 * BLOCK, 'i' }, END },
    { { ZERO_WITH_SPACE, 2 * SLOT, 0, 0 }, { ZERO, SLOT, 0, 0 }, END },
    { { ZERO, 2 * SLOT, 0, 0 }, { FREEZE, 0, 0, 0 }, END },
    { { WRITE, 2 * SLOT, 0, 'i' },
      { FREEZE, 0, 0, 0 },
      { ZERO, 2 * SLOT, 0, 0 },
      { RELEASE_NEWEST, 0, 0, 0 },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof release / sizeof release[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      interrupt_every_step (before, &release[i], ops[j]);
}

/* The cleaner at each step of requests and releases, and these at each step of its own. */
static void
cleaned_at_any_step (void **state)
{
  static const struct op before[] = {
    { WRITE, 3 * SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 20 * BLOCK, BLOCK, 0 },
    { WRITE, SLOT, SLOT, 'c' },
    { FREEZE, 0, 0, 0 },
    { WRITE, SLOT, SLOT, 'd' },
    { WRITE, SLOT, 3 * SLOT, 'd' },
    { RELEASE_OLDEST, 0, 0, 0 },
    { ZERO, 5 * BLOCK, 3 * SLOT, 0 },
    END,
  };
  static const struct op clean = { CLEAN, 0, 0, 0 };
  static const struct op ops[][5] = {
    { { WRITE, SLOT, BLOCK + 100, 'i' }, END },
    { { WRITE, 100, 2 * SLOT + 100, 'i' }, END },
    { { ZERO, 2 * SLOT, SLOT + 100, 0 }, { WRITE, SLOT, 4, 'i' }, END },
    { { RELEASE_OLDEST, 0, 0, 0 }, { WRITE, SLOT, 2 * SLOT, 'i' }, END },
    { { FREEZE, 0, 0, 0 },
      { WRITE, 100, SLOT, 'i' },
      { RELEASE_NEWEST, 0, 0, 0 },
      { CLEAN, 0, 0, 0 },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i) {
    const struct op clean_inside[] = { clean, END };

    interrupt_every_step (before, &clean, ops[i]);
    interrupt_every_step (before, &ops[i][0], clean_inside);
  }
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

/* A zero in a shared slot, and a write that moves blocks of it. */
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

/* Requests and freezes in front of each step of a release: its lists are made, but what
 * is in them is written again, and perhaps frozen, while it looks at them.
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
    { { FREEZE, 0, 0, 0 }, { CLEAN, 0, 0, 0 }, { ZERO, SIZE, 0, 0 }, END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i) {
    interrupt_every_step (before, &oldest, ops[i]);
    interrupt_every_step (before, &newest, ops[i]);
    interrupt_every_step (before_one, &oldest, ops[i]);
  }
}

/* The release of F looks, entry by entry, at the dead list that it took from the live map.
 * A freeze in between makes a map G that is the next newer one of F's older neighbour: so
 * what that one owns goes on the list of G, and not on the live map's.
 */
static void
frozen_while_a_dead_list_is_passed_on (void **state)
{
  static const struct op before[] = {
    { WRITE, SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { WRITE, 4 * BLOCK, 8 * BLOCK, 'c' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 20 * BLOCK, 0, 0 },
    END,
  };
  static const struct op newest = { RELEASE_NEWEST, 0, 0, 0 };
  static const struct op freeze[]
    = { { FREEZE, 0, 0, 0 }, { WRITE, 10, 25 * BLOCK, 'i' }, END };
  static uint8_t model[SIZE];
  unsigned nr_in_between = 0;

  (void) state;
  for (int n = 1;; ++n) {
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_ops (before, model);
    interrupt_at (AT_CALL, n, &newest, freeze, model);
    release_nr (1);

    const bool at_once = action.done;
    if (!interrupt_is_over (AT_CALL))
      break;
    memset (model + 25 * BLOCK, 'i', 10);
    if (at_once)
      nr_in_between++;

    /* Blocks 0 to 7 and 12 to 19; then those of the write, which came later. */
    assert_int_equal (nr_held, 2);
    assert_int_equal (held[1]->frozen->map.dead.nr_blocks, 20);
    assert_int_equal (overlay->map.dead.nr_blocks, 1);
    check_accounts ();
    check_held ();
    check_disk (model);
  }
  assert_true (nr_in_between > 1);
}

/* A release while a write has put bytes where blocks are going to be, or looked at what
 * is shared, but not yet said so: at each of its own steps one of the write's.
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
  /* The slots do not touch in the log, so that each is a write of its own. */
  static const struct op before[] = {
    { WRITE, SLOT, SLOT, 'b' },
    { WRITE, SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { ZERO, 4 * BLOCK, SLOT - 2 * BLOCK, 0 },
    { FREEZE, 0, 0, 0 },
    { WRITE, 100, 2 * SLOT - 100, 'c' },
    END,
  };
  static uint8_t model[SIZE];

  (void) state;
  for (enum where where = 0; where < AT_BASE_READ; ++where)
    for (half_done_at = 1; half_done_at < 16; ++half_done_at)
      for (int n = 1;; ++n) {
        start_over ();
        memcpy (model, base_bytes, SIZE);
        do_ops (before, model);
        is_half_done = is_all_done = half_done_started = false;
        if (where == AT_MUTEX)
          interrupt_mutex (n, start_half_done, NULL);
        else
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
        check_clean ();
      }
}

/* What is given back is punched before anybody else can have it, also a part of it. */
static void *
write_some (void *arg)
{
  static uint8_t buf[8 * BLOCK];
  int my_err = 0;

  memset (buf, 'i', sizeof buf);
  if (blk_write (overlay, &base, buf, sizeof buf, 3 * SLOT, &my_err) == -1)
    die ("write in front of a punch", my_err);
  return arg;
}

/* In a thread of its own, as the one who punches may hold locks. */
static void
write_elsewhere (void)
{
  pthread_t thread;

  if (pthread_create (&thread, NULL, write_some, NULL) != 0)
    die ("pthread_create", 0);
  pthread_join (thread, NULL);
}

static void
written_in_front_of_the_punch_of_what_died (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  /* It is in the middle of the log, or at its end. */
  for (unsigned last = 0; last < 2; ++last) {
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_op ((struct op) { WRITE, SLOT, 0, 'b' }, model);
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    do_op ((struct op) { WRITE, SLOT, 0, 'c' }, model);
    if (last) {
      do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
      do_op ((struct op) { WRITE, SLOT, 0, 'd' }, model);
      do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
      do_op ((struct op) { ZERO, SLOT, 0, 0 }, model);
      release_nr (1);
    }
    release_nr (last);
    before_punch = write_elsewhere;
    overlay_clean (overlay);
    assert_null (before_punch);
    memset (model + 3 * SLOT, 'i', 8 * BLOCK);
    check_disk (model);
    check_held ();
    check_accounts ();
  }
}

/* Blocks that are zeroed while they are shared are free when the last frozen map that
 * has them is released, whichever that is, and not before.
 */
static void
zeroed_while_shared_is_free_in_the_end (void **state)
{
  static uint8_t model[SIZE];

  for (unsigned newest_first = 0; newest_first < 2; ++newest_first)
    for (unsigned when = 0; when < 3; ++when) {
      tear_down (state);
      set_up (state);
      memcpy (model, base_bytes, SIZE);
      do_op ((struct op) { WRITE, 2 * SLOT, 0, 'w' }, model);
      const uint32_t address = live_address (SLOT_BLOCKS / 2);

      for (unsigned i = 0; i < 3; ++i) {
        do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
        if (when == i)
          do_op ((struct op) { ZERO, SLOT, SLOT / 2, 0 }, model);
      }
      while (nr_held > 0) {
        const bool owned = newest_first ? nr_held > 0 : nr_held > 2 - when;

        assert_int_equal (check_accounts ().owned,
                          owned ? 2 * SLOT_BLOCKS : SLOT_BLOCKS);
        release_nr (newest_first ? nr_held - 1 : 0);
        check_clean ();
      }
      check_disk (model);
      assert_int_equal (check_accounts ().owned, SLOT_BLOCKS);
      assert_false (has_data (log_offset (&overlay->log, address), SLOT));
      assert_true (bytes_of_last_file () <= SLOT + 4 * BLOCK);
      assert_int_equal (live_address (0), overlay->log.head);
    }
}

/* Readers of the disk and of a frozen map: under them blocks move, what they had dies and
 * is cleaned, and its addresses are used again for others.
 */
static void
address_is_used_again_under_a_reader (void **state)
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
    { { ZERO, SLOT, SLOT, 0 },
      { CLEAN, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'b' },
      END },
    { { WRITE, SLOT, SLOT, 'a' },
      { RELEASE_NEWEST, 0, 0, 0 },
      { CLEAN, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'b' },
      END },
    { { WRITE, 2 * SLOT, 0, 'a' },
      { FREEZE, 0, 0, 0 },
      { RELEASE_NEWEST, 0, 0, 0 },
      { RELEASE_NEWEST, 0, 0, 0 },
      { CLEAN, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'b' },
      { WRITE, SIZE - 4 * SLOT, 4 * SLOT, 'c' },
      END },
    { { WRITE, 2 * SLOT, 0, 'a' },
      { RELEASE_OLDEST, 0, 0, 0 },
      { RELEASE_OLDEST, 0, 0, 0 },
      { CLEAN, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'b' },
      { WRITE, SIZE - 4 * SLOT, 4 * SLOT, 'c' },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      if (!(outer[i].kind == READ_FROZEN && j == 3)) /* that is not released */
        interrupt_every_step (before, &outer[i], ops[j]);
}

/* No frozen map has it, so that it waits as soon as the live disk has it no longer; then
 * for requests that may have found it.
 */
static const struct op own_slot[] = {
  { WRITE, SLOT, 0, 'a' },
  { FREEZE, 0, 0, 0 },
  { WRITE, SLOT, 3 * SLOT, 'd' },
  END,
};
static const struct op give_own_to_other[] = {
  { ZERO, SLOT, 3 * SLOT, 0 },
  { CLEAN, 0, 0, 0 },
  { WRITE, SLOT, 0, 'b' },
  END,
};

static void
own_address_is_used_again_under_a_reader (void **state)
{
  static const struct op outer[] = {
    { READ, SIZE, 0, 0 },
    { READ, 100, 3 * SLOT + 100, 0 },
    { READ_AND_KEEP, SIZE, 0, 0 },
    { READ_FROZEN, SIZE, 0, 0 },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    interrupt_every_step (own_slot, &outer[i], give_own_to_other);
}

/* What is written and zeroed at once may be either; nothing else is written to. */
static void
own_address_is_used_again_under_a_writer (void **state)
{
  static const struct op outer[] = {
    { WRITE, 100, 3 * SLOT + 100, 'o' },
    { WRITE, SLOT, 3 * SLOT, 'o' },
  };
  static uint8_t model[SIZE], got[SIZE];

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (enum where where = 0; where < AT_BASE_READ; ++where)
      for (int n = 1;; ++n) {
        start_over ();
        memcpy (model, base_bytes, SIZE);
        do_ops (own_slot, model);
        interrupt_at (where, n, &outer[i], give_own_to_other, model);
        assert_int_equal (run_op (got, &outer[i], NULL, NULL, &err), 0);
        if (!interrupt_is_over (where))
          break;

        memset (model, 'b', SLOT);
        memset (model + 3 * SLOT, 0, SLOT);
        assert_int_equal (
          run_op (got, &(struct op) { READ, SIZE, 0, 0 }, NULL, NULL, &err),
          0);
        for (uint64_t at = outer[i].offset;
             at < outer[i].offset + outer[i].count; ++at)
          if (got[at] == 'o')
            model[at] = 'o';
        check_disk (model);
        check_all_released (model, n % 2);
      }
}

/* L6: what waits, or is taken or free, no map has.  Looked at from another thread, as the
 * one that is interrupted may be about to take a lock.
 */
static void *
look_at_owners (void *arg)
{
  HOLD_SHARED (&overlay->request_lock);
  const struct frozen_map *newest = overlay->map.newest;
  const struct map *map = &overlay->map;

  for (;;) {
    for (uint64_t nr = 0; nr < map->nr_slots; ++nr) {
      const struct slot *slot = map_find (map, nr);
      const struct slot_pair pair
        = slot ? slot_load (slot) : (struct slot_pair) { .where = 0 };

      for (unsigned i = 0; i < SLOT_BLOCKS; ++i)
        if (bitmap_state (pair.state, i) == BLOCK_ALLOCATED
            && log_kind_of (&overlay->log, slot_address (pair, i))
                 != LOG_OWNED)
          die ("a map has what it does not own, block",
               (int) (nr * SLOT_BLOCKS + i));
    }
    if (!newest)
      return arg;
    map = &newest->map;
    newest = newest->older;
  }
}

static void
check_owners (void *arg)
{
  pthread_t thread;

  if (pthread_create (&thread, NULL, look_at_owners, arg) != 0)
    die ("pthread_create", 0);
  pthread_join (thread, NULL);
}

static void
maps_own_what_they_have_at_each_step (void **state)
{
  /* In no order, so that a slot has several runs. */
  static const struct op before[] = {
    { WRITE, BLOCK, 7 * BLOCK, '7' },
    { WRITE, 3 * BLOCK, 3 * BLOCK, '3' },
    { WRITE, SLOT, SLOT, 'a' },
    { FREEZE, 0, 0, 0 },
    { WRITE, BLOCK, 4 * BLOCK, '4' },
    { WRITE, 2 * BLOCK, SLOT + 9 * BLOCK, '9' },
    { FREEZE, 0, 0, 0 },
    { WRITE, BLOCK, SLOT + 20 * BLOCK, 'b' },
    { WRITE, BLOCK, SLOT + 15 * BLOCK, 'b' },
    { WRITE, BLOCK, 9 * BLOCK, 'b' },
    { WRITE, BLOCK, 2 * BLOCK, 'b' },
    { WRITE, BLOCK, 25 * BLOCK, 'b' },
    { ZERO, BLOCK, 25 * BLOCK, 0 },
    END,
  };
  static const struct op outer[] = {
    { WRITE, 2 * SLOT, 0, 'o' },    { ZERO, 2 * SLOT, 0, 0 },
    { ZERO, 2 * SLOT, 100, 0 },     { ZERO_WITH_SPACE, 2 * SLOT, 100, 0 },
    { CACHE_AND_KEEP, SIZE, 0, 0 }, { CLEAN, 0, 0, 0 },
    { RELEASE_OLDEST, 0, 0, 0 },    { RELEASE_NEWEST, 0, 0, 0 },
  };
  static uint8_t model[SIZE], buf[SIZE];

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (enum where where = 0; where < AT_BASE_READ; ++where)
      for (int n = 1;; ++n) {
        start_over ();
        memcpy (model, base_bytes, SIZE);
        do_ops (before, model);
        if (where == AT_MUTEX)
          interrupt_mutex (n, check_owners, NULL);
        else
          interrupt_call (n, check_owners, NULL);
        assert_int_equal (run_op (buf, &outer[i], model, NULL, &err), 0);
        if (!call_was_interrupted ())
          break;
      }
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
    check_all_released (model, true);
  }
}

/*----------------------------------------------------------------------
 * What a write brings along
 */

/* Bytes are brought along by reading them. */
static void
exactly_the_shared_blocks_at_the_ends_are_brought (void **state)
{
  static const struct {
    struct op op;
    unsigned brought, fresh; /* blocks */
  } cases[] = {
    /* Of the first slot blocks 0, 2 and 3 are allocated, block 1 is zero. */
    { { WRITE, BLOCK, 0, 'x' }, 0, 1 },
    { { WRITE, 1, 0, 'x' }, 1, 1 },
    { { WRITE, BLOCK - 1, 0, 'x' }, 1, 1 },
    { { WRITE, BLOCK + 1, 0, 'x' }, 0, 2 },
    { { WRITE, BLOCK, 100, 'x' }, 1, 2 },
    { { WRITE, 3 * BLOCK, 100, 'x' }, 2, 4 },
    { { WRITE, 4 * BLOCK, 0, 'x' }, 0, 4 },
    { { WRITE, SLOT, 0, 'x' }, 0, 32 },
    { { WRITE, 5, 20 * BLOCK, 'x' }, 0, 1 },
    { { ZERO, 100, 0, 0 }, 1, 1 },
    { { ZERO, BLOCK + 100, 2 * BLOCK, 0 }, 1, 1 },
    { { ZERO, 2 * BLOCK, 2 * BLOCK, 0 }, 0, 0 },
    { { ZERO, 100, BLOCK + 100, 0 }, 0, 0 },
    { { ZERO, 100, 20 * BLOCK + 100, 0 }, 0, 1 }, /* a hole */
    { { ZERO_WITH_SPACE, 4 * BLOCK, 0, 0 }, 0, 4 },
    { { ZERO_WITH_SPACE, 3 * BLOCK, 100, 0 }, 2, 4 },
    { { ZERO_WITH_SPACE, 100, BLOCK + 100, 0 }, 0, 1 },
    { { READ_AND_KEEP, 100, 20 * BLOCK, 0 }, 0, 1 }, /* the same */
    { { CACHE_AND_KEEP, SLOT, 0, 0 }, 0, 28 },
    { { READ_AND_KEEP, 2 * BLOCK, BLOCK, 0 }, 0, 0 }, /* no holes */
    /* Of the last one blocks 1 and 3, which has 777 bytes; what lies behind them in
     * the file has to come along.
     */
    { { WRITE, 777, SIZE - 777, 'x' }, 1, 1 },
    { { WRITE, 776, SIZE - 777, 'x' }, 1, 1 },
    { { WRITE, 776, SIZE - 776, 'x' }, 1, 1 },
    { { WRITE, 1, SIZE - 1, 'x' }, 1, 1 },
    { { WRITE, 1, 4 * SLOT, 'x' }, 0, 1 },
    { { WRITE, 2 * BLOCK + 777, SIZE - 777 - 2 * BLOCK, 'x' }, 1, 3 },
    { { ZERO, 777, SIZE - 777, 0 }, 0, 0 },
    { { ZERO, 776, SIZE - 776, 0 }, 1, 1 },
    { { ZERO, 776, SIZE - 777, 0 }, 1, 1 },
    { { ZERO, BLOCK + 777, SIZE - 777 - BLOCK, 0 }, 0, 0 },
    { { ZERO, BLOCK + 777, SIZE - 777 - BLOCK - 100, 0 }, 2, 2 },
    { { CACHE_AND_KEEP, 1, SIZE - 778, 0 }, 0, 1 },
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
    memcpy (model, base_bytes, SIZE);
    do_ops (before, model);
    bytes_read_from_files = 0;
    const uint64_t owned = check_accounts ().owned;

    do_op (*op, model);
    if (op->kind == READ_AND_KEEP && cases[i].fresh == 0)
      bytes_read_from_files -= BLOCK; /* the read itself */
    if (bytes_read_from_files != cases[i].brought * (uint64_t) BLOCK)
      fail_msg ("case %u: %lu bytes brought along", i,
                (unsigned long) bytes_read_from_files);
    if (check_accounts ().owned != owned + cases[i].fresh)
      fail_msg ("case %u: %lu fresh addresses", i,
                (unsigned long) (check_accounts ().owned - owned));

    /* A second one finds blocks that are not shared. */
    if (op->kind == WRITE || op->kind == ZERO) {
      struct slot_pair slots[NR_SLOTS];

      for (unsigned nr = 0; nr < NR_SLOTS; ++nr)
        slots[nr] = live_slot (nr);
      bytes_read_from_files = 0;
      do_op (*op, model);
      assert_int_equal (bytes_read_from_files, 0);
      for (unsigned nr = 0; nr < NR_SLOTS; ++nr) {
        const struct slot_pair now = live_slot (nr);

        assert_memory_equal (&now, &slots[nr], sizeof now);
      }
    }
    check_disk (model);
    check_all_released (model, true);
  }
}

/* In front of each step of a write to a shared block others read it in the frozen map: it
 * is not written to, not even with the bytes that are there.
 */
static void
shared_blocks_are_not_written_to (void **state)
{
  static const struct op before[] = {
    { WRITE, 2 * SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    END,
  };
  static const struct op outer[] = {
    { WRITE, 100, 100, 'o' },
    { WRITE, 3 * BLOCK, SLOT - BLOCK - 1, 'o' },
    { ZERO, 3 * BLOCK, SLOT - BLOCK - 1, 0 },
    { ZERO_WITH_SPACE, 3 * BLOCK, SLOT - BLOCK - 1, 0 },
  };
  static const struct op read[] = { { READ_FROZEN, SIZE, 0, 0 }, END };
  static uint8_t model[SIZE];

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i) {
    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_ops (before, model);

    uint32_t old[2 * SLOT_BLOCKS];
    const uint64_t first = outer[i].offset / BLOCK;
    const uint64_t last = (outer[i].offset + outer[i].count - 1) / BLOCK;

    for (unsigned b = 0; b < 2 * SLOT_BLOCKS; ++b)
      old[b] = live_address (b);
    do_op (outer[i], model);
    for (unsigned b = 0; b < 2 * SLOT_BLOCKS; ++b) {
      const bool zero
        = bitmap_state (live_slot (b / SLOT_BLOCKS).state, b % SLOT_BLOCKS)
          == BLOCK_ZERO;

      if (b < first || b > last)
        assert_int_equal (live_address (b), old[b]);
      else if (!zero)
        assert_int_not_equal (live_address (b), old[b]);
      assert_int_equal (log_kind_of (&overlay->log, old[b]), LOG_OWNED);
    }
    interrupt_every_step (before, &outer[i], read);
  }
}

/* The last block of the disk is not a whole one, and moves several times. */
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
    { ZERO_WITH_SPACE, 100, SIZE - 100, 0 },
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
    check_all_released (model, i % 2);
  }
}

/* A slot becomes shared, its blocks move, are zeroed, or stop being shared, while the
 * request reads the base for a block of it that is a hole.
 */
static void
shared_with_a_slow_base (void **state)
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

  /* Whole blocks of zeroes need no address. */
  start_over ();
  memcpy (model, base_bytes, SIZE);
  do_ops (before, model);
  const uint64_t owned = check_accounts ().owned;
  do_op (outer[0], model);
  do_op (outer[2], model);
  assert_int_equal (check_accounts ().owned, owned);
  check_disk (model);
  check_all_released (model, true);
}

/*----------------------------------------------------------------------
 * Slots whose blocks lie anywhere
 */

/* Blocks in an order that no run has. */
static const struct op spread[] = {
  { WRITE, BLOCK, 7 * BLOCK, '7' },
  { WRITE, BLOCK, 3 * BLOCK, '3' },
  { WRITE, BLOCK, 5 * BLOCK, '5' },
  { WRITE, 2 * BLOCK, 0, '0' },
  { WRITE, BLOCK, SLOT + 31 * BLOCK, 'z' },
  { WRITE, BLOCK, SLOT, 'a' },
  END,
};

/* It is in the frozen map as it was, and so are all addresses in it; the live disk gets one
 * of its own with the first change, and keeps that.
 */
static void
frozen_maps_keep_their_nodes (void **state)
{
  static const struct op write = { WRITE, 10, 3 * BLOCK, 'n' };
  static const struct op zero = { ZERO, BLOCK, 5 * BLOCK, 0 };
  static uint8_t model[SIZE];
  uint32_t old[8];

  (void) state;
  memcpy (model, base_bytes, SIZE);
  do_ops (spread, model);
  const struct slot_pair before = live_slot (0);
  for (unsigned b = 0; b < 8; ++b)
    old[b] = slot_address (before, b);
  assert_int_equal (before.where & 1, 0);

  /* A change of its own node changes just that. */
  do_op ((struct op) { WRITE, BLOCK, 20 * BLOCK, 'm' }, model);
  assert_true (live_slot (0).where == before.where);

  do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  do_op (zero, model); /* needs no address, and so no node */
  assert_true (live_slot (0).where == before.where);
  do_op (write, model);
  const struct slot_pair after = live_slot (0);
  assert_true (after.where != before.where);
  do_op ((struct op) { WRITE, BLOCK, 21 * BLOCK, 'm' }, model);
  assert_true (live_slot (0).where == after.where);

  const struct slot_pair frozen = frozen_slot (held[0]->frozen, 0);
  assert_true (frozen.where == before.where);
  for (unsigned b = 0; b < 8; ++b)
    if (bitmap_state (before.state, b) == BLOCK_ALLOCATED) {
      assert_int_equal (slot_address (frozen, b), old[b]);
      if (b == 3)
        assert_int_not_equal (slot_address (after, b), old[b]);
      else if (b != 5)
        assert_int_equal (slot_address (after, b), old[b]);
    }
  check_held ();
  check_accounts ();

  /* Nor does it become anything else when it is alone again. */
  release_nr (0);
  assert_true (live_slot (0).where == after.where);
  do_op ((struct op) { WRITE, SLOT, 0, 'n' }, model);
  assert_true (live_slot (0).where == after.where);
  check_all_released (model, true);
}

/* Several maps have one node each, or the same one; they go in any order. */
static void
nodes_go_with_the_last_map (void **state)
{
  static uint8_t model[SIZE];

  (void) state;
  for (unsigned order = 0; order < 3 * 2; ++order)
    for (unsigned changes = 0; changes < 1 << 3; ++changes) {
      start_over ();
      memcpy (model, base_bytes, SIZE);
      do_ops (spread, model);
      for (unsigned i = 0; i < 3; ++i) {
        do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
        if (changes >> i & 1)
          do_op ((struct op) { WRITE, 10, i * BLOCK + 5, (uint8_t) i }, model);
      }
      release_nr (order / 2);
      check_held ();
      check_accounts ();
      do_op ((struct op) { WRITE, 10, 5 * BLOCK, 'y' }, model);
      release_nr (order % 2);
      check_held ();
      check_accounts ();
      do_op ((struct op) { ZERO, 10, 7 * BLOCK, 0 }, model);
      check_all_released (model, true);
    }
}

/* Requests, freezes and releases in the middle of others, of slots that are spread or
 * become so.
 */
static void
interrupted_where_slots_are_spread (void **state)
{
  static const struct op before[] = {
    { WRITE, BLOCK, 7 * BLOCK, '7' }, { WRITE, 3 * BLOCK, 3 * BLOCK, '3' },
    { WRITE, SLOT, SLOT, 'a' },       { FREEZE, 0, 0, 0 },
    { WRITE, BLOCK, 4 * BLOCK, '4' }, { FREEZE, 0, 0, 0 },
    { ZERO, BLOCK, 5 * BLOCK, 0 },    END,
  };
  static const struct op outer[] = {
    { WRITE, BLOCK, 3 * BLOCK + 5, 'o' },
    { WRITE, 5, SLOT + 7 * BLOCK, 'o' },
    { WRITE, SLOT, SLOT / 2, 'o' },
    { ZERO, 2 * BLOCK, 4 * BLOCK, 0 },
    { READ, 2 * SLOT, 0, 0 },
    { READ_FROZEN, 2 * SLOT, 0, 0 },
    { RELEASE_SECOND, 0, 0, 0 },
  };
  static const struct op ops[][5] = {
    { { FREEZE, 0, 0, 0 }, END },
    { { RELEASE_NEWEST, 0, 0, 0 }, { CLEAN, 0, 0, 0 }, END },
    { { WRITE, 5, 7 * BLOCK, 'i' }, { FREEZE, 0, 0, 0 }, END },
    { { WRITE, BLOCK, 7 * BLOCK, 'i' },
      { RELEASE_NEWEST, 0, 0, 0 },
      { CLEAN, 0, 0, 0 },
      { WRITE, SLOT, 3 * SLOT, 'i' },
      END },
  };

  (void) state;
  for (unsigned i = 0; i < sizeof outer / sizeof outer[0]; ++i)
    for (unsigned j = 0; j < sizeof ops / sizeof ops[0]; ++j)
      if (!(outer[i].kind == RELEASE_SECOND
            && j % 2)) /* the reader's is left */
        interrupt_every_step (before, &outer[i], ops[j]);
}

/*----------------------------------------------------------------------
 * Failures
 */

/* Both words of all slots. */
static void
read_slots (struct slot_pair slots[NR_SLOTS])
{
  for (unsigned i = 0; i < NR_SLOTS; ++i)
    slots[i] = live_slot (i);
}

/* Every call that an operation on shared slots makes fails in turn; then the
 * operation gets the error, and the disk, all slots, the frozen maps and who owns what
 * are what they were, as nothing is written to what is shared.  After that it succeeds.
 */
static void
check_every_failure (struct op op, int with)
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
  struct slot_pair slots[NR_SLOTS], slots_after[NR_SLOTS];

  for (int n = 1;; ++n) {
    int r, failed, op_err = 0;

    start_over ();
    memcpy (model, base_bytes, SIZE);
    do_ops (before, model);
    read_slots (slots);
    const uint64_t owned = check_accounts ().owned;

    fail_calls_from (n, with);
    r = run_op (buf, &op, NULL, NULL, &op_err);
    failed = call_has_failed ();

    if (!failed) {
      assert_int_equal (r, 0);
      model_op (&op, model);
      check_disk (model);
      check_all_released (model, n % 2);
      assert_true (n > 1);
      return;
    }
    /* A read may succeed, though nothing was kept, or have failed later. */
    if (op.kind != READ_AND_KEEP) {
      assert_int_equal (r, -1);
      /* Where there was no room, it is tried again, without memory. */
      if (!(failed == ENOSPC && op_err == ENOMEM))
        assert_int_equal (op_err, failed == EOPNOTSUPP ? EIO : failed);
      assert_true (nr_errors > 0);
    }

    check_disk (model);
    check_held ();
    const uint64_t owned_after = check_accounts ().owned;
    read_slots (slots_after);
    /* Keeping is done in several steps, one for each run of holes. */
    if (op.kind <= ZERO_WITH_SPACE) {
      assert_memory_equal (slots_after, slots, sizeof slots);
      assert_int_equal (owned_after, owned);
    }

    do_op (op, model);
    check_disk (model);
    check_all_released (model, n % 2);
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
    { ZERO_WITH_SPACE, SLOT + 100, BLOCK + 100, 0 },
    { READ_AND_KEEP, SLOT + 100, BLOCK + 100, 0 },
    { CACHE_AND_KEEP, SIZE - 5, 5, 0 },
  };
  static const int errors[] = { ENOSPC, EOPNOTSUPP };

  (void) state;
  for (unsigned detect = 0; detect < 2; ++detect) {
    options.detect_zeroes = detect;
    for (unsigned i = 0; i < sizeof ops / sizeof ops[0]; ++i)
      check_every_failure (ops[i], errors[detect]);
  }
}

/* A release needs memory only where a run of its list becomes several, and else succeeds
 * without any.  What it cannot pass on is lost, but nothing else is.
 */
static void
released_without_memory (void **state)
{
  static const struct op whole[] = {
    { WRITE, SLOT, 0, 'b' },    { FREEZE, 0, 0, 0 },
    { WRITE, SLOT, SLOT, 'b' }, { FREEZE, 0, 0, 0 },
    { ZERO, 2 * SLOT, 0, 0 },   END,
  };
  static const struct op in_pieces[] = {
    { WRITE, SLOT, 0, 'b' },
    { FREEZE, 0, 0, 0 },
    { WRITE, BLOCK, 3 * BLOCK, 'c' },
    { WRITE, BLOCK, 9 * BLOCK, 'd' },
    { FREEZE, 0, 0, 0 },
    { ZERO, SLOT, 0, 0 },
    END,
  };
  static uint8_t model[SIZE];

  (void) state;
  for (unsigned i = 0; i < 2; ++i)
    for (unsigned nr = 0; nr < 2; ++nr) {
      start_over ();
      memcpy (model, base_bytes, SIZE);
      do_ops (i ? in_pieces : whole, model);
      fail_calls_from (1, ENOMEM);
      release_nr (nr);
      (void) call_has_failed ();
      check_held ();
      check_disk (model);
      check_all_released (model, true);
      assert_int_equal (check_accounts ().owned, 0);
    }
}

/* There are no addresses to be had: what was zeroed while it was shared is still the frozen
 * map's.
 */
static void
no_address_to_move_to (void **state)
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
    const uint64_t limit = overlay->log.end_limit;
    overlay->log.end_limit = overlay->log.next + (i == 1);

    assert_int_equal (run_op (buf, &ops[i], NULL, NULL, &err), -1);
    assert_int_equal (err, EFBIG);
    check_disk (model);
    check_held ();
    check_accounts ();

    overlay->log.end_limit = limit;
    do_op (ops[i], model);
    check_disk (model);
    check_all_released (model, true);
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
  do_op ((struct op) { WRITE, 2 * SLOT, 100, 'b' }, model);
  do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  short_transfers = true;
  do_op ((struct op) { WRITE, 100, SLOT - 50, 'x' }, model);
  do_op ((struct op) { ZERO, BLOCK + 20, 2 * SLOT - 100, 0 }, model);
  short_transfers = false;
  check_disk (model);
  check_all_released (model, true);
}

/* What cannot be punched is used again all the same: it is written whole. */
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
  check_clean ();
  /* At addresses that were used, and in blocks that were. */
  do_op ((struct op) { WRITE, 100, 3 * SLOT + 100, 'd' }, model);
  do_op ((struct op) { WRITE, 100, SLOT + 100, 'e' }, model);
  do_op ((struct op) { ZERO, 100, 4 * SLOT + 100, 0 }, model);
  check_disk (model);
  check_all_released (model, true);
}

/* What is zeroed from the end of the log to its start, a block at a time, leaves nothing in
 * the file, though no range of it is worth being punched when it is freed.
 */
static void
backwards_zeroes_leave_nothing (void **state)
{
  static uint8_t bytes[BLOCK];
  const unsigned count = SIZE / BLOCK;

  (void) state;
  memset (bytes, 'x', sizeof bytes);
  for (unsigned i = 0; i < count; ++i)
    assert_int_equal (
      blk_write (overlay, &base, bytes, BLOCK, i * (uint64_t) BLOCK, &err), 0);
  assert_true (bytes_of_last_file () >= count * (uint64_t) BLOCK);
  for (unsigned i = count; i-- > 0;) {
    assert_int_equal (blk_zero (overlay, &base, ZERO_ANY, ZERO_GIVES_BACK,
                                BLOCK, i * (uint64_t) BLOCK, &err),
                      0);
    overlay_clean (overlay);
  }
  assert_int_equal (bytes_of_last_file (), 0);
}

static uint64_t
taken_by (unsigned i)
{
  uint64_t bytes = 1;

  assert_int_equal (overlay_taken_by (overlay, held[i]->frozen, &bytes), 0);
  return bytes / BLOCK;
}

/* What a frozen map alone has is what its release gives back. */
static void
frozen_map_alone_takes_what_its_release_gives_back (void **state)
{
  static uint8_t model[SIZE];
  uint64_t alone, free_before;

  (void) state;
  memcpy (model, base_bytes, SIZE);
  do_op ((struct op) { WRITE, 10 * BLOCK, 0, 'a' }, model);
  do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  assert_int_equal (taken_by (0), 0); /* the live disk has all of it */
  do_op ((struct op) { WRITE, 3 * BLOCK, 0, 'b' }, model);
  assert_int_equal (taken_by (0), 3);
  do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  assert_int_equal (taken_by (0), 3);
  assert_int_equal (taken_by (1), 0);
  do_op ((struct op) { WRITE, 2 * BLOCK, BLOCK, 'c' }, model);
  do_op ((struct op) { ZERO, 2 * BLOCK, 8 * BLOCK, 0 }, model);
  assert_int_equal (taken_by (0), 3);
  assert_int_equal (taken_by (1),
                    2); /* of the zeroed ones the other has the same */

  /* Without that one, these are its own too. */
  do_op ((struct op) { RELEASE_OLDEST, 0, 0, 0 }, model);
  assert_int_equal (taken_by (0), 4);

  /* At random, and more than a chunk of the list has. */
  seed = 7;
  for (unsigned i = 0; i < 300; ++i) {
    do_op ((struct op) { WRITE, 1 + below (3 * BLOCK),
                         below (SIZE - 3 * BLOCK), 'r' },
           model);
    if (i % 60 == 0 && nr_held < MAX_HELD)
      do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
  }
  while (nr_held > 0) {
    const unsigned i = below (nr_held);

    overlay_clean (overlay);
    free_before = log_count (&overlay->log).owned;
    alone = taken_by (i);
    release_nr (i);
    assert_int_equal (log_count (&overlay->log).waiting, alone);
    overlay_clean (overlay);
    assert_int_equal (free_before - log_count (&overlay->log).owned, alone);
  }
  check_all_released (model, true);
}

/* Whoever is given a frozen map in place of a new one must find all in it that was done. */
static void
changes_since_are_noticed (void **state)
{
  static uint8_t model[SIZE];
  struct frozen_map *f;

  (void) state;
  memcpy (model, base_bytes, SIZE);
  for (unsigned i = 0; i < 3; ++i) {
    do_op ((struct op) { FREEZE, 0, 0, 0 }, model);
    f = held[nr_held - 1]->frozen;
    assert_false (overlay_is_changed_since (overlay, f));
    switch (i) {
    case 0:
      do_op ((struct op) { WRITE, 100, 100, 'a' }, model);
      break;
    case 1:
      do_op ((struct op) { WRITE, 100, 100, 'b' }, model);
      break;
    default:
      do_op ((struct op) { ZERO, BLOCK, 0, 0 }, model);
    }
    assert_true (overlay_is_changed_since (overlay, f));
    assert_true (overlay_is_changed_since (overlay, held[0]->frozen));
  }
  check_all_released (model, true);
}

static struct overlay *both[2];
static struct frozen_map *frozen_both[2];

static void *
freeze_both (void *opaque)
{
  (void) opaque;
  if (overlay_freeze_all (both, 2, frozen_both) == -1)
    die ("overlay_freeze_all", errno);
  return NULL;
}

/* As long as a request to one of them is under way, none is frozen, and none is changed by
 * others: else a write to the first and then one to the second would be in the second's
 * moment alone.
 */
static void
all_are_frozen_at_one_moment (void **state)
{
  struct overlay *other = overlay_new (SIZE, &options);
  pthread_t thread;

  (void) state;
  both[0] = (uintptr_t) overlay < (uintptr_t) other ? overlay : other;
  both[1] = both[0] == overlay ? other : overlay;
  {
    HOLD_REQUEST (both[1]);
    assert_int_equal (pthread_create (&thread, NULL, freeze_both, NULL), 0);
    while (pthread_rwlock_tryrdlock (&both[0]->request_lock.pthread) == 0) {
      assert_null (both[0]->map.newest);
      pthread_rwlock_unlock (&both[0]->request_lock.pthread);
    }
    (void) usleep (20000);
    assert_null (both[0]->map.newest);
    assert_int_not_equal (
      pthread_rwlock_tryrdlock (&both[0]->request_lock.pthread), 0);
  }
  assert_int_equal (pthread_join (thread, NULL), 0);
  for (unsigned i = 0; i < 2; ++i) {
    assert_ptr_equal (both[i]->map.newest, frozen_both[i]);
    overlay_release (both[i], frozen_both[i]);
  }
  overlay_free (other);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    WITH_OVERLAY (frozen_map_alone_takes_what_its_release_gives_back),
    WITH_OVERLAY (changes_since_are_noticed),
    WITH_OVERLAY (all_are_frozen_at_one_moment),
    WITH_OVERLAY (backwards_zeroes_leave_nothing),
    WITH_OVERLAY (frozen_between_a_look_and_its_write),
    WITH_OVERLAY (frozen_in_the_middle_of_any_request),
    WITH_OVERLAY (released_while_others_have_the_blocks),
    WITH_OVERLAY (block_dies_in_the_middle_of_a_release),
    WITH_OVERLAY (cleaned_at_any_step),
    WITH_OVERLAY (two_requests_copy_one_node),
    WITH_OVERLAY (zero_races_a_move),
    WITH_OVERLAY (changed_in_the_middle_of_a_release),
    WITH_OVERLAY (frozen_while_a_dead_list_is_passed_on),
    WITH_OVERLAY (released_while_a_write_is_half_done),
    WITH_OVERLAY (written_in_front_of_the_punch_of_what_died),
    WITH_OVERLAY (zeroed_while_shared_is_free_in_the_end),
    WITH_OVERLAY (address_is_used_again_under_a_reader),
    WITH_OVERLAY (own_address_is_used_again_under_a_reader),
    WITH_OVERLAY (own_address_is_used_again_under_a_writer),
    WITH_OVERLAY (maps_own_what_they_have_at_each_step),
    WITH_OVERLAY (kept_in_a_shared_slot),
    WITH_OVERLAY (exactly_the_shared_blocks_at_the_ends_are_brought),
    WITH_OVERLAY (shared_blocks_are_not_written_to),
    WITH_OVERLAY (last_block_moves_again),
    WITH_OVERLAY (shared_with_a_slow_base),
    WITH_OVERLAY (detected_zeroes_in_a_shared_slot),
    WITH_OVERLAY (frozen_maps_keep_their_nodes),
    WITH_OVERLAY (nodes_go_with_the_last_map),
    WITH_OVERLAY (interrupted_where_slots_are_spread),
    WITH_OVERLAY (every_failure_leaves_all_as_it_was),
    WITH_OVERLAY (released_without_memory),
    WITH_OVERLAY (no_address_to_move_to),
    WITH_OVERLAY (no_memory_to_freeze),
    WITH_OVERLAY (short_transfers_lose_nothing),
    WITH_OVERLAY (failing_punches_fail_nothing),
  };

#ifdef __SANITIZE_THREAD__
  /* All of these force what one thread does between two steps of another. */
  cmocka_set_test_filter ("no_memory_to_freeze");
#endif
  return cmocka_run_group_tests_name ("freeze", tests, NULL, NULL);
}
