/* SPDX-License-Identifier: BSD-3-Clause */

/* A change to an overlay: the transaction of one request.  For overlay/ and blk*.c.
 *
 * It is begun, which takes the locks and finds the slots; it is told which blocks are to
 * be written to, and which become zero; it is prepared, which takes addresses; all bytes
 * are written; and only when it ends the new states are stored, so that a request is
 * there wholly or, if it fails, not at all.
 *
 * Offsets are bytes of the disk; ranges are not empty.
 */

#ifndef COW_CHANGE_H
#define COW_CHANGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "bitmap.h"
#include "overlay/grace.h"
#include "overlay/log.h"
#include "overlay/map.h"
#include "overlay/overlay.h"

/* What a request does to one slot; or, if SLOT is NULL, to all slots of a leaf, which
 * have no address and become zero.
 */
struct slot_change {
  uint64_t nr;       /* of the slot, or the first one of the leaf */
  struct slot *slot; /* good between change_begin and change_end */
  struct slot_step
    step;            /* step.to has the addresses of all blocks in ALLOCATE */
  bool reserved;     /* for it, space was set aside for an L2 table */
  uint32_t shared;   /* allocated blocks that a frozen map has too */
  uint32_t allocate; /* blocks that are written to, and allocated then */
  uint32_t
    provided;    /* of these, those that are zero where they are going to be */
  uint32_t zero; /* blocks that become zero, or stay so */
};

/* Enough for 2 MiB in blocks of 4 KiB. */
#define FEW_SLOTS 17

/* A request's changes.  What is in it is for change.c alone. */
struct change {
  struct overlay *o;
  enum log_effort effort;
  grace_ticket ticket;
  uint64_t first; /* numbers of the first and the last slot */
  uint64_t last;
  size_t count;       /* of slots or leaves in SLOTS */
  size_t nr_prepared; /* the first so many of them by slot_prepare */
  uint64_t stripes;   /* slot locks held, one bit each */
  size_t nr_dead;     /* runs of the dead list that room is promised for */
  struct log_run
    *runs; /* fresh addresses, which nobody else has seen; their count is... */
  size_t nr_runs, max_runs;
  uint64_t nr_addresses; /* ...this in all */
  size_t used_runs;      /* of them blocks were given the first so many, */
  uint32_t used_of_next; /* and so many addresses of the next one */
  struct slot_change *slots;
  uint32_t *to; /* for the slots that are written to */
  struct log_run few_runs[4];
  struct slot_change few_slots[FEW_SLOTS];
  uint32_t few_to[FEW_SLOTS * SLOT_BLOCKS];
};

/* To be called before anything else; and when it has ended. */
extern void change_init (struct change *c, struct overlay *o,
                         enum log_effort effort);
extern void change_free (struct change *c);

#define CLEANUP_CHANGE __attribute__ ((cleanup (change_free)))

/* Take space for COUNT blocks now, while no lock is held: it is there and reads as
 * zeroes.  FAST: only if that takes no time, else ENOTSUP.  0 or an errno value.
 */
extern int change_provide (struct change *c, uint64_t count, bool fast);

/* Lock the slots of the disk's bytes OFFSET .. END-1 and look at them.
 * ZERO_START .. ZERO_END-1 of these, both block aligned, are to become zero.  0, and
 * the locks are held until change_end; or an errno value, and they are not:
 * ENOMEM, or ESHUTDOWN when the overlay was closed.
 */
extern int change_begin (struct change *c, uint64_t offset, uint64_t end,
                         uint64_t zero_start, uint64_t zero_end);

/* The state of the block at OFFSET as it was found. */
extern enum block_state change_found (const struct change *c, uint64_t offset);

/* Blocks START .. END-1, both block aligned, are written to: they become allocated, or
 * stay so.
 */
extern void change_allocate (struct change *c, uint64_t start, uint64_t end);

/* The same of those blocks that are holes. */
extern void change_allocate_holes (struct change *c, uint64_t start,
                                   uint64_t end);

/* The same, but all of them get what change_provide took, and are not written to. */
extern void change_allocate_provided (struct change *c, uint64_t start,
                                      uint64_t end);

/* The block at BLOCK becomes zero, and is not written to. */
extern void change_make_zero (struct change *c, uint64_t block);

/* Everything that must be there before the bytes of the request, OFFSET .. END-1, are
 * written.  0 or an errno value.
 */
extern int change_prepare (struct change *c, uint64_t offset, uint64_t end);

/* Parts of one write at the most: bytes before, of, and behind the request. */
#define MAX_PARTS 3

/* Of the NR_PARTS pieces of memory, which lie one behind the other, those that
 * hold bytes START .. END-1.  Returns how many, in IOV.
 */
extern int slice_parts (const struct iovec *parts, int nr_parts,
                        uint64_t start, uint64_t end, struct iovec *iov);

/* Write NR_PARTS pieces of memory one behind the other from OFFSET of the disk on, to
 * those blocks that are to be allocated.  0 or an errno value.
 */
extern int change_write (const struct change *c, const struct iovec *parts,
                         int nr_parts, uint64_t offset);

/* Let go: with ERR 0 the changes are made, else undone.  Returns ERR. */
extern int change_end (struct change *c, int err);

#endif /* COW_CHANGE_H */
