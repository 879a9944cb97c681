/* SPDX-License-Identifier: BSD-3-Clause */

/* Starting to write a file to its disk while it grows (see writeback.h).
 *
 * sync_file_range waits while the disk's queue is full, so that no request should
 * call it.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/lock.h"
#include "overlay/writeback.h"

/* What is synced soon enough. */
#define LITTLE (UINT64_C (32) << 20)

/* As much is asked for at once: who ends the thread waits for no more than that. */
#define STEP (UINT64_C (16) << 20)

/* May the call itself be what is wrong?  Not every sandbox knows it. */
static bool
may_be_refused (int err)
{
  return err == ENOSYS || err == EINVAL || err == ESPIPE || err == EPERM;
}

/* Has the thread's call lost bytes?  After the others they are written later, and the
 * sync tells how that went.
 */
static bool
is_loss (int err)
{
  return err && err != ENOMEM && err != EAGAIN && err != EINTR
         && !may_be_refused (err);
}

/* Sleep for a second.  Caller holds the lock. */
static void
sleep_a_second (struct writeback *w)
{
  const struct timespec until = clock_after (1000000000);

  assert_held (&w->lock);
  while (!w->stop
         && pthread_cond_timedwait (&w->stopped, &w->lock.pthread, &until)
              == 0)
    ;
}

/* Ask for the bytes from w->asked on, as far as END.  Caller holds the lock, which is let
 * go meanwhile.
 */
static void
ask (struct writeback *w, uint64_t end)
{
  while (!w->stop && w->asked < end) {
    const uint64_t start = w->asked, count = MIN (STEP, end - start);

    w->asked += count;
    mutex_unlock (&w->lock);
    const int r = sync_file_range (w->fd, (off_t) start, (off_t) count,
                                   SYNC_FILE_RANGE_WRITE);
    const int err = r == -1 ? errno : 0;
    mutex_lock (&w->lock);
    if (is_loss (err))
      w->error = err;
  }
}

static void *
write_back (void *pointer)
{
  struct writeback *w = pointer;

  mutex_lock (&w->lock);
  while (!w->stop && w->end > w->asked) {
    const uint64_t end = w->end;

    sleep_a_second (w);
    ask (w, end);
  }
  w->running = false;
  mutex_unlock (&w->lock);
  return NULL;
}

void
writeback_init (struct writeback *w)
{
  pthread_condattr_t attr;

  *w = (struct writeback) { .fd = -1 };
  mutex_init (&w->lock, RANK_WRITE_BACK);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&w->stopped, &attr);
  pthread_condattr_destroy (&attr);
}

/* Signals are for nbdkit's own threads.  Caller holds the lock, which a thread that is
 * not running any more does not take again.
 */
static void
start (struct writeback *w)
{
  sigset_t all, old;

  assert_held (&w->lock);
  if (w->to_join)
    pthread_join (w->thread, NULL);
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &old);
  w->running = w->to_join
    = pthread_create (&w->thread, NULL, write_back, w) == 0;
  pthread_sigmask (SIG_SETMASK, &old, NULL);
  if (!w->running)
    w->asked = w->end; /* not tried again with the next request */
}

void
writeback_grown (struct writeback *w, int fd, uint64_t end)
{
  HOLD (&w->lock);

  if (end <= w->end)
    return;
  w->fd = fd;
  w->end = end;
  if (!w->running && !w->stop && end - w->asked >= LITTLE)
    start (w);
}

int
writeback_end (struct writeback *w)
{
  mutex_lock (&w->lock);
  w->stop = true; /* from here on, start is not called any more */
  pthread_cond_signal (&w->stopped);
  mutex_unlock (&w->lock);
  if (w->to_join)
    pthread_join (w->thread, NULL);
  w->to_join = false;
  errno = w->error;
  return w->error ? -1 : 0;
}

/* Wait until what the kernel is writing of FD is written.  0 or an errno value: any
 * that a file system has noted, but that once only.
 */
static int
wait_for_kernel (int fd)
{
  while (sync_file_range (fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE) == -1)
    if (errno != EINTR)
      return errno;
  return 0;
}

int
writeback_check (struct writeback *w, int fd)
{
  if (writeback_end (w) == -1)
    return -1;

  const int err = wait_for_kernel (fd);
  /* Whoever refuses the call does that each time. */
  if (may_be_refused (err) && wait_for_kernel (fd) == err)
    return fsync (fd);
  errno = err;
  return err ? -1 : 0;
}

void
writeback_destroy (struct writeback *w)
{
  (void) writeback_end (w);
  pthread_cond_destroy (&w->stopped);
  mutex_destroy (&w->lock);
}
