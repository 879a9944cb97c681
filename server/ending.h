/* SPDX-License-Identifier: BSD-3-Clause */

/* Noticing that the server is told to stop, while clients are still connected.
 *
 * nbdkit waits for its clients before it tells a filter that it ends.  So the
 * signals that tell it to stop are seen here first.
 */

#ifndef COW_ENDING_H
#define COW_ENDING_H

/* Call FUNCTION, once and in a thread of its own, as soon as the server is told to
 * stop, or aborts.  To be called in .after_fork, once.  -1 and errno.
 */
extern int ending_watch (void (*function) (void));

/* Call it now if that was not done, and wait until it has returned.  Does nothing
 * where ending_watch was not called.
 */
extern void ending_finish (void);

/* Let the process end with a failure, though nbdkit will ask for success. */
extern void ending_fail (void);

#endif /* COW_ENDING_H */
