/* SPDX-License-Identifier: BSD-3-Clause */

/* What the filter needs of nbdkit, for tests without a server: the functions
 * that nbdkit exports, and a base in memory.
 */

#ifndef COW_NBDKIT_STUBS_H
#define COW_NBDKIT_STUBS_H

#include <stdbool.h>
#include <stdint.h>

#include <nbdkit-filter.h>

/* How many errors were reported, and the last one. */
extern unsigned nr_errors;
extern char last_error[1024];

/* How many extents a list holds; what is added to a full one is dropped. */
extern size_t longest_list;

struct fake_base {
  struct nbdkit_next_ops ops; /* first: this is what the filter gets */
  const uint8_t *bytes;
  uint64_t size;
  uint32_t minimum, maximum; /* block size constraints, enforced; 0: none */
  bool can_extents;
  uint64_t extent_size; /* every other one so long is a hole; 0: none */
  bool one_extent;      /* is all that it answers, whatever it is asked */
  int can_cache;
  int fail_with; /* errno of all requests; 0: they succeed */
  /* Called in the middle of each read, once: reset before the call. */
  void (*during_read) (void *arg);
  void *during_read_arg;
  unsigned nr_reads, nr_caches, nr_extents; /* requests so far */
  uint64_t bytes_read;
  const void *read_into; /* the buffer of the last read */
};

/* Fill in the callbacks of a base whose other fields are set. */
extern nbdkit_next *fake_next (struct fake_base *fake);

#endif /* COW_NBDKIT_STUBS_H */
