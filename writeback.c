/* SPDX-License-Identifier: BSD-3-Clause */

/* Starting to write a file to its disk while it grows (see writeback.h).
 *
 * sync_file_range waits while the disk's queue is full, so that no request should
 * call it.  What it finds wrong is not lost: the sync at the end tells.
 */

#include <config.h>

#include <fcntl.h>
#include <signal.h>
#include <time.h>

#include "cleanup.h"
#include "writeback.h"

/* Files shorter than this are synced soon enough. */
#define SMALLEST (UINT64_C (32) << 20)

/* All that the thread needs. */
#define STACK_SIZE (64 << 10)

/* Sleep for a second.  Caller holds the lock. */
static void
sleep_a_second (struct writeback *w)
{
  struct timespec until;

  clock_gettime (CLOCK_MONOTONIC, &until);
  until.tv_sec++;
  while (!w->stop
         && pthread_cond_timedwait (&w->changed, &w->lock, &until) == 0)
    ;
}

static void *
write_back (void *pointer)
{
  struct writeback *w = pointer;
  uint64_t written = 0;

  pthread_mutex_lock (&w->lock);
  for (;;) {
    const uint64_t end = w->end;

    sleep_a_second (w);
    if (w->stop)
      break;
    pthread_mutex_unlock (&w->lock);
    (void) sync_file_range (w->fd, (off_t) written, (off_t) (end - written),
                            SYNC_FILE_RANGE_WRITE);
    pthread_mutex_lock (&w->lock);
    written = end;

    w->idle = true;
    while (w->end == written && !w->stop)
      pthread_cond_wait (&w->changed, &w->lock);
    w->idle = false;
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
  pthread_cond_init (&w->changed, &attr);
  pthread_condattr_destroy (&attr);
}

/* Signals are for nbdkit's own threads.  Caller holds the lock. */
static void
start (struct writeback *w, int fd)
{
  pthread_attr_t attr;
  sigset_t all, old;

  w->tried = true;
  w->fd = fd;
  if (pthread_attr_init (&attr) != 0)
    return;
  pthread_attr_setstacksize (&attr, STACK_SIZE);
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &old);
  w->started = pthread_create (&w->thread, &attr, write_back, w) == 0;
  pthread_sigmask (SIG_SETMASK, &old, NULL);
  pthread_attr_destroy (&attr);
}

void
writeback_grown (struct writeback *w, int fd, uint64_t end)
{
  LOCK_FOR_SCOPE (&w->lock);

  if (end <= w->end)
    return;
  w->end = end;
  if (w->idle)
    pthread_cond_signal (&w->changed);
  if (!w->tried && end >= SMALLEST)
    start (w, fd);
}

void
writeback_destroy (struct writeback *w)
{
  pthread_mutex_lock (&w->lock);
  w->stop = true;
  pthread_cond_signal (&w->changed);
  pthread_mutex_unlock (&w->lock);
  if (w->started)
    pthread_join (w->thread, NULL);
  pthread_cond_destroy (&w->changed);
  pthread_mutex_destroy (&w->lock);
}
