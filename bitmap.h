/* SPDX-License-Identifier: BSD-3-Clause */

/* State words: the states of the 32 blocks of a slot in 64 bits.
 *
 *    63                            32 31                             0
 *   +--------------------------------+--------------------------------+
 *   | zero: block 31 ....... block 0 | allocated: block 31 .. block 0 |
 *   +--------------------------------+--------------------------------+
 *
 *    zero  allocated
 *      0       0      hole: the base has the bytes
 *      0       1      allocated: the overlay file has them
 *      1       0      zero: they read as zeroes
 *      1       1      never
 *
 * This is how qcow2 lays out the subcluster bitmap of an extended L2 entry
 * (docs/interop/qcow2.txt in qemu, "Extended L2 Entries").
 *
 * Pure functions on values: no memory, no locks, no I/O.
 */

#ifndef COW_BITMAP_H
#define COW_BITMAP_H

#include <stdint.h>

/* Blocks in a slot. */
#define SLOT_BLOCKS 32u

enum block_state {
  BLOCK_HOLE,
  BLOCK_ALLOCATED,
  BLOCK_ZERO,
};

/* The blocks FIRST .. FIRST+COUNT-1 of a slot, as one half of a state word.
 * FIRST + COUNT must not exceed SLOT_BLOCKS.
 */
static inline uint32_t
bitmap_mask (unsigned first, unsigned count)
{
  return (uint32_t) (((UINT64_C (1) << count) - 1) << first);
}

/* The blocks of WORD that are allocated. */
static inline uint32_t
bitmap_allocated (uint64_t word)
{
  return (uint32_t) word;
}

/* The blocks of WORD that are zero. */
static inline uint32_t
bitmap_zero (uint64_t word)
{
  return (uint32_t) (word >> 32);
}

/* The blocks of WORD that are holes. */
static inline uint32_t
bitmap_holes (uint64_t word)
{
  return ~(bitmap_allocated (word) | bitmap_zero (word));
}

/* WORD with the BLOCKS made allocated, or zero. */
static inline uint64_t
bitmap_set_allocated (uint64_t word, uint32_t blocks)
{
  return (word & ~((uint64_t) blocks << 32)) | blocks;
}

static inline uint64_t
bitmap_set_zero (uint64_t word, uint32_t blocks)
{
  return (word & ~(uint64_t) blocks) | (uint64_t) blocks << 32;
}

/* The state of one block, 0 <= BLOCK < SLOT_BLOCKS. */
static inline enum block_state
bitmap_state (uint64_t word, unsigned block)
{
  if (bitmap_allocated (word) >> block & 1)
    return BLOCK_ALLOCATED;
  if (bitmap_zero (word) >> block & 1)
    return BLOCK_ZERO;
  return BLOCK_HOLE;
}

/* The length in blocks of the run of ones that starts at block FIRST of
 * BLOCKS; 0 if there is a zero.
 */
static inline unsigned
bitmap_run_of_ones (uint32_t blocks, unsigned first)
{
  /* Zeroes are shifted in from above and end the run at the slot's end. */
  return (unsigned) __builtin_ctzll (~((uint64_t) blocks >> first));
}

/* The length in blocks of the run that starts at block FIRST and is all in
 * one state.  At least 1; never goes past the slot.
 */
static inline unsigned
bitmap_run (uint64_t word, unsigned first)
{
  switch (bitmap_state (word, first)) {
  case BLOCK_ALLOCATED:
    return bitmap_run_of_ones (bitmap_allocated (word), first);
  case BLOCK_ZERO:
    return bitmap_run_of_ones (bitmap_zero (word), first);
  case BLOCK_HOLE:
  default:
    return bitmap_run_of_ones (bitmap_holes (word), first);
  }
}

#endif /* COW_BITMAP_H */
