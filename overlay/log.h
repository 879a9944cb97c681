/* SPDX-License-Identifier: BSD-3-Clause */

/* The log: who gets which part of the overlay file.
 *
 * The file is a row of blocks.  A block's number in it is its address; what is written,
 * wherever on the disk, gets addresses one behind the other.  Address 0 and some that
 * follow it are never given out: they are free for the header and tables of an image.
 *
 * An address is owned by whoever took it, or by the maps that have it.  When they do not
 * any more, it waits, as a request may still have it in hand.  The cleaner takes what
 * waits, and frees it later.
 */

#ifndef COW_LOG_H
#define COW_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/lock.h"
#include "overlay/store.h"

/* Consecutive addresses. */
struct log_run {
  uint32_t first;
  uint32_t count;
};

/* The state of an address. */
enum log_kind {
  LOG_FREE,
  LOG_WAITING,
  LOG_TAKEN, /* by the cleaner */
  LOG_NR_KINDS,
  LOG_OWNED = LOG_NR_KINDS, /* none of these */
};

struct log_chunk;

struct log {
  struct store *store;      /* constant, as are the next three */
  unsigned block_shift;     /* log2 of the block size */
  uint64_t head;            /* the first address that is given out */
  uint64_t end_limit;       /* all are smaller than this */
  struct mutex lock;        /* guards what follows */
  uint64_t next;            /* behind the last address that is given out */
  struct log_chunk *chunks; /* for all addresses before next */
  size_t nr_chunks, max_chunks;
  uint64_t count[LOG_NR_KINDS]; /* all others, from head to next, are owned */
  uint64_t cursor;              /* where free ones are looked for first */
  uint64_t cleaned;             /* no address before this one is taken */
  uint64_t file_size; /* the file was made so long ahead of its use */
};

/* Divide STORE into blocks; the first HEAD (at least 1) are not given out. */
extern void log_init (struct log *log, struct store *store,
                      unsigned block_shift, uint64_t head);
extern void log_destroy (struct log *log);

/* Where the last block that was given out ends: a byte offset in the file. */
extern uint64_t log_end (struct log *log);

/* The byte offset of an address. */
static inline uint64_t
log_offset (const struct log *log, uint64_t address)
{
  return address << log->block_shift;
}

/* Which addresses are good enough? */
enum log_effort {
  LOG_TIDY, /* a row of free ones, else new ones, unless the log is too long */
  LOG_ANY,  /* any free ones, else new ones */
};

/* Take up to WANTED consecutive addresses; the file is made with the first ones.  -1 and
 * errno if there is none to be had: the file cannot be made, EFBIG when the log is as
 * long as it can be, ENOMEM; EDQUOT when MOST addresses are in use already.  What the
 * blocks hold is undefined.
 */
extern int log_take (struct log *log, uint64_t wanted, enum log_effort effort,
                     uint64_t most, struct log_run *run);

/* For MOST: there is no limit. */
#define LOG_UNLIMITED UINT64_MAX

/* Take COUNT consecutive addresses, no fewer.  -1 and errno. */
extern int log_take_row (struct log *log, uint64_t count, struct log_run *run);

/* Give back addresses that no map and no other request has ever seen.  What was written
 * there is punched.  Caller holds no lock that a request takes.  Keeps errno.
 */
extern void log_give_back (struct log *log, struct log_run run);

/* Maps have the addresses no longer: they wait.  Returns whether they are the first that
 * do, so that the cleaner is to be told.  Takes no memory.
 */
extern bool log_wait (struct log *log, struct log_run run);

/*----------------------------------------------------------------------
 * For the cleaner.  One thread at a time.
 */

/* All that waits is taken.  Returns whether anything is. */
extern bool log_take_waiting (struct log *log);

/* Addresses that are taken, and can be freed in one step: BYTES of the file at the most.
 * PUNCH: their bytes are to be given back to the file system before.  That is so of a
 * range of 64 KiB in which nothing is used, and what is free of it is taken too; of the end
 * of the log; or of any range, when a tenth of the log is free.  False: none is taken any more.
 */
extern bool log_next_taken (struct log *log, uint64_t bytes,
                            struct log_run *run, bool *punch);

/* They are free, and may be given out. */
extern void log_free_taken (struct log *log, struct log_run run);

/* Does anything wait? */
extern bool log_has_waiting (struct log *log);

/*----------------------------------------------------------------------
 * Figures
 */

/* Addresses; their sum is the length of the log, less its head. */
struct log_counts {
  uint64_t owned, waiting, taken, free;
};
extern struct log_counts log_count (struct log *log);

/* Those behind the end are free. */
extern enum log_kind log_kind_of (struct log *log, uint64_t address);

#endif /* COW_LOG_H */
