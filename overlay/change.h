/* SPDX-License-Identifier: BSD-3-Clause */

/* A change to an overlay: the transaction of one request.  For overlay/ and blk*.c.
 *
 * It is begun, which takes the locks and finds the slots; it is told which blocks are to
 * be written to, and which become zero; it is prepared, which takes places; all bytes
 * are written; and only when it ends the new states are stored, so that a request is
 * there wholly or, if it fails, not at all.  What has become zero is punched afterwards.
 *
 * Offsets are bytes of the disk; ranges are not empty.
 */

#ifndef COW_CHANGE_H
#define COW_CHANGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/uio.h>

#include "bitmap.h"
#include "overlay/map.h"
#include "overlay/overlay.h"

/* What a request does to one slot; or, if SLOT is NULL, to all slots of a leaf, which
 * have no places and become zero.
 */
struct slot_change {
  uint64_t nr;            /* of the slot, or the first one of the leaf */
  struct slot *slot;      /* good between change_begin and change_end */
  struct slot_pair found; /* under the slot lock */
  bool shared;            /* with a frozen map: its place is not written to */
  uint64_t place;         /* where its bytes go; 0: it needs no place */
  uint32_t allocate;      /* blocks that are written to, and allocated then */
  uint32_t zero;          /* blocks that become zero, or stay so */
};

/* A request's changes, from change_begin to change_end.  What is in it is for change.c
 * alone.
 */
struct change {
  struct overlay *o;
  uint64_t first; /* numbers of the first and the last slot */
  uint64_t last;
  size_t count;      /* of slots or leaves in SLOTS */
  uint64_t stripes;  /* slot locks held, one bit each */
  uint64_t nr_l2;    /* L2 tables that space was set aside for */
  uint64_t nr_fresh; /* slots that get a fresh place */
  struct slot_change *slots;
  struct slot_change few[17]; /* enough for 2 MiB in blocks of 4 KiB */
};

static inline void
cleanup_change (struct change *c)
{
  if (c->slots != c->few)
    free (c->slots);
}

#define CLEANUP_CHANGE __attribute__ ((cleanup (cleanup_change)))

/* Lock the slots of the disk's bytes OFFSET .. END-1 and look at them.
 * ZERO_START .. ZERO_END-1 of these, both block aligned, are to become zero.  0, and
 * the locks are held until change_end; or an errno value, and they are not:
 * ENOMEM, or ESHUTDOWN when the overlay was closed.  C is to be declared with
 * CLEANUP_CHANGE.
 */
extern int change_begin (struct change *c, struct overlay *o, uint64_t offset,
                         uint64_t end, uint64_t zero_start, uint64_t zero_end);

/* The state of the block at OFFSET as it was found. */
extern enum block_state change_found (const struct change *c, uint64_t offset);

/* Blocks START .. END-1, both block aligned, are written to: they become allocated, or
 * stay so.
 */
extern void change_allocate (struct change *c, uint64_t start, uint64_t end);

/* The same of those blocks that are holes. */
extern void change_allocate_holes (struct change *c, uint64_t start,
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

/* Write NR_PARTS pieces of memory one behind the other from OFFSET of the disk
 * on, to the places of their slots.  0 or an errno value.
 */
extern int change_write (const struct change *c, const struct iovec *parts,
                         int nr_parts, uint64_t offset);

/* The same, but leaves out blocks that are not to be allocated. */
extern int change_write_allocated (const struct change *c,
                                   const struct iovec *parts, int nr_parts,
                                   uint64_t offset);

/* Let go: with ERR 0 the changes are made, else undone.  Returns ERR. */
extern int change_end (struct change *c, int err);

/* Give back the bytes of the blocks that C has turned from allocated to zero,
 * so much at a time that others wait a millisecond or two: in one piece nobody
 * else could use the file meanwhile, in small ones it takes several times as
 * long.  C has ended.
 */
extern void change_punch (struct change *c);

#endif /* COW_CHANGE_H */
