/* SPDX-License-Identifier: BSD-3-Clause */

/* The log without a map: who gets which addresses, and when they are free. */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/cleanup.h"
#include "faults.h"
#include "overlay/log.h"

#define SHIFT 12
#define BLOCK (UINT64_C (1) << SHIFT)
#define CHUNK 4096 /* blocks; log.c's own */
#define WINDOW (UINT32_C (65536) >> SHIFT)
#define PIECE (UINT64_C (16) << 20)

static char dir[4096];
static struct store store;
static struct log log_;

static void
begin (unsigned block_shift, uint64_t head)
{
  store_init (&store, dir, NEWFILE_ANONYMOUS, STORE_WRITES_BACK_LATE);
  log_init (&log_, &store, block_shift, head);
}

static int
set_up (void **state)
{
  (void) state;
  begin (SHIFT, 1);
  return 0;
}

static int
tear_down (void **state)
{
  (void) state;
  log_destroy (&log_);
  store_destroy (&store);
  fail_calls_from (0, 0);
  fail_punches = fail_truncates = false;
  return 0;
}

static struct log_run
run_of (uint64_t first, uint64_t count)
{
  return (struct log_run) { (uint32_t) first, (uint32_t) count };
}

static struct log_run
take_with (uint64_t wanted, enum log_effort effort)
{
  struct log_run run;

  assert_int_equal (log_take (&log_, wanted, effort, LOG_UNLIMITED, &run), 0);
  return run;
}

static void
expect_take (uint64_t wanted, uint64_t first, uint64_t count)
{
  const struct log_run run = take_with (wanted, LOG_TIDY);

  assert_int_equal (run.first, first);
  assert_int_equal (run.count, count);
}

/* The cleaner's round; calls PUNCHED for all that is to be punched. */
static void
clean (void (*punched) (struct log_run run))
{
  struct log_run run;
  bool punch;

  log_take_waiting (&log_);
  while (log_next_taken (&log_, PIECE, &run, &punch)) {
    if (punch && punched)
      punched (run);
    log_free_taken (&log_, run);
  }
}

/* Nobody owns these any more, and the cleaner has been there. */
static void
free_run (uint64_t first, uint64_t count)
{
  log_wait (&log_, run_of (first, count));
  clean (NULL);
}

static void
expect_counts (uint64_t owned, uint64_t waiting, uint64_t taken, uint64_t free)
{
  const struct log_counts counts = log_count (&log_);

  assert_int_equal (counts.owned, owned);
  assert_int_equal (counts.waiting, waiting);
  assert_int_equal (counts.taken, taken);
  assert_int_equal (counts.free, free);
  assert_int_equal (log_end (&log_),
                    (log_.head + owned + waiting + taken + free)
                      << log_.block_shift);
}

/*----------------------------------------------------------------------
 * Giving out
 */

static void
addresses_come_in_order (void **state)
{
  (void) state;
  assert_int_equal (store.file.fd, -1);
  assert_int_equal (log_end (&log_), BLOCK);
  expect_take (3, 1, 3);
  assert_true (store.file.fd >= 0);
  expect_take (2, 4, 2);
  expect_counts (5, 0, 0, 0);
  assert_int_equal (log_offset (&log_, 4), 4 * BLOCK);
  assert_int_equal (log_kind_of (&log_, 5), LOG_OWNED);
  assert_int_equal (log_kind_of (&log_, 6), LOG_FREE);
}

static void
head_is_not_given_out (void **state)
{
  tear_down (state);
  begin (16, 5000);
  expect_take (2, 5000, 2);
  assert_int_equal (log_end (&log_), UINT64_C (5002) << 16);
  free_run (5000, 2);
  assert_int_equal (log_end (&log_), UINT64_C (5000) << 16);
  expect_take (UINT64_C (1) << 16, 5000, UINT64_C (1) << 16);
}

/* A long request gets one row, across chunks too. */
static void
long_request_gets_one_row (void **state)
{
  (void) state;
  expect_take (CHUNK - 10, 1, CHUNK - 10);
  expect_take (3 * CHUNK, CHUNK - 9, 3 * CHUNK);
  expect_counts (4 * CHUNK - 10, 0, 0, 0);
}

static void
free_row_is_used_again (void **state)
{
  (void) state;
  expect_take (1000, 1, 1000);
  free_run (100, 10);
  free_run (200, 20);
  free_run (300, 10);
  expect_counts (960, 0, 0, 40);
  /* Long enough, or it stays. */
  expect_take (21, 1001, 21);
  expect_take (11, 200, 11);
  /* The next one is looked for behind that. */
  expect_take (9, 211, 9);
  expect_take (10, 300, 10);
  expect_take (10, 100, 10);
  expect_take (1, 1022, 1);
  expect_counts (1022, 0, 0, 0);
}

static void
next_one_is_looked_for_behind_the_last_one (void **state)
{
  (void) state;
  expect_take (5 * CHUNK, 1, 5 * CHUNK);
  for (unsigned i = 0; i < 5; ++i)
    free_run (i * CHUNK + 10, 4);
  for (unsigned i = 0; i < 5; ++i)
    expect_take (3, i * CHUNK + 10, 3);
  expect_take (2, 5 * CHUNK + 1, 2);
  for (unsigned i = 0; i < 5; ++i)
    expect_take (1, i * CHUNK + 13, 1);
  expect_take (1, 5 * CHUNK + 3, 1);
}

/* No row is longer than a chunk; for a longer request, that is good enough. */
static void
long_request_uses_whole_chunks (void **state)
{
  (void) state;
  expect_take (5 * CHUNK, 1, 5 * CHUNK);
  free_run (2 * CHUNK, CHUNK);
  expect_take (2 * CHUNK, 2 * CHUNK, CHUNK);
  expect_take (2 * CHUNK, 5 * CHUNK + 1, 2 * CHUNK);
}

/* A log that is more than twice as long as what is in it takes what there is. */
static void
log_is_twice_as_long (void **state)
{
  (void) state;
  expect_take (100, 1, 100);
  for (unsigned i = 2; i < 80; i += 2)
    log_wait (&log_, run_of (i, 1));
  log_wait (&log_, run_of (80, 16));
  clean (NULL);
  expect_counts (45, 0, 0, 55);
  expect_take (9, 80, 9);
  expect_counts (54, 0, 0, 46);
  expect_take (8, 101, 8);
  for (unsigned i = 5; i < 80; i += 4)
    log_wait (&log_, run_of (i, 1));
  clean (NULL);
  /* With eight more, 116 of which 51 are owned: the longest row that is seen, although it
   * is not long enough.
   */
  expect_counts (43, 0, 0, 65);
  expect_take (8, 89, 7);
  /* With eight more, 116 of which 58 are owned. */
  expect_counts (50, 0, 0, 58);
  expect_take (8, 109, 8);
}

/* What waits counts for its length. */
static void
waiting_ones_make_a_log_long (void **state)
{
  (void) state;
  expect_take (100, 1, 100);
  free_run (50, 1);
  log_wait (&log_, run_of (60, 40));
  expect_take (9, 101, 9); /* 109, and 68 are owned */
  log_wait (&log_, run_of (1, 40));
  expect_take (9, 50, 1); /* 109, and 28 are owned */
  expect_take (9, 110, 9);
}

/* Where nothing else is left, anything will do, wherever it is. */
static void
any_address (void **state)
{
  struct log_run run;

  (void) state;
  expect_take (20 * CHUNK, 1, 20 * CHUNK);
  log_wait (&log_, run_of (10 * CHUNK + 5, 1));
  log_wait (&log_, run_of (10 * CHUNK + 7, 2));
  log_wait (&log_, run_of (17 * CHUNK, 3));
  clean (NULL);
  run = take_with (100, LOG_ANY);
  assert_int_equal (run.first, 10 * CHUNK + 5);
  assert_int_equal (run.count, 1);
  run = take_with (99, LOG_ANY);
  assert_int_equal (run.first, 10 * CHUNK + 7);
  assert_int_equal (run.count, 2);
  run = take_with (2, LOG_ANY);
  assert_int_equal (run.first, 17 * CHUNK);
  assert_int_equal (run.count, 2);
  run = take_with (97, LOG_ANY);
  assert_int_equal (run.first, 17 * CHUNK + 2);
  assert_int_equal (run.count, 1);
  run = take_with (96, LOG_ANY);
  assert_int_equal (run.first, 20 * CHUNK + 1);
  assert_int_equal (run.count, 96);
}

/* Among very many that are too short, one that is long enough is not looked for in one
 * request, but found by later ones.
 */
static void
search_is_bounded (void **state)
{
  const uint64_t nr = 40 * CHUNK;
  unsigned tries = 0;

  (void) state;
  expect_take (nr, 1, nr);
  for (uint64_t i = 10; i < nr; i += 3)
    log_wait (&log_, run_of (i, 1));
  log_wait (&log_, run_of (30 * CHUNK + 2, 2)); /* behind one of those */
  clean (NULL);
  while (take_with (3, LOG_TIDY).first > nr)
    tries++;
  assert_true (tries > 50 && tries < 1000);
}

static void
row_or_nothing (void **state)
{
  struct log_run run;

  (void) state;
  expect_take (30, 1, 30);
  free_run (1, 20);
  assert_int_equal (log_take_row (&log_, 5, &run), 0);
  assert_int_equal (run.first, 31);
  assert_int_equal (run.count, 5);
  log_.end_limit = 100;
  assert_int_equal (log_take_row (&log_, 65, &run), -1);
  assert_int_equal (errno, EFBIG);
  assert_int_equal (log_take_row (&log_, UINT64_MAX, &run), -1);
  assert_int_equal (errno, EFBIG);
  assert_int_equal (log_take_row (&log_, 64, &run), 0);
  assert_int_equal (run.first, 36);
  assert_int_equal (run.count, 64);
}

/*----------------------------------------------------------------------
 * Limits
 */

static void
log_is_as_long_as_can_be (void **state)
{
  struct log_run run;

  (void) state;
  log_.end_limit = 100;
  expect_take (60, 1, 60);
  expect_take (60, 61, 39);
  assert_int_equal (log_take (&log_, 1, LOG_TIDY, LOG_UNLIMITED, &run), -1);
  assert_int_equal (errno, EFBIG);
  assert_int_equal (log_take (&log_, 1, LOG_ANY, LOG_UNLIMITED, &run), -1);
  assert_int_equal (errno, EFBIG);
  expect_counts (99, 0, 0, 0);
  free_run (5, 1);
  assert_int_equal (log_take (&log_, 2, LOG_TIDY, LOG_UNLIMITED, &run), -1);
  assert_int_equal (errno, EFBIG);
  run = take_with (2, LOG_ANY);
  assert_int_equal (run.first, 5);
  assert_int_equal (run.count, 1);
  log_wait (&log_, run_of (99, 1));
  assert_int_equal (log_take (&log_, 1, LOG_ANY, LOG_UNLIMITED, &run), -1);
  clean (NULL);
  expect_take (5, 99, 1);
}

static void
no_more_addresses_than_fit (void **state)
{
  struct log_run run;

  (void) state;
  assert_true (log_.end_limit == UINT32_MAX);
  tear_down (state);
  begin (21, 1);
  assert_true (log_offset (&log_, log_.end_limit) <= INT64_MAX);
  expect_take (1, 1, 1);

  /* The last ones.  (There need not be bits for all before them.) */
  tear_down (state);
  begin (SHIFT, UINT32_MAX - UINT64_C (2) * CHUNK);
  log_.max_chunks = log_.nr_chunks = 0;
  expect_take (1, UINT32_MAX - 2 * CHUNK, 1);
  expect_take (UINT64_MAX, UINT32_MAX - 2 * CHUNK + 1, 2 * CHUNK - 1);
  assert_int_equal (log_take (&log_, 1, LOG_ANY, LOG_UNLIMITED, &run), -1);
  assert_int_equal (errno, EFBIG);
  free_run (UINT32_MAX - 1, 1);
  expect_take (2, UINT32_MAX - 1, 1);
}

static void
limit_of_the_process (void **state)
{
  struct rlimit old, limit;
  struct log_run run, other;
  struct stat st;

  signal (SIGXFSZ, SIG_IGN);
  assert_int_equal (getrlimit (RLIMIT_FSIZE, &old), 0);
  tear_down (state);
  limit = old;
  limit.rlim_cur = 100 * BLOCK + 5;
  assert_int_equal (setrlimit (RLIMIT_FSIZE, &limit), 0);
  begin (SHIFT, 1);
  run = take_with (1000, LOG_TIDY);
  const int r = fstat (store.file.fd, &st);
  const int r2 = log_take (&log_, 1, LOG_TIDY, LOG_UNLIMITED, &other);
  const int err = errno;
  assert_int_equal (setrlimit (RLIMIT_FSIZE, &old), 0);
  assert_int_equal (run.count, 99);
  assert_int_equal (r, 0);
  assert_int_equal (st.st_size, 100 * BLOCK);
  assert_int_equal (r2, -1);
  assert_int_equal (err, EFBIG);
  signal (SIGXFSZ, SIG_DFL);
}

/* A limit below the head. */
static void
no_room_for_the_head (void **state)
{
  struct log_run run;

  (void) state;
  log_.end_limit = 0;
  assert_int_equal (log_take (&log_, 1, LOG_TIDY, LOG_UNLIMITED, &run), -1);
  assert_int_equal (errno, EFBIG);
  assert_int_equal (log_take_row (&log_, 1, &run), -1);
  assert_int_equal (errno, EFBIG);
}

static uint64_t
size_of_file (void)
{
  uint64_t size;

  assert_int_equal (store_size (&store, &size), 0);
  return size;
}

/* The file is made longer ahead of its use, so that it does not grow by each write. */
static void
file_grows_ahead (void **state)
{
  static const uint64_t mib = UINT64_C (1) << 20;

  (void) state;
  take_with (1, LOG_TIDY);
  assert_int_equal (size_of_file (), 2 * BLOCK + mib);
  take_with (mib / BLOCK - 1, LOG_TIDY);
  assert_int_equal (size_of_file (), 2 * BLOCK + mib);
  take_with (2, LOG_TIDY);
  assert_int_equal (size_of_file (), 3 * BLOCK + 2 * mib);
  take_with (80 * mib / BLOCK, LOG_TIDY);
  uint64_t end = log_end (&log_);
  assert_int_equal (size_of_file (), end + end / 8);
  take_with (2000 * mib / BLOCK, LOG_TIDY);
  end = log_end (&log_);
  assert_int_equal (size_of_file (), end + 64 * mib);

  /* What is free at the end does not make it shorter, nor is it made longer again. */
  free_run (1, end / BLOCK - 1);
  assert_int_equal (log_end (&log_), BLOCK);
  assert_int_equal (size_of_file (), end + 64 * mib);
  take_with (1000, LOG_TIDY);
  assert_int_equal (size_of_file (), end + 64 * mib);

  /* Never past the limit. */
  log_.end_limit = (end + 70 * mib) / BLOCK;
  take_with ((end + 65 * mib) / BLOCK - 1001, LOG_TIDY);
  assert_int_equal (size_of_file (), end + 70 * mib);
}

static void
file_that_does_not_grow (void **state)
{
  struct iovec iov = { .iov_base = "x", .iov_len = 1 };

  (void) state;
  fail_truncates = true;
  take_with (10, LOG_TIDY);
  assert_int_equal (size_of_file (), 0);
  assert_int_equal (store_writev (&store, &iov, 1, 10 * BLOCK), 0);
  fail_truncates = false;
  take_with (10, LOG_TIDY);
  assert_int_equal (size_of_file (), 21 * BLOCK + (1 << 20));
}

/*----------------------------------------------------------------------
 * Failures
 */

/* Let each call fail that taking addresses makes. */
static void
nothing_is_taken_where_something_fails (void **state)
{
  static const uint64_t wanted[] = { 1, 10, 3 * CHUNK, CHUNK };
  struct log_run run;
  unsigned failures = 0;

  (void) state;
  for (unsigned i = 0; i < sizeof wanted / sizeof wanted[0]; ++i)
    for (int n = 1;; ++n) {
      const uint64_t next = log_.next;

      fail_calls_from (n, EMFILE);
      const bool row = (i + (unsigned) n) % 2;
      const int r
        = row ? log_take_row (&log_, wanted[i], &run)
              : log_take (&log_, wanted[i], LOG_TIDY, LOG_UNLIMITED, &run);
      const int err = errno, failed = call_has_failed ();

      if (!failed) {
        assert_int_equal (r, 0);
        assert_int_equal (run.first, next);
        assert_int_equal (run.count, wanted[i]);
        break;
      }
      failures++;
      assert_int_equal (r, -1);
      assert_int_equal (err, failed);
      assert_int_equal (log_.next, next);
    }
  assert_true (failures > 4);
  expect_counts (4 * CHUNK + 11, 0, 0, 0);
}

/* Whatever is owned can become free without memory. */
static void
freeing_takes_no_memory (void **state)
{
  (void) state;
  expect_take (4 * CHUNK, 1, 4 * CHUNK);
  fail_calls_from (1, ENOSPC);
  for (unsigned i = 1; i < 4 * CHUNK; i += 2)
    log_wait (&log_, run_of (i, 1));
  clean (NULL);
  log_give_back (&log_, run_of (4 * CHUNK, 1));
  log_give_back (&log_, run_of (4 * CHUNK - 2, 1));
  assert_int_equal (call_has_failed (), 0);
  expect_counts (2 * CHUNK - 2, 0, 0, 2 * CHUNK - 2);
}

/*----------------------------------------------------------------------
 * From owned to free
 */

static void
what_waits_is_not_given_out (void **state)
{
  struct log_run run;
  bool punch;

  (void) state;
  expect_take (40, 1, 40);
  assert_false (log_take_waiting (&log_));
  assert_true (log_wait (&log_, run_of (10, 3)));
  assert_false (log_wait (&log_, run_of (20, 1)));
  expect_counts (36, 4, 0, 0);
  assert_int_equal (log_kind_of (&log_, 12), LOG_WAITING);
  assert_int_equal (log_kind_of (&log_, 13), LOG_OWNED);
  expect_take (1, 41, 1);
  assert_false (log_next_taken (&log_, PIECE, &run, &punch));

  assert_true (log_take_waiting (&log_));
  expect_counts (37, 0, 4, 0);
  assert_int_equal (log_kind_of (&log_, 12), LOG_TAKEN);
  assert_int_equal (take_with (1, LOG_ANY).first, 42);
  /* The next round is told of again. */
  assert_true (log_wait (&log_, run_of (30, 1)));
  /* Those that are still taken stay so. */
  assert_true (log_take_waiting (&log_));
  expect_counts (37, 0, 5, 0);

  assert_true (log_next_taken (&log_, PIECE, &run, &punch));
  assert_int_equal (run.first, 10);
  assert_int_equal (run.count, 3);
  assert_int_equal (log_kind_of (&log_, 10), LOG_TAKEN);
  assert_int_equal (take_with (1, LOG_ANY).first, 43);
  log_free_taken (&log_, run);
  expect_counts (38, 0, 2, 3);
  expect_take (3, 10, 3);
  clean (NULL);
  expect_counts (41, 0, 0, 2);
}

static void
end_moves_back (void **state)
{
  (void) state;
  expect_take (10 * CHUNK, 1, 10 * CHUNK);
  free_run (100, 10 * CHUNK - 200);
  expect_counts (200, 0, 0, 10 * CHUNK - 200);
  log_wait (&log_, run_of (10 * CHUNK - 50, 10));
  free_run (10 * CHUNK, 1);
  expect_counts (189, 0, 0, 10 * CHUNK - 190);
  free_run (10 * CHUNK - 40, 40);
  /* Over those that were free before it too, but no owned one. */
  expect_counts (99 + 50, 0, 0, 10 * CHUNK - 200);
  free_run (10 * CHUNK - 100, 50);
  expect_counts (99, 0, 0, 0);
  /* Not over what waits. */
  expect_take (30, 100, 30);
  log_wait (&log_, run_of (110, 10));
  log_give_back (&log_, run_of (120, 10));
  expect_counts (99 + 10, 10, 0, 0);
  clean (NULL);
  expect_counts (99 + 10, 0, 0, 0);
  free_run (1, 109);
  expect_counts (0, 0, 0, 0);
  expect_take (10 * CHUNK, 1, 10 * CHUNK);
}

static uint64_t
bytes_used (void)
{
  struct stat st;

  assert_int_equal (fstat (store.file.fd, &st), 0);
  return (uint64_t) st.st_blocks * 512;
}

static uint64_t other_end;

/* Another one appends in the middle of giving back. */
static void
take_one (void)
{
  struct log_run run;

  assert_int_equal (log_take (&log_, 1, LOG_TIDY, LOG_UNLIMITED, &run), 0);
  other_end = run.first;
}

static void
given_back_means_punched (void **state)
{
  static char bytes[64 * BLOCK];
  struct iovec iov = { .iov_base = bytes, .iov_len = sizeof bytes };

  (void) state;
  memset (bytes, 'x', sizeof bytes);
  expect_take (64, 1, 64);
  assert_int_equal (store_writev (&store, &iov, 1, BLOCK), 0);
  const uint64_t used = bytes_used ();
  assert_true (used >= sizeof bytes);

  log_give_back (&log_, run_of (1, 32));
  assert_true (bytes_used () <= used - 32 * BLOCK);
  expect_counts (32, 0, 0, 32);

  /* It is punched before it can be given out again. */
  before_punch = take_one;
  log_give_back (&log_, run_of (33, 32));
  assert_int_equal (other_end, 1);
  assert_true (bytes_used () <= used - 64 * BLOCK);
  expect_counts (1, 0, 0, 0);

  fail_punches = true;
  errno = EDOM;
  log_give_back (&log_, run_of (1, 1));
  assert_int_equal (errno, EDOM);
  expect_counts (0, 0, 0, 0);

  /* Nothing at all, behind the end. */
  nr_punches = 0;
  log_give_back (&log_, run_of (20, 0));
  log_give_back (&log_, run_of (1, 0));
  assert_int_equal (nr_punches, 0);
  expect_counts (0, 0, 0, 0);
}

/*----------------------------------------------------------------------
 * What is punched
 */

static struct log_run all_punched[64];
static unsigned nr_punched;

static void
note (struct log_run run)
{
  assert_true (nr_punched < 64);
  assert_true (run.count > 0 && run.count << SHIFT <= PIECE);
  for (uint32_t i = 0; i < run.count; ++i)
    assert_int_equal (log_kind_of (&log_, run.first + i), LOG_TAKEN);
  all_punched[nr_punched++] = run;
}

static void
clean_and_expect (unsigned nr, const struct log_run *runs)
{
  nr_punched = 0;
  clean (note);
  assert_int_equal (nr_punched, nr);
  for (unsigned i = 0; i < nr; ++i) {
    assert_int_equal (all_punched[i].first, runs[i].first);
    assert_int_equal (all_punched[i].count, runs[i].count);
  }
}

/* Windows of 64 KiB in which nothing is used. */
static void
windows_are_punched (void **state)
{
  (void) state;
  expect_take (100000, 1, 100000);
  /* One and a half; the half ones are freed as they are. */
  log_wait (&log_, run_of (10 * WINDOW, WINDOW + WINDOW / 2));
  log_wait (&log_, run_of (20 * WINDOW - 3, WINDOW + 5));
  /* As long, but not aligned. */
  log_wait (&log_, run_of (30 * WINDOW + 1, WINDOW));
  /* Some in a row. */
  log_wait (&log_, run_of (40 * WINDOW, 3 * WINDOW));
  clean_and_expect (3, (const struct log_run[]) {
                         { 10 * WINDOW, WINDOW },
                         { 20 * WINDOW, WINDOW },
                         { 40 * WINDOW, 3 * WINDOW },
                       });
  expect_counts (100000 - 6 * WINDOW - WINDOW / 2 - 5, 0, 0,
                 6 * WINDOW + WINDOW / 2 + 5);

  /* What is free in a window is punched with what becomes so. */
  log_wait (&log_, run_of (11 * WINDOW + WINDOW / 2, WINDOW / 2));
  clean_and_expect (1, &(struct log_run) { 11 * WINDOW, WINDOW });
  /* Not again, also not with what is next to it. */
  log_wait (&log_, run_of (12 * WINDOW, 1));
  clean_and_expect (0, NULL);
  log_wait (&log_, run_of (9 * WINDOW, WINDOW));
  clean_and_expect (1, &(struct log_run) { 9 * WINDOW, WINDOW });
}

/* The head and what lies behind the end. */
static void
windows_at_both_ends (void **state)
{
  tear_down (state);
  begin (SHIFT, 3);
  expect_take (100000, 3, 100000);
  log_wait (&log_, run_of (3, 2 * WINDOW - 3));
  clean_and_expect (1, &(struct log_run) { WINDOW, WINDOW });
  const uint32_t end = 100003, start = ROUND_DOWN (end - 1, WINDOW);
  log_wait (&log_, run_of (start, end - start));
  clean_and_expect (1, &(struct log_run) { start, end - start });
  assert_int_equal (log_.next, start);
}

/* Nobody looks behind the end again, so what gets there is punched, however small. */
static void
what_gets_behind_the_end_is_punched (void **state)
{
  (void) state;
  expect_take (100000, 1, 100000);
  log_wait (&log_, run_of (99990, 3));
  clean_and_expect (0, NULL);
  log_wait (&log_, run_of (99993, 8));
  clean_and_expect (1, &(struct log_run) { 99990, 11 });
  expect_counts (99989, 0, 0, 0);
}

/* A block may be as large as that, or larger. */
static void
large_blocks (void **state)
{
  for (unsigned shift = 16; shift <= 21; ++shift) {
    tear_down (state);
    begin (shift, 1);
    expect_take (10000, 1, 10000);
    log_wait (&log_, run_of (10, 1));
    log_wait (&log_, run_of (20, 2));
    clean_and_expect (2, (const struct log_run[]) { { 10, 1 }, { 20, 2 } });
  }
}

static void
pieces_are_bounded (void **state)
{
  const uint64_t per_piece = PIECE / BLOCK;

  (void) state;
  expect_take (10 * per_piece, 1, 10 * per_piece);
  log_wait (&log_, run_of (1, 10 * per_piece - 1));
  clean_and_expect (11, (const struct log_run[]) {
                          { 1, WINDOW - 1 },
                          { WINDOW, per_piece },
                          { WINDOW + per_piece, per_piece },
                          { WINDOW + 2 * per_piece, per_piece },
                          { WINDOW + 3 * per_piece, per_piece },
                          { WINDOW + 4 * per_piece, per_piece },
                          { WINDOW + 5 * per_piece, per_piece },
                          { WINDOW + 6 * per_piece, per_piece },
                          { WINDOW + 7 * per_piece, per_piece },
                          { WINDOW + 8 * per_piece, per_piece },
                          { WINDOW + 9 * per_piece, per_piece - WINDOW },
                        });
}

/* Where a tenth is free, small ranges are punched too. */
static void
small_ones_of_a_log_with_much_free (void **state)
{
  (void) state;
  expect_take (1000, 1, 1000);
  for (unsigned i = 0; i < 99; ++i)
    log_wait (&log_, run_of (i * 4 + 4, 1));
  clean_and_expect (0, NULL);
  log_wait (&log_, run_of (500, 1));
  log_wait (&log_, run_of (510, 4)); /* across the start of a window */
  clean_and_expect (3, (const struct log_run[]) {
                         { 500, 1 },
                         { 510, 2 },
                         { 512, 2 },
                       });
}

/*----------------------------------------------------------------------
 * At random, against a model
 */

#define NR_MODEL (5 * CHUNK)

static uint8_t kinds[NR_MODEL]; /* those behind the end are LOG_FREE */
static uint64_t model_end, random_state;
static struct log_run owned[20000];
static unsigned nr_owned;

static uint64_t
random_below (uint64_t n)
{
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % n;
}

static void
expect_kind (struct log_run run, enum log_kind from, enum log_kind to)
{
  assert_true (run.count > 0);
  for (uint32_t i = run.first; i < run.first + run.count; ++i) {
    assert_int_equal (kinds[i], from);
    kinds[i] = (uint8_t) to;
  }
}

static void
model_end_moves_back (void)
{
  while (model_end > log_.head && kinds[model_end - 1] == LOG_FREE)
    model_end--;
}

static void
check_model (void)
{
  uint64_t nr[LOG_OWNED + 1] = { 0 };

  assert_int_equal (log_end (&log_), model_end << SHIFT);
  for (uint64_t i = log_.head; i < NR_MODEL; ++i) {
    assert_int_equal (log_kind_of (&log_, i), kinds[i]);
    nr[kinds[i]] += i < model_end;
  }
  expect_counts (nr[LOG_OWNED], nr[LOG_WAITING], nr[LOG_TAKEN], nr[LOG_FREE]);
}

static void
random_take (void)
{
  const struct log_counts c = log_count (&log_);
  const uint64_t wanted
    = 1 + random_below (random_below (20) ? 40 : 2 * CHUNK);
  const enum log_effort effort = random_below (10) ? LOG_TIDY : LOG_ANY;
  const bool too_long
    = model_end - log_.head + wanted > 2 * (c.owned + wanted);
  struct log_run run;

  if (nr_owned == sizeof owned / sizeof owned[0])
    return;
  if (log_take (&log_, wanted, effort, LOG_UNLIMITED, &run) == -1) {
    assert_int_equal (errno, EFBIG);
    assert_int_equal (model_end, NR_MODEL);
    assert_true (effort == LOG_TIDY || c.free == 0);
    return;
  }
  assert_true (run.count >= 1 && run.count <= wanted);
  if (run.first == model_end) {
    /* New ones, if there is nothing (or, far away, too little) to be used again. */
    assert_true (run.count == wanted || model_end + run.count == NR_MODEL);
    assert_true (effort == LOG_TIDY || c.free == 0);
    model_end += run.count;
  }
  else {
    assert_true (effort == LOG_ANY || too_long
                 || run.count == MIN (wanted, CHUNK));
    assert_true (run.first + run.count <= model_end);
  }
  expect_kind (run, LOG_FREE, LOG_OWNED);
  owned[nr_owned++] = run;
}

/* Part of something that is owned, or all of it, has no owner any more. */
static void
random_drop (void)
{
  if (nr_owned == 0)
    return;
  const unsigned nr = (unsigned) random_below (nr_owned);
  struct log_run run = owned[nr];

  if (random_below (2)) {
    run.count = 1 + (uint32_t) random_below (run.count);
    owned[nr].first += run.count;
    owned[nr].count -= run.count;
  }
  else
    owned[nr].count = 0;
  if (owned[nr].count == 0)
    owned[nr] = owned[--nr_owned];
  if (random_below (3)) {
    const uint64_t waiting = log_count (&log_).waiting;

    assert_int_equal (log_wait (&log_, run), waiting == 0);
    expect_kind (run, LOG_OWNED, LOG_WAITING);
  }
  else {
    log_give_back (&log_, run);
    expect_kind (run, LOG_OWNED, LOG_FREE);
    model_end_moves_back ();
  }
}

/* A piece of the cleaner's work.  (It may begin a round before the last one is done, as
 * when it was told to leave.)
 */
static void
random_clean (void)
{
  struct log_run run;
  bool punch, any = false;

  if (random_below (4) == 0) {
    for (uint64_t i = 0; i < NR_MODEL; ++i) {
      if (kinds[i] == LOG_WAITING)
        kinds[i] = LOG_TAKEN;
      any |= kinds[i] == LOG_TAKEN;
    }
    assert_int_equal (log_take_waiting (&log_), any);
  }
  if (!log_next_taken (&log_, random_below (2) ? PIECE : 1 << 16, &run,
                       &punch))
    return;
  for (uint32_t i = run.first; i < run.first + run.count; ++i) {
    assert_true (kinds[i] == LOG_TAKEN || (punch && kinds[i] == LOG_FREE));
    assert_true (i < model_end);
    any |= kinds[i] == LOG_TAKEN;
    kinds[i] = LOG_TAKEN;
  }
  assert_true (any);
  if (random_below (100) == 0)
    check_model ();
  log_free_taken (&log_, run);
  expect_kind (run, LOG_TAKEN, LOG_FREE);
  model_end_moves_back ();
}

static void
random_operations (void **state)
{
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    tear_down (state);
    begin (SHIFT, 1 + seed * 7);
    log_.end_limit = NR_MODEL;
    random_state = seed * UINT64_C (0x9e3779b97f4a7c15);
    model_end = log_.head;
    nr_owned = 0;
    memset (kinds, LOG_FREE, sizeof kinds);
    for (unsigned i = 0; i < 6000; ++i) {
      /* It gets fuller, and emptier again. */
      const uint64_t what = random_below (10);

      if (what < (i / 1000 % 2 ? 3 : 5))
        random_take ();
      else if (what < 7)
        random_drop ();
      else
        random_clean ();
      if (i % 250 == 0)
        check_model ();
    }
    while (nr_owned > 0)
      random_drop ();
    for (unsigned i = 0; i < 2; ++i) {
      log_take_waiting (&log_);
      clean (NULL);
    }
    expect_counts (0, 0, 0, 0);
  }
}

/*----------------------------------------------------------------------
 * Threads
 */

#define NR_THREADS 4
#define NR_SHARED (3 * CHUNK)

static atomic_uchar owner[NR_SHARED];
static atomic_bool stop;

static void
must (bool it_holds)
{
  if (!it_holds)
    abort ();
}

/* Only one thread has an address at a time. */
static void *
take_and_let_go (void *arg)
{
  const unsigned char me = *(const unsigned char *) arg;
  struct log_run mine[50];
  unsigned nr = 0, seed = me;

  for (unsigned i = 0; i < 3000 || nr > 0; ++i) {
    if (i < 3000 && nr < 50 && rand_r (&seed) % 5 > 1) {
      const uint64_t wanted = 1 + (unsigned) rand_r (&seed) % 40;

      if (log_take (&log_, wanted, rand_r (&seed) % 2 ? LOG_TIDY : LOG_ANY,
                    LOG_UNLIMITED, &mine[nr])
          == -1)
        continue;
      for (uint32_t j = 0; j < mine[nr].count; ++j)
        must (atomic_exchange (&owner[mine[nr].first + j], me) == 0);
      nr++;
    }
    else if (nr > 0) {
      const unsigned which = (unsigned) rand_r (&seed) % nr;
      const struct log_run run = mine[which];

      for (uint32_t j = 0; j < run.count; ++j)
        must (atomic_exchange (&owner[run.first + j], 0) == me);
      if (rand_r (&seed) % 4)
        (void) log_wait (&log_, run);
      else
        log_give_back (&log_, run);
      mine[which] = mine[--nr];
    }
  }
  return NULL;
}

static void *
clean_all_the_time (void *arg)
{
  struct log_run run;
  bool punch;

  (void) arg;
  while (!atomic_load (&stop)) {
    log_take_waiting (&log_);
    while (log_next_taken (&log_, PIECE, &run, &punch)) {
      for (uint32_t i = 0; i < run.count; ++i)
        must (atomic_load (&owner[run.first + i]) == 0);
      log_free_taken (&log_, run);
    }
  }
  return NULL;
}

static void
threads (void **state)
{
  static const unsigned char numbers[NR_THREADS] = { 1, 2, 3, 4 };
  pthread_t ids[NR_THREADS], cleaner;

  (void) state;
  log_.end_limit = NR_SHARED;
  stop = false;
  assert_int_equal (pthread_create (&cleaner, NULL, clean_all_the_time, NULL),
                    0);
  for (unsigned i = 0; i < NR_THREADS; ++i)
    assert_int_equal (
      pthread_create (&ids[i], NULL, take_and_let_go, (void *) &numbers[i]),
      0);
  for (unsigned i = 0; i < NR_THREADS; ++i)
    pthread_join (ids[i], NULL);
  stop = true;
  pthread_join (cleaner, NULL);
  clean (NULL);
  expect_counts (0, 0, 0, 0);
}

#define WITH_LOG(test)                                                        \
  cmocka_unit_test_setup_teardown (test, set_up, tear_down)

/* A limit is about what is in use: what waits counts, what is free does not. */
static void
no_more_than_is_allowed (void **state)
{
  struct log_run run;

  (void) state;
  assert_int_equal (log_take (&log_, 8, LOG_TIDY, 10, &run), 0);
  assert_int_equal (run.count, 8);
  assert_int_equal (log_take (&log_, 8, LOG_TIDY, 10, &run), 0);
  assert_int_equal (run.count, 2);
  assert_int_equal (log_take (&log_, 1, LOG_ANY, 10, &run), -1);
  assert_int_equal (errno, EDQUOT);
  expect_counts (10, 0, 0, 0);
  assert_int_equal (log_take (&log_, 1, LOG_ANY, 11, &run), 0);
  (void) log_wait (&log_, run);
  assert_int_equal (log_take (&log_, 1, LOG_ANY, 11, &run), -1);
  assert_int_equal (errno, EDQUOT);
  free_run (3, 2);
  assert_int_equal (log_take (&log_, 4, LOG_ANY, 11, &run), 0);
  assert_int_equal (run.count, 2);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    WITH_LOG (addresses_come_in_order),
    WITH_LOG (head_is_not_given_out),
    WITH_LOG (no_more_than_is_allowed),
    WITH_LOG (long_request_gets_one_row),
    WITH_LOG (free_row_is_used_again),
    WITH_LOG (next_one_is_looked_for_behind_the_last_one),
    WITH_LOG (long_request_uses_whole_chunks),
    WITH_LOG (log_is_twice_as_long),
    WITH_LOG (waiting_ones_make_a_log_long),
    WITH_LOG (any_address),
    WITH_LOG (search_is_bounded),
    WITH_LOG (row_or_nothing),
    WITH_LOG (log_is_as_long_as_can_be),
    WITH_LOG (no_more_addresses_than_fit),
    WITH_LOG (limit_of_the_process),
    WITH_LOG (no_room_for_the_head),
    WITH_LOG (file_grows_ahead),
    WITH_LOG (file_that_does_not_grow),
    WITH_LOG (nothing_is_taken_where_something_fails),
    WITH_LOG (freeing_takes_no_memory),
    WITH_LOG (what_waits_is_not_given_out),
    WITH_LOG (end_moves_back),
    WITH_LOG (given_back_means_punched),
    WITH_LOG (windows_are_punched),
    WITH_LOG (windows_at_both_ends),
    WITH_LOG (what_gets_behind_the_end_is_punched),
    WITH_LOG (large_blocks),
    WITH_LOG (pieces_are_bounded),
    WITH_LOG (small_ones_of_a_log_with_much_free),
    WITH_LOG (random_operations),
    WITH_LOG (threads),
  };

  const char *above = getenv ("TMPDIR");

  snprintf (dir, sizeof dir, "%s/test-log-XXXXXX", above ? above : "/tmp");
  if (!mkdtemp (dir)) {
    perror (dir);
    return 1;
  }
  const int failures = cmocka_run_group_tests_name ("log", tests, NULL, NULL);
  rmdir (dir);
  return failures;
}
