/* SPDX-License-Identifier: BSD-3-Clause */

/* Noticing that the server is told to stop (see ending.h).
 *
 * nbdkit has its handlers of signals installed when .after_fork is called.  Ours
 * stand in front of them: they wake a thread through an eventfd, and call
 * nbdkit's.  All that they use stays as long as the process: the filter is linked
 * with -z nodelete, and the eventfd is never closed.
 *
 * What is here belongs to the process, as signals do, and so is static.
 */

#include <config.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "cleanup.h"
#include "ending.h"

/* Those that tell nbdkit to stop. */
static const int signals[] = { SIGINT, SIGQUIT, SIGTERM, SIGHUP };
#define NR_SIGNALS (sizeof signals / sizeof signals[0])

/* Set before the handlers are installed, and constant from then on. */
static int event = -1;
static struct sigaction old_actions[NR_SIGNALS];

/* Main thread only. */
static bool watching;
static pthread_t thread;

static void
wake_thread (void)
{
  const uint64_t one = 1;

  while (write (event, &one, sizeof one) == -1 && errno == EINTR)
    ;
}

static void
handle_signal (int number)
{
  const int err = errno;

  wake_thread ();
  for (size_t i = 0; i < NR_SIGNALS; ++i)
    if (signals[i] == number && old_actions[i].sa_handler != SIG_DFL
        && old_actions[i].sa_handler != SIG_IGN)
      old_actions[i].sa_handler (number);
  errno = err;
}

static void *
wait_for_event (void *function)
{
  uint64_t count;

  while (read (event, &count, sizeof count) == -1 && errno == EINTR)
    ;
  (*(void (**) (void)) function) ();
  return NULL;
}

/* Signals are for nbdkit's own threads. */
static int
start_thread (void (**function) (void))
{
  sigset_t all, old;

  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &old);
  const int r = pthread_create (&thread, NULL, wait_for_event, function);
  pthread_sigmask (SIG_SETMASK, &old, NULL);
  return r;
}

static int
install_handlers (void)
{
  for (size_t i = 0; i < NR_SIGNALS; ++i) {
    struct sigaction action;

    if (sigaction (signals[i], NULL, &old_actions[i]) == -1)
      return -1;

    action = old_actions[i];
    action.sa_handler = handle_signal;
    if (sigaction (signals[i], &action, NULL) == -1)
      return -1;
  }
  return 0;
}

int
ending_watch (void (*function) (void))
{
  static void (*to_call) (void);
  int err;

  to_call = function;
  event = eventfd (0, EFD_CLOEXEC);
  if (event == -1)
    return -1;
  err = start_thread (&to_call);
  if (err) {
    errno = err;
    return -1;
  }
  watching = true;
  return install_handlers ();
}

void
ending_finish (void)
{
  if (!watching)
    return;
  wake_thread ();
  pthread_join (thread, NULL);
  watching = false;
}

static void
end_with_failure (void)
{
  _exit (EXIT_FAILURE);
}

void
ending_fail (void)
{
  /* What stands in the buffers of stdio is not lost: nbdkit flushes what it writes,
   * and standard output is closed.
   */
  (void) atexit (end_with_failure);
}
