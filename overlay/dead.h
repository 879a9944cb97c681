/* SPDX-License-Identifier: BSD-3-Clause */

/* Dead lists: what of the log a map does not own any more, and its next older one does.
 *
 * The memory for a run is taken before it is needed, so that adding one cannot fail.
 */

#ifndef COW_DEAD_H
#define COW_DEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* COUNT blocks of the disk from BLOCK on, which lie at ADDRESS and behind it. */
struct dead_run {
  uint64_t block;
  uint32_t address;
  uint32_t count;
};

struct dead_chunk;

/* Runs, in no order.  All zero: an empty one.  Whoever has it locks it. */
struct dead_list {
  struct dead_chunk *open;        /* chunks with room */
  struct dead_chunk *full, *last; /* the others; LAST is the last of them */
  uint64_t nr_blocks;             /* in all runs */
  size_t room;                    /* runs that can still be added */
  size_t reserved;                /* as many of them are promised */
};

/* Free what is in it; it is empty then. */
extern void dead_destroy (struct dead_list *list);

/* Promise room for COUNT runs; take the promise back, as far as it was not used.  -1 and
 * ENOMEM.
 */
extern int dead_reserve (struct dead_list *list, size_t count);
extern void dead_unreserve (struct dead_list *list, size_t count);

/* Add a run, for which room was promised and is promised no longer. */
extern void dead_add (struct dead_list *list, struct dead_run run);

/* All of FROM moves to TO, and FROM is empty then.  No room of FROM is promised. */
extern void dead_join (struct dead_list *to, struct dead_list *from);

/* Both are exchanged.  No room of either is promised. */
extern void dead_swap (struct dead_list *list, struct dead_list *other);

/* How many blocks from the start of RUN on (at least 1) have one fate, and is that to
 * stay in the list?
 */
typedef uint32_t dead_keep (void *opaque, struct dead_run run, bool *stays);

/* Ask KEEP of all runs, piece by piece, and leave in the list what stays.  Takes memory
 * only where one run becomes several; where there is none, such a piece is lost.
 */
extern void dead_filter (struct dead_list *list, dead_keep *keep,
                         void *opaque);

/* A list as it was at one moment, of which full chunks are not copied. */
struct dead_look {
  const struct dead_chunk *full;
  struct dead_run *runs; /* the others */
  size_t nr_runs;
};

/* Look at a list.  Until dead_count is done, LIST may get runs, and move as a whole; but
 * it is not filtered, not destroyed, and not joined to another one.  -1 and ENOMEM.
 */
extern int dead_look (const struct dead_list *list, struct dead_look *look);

/* The sum of what COUNT says of each run.  Ends the look. */
extern uint64_t dead_count (struct dead_look *look,
                            uint32_t (*count) (void *opaque,
                                               struct dead_run run),
                            void *opaque);

#endif /* COW_DEAD_H */
