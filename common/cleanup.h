/* SPDX-License-Identifier: BSD-3-Clause */

/* Clean-up bound to a scope, and the few macros that every part uses.
 *
 * A variable marked with one of these gives back what it holds when its
 * scope is left, whichever way: functions can return early and not leak.
 */

#ifndef COW_CLEANUP_H
#define COW_CLEANUP_H

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

/* free() when the scope is left. */
#define CLEANUP_FREE __attribute__ ((cleanup (cleanup_free)))

#endif /* COW_CLEANUP_H */
