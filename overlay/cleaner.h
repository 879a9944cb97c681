/* SPDX-License-Identifier: BSD-3-Clause */

/* The cleaner: a thread that makes addresses of logs free which wait.
 *
 * There is one for all overlays.  It starts with the first address that waits.
 */

#ifndef COW_CLEANER_H
#define COW_CLEANER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/lock.h"
#include "overlay/grace.h"
#include "overlay/log.h"

struct cleaner;

/* NULL and ENOMEM.  No thread is started yet. */
extern struct cleaner *cleaner_new (void);

/* All overlays have left it.  NULL is allowed. */
extern void cleaner_free (struct cleaner *cleaner);

/* What the cleaner knows of an overlay, which has it. */
struct cleaning {
  struct cleaner
    *cleaner; /* constant, as are the next two; NULL: rounds are done by
                            * hand */
  struct log *log;
  struct grace *grace;
  struct mutex round; /* held during one */
  atomic_bool left;   /* it is cleaned no more */

  /* The cleaner's lock guards what follows. */
  struct cleaning *next; /* in the queue */
  bool queued;
  bool busy;            /* the thread is at work on it */
  uint64_t begun, done; /* rounds */
};

extern void cleaning_init (struct cleaning *cleaning, struct cleaner *cleaner,
                           struct log *log, struct grace *grace);
extern void cleaning_destroy (struct cleaning *cleaning);

/* There is something to clean. */
extern void cleaner_wake (struct cleaning *cleaning);

/* Wait for a round that begins after this was called, or do it if there is no thread to be
 * had.  Caller holds no lock.
 */
extern void cleaner_round (struct cleaning *cleaning);

/* It is cleaned no more.  Waits for the piece that is in somebody's hands.  May be called
 * again.  Caller holds no lock of the overlay.
 */
extern void cleaner_leave (struct cleaning *cleaning);

/* Do one round: what waits in the log is taken, a grace period passes, what is worth it is
 * punched, and all is free.  Ends early when it has left.  Caller holds no lock of the
 * overlay.
 */
extern void cleaning_round (struct cleaning *cleaning);

#endif /* COW_CLEANER_H */
