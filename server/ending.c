/* SPDX-License-Identifier: BSD-3-Clause */

/* Noticing that the server is told to stop (see ending.h).
 *
 * nbdkit has its handlers of signals installed when .after_fork is called.  Ours
 * stand in front of them: they wake a thread through an eventfd, and call
 * nbdkit's.  All that they use stays as long as the process: the filter is linked
 * with -z nodelete, and the eventfds are never closed.
 *
 * nbdkit may also end itself by abort: 1.32 does when a client is killed that waits
 * for several answers, of which other threads are sending some.  The memory is sound
 * then, so the handler of SIGABRT lets the thread do its work before it goes on.  It
 * does not wait for ever, as what aborts may hold a lock.
 *
 * What is here belongs to the process, as signals do, and so is static.
 */

#include <config.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "server/ending.h"

/* Those that tell nbdkit to stop. */
static const int signals[] = { SIGINT, SIGQUIT, SIGTERM, SIGHUP };
#define NR_SIGNALS (sizeof signals / sizeof signals[0])

/* Set before the handlers are installed, and constant from then on. */
static int event = -1;
static int done_event = -1; /* can be read when the thread has done its work */
static pid_t process;       /* not a child that a plugin has forked */
static struct sigaction old_actions[NR_SIGNALS], old_on_abort;

/* Main thread only. */
static bool watching;
static pthread_t thread;

/* How long an abort waits. */
#define ABORT_MILLISECONDS (5 * 60 * 1000)

static void
signal_event (int fd)
{
  const uint64_t one = 1;

  while (write (fd, &one, sizeof one) == -1 && errno == EINTR)
    ;
}

static void
handle_signal (int number)
{
  const int err = errno;

  if (getpid () == process)
    signal_event (event);
  for (size_t i = 0; i < NR_SIGNALS; ++i)
    if (signals[i] == number && old_actions[i].sa_handler != SIG_DFL
        && old_actions[i].sa_handler != SIG_IGN)
      old_actions[i].sa_handler (number);
  errno = err;
}

static void
handle_abort (int number)
{
  struct pollfd done = { .fd = done_event, .events = POLLIN };

  if (getpid () == process && !pthread_equal (pthread_self (), thread)) {
    signal_event (event);
    while (poll (&done, 1, ABORT_MILLISECONDS) == -1 && errno == EINTR)
      ;
  }
  /* The signal may have come from outside. */
  sigaction (number, &old_on_abort, NULL);
  (void) raise (number);
}

static void *
wait_for_event (void *function)
{
  uint64_t count;

  while (read (event, &count, sizeof count) == -1 && errno == EINTR)
    ;
  (*(void (**) (void)) function) ();
  signal_event (done_event);
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
  struct sigaction on_abort = { .sa_handler = handle_abort };

  for (size_t i = 0; i < NR_SIGNALS; ++i) {
    struct sigaction action;

    if (sigaction (signals[i], NULL, &old_actions[i]) == -1)
      return -1;

    action = old_actions[i];
    action.sa_handler = handle_signal;
    if (sigaction (signals[i], &action, NULL) == -1)
      return -1;
  }
  return sigaction (SIGABRT, &on_abort, &old_on_abort);
}

int
ending_watch (void (*function) (void))
{
  static void (*to_call) (void);
  int err;

  to_call = function;
  process = getpid ();
  event = eventfd (0, EFD_CLOEXEC);
  done_event = eventfd (0, EFD_CLOEXEC);
  if (event == -1 || done_event == -1)
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
  signal_event (event);
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
