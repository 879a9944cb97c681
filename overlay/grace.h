/* SPDX-License-Identifier: BSD-3-Clause */

/* Grace: when have all requests ended that were under way at some moment?
 *
 * A request counts itself in, in one of two phases, and out when it is done.  The cleaner
 * turns the phase and waits until nobody is left in the old one.  It stops nobody: those
 * who come later are counted in the new phase.
 */

#ifndef COW_GRACE_H
#define COW_GRACE_H

#include <stdatomic.h>
#include <stdint.h>

#define GRACE_STRIPES 16

/* A cache line apart, so that threads do not take one away from each other.  (No
 * alignment: what has this in it comes from malloc.)
 */
struct grace_count {
  _Atomic uint64_t under_way[2]; /* by phase */
  char apart[48];
};

struct grace {
  _Atomic unsigned phase;                   /* turned by the cleaner only */
  struct grace_count counts[GRACE_STRIPES]; /* threads have different ones */
};

/* Where a request is counted. */
typedef _Atomic uint64_t *grace_ticket;

extern void grace_init (struct grace *grace);

/* Count a request in, before its first look at the map; and out, when it uses no address
 * any more.  Never waits.
 */
extern grace_ticket grace_enter (struct grace *grace);
extern void grace_leave (grace_ticket ticket);

/* Wait until all requests have ended that were counted in before this was called.  One
 * thread at a time, which holds no lock.
 */
extern void grace_wait (struct grace *grace);

#endif /* COW_GRACE_H */
