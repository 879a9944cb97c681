/* SPDX-License-Identifier: BSD-3-Clause */

/* The time, for deadlines and pauses. */

#ifndef COW_CLOCK_H
#define COW_CLOCK_H

#include <stdint.h>
#include <time.h>

/* In nanoseconds, from some moment on; never set back. */
static inline int64_t
clock_now (void)
{
  struct timespec t;

  (void) clock_gettime (CLOCK_MONOTONIC, &t);
  return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The moment that is NS from now. */
static inline struct timespec
clock_after (int64_t ns)
{
  const int64_t t = clock_now () + ns;

  return (struct timespec) { .tv_sec = (time_t) (t / 1000000000),
                             .tv_nsec = (long) (t % 1000000000) };
}

#endif /* COW_CLOCK_H */
