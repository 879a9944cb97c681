/* SPDX-License-Identifier: BSD-3-Clause */

/* Grace and the cleaner, without requests: the tests count themselves in and out. */

#include <config.h>

#include <dirent.h>
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
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/cleanup.h"
#include "faults.h"
#include "overlay/private.h"

#define BLOCK 4096
#define MIB_BLOCKS 256u /* in a MiB */

static void
must (bool it_holds)
{
  if (!it_holds)
    abort ();
}

static void
sleep_ms (unsigned n)
{
  usleep (n * 1000);
}

static double
seconds (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (double) t.tv_sec + (double) t.tv_nsec / 1e9;
}

/* A call in a thread of its own, and whether it has come back. */
struct call {
  void (*function) (void *arg);
  void *arg;
  pthread_t thread;
  atomic_bool back;
};

static void *
run_call (void *arg)
{
  struct call *call = arg;

  call->function (call->arg);
  atomic_store (&call->back, true);
  return NULL;
}

static void
begin_call (struct call *call, void (*function) (void *arg), void *arg)
{
  call->function = function;
  call->arg = arg;
  atomic_init (&call->back, false);
  must (pthread_create (&call->thread, NULL, run_call, call) == 0);
}

static void
expect_waiting (struct call *call)
{
  sleep_ms (20);
  assert_false (atomic_load (&call->back));
}

static void
expect_back (struct call *call)
{
  pthread_join (call->thread, NULL);
  assert_true (atomic_load (&call->back));
}

/*----------------------------------------------------------------------
 * Grace
 */

static struct grace grace;

static void
do_grace (void *arg)
{
  grace_wait (arg);
}

/* Wait until the one who waits for grace has turned the phase. */
static void
wait_for_turn (const struct grace *g, unsigned old)
{
  while (atomic_load (&g->phase) == old)
    usleep (100);
}

static void
nobody_is_waited_for (void **state)
{
  (void) state;
  grace_init (&grace);
  for (unsigned i = 0; i < 5; ++i) {
    grace_wait (&grace);
    grace_leave (grace_enter (&grace));
  }
}

/* In either phase. */
static void
who_is_under_way_is_waited_for (void **state)
{
  (void) state;
  grace_init (&grace);
  for (unsigned i = 0; i < 4; ++i) {
    const grace_ticket first = grace_enter (&grace),
                       second = grace_enter (&grace);
    struct call call;

    begin_call (&call, do_grace, &grace);
    expect_waiting (&call);
    grace_leave (second);
    expect_waiting (&call);
    grace_leave (first);
    expect_back (&call);
  }
}

static void
who_comes_later_is_not_waited_for (void **state)
{
  (void) state;
  grace_init (&grace);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned phase = atomic_load (&grace.phase);
    const grace_ticket first = grace_enter (&grace);
    struct call call;

    begin_call (&call, do_grace, &grace);
    wait_for_turn (&grace, phase);
    const grace_ticket later = grace_enter (&grace);
    expect_waiting (&call);
    grace_leave (first);
    expect_back (&call);
    grace_leave (later);
  }
}

/* One that has read the phase, and counts itself only after the phase was turned: the next
 * grace has to wait for it.
 */
static void
late_one_is_waited_for (void **state)
{
  (void) state;
  grace_init (&grace);
  for (unsigned i = 0; i < 4; ++i) {
    const grace_ticket late
      = &grace.counts[3 * i].under_way[atomic_load (&grace.phase)];
    struct call call;

    grace_wait (&grace);
    atomic_fetch_add (late, 1);
    begin_call (&call, do_grace, &grace);
    expect_waiting (&call);
    grace_leave (late);
    expect_back (&call);
  }
}

/* What is read may be freed after grace.  The numbers are not atomic, so that the thread
 * sanitizer looks whether one thing happens before the other.
 */
#define NR_READERS 3
#define NR_TURNS 300

static _Atomic (int *) published;
static atomic_bool stop;

static void *
read_published (void *arg)
{
  (void) arg;
  while (!atomic_load (&stop)) {
    const grace_ticket ticket = grace_enter (&grace);
    const int *number
      = atomic_load_explicit (&published, memory_order_acquire);

    must (*number == 1);
    grace_leave (ticket);
  }
  return NULL;
}

static void
readers_find_what_is_there (void **state)
{
  static int numbers[2];
  pthread_t readers[NR_READERS];

  (void) state;
  grace_init (&grace);
  numbers[0] = 1;
  atomic_store (&published, &numbers[0]);
  stop = false;
  for (unsigned i = 0; i < NR_READERS; ++i)
    must (pthread_create (&readers[i], NULL, read_published, NULL) == 0);
  for (unsigned i = 1; i <= NR_TURNS; ++i) {
    numbers[i % 2] = 1;
    atomic_store_explicit (&published, &numbers[i % 2], memory_order_release);
    grace_wait (&grace);
    numbers[(i - 1) % 2] = 0;
  }
  stop = true;
  for (unsigned i = 0; i < NR_READERS; ++i)
    pthread_join (readers[i], NULL);
}

/*----------------------------------------------------------------------
 * The cleaner
 */

static char dir[4096];
static struct cleaner *cleaner;
static struct overlay *o;

static struct overlay *
new_overlay (void)
{
  const struct overlay_options options = {
    .block_size = BLOCK,
    .dir = dir,
    .cleaner = cleaner,
    .fate = OVERLAY_THROWN_AWAY,
  };
  struct overlay *overlay = overlay_new (1 << 20, &options);

  must (overlay != NULL);
  return overlay;
}

static int
set_up (void **state)
{
  (void) state;
  cleaner = cleaner_new ();
  o = new_overlay ();
  return 0;
}

static int
set_up_without_cleaner (void **state)
{
  (void) state;
  cleaner = NULL;
  o = new_overlay ();
  return 0;
}

static int
tear_down (void **state)
{
  (void) state;
  overlay_free (o);
  cleaner_free (cleaner);
  fail_calls_from (0, 0);
  fail_punches = no_threads = false;
  before_punch = NULL;
  return 0;
}

static struct log_run
take_from (struct overlay *overlay, uint64_t count)
{
  struct log_run run;

  must (log_take_row (&overlay->log, count, &run) == 0);
  return run;
}

/* COUNT addresses are taken, and wait then. */
static void
let_wait (struct overlay *overlay, uint64_t count)
{
  must (log_wait (&overlay->log, take_from (overlay, count)));
}

static void
expect_counts (uint64_t owned, uint64_t waiting, uint64_t taken)
{
  const struct log_counts counts = log_count (&o->log);

  assert_int_equal (counts.owned, owned);
  assert_int_equal (counts.waiting, waiting);
  assert_int_equal (counts.taken, taken);
}

static void
wait_until_clean (struct overlay *overlay)
{
  for (;;) {
    const struct log_counts counts = log_count (&overlay->log);

    if (counts.waiting + counts.taken == 0)
      return;
    sleep_ms (1);
  }
}

static void
wait_until_taken (struct overlay *overlay)
{
  while (log_count (&overlay->log).taken == 0)
    usleep (100);
}

static void
wait_until_left (const struct overlay *overlay)
{
  while (!atomic_load (&overlay->cleaning.left))
    usleep (100);
}

static void
do_round (void *arg)
{
  cleaner_round (&((struct overlay *) arg)->cleaning);
}

static void
do_leave (void *arg)
{
  cleaner_leave (&((struct overlay *) arg)->cleaning);
}

/* The threads of this process that catch no signals, those included that have been joined
 * and that the kernel has not done away with yet.
 */
static unsigned
count_deaf_threads (void)
{
  DIR *d = opendir ("/proc/self/task");
  const struct dirent *entry;
  unsigned nr = 0;

  assert_non_null (d);
  while ((entry = readdir (d))) {
    char name[300], line[100];
    unsigned long long blocked = 0;
    FILE *f;

    snprintf (name, sizeof name, "/proc/self/task/%s/status", entry->d_name);
    f = fopen (name, "r");
    if (!f)
      continue;
    while (fgets (line, sizeof line, f))
      if (strncmp (line, "SigBlk:", 7) == 0)
        blocked = strtoull (line + 7, NULL, 16);
    nr += blocked >> (SIGTERM - 1) & blocked >> (SIGCHLD - 1) & 1;
    fclose (f);
  }
  closedir (d);
  return nr;
}

/* How many there are for some time. */
static unsigned
nr_deaf_threads (void)
{
  unsigned nr, same = 0;

  for (nr = count_deaf_threads (); same < 20; sleep_ms (1)) {
    const unsigned now = count_deaf_threads ();

    same = now == nr ? same + 1 : 0;
    nr = now;
  }
  return nr;
}

static void
thread_lives_as_long_as_needed (void **state)
{
  (void) state;
  const unsigned before = nr_deaf_threads ();

  take_from (o, 10);
  assert_int_equal (nr_deaf_threads (), before);
  let_wait (o, 1000);
  cleaner_wake (&o->cleaning);
  assert_int_equal (nr_deaf_threads (), before + 1);
  wait_until_clean (o);
  let_wait (o, 1000);
  cleaner_wake (&o->cleaning);
  wait_until_clean (o);
  assert_int_equal (nr_deaf_threads (), before + 1);
  expect_counts (10, 0, 0);
  assert_int_equal (log_end (&o->log), 11 * BLOCK);

  overlay_free (o);
  cleaner_free (cleaner);
  assert_int_equal (nr_deaf_threads (), before);
  set_up (state);
}

static void
no_memory_for_the_cleaner (void **state)
{
  (void) state;
  fail_calls_from (1, ENOMEM);
  assert_null (cleaner_new ());
  assert_int_equal (call_has_failed (), ENOMEM);
  cleaner_free (NULL);
}

static atomic_uint nr_punches_seen;

static void
look_at_taken (void)
{
  must (log_count (&o->log).taken == 64 * MIB_BLOCKS);
  must (log_count (&o->log).free == 0);
  nr_punches_seen++;
}

/* What is punched is not free yet. */
static void
punched_before_it_is_free (void **state)
{
  (void) state;
  take_from (o, 15);
  nr_punches = nr_punches_seen = 0;
  longest_punch = 0;
  before_punch = look_at_taken;
  let_wait (o, 64 * MIB_BLOCKS);
  take_from (o, 1);
  cleaner_round (&o->cleaning);
  assert_int_equal (nr_punches_seen, 1);
  assert_int_equal (nr_punches, 4);
  assert_int_equal (longest_punch, 16 << 20);
  expect_counts (16, 0, 0);

  /* Where nothing can be punched, it is free all the same. */
  fail_punches = true;
  let_wait (o, 64 * MIB_BLOCKS);
  cleaner_round (&o->cleaning);
  expect_counts (16, 0, 0);
}

/* All that waited is free after it.  Whoever asks for one does not wait for the pause. */
static void
rounds (void **state)
{
  double shortest = 1;

  (void) state;
  for (unsigned i = 0; i < 300; ++i) {
    const double start = seconds ();

    let_wait (o, 1 + i % 50);
    if (i % 2)
      cleaner_wake (&o->cleaning);
    cleaner_round (&o->cleaning);
    expect_counts (0, 0, 0);
    if (i > 0)
      shortest = MIN (shortest, seconds () - start);
  }
  assert_true (shortest < 0.008);
  cleaner_round (&o->cleaning); /* nothing to do */
}

/* Not each request makes a round. */
static void
frees_come_together (void **state)
{
  const double start = seconds ();

  (void) state;
  do {
    if (log_wait (&o->log, take_from (o, 1)))
      cleaner_wake (&o->cleaning);
    usleep (200);
  } while (seconds () - start < 0.2);
  cleaner_round (&o->cleaning);
  cleaner_leave (&o->cleaning);
  assert_true (o->cleaning.done >= 1);
  assert_true ((double) o->cleaning.done <= 3 + (seconds () - start) / 0.01);
}

static void
round_waits_for_who_is_under_way (void **state)
{
  struct call call;

  (void) state;
  const grace_ticket ticket = grace_enter (&o->grace);
  let_wait (o, 1000);
  begin_call (&call, do_round, o);
  wait_until_taken (o);
  expect_waiting (&call);
  expect_counts (0, 0, 1000);
  grace_leave (ticket);
  expect_back (&call);
  expect_counts (0, 0, 0);
}

/* One that has begun already does not do: it has not taken what waits now. */
static void
round_begins_after_it_was_asked_for (void **state)
{
  struct call call;

  (void) state;
  const grace_ticket ticket = grace_enter (&o->grace);
  let_wait (o, 1000);
  cleaner_wake (&o->cleaning);
  wait_until_taken (o);
  let_wait (o, 500);
  begin_call (&call, do_round, o);
  expect_waiting (&call);
  expect_counts (0, 500, 1000);
  grace_leave (ticket);
  expect_back (&call);
  expect_counts (0, 0, 0);
}

/* While what waits is taken, in several steps, something begins to wait behind them, and is
 * not the first.
 */
static void
wait_behind (void *arg)
{
  must (!log_wait (&o->log, *(const struct log_run *) arg));
}

static void
interrupt_taking (void *arg)
{
  struct call call;

  begin_call (&call, wait_behind, arg);
  pthread_join (call.thread, NULL);
}

static void
what_waits_meanwhile_is_not_forgotten (void **state)
{
  struct log_run early = take_from (o, 1);

  (void) state;
  take_from (o, 20000 * MIB_BLOCKS);
  let_wait (o, 1);
  /* In front of the third lock: that of the round, and twice that of the log. */
  interrupt_mutex (3, interrupt_taking, &early);
  overlay_clean (o);
  assert_true (call_was_interrupted ());
  wait_until_clean (o);
  expect_counts (20000 * MIB_BLOCKS, 0, 0);
}

static void
no_cleaner (void **state)
{
  (void) state;
  let_wait (o, 1000);
  cleaner_wake (&o->cleaning);
  expect_counts (0, 1000, 0);
  cleaner_round (&o->cleaning);
  expect_counts (0, 0, 0);
  let_wait (o, 10);
  overlay_clean (o);
  expect_counts (0, 0, 0);
  let_wait (o, 10);
  cleaner_leave (&o->cleaning);
  cleaner_round (&o->cleaning);
  overlay_clean (o);
  expect_counts (0, 10, 0);
}

/* Whoever asks for a round does it, and one at a time. */
static void
no_thread (void **state)
{
  struct call calls[3];

  (void) state;
  no_threads = true;
  let_wait (o, 1000);
  cleaner_wake (&o->cleaning);
  cleaner_round (&o->cleaning);
  expect_counts (0, 0, 0);

  no_threads = false; /* for the calls; they find none again */
  const grace_ticket ticket = grace_enter (&o->grace);
  let_wait (o, 1000);
  for (unsigned i = 0; i < 3; ++i)
    begin_call (&calls[i], (void (*) (void *)) overlay_clean, o);
  wait_until_taken (o);
  expect_waiting (&calls[0]);
  let_wait (o, 10);
  expect_waiting (&calls[1]);
  expect_waiting (&calls[2]);
  expect_counts (0, 10, 1000);
  grace_leave (ticket);
  for (unsigned i = 0; i < 3; ++i)
    expect_back (&calls[i]);
  expect_counts (0, 0, 0);

  /* Now there is one. */
  let_wait (o, 1000);
  cleaner_wake (&o->cleaning);
  wait_until_clean (o);
}

/* Leaving waits for who is in a round, and that frees nothing more. */
static void
leave_in_grace (void **state, bool by_hand)
{
  struct call round, leave;

  (void) state;
  const grace_ticket ticket = grace_enter (&o->grace);
  let_wait (o, 1000);
  if (by_hand)
    begin_call (&round, (void (*) (void *)) overlay_clean, o);
  else
    begin_call (&round, do_round, o);
  wait_until_taken (o);
  begin_call (&leave, do_leave, o);
  wait_until_left (o);
  expect_waiting (&leave);
  grace_leave (ticket);
  expect_back (&leave);
  expect_counts (0, 0, 1000);
  expect_back (&round);

  /* Nothing happens any more. */
  let_wait (o, 10);
  cleaner_wake (&o->cleaning);
  cleaner_round (&o->cleaning);
  overlay_clean (o);
  sleep_ms (20);
  expect_counts (0, 10, 1000);
  cleaner_leave (&o->cleaning);
}

static void
overlay_leaves_in_grace (void **state)
{
  leave_in_grace (state, false);
}

static void
overlay_leaves_a_round_by_hand (void **state)
{
  leave_in_grace (state, true);
}

/* Who waits for a round that will not be is not left alone. */
static void
overlay_leaves_while_others_are_cleaned (void **state)
{
  struct overlay *other = new_overlay ();
  struct call round;

  (void) state;
  const grace_ticket ticket = grace_enter (&other->grace);
  let_wait (other, 10);
  cleaner_wake (&other->cleaning);
  wait_until_taken (other);
  let_wait (o, 1000);
  begin_call (&round, do_round, o);
  expect_waiting (&round);
  cleaner_leave (&o->cleaning);
  expect_back (&round);
  expect_counts (0, 1000, 0);
  grace_leave (ticket);
  overlay_free (other);
}

static struct call leaving;
static atomic_bool left_in_the_piece;

static void
leave_in_the_piece (void)
{
  begin_call (&leaving, do_leave, o);
  wait_until_left (o);
  sleep_ms (10);
  left_in_the_piece = atomic_load (&leaving.back);
}

/* The piece in hand is freed, the others are not. */
static void
overlay_leaves_in_a_piece (void **state)
{
  (void) state;
  left_in_the_piece = true;
  take_from (o, 15);
  let_wait (o, 64 * MIB_BLOCKS);
  take_from (o, 1);
  before_punch = leave_in_the_piece;
  cleaner_wake (&o->cleaning);
  while (log_count (&o->log).free == 0)
    usleep (100);
  expect_back (&leaving);
  assert_false (left_in_the_piece);
  expect_counts (16, 0, 48 * MIB_BLOCKS);
  sleep_ms (20);
  expect_counts (16, 0, 48 * MIB_BLOCKS);
}

/* In the queue, at work, or in the pause: whatever comes. */
static void
overlays_leave_at_any_time (void **state)
{
  struct overlay *all[5];
  unsigned seed = 1;

  (void) state;
  for (unsigned n = 0; n < 60; ++n) {
    for (unsigned i = 0; i < 5; ++i) {
      all[i] = new_overlay ();
      let_wait (all[i], 300);
      cleaner_wake (&all[i]->cleaning);
    }
    if (n % 3 == 0)
      cleaner_round (&all[(unsigned) rand_r (&seed) % 5]->cleaning);
    usleep ((unsigned) rand_r (&seed) % 300);
    for (unsigned i = 0; i < 5; ++i)
      overlay_free (all[(i + n) % 5]);
  }
}

/* They do not wait for each other's pauses: those would be three seconds.  Returns how long
 * it took.
 */
static double
clean_many (void)
{
  static struct overlay *all[300];
  const double start = seconds ();

  for (unsigned i = 0; i < 300; ++i) {
    all[i] = new_overlay ();
    let_wait (all[i], 300);
    cleaner_wake (&all[i]->cleaning);
  }
  for (unsigned i = 0; i < 300; ++i)
    wait_until_clean (all[i]);
  const double end = seconds ();
  for (unsigned i = 0; i < 300; ++i)
    overlay_free (all[i]);
  return end - start;
}

static void
many_overlays (void **state)
{
  double shortest = clean_many ();

  (void) state;
  /* (The machine may be busy with something else.) */
  for (unsigned i = 0; i < 9 && shortest > 2.5; ++i)
    shortest = MIN (shortest, clean_many ());
  assert_true (shortest < 2.5);
}

/*----------------------------------------------------------------------
 * All of it: blocks that move all the time
 */

#define NR_BLOCKS 24
#define NR_WRITERS 2
#define NR_MOVES 3000
#define MAX_ADDRESS 4000

/* What the file has: the number of the block.  Not atomic, as above. */
static unsigned bytes[MAX_ADDRESS];
static _Atomic uint32_t where[NR_BLOCKS];

static void
write_fresh (unsigned block, uint32_t address)
{
  must (address < MAX_ADDRESS);
  bytes[address] = block + 1;
  atomic_store_explicit (&where[block], address, memory_order_release);
}

static void *
move_blocks (void *arg)
{
  const unsigned me = *(const unsigned *) arg;
  unsigned seed = me;

  for (unsigned i = 0; i < NR_MOVES; ++i) {
    const unsigned block
      = me
        + NR_WRITERS * ((unsigned) rand_r (&seed) % (NR_BLOCKS / NR_WRITERS));
    struct log_run run;

    while (
      log_take (&o->log, 1, i % 2 ? LOG_ANY : LOG_TIDY, LOG_UNLIMITED, &run)
      == -1) {
      must (errno == EFBIG);
      cleaner_round (&o->cleaning);
    }
    const grace_ticket ticket = grace_enter (&o->grace);
    const uint32_t old = atomic_load (&where[block]);

    write_fresh (block, run.first);
    const bool tell = log_wait (&o->log, (struct log_run) { old, 1 });
    grace_leave (ticket);
    if (tell)
      cleaner_wake (&o->cleaning);
  }
  return NULL;
}

static void *
read_blocks (void *arg)
{
  unsigned seed = *(const unsigned *) arg;

  while (!atomic_load (&stop)) {
    const unsigned block = (unsigned) rand_r (&seed) % NR_BLOCKS;
    const grace_ticket ticket = grace_enter (&o->grace);
    const uint32_t address
      = atomic_load_explicit (&where[block], memory_order_acquire);

    must (bytes[address] == block + 1);
    grace_leave (ticket);
  }
  return NULL;
}

static void
blocks_move (void **state)
{
  static const unsigned numbers[] = { 0, 1, 2, 3 };
  pthread_t writers[NR_WRITERS], readers[NR_READERS];

  (void) state;
  o->log.end_limit = 200;
  for (unsigned i = 0; i < NR_BLOCKS; ++i)
    write_fresh (i, take_from (o, 1).first);
  stop = false;
  for (unsigned i = 0; i < NR_READERS; ++i)
    must (pthread_create (&readers[i], NULL, read_blocks, (void *) &numbers[i])
          == 0);
  for (unsigned i = 0; i < NR_WRITERS; ++i)
    must (pthread_create (&writers[i], NULL, move_blocks, (void *) &numbers[i])
          == 0);
  for (unsigned i = 0; i < NR_WRITERS; ++i)
    pthread_join (writers[i], NULL);
  stop = true;
  for (unsigned i = 0; i < NR_READERS; ++i)
    pthread_join (readers[i], NULL);
  cleaner_round (&o->cleaning);
  expect_counts (NR_BLOCKS, 0, 0);
}

#define WITH_CLEANER(test)                                                    \
  cmocka_unit_test_setup_teardown (test, set_up, tear_down)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (nobody_is_waited_for),
    cmocka_unit_test (who_is_under_way_is_waited_for),
    cmocka_unit_test (who_comes_later_is_not_waited_for),
    cmocka_unit_test (late_one_is_waited_for),
    cmocka_unit_test (readers_find_what_is_there),
    WITH_CLEANER (thread_lives_as_long_as_needed),
    WITH_CLEANER (no_memory_for_the_cleaner),
    WITH_CLEANER (punched_before_it_is_free),
    WITH_CLEANER (rounds),
    WITH_CLEANER (frees_come_together),
    WITH_CLEANER (round_waits_for_who_is_under_way),
    WITH_CLEANER (round_begins_after_it_was_asked_for),
    WITH_CLEANER (what_waits_meanwhile_is_not_forgotten),
    cmocka_unit_test_setup_teardown (no_cleaner, set_up_without_cleaner,
                                     tear_down),
    WITH_CLEANER (no_thread),
    WITH_CLEANER (overlay_leaves_in_grace),
    WITH_CLEANER (overlay_leaves_a_round_by_hand),
    WITH_CLEANER (overlay_leaves_while_others_are_cleaned),
    WITH_CLEANER (overlay_leaves_in_a_piece),
    WITH_CLEANER (overlays_leave_at_any_time),
    WITH_CLEANER (many_overlays),
    WITH_CLEANER (blocks_move),
  };

  const char *above = getenv ("TMPDIR");

  snprintf (dir, sizeof dir, "%s/test-cleaner-XXXXXX", above ? above : "/tmp");
  if (!mkdtemp (dir)) {
    perror (dir);
    return 1;
  }
  const int failures
    = cmocka_run_group_tests_name ("cleaner", tests, NULL, NULL);
  rmdir (dir);
  return failures;
}
