/* SPDX-License-Identifier: BSD-3-Clause */

/* Starting to write a file to its disk while it grows (see writeback.h).
 *
 * sync_file_range waits while the disk's queue is full, so that no request should
 * call it.  What it finds wrong is not lost: the sync at the end tells.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <time.h>

#include "cleanup.h"
#include "writeback.h"

/* Files shorter than this are synced soon enough. */
#define SMALLEST (UINT64_C (32) << 20)

/* Sleep for a second.  Caller holds the lock.  False if the thread is to stop. */
static bool
sleep_a_second (struct writeback *w)
{
  struct timespec until;

  clock_gettime (CLOCK_MONOTONIC, &until);
  until.tv_sec++;
  while (!w->stop
         && pthread_cond_timedwait (&w->stop_changed, &w->lock, &until) == 0)
    ;
  return !w->stop;
}

static void *
write_back (void *pointer)
{
  struct writeback *w = pointer;
  uint64_t written = 0, seen = 0;

  pthread_mutex_lock (&w->lock);
  while (sleep_a_second (w)) {
    const uint64_t end = w->end;

    if (seen > written) {
      pthread_mutex_unlock (&w->lock);
      (void) sync_file_range (w->fd, (off_t) written, (off_t) (seen - written),
                              SYNC_FILE_RANGE_WRITE);
      pthread_mutex_lock (&w->lock);
    }
    written = seen;
    seen = end;
  }
  pthread_mutex_unlock (&w->lock);
  return NULL;
}

void
writeback_init (struct writeback *w)
{
  pthread_condattr_t attr;

  *w = (struct writeback) { .fd = -1 };
  pthread_mutex_init (&w->lock, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&w->stop_changed, &attr);
  pthread_condattr_destroy (&attr);
}

/* Signals are for nbdkit's own threads.  Caller holds the lock. */
static void
start (struct writeback *w, int fd)
{
  sigset_t all, old;

  w->tried = true;
  w->fd = fd;
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &old);
  w->started = pthread_create (&w->thread, NULL, write_back, w) == 0;
  pthread_sigmask (SIG_SETMASK, &old, NULL);
}

void
writeback_grown (struct writeback *w, int fd, uint64_t end)
{
  LOCK_FOR_SCOPE (&w->lock);

  w->end = MAX (w->end, end);
  if (!w->tried && w->end >= SMALLEST)
    start (w, fd);
}

void
writeback_destroy (struct writeback *w)
{
  pthread_mutex_lock (&w->lock);
  w->stop = true;
  pthread_cond_signal (&w->stop_changed);
  pthread_mutex_unlock (&w->lock);
  if (w->started)
    pthread_join (w->thread, NULL);
  pthread_cond_destroy (&w->stop_changed);
  pthread_mutex_destroy (&w->lock);
}
