/* SPDX-License-Identifier: BSD-3-Clause */

/* What a build with --enable-debug knows of locks: that what is right passes, and that
 * each thing that is wrong ends the process.
 */

#include <config.h>

#undef COW_DEBUG
#define COW_DEBUG 1

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

/* Compiled here, as such a build has it. */
#include "common/lock.c" /* NOLINT(bugprone-suspicious-include) */

static struct mutex release, slots[2], store, set;
static struct rwlock request;

static int
set_up (void **state)
{
  (void) state;
  mutex_init (&set, RANK_SET);
  mutex_init (&release, RANK_RELEASE);
  mutex_init (&slots[0], RANK_SLOT);
  mutex_init (&slots[1], RANK_SLOT);
  mutex_init (&store, RANK_STORE);
  rwlock_init (&request, RANK_REQUEST);
  return 0;
}

/* What FUNCTION says when it ends its process; "" if it does not. */
static const char *
last_words (void (*function) (void))
{
  static char words[256];
  int pipes[2], status;
  size_t count = 0;
  ssize_t n;

  assert_int_equal (pipe (pipes), 0);
  const pid_t child = fork ();
  if (child == 0) {
    (void) setrlimit (RLIMIT_CORE, &(struct rlimit) { .rlim_cur = 0 });
    (void) signal (SIGABRT, SIG_DFL);
    (void) dup2 (pipes[1], STDERR_FILENO);
    function ();
    _exit (0);
  }
  close (pipes[1]);
  while ((n = read (pipes[0], words + count, sizeof words - 1 - count)) > 0)
    count += (size_t) n;
  words[count] = '\0';
  close (pipes[0]);
  assert_int_equal (waitpid (child, &status, 0), child);
  if (count == 0)
    assert_int_equal (status, 0);
  else
    assert_true (WIFSIGNALED (status) && WTERMSIG (status) == SIGABRT);
  return words;
}

static void
in_order (void)
{
  HOLD (&release);
  HOLD (&slots[0]);
  HOLD (&slots[1]);
  {
    HOLD_SHARED (&request);
    HOLD (&store);
    assert_held (&release);
    assert_held (&slots[1]);
    assert_held (&request);
    assert_held_exclusively (&store);
    assert_either_held (&set, &request);
  }
  HOLD_EXCLUSIVE (&request);
  assert_held_exclusively (&request);
  assert_none_held_from (RANK_VIEW);
}

static void
let_go_in_any_order (void)
{
  mutex_lock (&slots[0]);
  rwlock_lock_shared (&request);
  mutex_lock (&store);
  mutex_unlock (&slots[0]);
  assert_held (&request);
  mutex_unlock (&store);
  assert_held (&request);
  rwlock_unlock (&request);
  assert_none_held_from (RANK_SET);
  in_order ();
}

static void
what_is_right_passes (void **state)
{
  (void) state;
  assert_string_equal (last_words (in_order), "");
  assert_string_equal (last_words (let_go_in_any_order), "");
}

static void
not_held (void)
{
  HOLD (&slots[0]);
  assert_held (&slots[1]);
}

static void
let_go_before (void)
{
  {
    HOLD_SHARED (&request);
  }
  assert_held (&request);
}

static void *
look_in_another_thread (void *arg)
{
  assert_held (&request);
  return arg;
}

static void
held_by_another_thread (void)
{
  pthread_t thread;

  HOLD_SHARED (&request);
  (void) pthread_create (&thread, NULL, look_in_another_thread, NULL);
  (void) pthread_join (thread, NULL);
}

static void
held_only_shared (void)
{
  HOLD_SHARED (&request);
  assert_held_exclusively (&request);
}

static void
neither_held (void)
{
  HOLD (&store);
  assert_either_held (&release, &request);
}

static void
held_though_none_may_be (void)
{
  HOLD (&slots[0]);
  assert_none_held_from (RANK_RELEASE);
}

static void
slot_lock_under_the_request_lock (void)
{
  HOLD_SHARED (&request);
  HOLD (&slots[0]);
}

static void
slot_locks_in_descending_order (void)
{
  HOLD (&slots[1]);
  HOLD (&slots[0]);
}

static void
taken_twice (void)
{
  HOLD_SHARED (&request);
  HOLD_SHARED (&request);
}

static void
taken_under_the_set (void)
{
  HOLD (&set);
  HOLD (&store);
}

static void
let_go_twice (void)
{
  mutex_lock (&store);
  mutex_unlock (&store);
  mutex_unlock (&store);
}

static void
what_is_wrong_ends_the_process (void **state)
{
  static const struct {
    void (*function) (void);
    const char *words;
  } wrong[] = {
    { not_held, "a lock is not held\n" },
    { let_go_before, "a lock is not held\n" },
    { held_by_another_thread, "a lock is not held\n" },
    { held_only_shared, "a lock is not held exclusively\n" },
    { neither_held, "neither lock is held\n" },
    { held_though_none_may_be, "a slot lock is held\n" },
    { slot_lock_under_the_request_lock,
      "a slot lock is taken while the request lock is held\n" },
    { slot_locks_in_descending_order,
      "a slot lock is taken while a slot lock is held\n" },
    { taken_twice,
      "the request lock is taken while the request lock is held\n" },
    { taken_under_the_set,
      "the store's lock is taken while the set's lock is held\n" },
    { let_go_twice, "one is let go that this thread does not hold\n" },
  };

  (void) state;
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
    const char *words = last_words (wrong[i].function);

    if (!strstr (words, wrong[i].words))
      fail_msg ("expected \"%s\", got \"%s\"", wrong[i].words, words);
  }
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (what_is_right_passes),
    cmocka_unit_test (what_is_wrong_ends_the_process),
  };

  return cmocka_run_group_tests (tests, set_up, NULL);
}
