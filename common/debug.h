/* SPDX-License-Identifier: BSD-3-Clause */

/* What -D cow.verbose=1 shows. */

#ifndef COW_DEBUG_H
#define COW_DEBUG_H

#include <nbdkit-filter.h>

extern int
  cow_debug_verbose; /* in cow.c; constant while requests are served */

#define VERBOSE(...)                                                          \
  do {                                                                        \
    if (cow_debug_verbose)                                                    \
      nbdkit_debug ("cow: " __VA_ARGS__);                                     \
  } while (0)

#endif /* COW_DEBUG_H */
