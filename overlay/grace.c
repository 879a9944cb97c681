/* SPDX-License-Identifier: BSD-3-Clause */

/* Grace: when have all requests ended that were under way (see grace.h)?
 *
 * This is what the Linux kernel's SRCU does.  grace_wait looks at each count, of both
 * phases, until it has seen that it is 0.  It looks by an atomic addition of nothing, and
 * requests add to the same count, so each request stands either before or behind that look
 * in the one order of changes to that count:
 *
 *  - behind it: then the request's addition reads what the look has written, or what follows
 *    on that (acquire, release).  So it finds the map at least as it was when grace_wait was
 *    called, and does not find what nobody owned then.
 *  - before it: then it has also been counted out, as the look saw 0; so all that it did
 *    happened before the look.
 *
 * This does not depend on the phase in which a request is counted.  The phase is there for
 * the wait to have an end: new requests are counted in the present phase, so the other one
 * gets empty, and the present one does after it was turned.  A request that has read the
 * phase may be counted in it only after the turn, perhaps after the next grace_wait has
 * begun.  So both phases are waited for each time (model/log.pml shows what happens
 * else), the other one first, as it is empty but for such requests.
 */

#include <config.h>

#include <pthread.h>
#include <stdint.h>
#include <time.h>

#include "common/cleanup.h"
#include "common/lock.h"
#include "overlay/grace.h"

void
grace_init (struct grace *g)
{
  atomic_init (&g->phase, 0);
  for (unsigned i = 0; i < GRACE_STRIPES; ++i)
    for (unsigned phase = 0; phase < 2; ++phase)
      atomic_init (&g->counts[i].under_way[phase], 0);
}

/* Threads differ in the bits above a page, as each has a stack. */
static unsigned
my_stripe (void)
{
  const uint64_t self = (uint64_t) (uintptr_t) pthread_self ();

  return (unsigned) ((self >> 12) * UINT64_C (0x9e3779b97f4a7c15) >> 60)
         % GRACE_STRIPES;
}

grace_ticket
grace_enter (struct grace *g)
{
  const unsigned phase = atomic_load (&g->phase);
  grace_ticket ticket = &g->counts[my_stripe ()].under_way[phase];

  atomic_fetch_add (ticket, 1);
  return ticket;
}

void
grace_leave (grace_ticket ticket)
{
  atomic_fetch_sub (ticket, 1);
}

/* Each count is waited for by itself: a request is counted in and out in the same one.
 * Most requests take less than the first pause.
 */
static void
wait_for (struct grace *g, unsigned phase)
{
  for (unsigned i = 0; i < GRACE_STRIPES; ++i) {
    struct timespec pause = { .tv_nsec = 20000 };

    while (atomic_fetch_add (&g->counts[i].under_way[phase], 0) > 0) {
      nanosleep (&pause, NULL);
      pause.tv_nsec = MIN (2 * pause.tv_nsec, 1000000);
    }
  }
}

void
grace_wait (struct grace *g)
{
  const unsigned phase = atomic_load (&g->phase);

  assert_none_held_from (RANK_RELEASE);
  wait_for (g, 1 - phase);
  atomic_store (&g->phase, 1 - phase);
  wait_for (g, phase);
}
