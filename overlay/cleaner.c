/* SPDX-License-Identifier: BSD-3-Clause */

/* The cleaner (see cleaner.h).
 *
 * An overlay is in the queue at most once.  The thread takes the first one out, and is at
 * work on it (busy) until its round is done; it does not hold the cleaner's lock then, and
 * the overlay stays, as overlay_free calls cleaner_leave, which waits for that.  A round
 * that begins after somebody has asked for one is what that one waits for.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "common/debug.h"
#include "common/lock.h"
#include "overlay/cleaner.h"
#include "overlay/store.h"

/* As much is punched at once: others who use the file wait in the kernel meanwhile.  After
 * so long (or one piece that takes longer) they get their turn.
 */
#define PIECE_BYTES (UINT64_C (16) << 20)
#define PIECES_NS INT64_C (1000000)

/* Between two rounds of an overlay, so that not every request makes one. */
#define PAUSE_NS 10000000

struct cleaner {
  struct mutex lock; /* guards what follows, and each struct cleaning */
  pthread_cond_t
    work; /* for the thread: something is queued, or it is to end */
  pthread_cond_t
    changed; /* for others: a round is done, or an overlay is let go */
  struct cleaning *first, *last; /* the queue, */
  size_t nr_queued;              /* and how many are in it */
  unsigned urgent;               /* how many wait for a round */
  bool running, end;
  pthread_t thread;
};

struct cleaner *
cleaner_new (void)
{
  struct cleaner *c = calloc (1, sizeof *c);
  pthread_condattr_t attr;

  if (!c)
    return NULL;
  mutex_init (&c->lock, RANK_CLEANER);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&c->work, &attr);
  pthread_cond_init (&c->changed, &attr);
  pthread_condattr_destroy (&attr);
  return c;
}

void
cleaner_free (struct cleaner *c)
{
  if (!c)
    return;
  mutex_lock (&c->lock);
  c->end = true;
  pthread_cond_signal (&c->work);
  mutex_unlock (&c->lock);
  if (c->running)
    pthread_join (c->thread, NULL);
  pthread_cond_destroy (&c->changed);
  pthread_cond_destroy (&c->work);
  mutex_destroy (&c->lock);
  free (c);
}

void
cleaning_init (struct cleaning *cleaning, struct cleaner *cleaner,
               struct log *log, struct grace *grace)
{
  *cleaning
    = (struct cleaning) { .cleaner = cleaner, .log = log, .grace = grace };
  atomic_init (&cleaning->left, false);
  mutex_init (&cleaning->round, RANK_ROUND);
}

void
cleaning_destroy (struct cleaning *cleaning)
{
  mutex_destroy (&cleaning->round);
}

static bool
has_left (const struct cleaning *g)
{
  return atomic_load (&g->left);
}

/* Nothing of this needs another lock of the overlay: what is taken, nobody else uses.
 *
 * Rule 6: what waits was let go of by maps before it was taken.  A request that may have
 * found it was counted in before that, and grace waits for it.
 */
void
cleaning_round (struct cleaning *g)
{
  struct log_run run;
  bool punch;

  assert_none_held_from (RANK_RELEASE);
  HOLD (&g->round);

  if (has_left (g) || !log_take_waiting (g->log))
    return;
  grace_wait (g->grace);

  int64_t since = clock_now ();

  while (!has_left (g) && log_next_taken (g->log, PIECE_BYTES, &run, &punch)) {
    if (punch) {
      VERBOSE ("punching %" PRIu64 " bytes",
               (uint64_t) run.count << g->log->block_shift);
      store_punch (g->log->store, log_offset (g->log, run.first),
                   (uint64_t) run.count << g->log->block_shift);
    }
    log_free_taken (g->log, run);
    /* Whoever waits for the file's lock in the kernel gets it now; without a pause, only
     * after some milliseconds.
     */
    if (punch && clock_now () - since >= PIECES_NS) {
      usleep (1);
      since = clock_now ();
    }
  }

  /* What came to wait before the last of the others was taken has told nobody. */
  if (log_has_waiting (g->log))
    cleaner_wake (g);
}

/* Caller holds the lock. */
static void
enqueue (struct cleaner *c, struct cleaning *g)
{
  assert_held (&c->lock);
  if (g->queued || has_left (g))
    return;
  g->queued = true;
  g->next = NULL;
  if (c->last)
    c->last->next = g;
  else
    c->first = g;
  c->last = g;
  c->nr_queued++;
  pthread_cond_signal (&c->work);
}

/* Caller holds the lock, and it is queued. */
static void
dequeue (struct cleaner *c, struct cleaning *g)
{
  struct cleaning **link = &c->first, *before = NULL;

  assert_held (&c->lock);
  while (*link != g) {
    before = *link;
    link = &before->next;
  }
  *link = g->next;
  if (c->last == g)
    c->last = before;
  c->nr_queued--;
  g->queued = false;
}

/* A round of the overlay that is first in the queue.  Caller holds the lock, which is let
 * go meanwhile.
 */
static void
do_round (struct cleaner *c)
{
  struct cleaning *g = c->first;

  dequeue (c, g);
  g->busy = true;
  g->begun++;
  mutex_unlock (&c->lock);
  cleaning_round (g);
  mutex_lock (&c->lock);
  g->busy = false;
  g->done = g->begun;
  pthread_cond_broadcast (&c->changed);
}

/* Let some more come together.  Caller holds the lock. */
static void
pause_for_more (struct cleaner *c)
{
  const struct timespec until = clock_after (PAUSE_NS);

  while (!c->end && c->urgent == 0
         && pthread_cond_timedwait (&c->work, &c->lock.pthread, &until)
              != ETIMEDOUT)
    ;
}

/* All that are queued get a round, then there is a pause: so none has two rounds without
 * one, and none waits for the pauses of others.
 */
static void *
run (void *pointer)
{
  struct cleaner *c = pointer;

  mutex_lock (&c->lock);
  while (!c->end)
    if (!c->first)
      pthread_cond_wait (&c->work, &c->lock.pthread);
    else {
      for (size_t n = c->nr_queued; n > 0 && c->first && !c->end; --n)
        do_round (c);
      pause_for_more (c);
    }
  mutex_unlock (&c->lock);
  return NULL;
}

/* Signals are for nbdkit's own threads.  If there is no thread to be had, the next one who
 * asks tries again.  Caller holds the lock.
 */
static bool
start (struct cleaner *c)
{
  sigset_t all, old;

  assert_held (&c->lock);
  if (c->running)
    return true;
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &old);
  c->running = pthread_create (&c->thread, NULL, run, c) == 0;
  pthread_sigmask (SIG_SETMASK, &old, NULL);
  return c->running;
}

void
cleaner_wake (struct cleaning *g)
{
  struct cleaner *c = g->cleaner;

  if (!c)
    return;
  HOLD (&c->lock);
  enqueue (c, g);
  (void) start (c);
}

/* Have the thread do a round that begins after this was called, and wait for it.  False if
 * there is no thread to be had.
 */
static bool
wait_for_round (struct cleaner *c, struct cleaning *g)
{
  HOLD (&c->lock);

  const uint64_t wanted = g->begun + 1;

  if (!start (c))
    return false;
  enqueue (c, g);
  c->urgent++;
  pthread_cond_signal (&c->work);
  while (g->done < wanted && !has_left (g))
    pthread_cond_wait (&c->changed, &c->lock.pthread);
  c->urgent--;
  return true;
}

void
cleaner_round (struct cleaning *g)
{
  struct cleaner *c = g->cleaner;

  assert_none_held_from (RANK_ROUND);
  if (!c || !wait_for_round (c, g))
    cleaning_round (g);
}

/* Whoever begins a round from now on finds that the overlay has left; the lock of the round
 * is held by the one who is in it, be it the thread or somebody who found none.
 */
void
cleaner_leave (struct cleaning *g)
{
  struct cleaner *c = g->cleaner;

  assert_none_held_from (RANK_ROUND);
  if (c) {
    HOLD (&c->lock);

    atomic_store (&g->left, true);
    if (g->queued)
      dequeue (c, g);
    while (g->busy)
      pthread_cond_wait (&c->changed, &c->lock.pthread);
    pthread_cond_broadcast (&c->changed);
  }
  atomic_store (&g->left, true);
  HOLD (&g->round);
}
