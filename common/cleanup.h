/* SPDX-License-Identifier: BSD-3-Clause */

/* Clean-up bound to a scope, and the few macros that every part uses.
 *
 * A variable marked with one of these gives back what it holds when its
 * scope is left, whichever way: functions can return early and neither leak
 * nor leave a lock held.
 */

#ifndef COW_CLEANUP_H
#define COW_CLEANUP_H

#include <pthread.h>
#include <stdlib.h>

#define COW_CONCAT_(a, b) a##b
#define COW_CONCAT(a, b) COW_CONCAT_ (a, b)

#define MIN(x, y) ((x) < (y) ? (x) : (y))
#define MAX(x, y) ((x) > (y) ? (x) : (y))

/* Rounding to a power of two. */
#define ROUND_DOWN(n, to) ((n) & ~((to) -1))
#define ROUND_UP(n, to) ROUND_DOWN ((n) + (to) -1, (to))

static inline void
cleanup_free (void *pointer)
{
  free (*(void **) pointer);
}

static inline void
cleanup_mutex_unlock (pthread_mutex_t **mutex)
{
  pthread_mutex_unlock (*mutex);
}

/* free() when the scope is left. */
#define CLEANUP_FREE __attribute__ ((cleanup (cleanup_free)))

/* Hold a lock until the scope is left.  Locking can only fail by misuse
 * (recursion, an uninitialized lock), so the result is not looked at.
 */
#define LOCK_FOR_SCOPE(mutex)                                                 \
  __attribute__ ((cleanup (cleanup_mutex_unlock)))                            \
  pthread_mutex_t *COW_CONCAT (locked_, __LINE__)                             \
    = (mutex);                                                                \
  pthread_mutex_lock (COW_CONCAT (locked_, __LINE__))

#endif /* COW_CLEANUP_H */
