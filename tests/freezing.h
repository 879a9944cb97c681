/* SPDX-License-Identifier: BSD-3-Clause */

/* For tests of frozen maps: an overlay without a server, operations as data, what the disk
 * and all frozen maps must hold, and to whom each address of the log belongs.
 */

#ifndef COW_FREEZING_H
#define COW_FREEZING_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base.h"
#include "nbdkit-stubs.h"
#include "overlay/log.h"
#include "overlay/map.h"
#include "overlay/overlay.h"

#define BLOCK UINT32_C (4096)
#define SLOT (32 * BLOCK)
/* Four slots and a bit; the last block is not a whole one. */
#define SIZE (4 * SLOT + 3 * BLOCK + 777)
#define NR_SLOTS 5
/* Every other 20 blocks of the base are a hole. */
#define BASE_EXTENT (20 * BLOCK)

extern uint8_t base_bytes[SIZE];
extern struct fake_base fake;
extern struct base base;
extern struct overlay_options options;
extern struct overlay *overlay;
extern int err;

/* A frozen map that is held, what it must hold (ONE, or where a request was under way
 * when it was frozen, perhaps OTHER), and what it says of its extents.
 */
#define MAX_EXTENTS 200

struct extents {
  size_t count;
  struct nbdkit_extent list[MAX_EXTENTS];
};

struct held {
  struct frozen_map *frozen;
  uint8_t one[SIZE], other[SIZE];
  struct extents extents;
};

/* Those that are held come first, in the order in which they were frozen. */
#define MAX_HELD 6

extern struct held *held[MAX_HELD];
extern unsigned nr_held;

extern int set_up (void **state);
extern int tear_down (void **state);

/* A new overlay with the same options. */
extern void start_over (void);

#define WITH_OVERLAY(test)                                                    \
  cmocka_unit_test_setup_teardown (test, set_up, tear_down)

/* Whoever finds something wrong in a thread cannot use cmocka's functions. */
extern void die (const char *what, int error);

/*----------------------------------------------------------------------
 * Operations, as data
 */

enum kind {
  WRITE,
  ZERO,
  ZERO_WITH_SPACE,
  READ_AND_KEEP,
  CACHE_AND_KEEP,
  /* These change nothing that can be read. */
  READ,
  READ_FROZEN, /* of the oldest that is held */
  CLEAN,
  /* These take the request lock exclusively. */
  FREEZE,
  RELEASE_OLDEST,
  RELEASE_SECOND, /* oldest */
  RELEASE_NEWEST,
  CLOSE,
};

struct op {
  enum kind kind;
  uint32_t count;
  uint64_t offset;
  uint8_t fill; /* of a write */
};

/* Lists of them end with one of no bytes. */
#define END                                                                   \
  {                                                                           \
    WRITE, 0, 0, 0                                                            \
  }

/* What the operation does to a disk in memory. */
extern void model_op (const struct op *op, uint8_t *model);

/* Run it, with BUF of SIZE bytes; MODEL and OTHER are for who freezes. */
extern int run_op (uint8_t *buf, const struct op *op, const uint8_t *model,
                   const uint8_t *other, int *op_err);

/* Run it now, on the disk and on MODEL. */
extern void do_op (struct op op, uint8_t *model);
extern void do_ops (const struct op *op, uint8_t *model);
extern void release_nr (unsigned i);
extern void release_all (void);

/* A change at random. */
extern unsigned seed;
extern unsigned below (unsigned n);
extern struct op random_op (void);

/*----------------------------------------------------------------------
 * What must be so
 */

extern void check_disk (const uint8_t *model);
extern void check_held (void);

/* What the live map has of slot NR, and what a frozen one has. */
extern struct slot_pair live_slot (uint64_t nr);
extern struct slot_pair frozen_slot (const struct frozen_map *frozen,
                                     uint64_t nr);

/* Where an allocated block of the live disk lies. */
extern uint32_t live_address (uint64_t block);

/* No request is under way, nor the cleaner at work: each address is owned by those maps
 * that are held and have it, always for the same block, or it waits, or is taken, or is free;
 * and the dead list of each map is exactly what its next older one owns and it does not.
 * Returns the counts.
 */
extern struct log_counts check_accounts (void);

/* A round of the cleaner: then nothing waits. */
extern void check_clean (void);

/* Release all, in the order of age or the other one: after the cleaner has been there, the
 * live disk owns what it needs, and all else is free.
 */
extern void check_all_released (const uint8_t *model, bool oldest_first);

/* Are there bytes in the file? */
extern bool has_data (uint64_t offset, uint64_t count);

/*----------------------------------------------------------------------
 * Something else happens in the middle of a request
 */

/* Where a request is interrupted. */
enum where {
  AT_MUTEX,     /* in front of the n-th mutex that it takes */
  AT_CALL,      /* in front of the n-th system call or look at the map */
  AT_BASE_READ, /* in its read of the base */
  NR_WHERE,
};

/* What happens then, in a thread of its own. */
struct action {
  const struct op *ops;
  const struct op *outer; /* the request that is interrupted */
  uint8_t model[SIZE];    /* without it */
  pthread_t thread;
  bool started;
  bool lock_was_held; /* the request lock, when it was interrupted */
  bool excludes;      /* an operation takes that lock exclusively */
  bool broke_in;      /* and yet was done while it was held */
  atomic_bool done;
};

extern struct action action;

/* Let OPS happen in front of step N of OUTER, the disk being MODEL; and end that.  Returns
 * whether they were started.
 */
extern void interrupt_at (enum where where, int n, const struct op *outer,
                          const struct op *ops, const uint8_t *model);
extern bool interrupt_is_over (enum where where);

/* Do BEFORE, and then OUTER, which is interrupted by OPS at each of its steps, one
 * after the other.  They overlap in no byte, unless both are zeroes; and whoever
 * freezes sees the outer one wholly or not at all.  Afterwards the disk and all
 * frozen maps are right, and when these are released, so is the log.
 */
extern void interrupt_every_step (const struct op *before,
                                  const struct op *outer,
                                  const struct op *ops);

#endif /* COW_FREEZING_H */
