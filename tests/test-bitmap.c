/* SPDX-License-Identifier: BSD-3-Clause */

/* State words, against a plain array of 32 states. */

#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "bitmap.h"

static uint64_t
word_of (const enum block_state states[SLOT_BLOCKS])
{
  uint64_t word = 0;

  for (unsigned i = 0; i < SLOT_BLOCKS; ++i) {
    if (states[i] == BLOCK_ALLOCATED)
      word |= UINT64_C (1) << i;
    else if (states[i] == BLOCK_ZERO)
      word |= UINT64_C (1) << (32 + i);
  }
  return word;
}

static void
masks (void **state)
{
  (void) state;
  assert_int_equal (bitmap_mask (0, 0), 0);
  assert_int_equal (bitmap_mask (0, 1), 1);
  assert_int_equal (bitmap_mask (31, 1), 0x80000000);
  assert_int_equal (bitmap_mask (0, 32), 0xffffffff);
  assert_int_equal (bitmap_mask (4, 8), 0xff0);
}

static void
empty_word_is_all_holes (void **state)
{
  (void) state;
  assert_int_equal (bitmap_state (0, 0), BLOCK_HOLE);
  assert_int_equal (bitmap_state (0, 31), BLOCK_HOLE);
  assert_int_equal (bitmap_run (0, 0), 32);
  assert_int_equal (bitmap_run (0, 31), 1);
  assert_int_equal (bitmap_holes (0), 0xffffffff);
}

static void
full_words (void **state)
{
  (void) state;
  const uint64_t allocated = bitmap_set_allocated (0, 0xffffffff);
  const uint64_t zero = bitmap_set_zero (allocated, 0xffffffff);

  assert_int_equal (bitmap_run (allocated, 0), 32);
  assert_int_equal (bitmap_run (allocated, 7), 25);
  assert_true (allocated == UINT64_C (0xffffffff));
  assert_true (zero == UINT64_C (0xffffffff00000000));
  assert_int_equal (bitmap_run (zero, 31), 1);
  assert_int_equal (bitmap_holes (zero), 0);
}

/* Random changes of random ranges, everything looked at after each. */
static void
against_an_array (void **state)
{
  enum block_state states[SLOT_BLOCKS] = { BLOCK_HOLE };
  uint64_t word = 0;

  (void) state;
  srandom (1);
  for (unsigned n = 0; n < 100000; ++n) {
    const unsigned first = (unsigned) random () % SLOT_BLOCKS;
    const unsigned count = 1 + (unsigned) random () % (SLOT_BLOCKS - first);
    const uint32_t mask = bitmap_mask (first, count);
    const enum block_state to = (unsigned) random () % 3;

    if (to == BLOCK_ALLOCATED)
      word = bitmap_set_allocated (word, mask);
    else if (to == BLOCK_ZERO)
      word = bitmap_set_zero (word, mask);
    else /* nothing in the filter makes a hole again */
      word &= ~(mask | (uint64_t) mask << 32);
    for (unsigned i = first; i < first + count; ++i)
      states[i] = to;

    assert_true (word == word_of (states));
    assert_int_equal (bitmap_allocated (word) & bitmap_zero (word), 0);
    assert_int_equal (bitmap_allocated (word) | bitmap_zero (word),
                      (uint32_t) ~bitmap_holes (word));
    for (unsigned i = 0; i < SLOT_BLOCKS; ++i) {
      unsigned run = 1;

      while (i + run < SLOT_BLOCKS && states[i + run] == states[i])
        run++;
      assert_int_equal (bitmap_state (word, i), states[i]);
      assert_int_equal (bitmap_run (word, i), run);
    }
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (masks),
    cmocka_unit_test (empty_word_is_all_holes),
    cmocka_unit_test (full_words),
    cmocka_unit_test (against_an_array),
  };

  return cmocka_run_group_tests_name ("bitmap", tests, NULL, NULL);
}
