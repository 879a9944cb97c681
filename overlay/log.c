/* SPDX-License-Identifier: BSD-3-Clause */

/* Who gets which part of the overlay file (see log.h).
 *
 * Addresses are given out by appending, several at a time for a large request, so that
 * what is written in order lies in order.  Whoever took an address has it alone until it
 * stands in the map or is given back; so reading and writing need no lock.
 *
 * The states of addresses are bits, in chunks: free, waiting, taken; what has none of them
 * is owned.  The memory for them is there before an address is given out.  How many bits of
 * a chunk are set stands apart from them, so that those which do not matter are passed over
 * fast: a log of 1 TiB has 65,536 chunks of 4 KiB blocks.
 *
 * Knows nothing of the map, or of nbdkit.
 */

#include <config.h>

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/limits.h"
#include "overlay/log.h"

#define CHUNK_WORDS 64
#define CHUNK_BLOCKS (CHUNK_WORDS * UINT64_C (64))

struct log_chunk {
  uint64_t (*bits)[CHUNK_WORDS];
  uint16_t count[LOG_NR_KINDS]; /* bits that are set */
};

/* So much is punched, and no less, but where much is free. */
#define WINDOW_BYTES (UINT64_C (64) << 10)

/* For one request, no more rows of free addresses are looked at, in no more chunks, and of
 * no more chunks at how much of them is free.
 */
#define MAX_ROWS 512
#define MAX_SEARCHED 4
#define MAX_PASSED 4096

/* In one hold of the lock, what waits is taken in no more chunks. */
#define MAX_TAKEN 1024

/* The file is made longer by an eighth ahead of what is written, between these. */
#define MIN_AHEAD (UINT64_C (1) << 20)
#define MAX_AHEAD (UINT64_C (64) << 20)

void
log_init (struct log *log, struct store *store, unsigned block_shift,
          uint64_t head)
{
  const uint64_t blocks = limits_file_size () >> block_shift;

  *log = (struct log) {
    .store = store,
    .block_shift = block_shift,
    .head = head,
    .end_limit = MIN (blocks, UINT32_MAX),
    .next = head,
  };
  mutex_init (&log->lock, RANK_LOG);
}

void
log_destroy (struct log *log)
{
  for (size_t i = 0; i < log->nr_chunks; ++i)
    free (log->chunks[i].bits);
  free (log->chunks);
  mutex_destroy (&log->lock);
}

uint64_t
log_end (struct log *log)
{
  HOLD (&log->lock);

  return log_offset (log, log->next);
}

/*----------------------------------------------------------------------
 * The states of addresses.  Caller holds the lock, here and below.
 */

static struct log_chunk *
chunk_of (const struct log *log, uint64_t address)
{
  return &log->chunks[address / CHUNK_BLOCKS];
}

static bool
has (const struct log *log, enum log_kind kind, uint64_t address)
{
  return chunk_of (log, address)->bits[kind][address % CHUNK_BLOCKS / 64]
           >> address % 64
         & 1;
}

/* Are all addresses of MASK, FIRST being one, of the kind FROM?  If not, one would be given
 * out twice, and data lost.
 */
static void
check_kind (const struct log *log, uint64_t first, uint64_t mask,
            enum log_kind from)
{
#ifdef COW_DEBUG
  bool right = first >= log->head && first < log->next;

  for (enum log_kind kind = 0; kind < LOG_NR_KINDS && right; ++kind) {
    const uint64_t word
      = chunk_of (log, first)->bits[kind][first % CHUNK_BLOCKS / 64];

    right = (word & mask) == (kind == from ? mask : 0);
  }
  if (!right) {
    (void) fprintf (stderr, "cow: log: addresses from %ju on are not %d\n",
                    (uintmax_t) first, (int) from);
    abort ();
  }
#else
  (void) log, (void) first, (void) mask, (void) from;
#endif
}

/* The COUNT addresses from FIRST on are not of the kind FROM any more, but TO. */
static void
move (struct log *log, uint64_t first, uint64_t count, enum log_kind from,
      enum log_kind to)
{
  assert_held (&log->lock);
  if (from != LOG_OWNED)
    log->count[from] -= count;
  if (to != LOG_OWNED)
    log->count[to] += count;
  while (count > 0) {
    struct log_chunk *chunk = chunk_of (log, first);
    const unsigned word = first % CHUNK_BLOCKS / 64, shift = first % 64;
    const unsigned n = (unsigned) MIN (count, 64 - shift);
    const uint64_t mask = UINT64_MAX >> (64 - n) << shift;

    check_kind (log, first, mask, from);
    if (from != LOG_OWNED) {
      chunk->bits[from][word] &= ~mask;
      chunk->count[from] = (uint16_t) (chunk->count[from] - n);
    }
    if (to != LOG_OWNED) {
      chunk->bits[to][word] |= mask;
      chunk->count[to] = (uint16_t) (chunk->count[to] + n);
    }
    first += n;
    count -= n;
  }
}

static uint64_t
nr_owned (const struct log *log)
{
  return log->next - log->head - log->count[LOG_FREE] - log->count[LOG_WAITING]
         - log->count[LOG_TAKEN];
}

/* How many addresses right before END are free: some of them, 0 if the last one is not. */
static uint64_t
free_before (const struct log *log, uint64_t end)
{
  const uint64_t last = end - 1;
  const struct log_chunk *chunk = chunk_of (log, last);
  const uint64_t *words = chunk->bits[LOG_FREE];
  const unsigned shift = 63 - last % 64;

  if (chunk->count[LOG_FREE] == CHUNK_BLOCKS)
    return last % CHUNK_BLOCKS + 1;
  const uint64_t used = ~(words[last % CHUNK_BLOCKS / 64] << shift);
  return used ? (unsigned) __builtin_clzll (used) : 64;
}

/* These addresses, which were FROM, are free.  Where they are the last ones, the end of the
 * log moves back, over those before them that are free too.  What lies behind it has no
 * bits, and neither has the head.
 */
static void
make_free (struct log *log, struct log_run run, enum log_kind from)
{
  uint64_t n;

  move (log, run.first, run.count, from, LOG_FREE);
  if ((uint64_t) run.first + run.count < log->next)
    return;
  while ((n = free_before (log, log->next)) > 0) {
    move (log, log->next - n, n, LOG_FREE, LOG_OWNED);
    log->next -= n;
  }
}

/*----------------------------------------------------------------------
 * Giving out
 */

/* The first row of free addresses in a chunk from FROM (in the chunk) on, WANTED at the
 * most.  None: its count is 0.
 */
static struct log_run
next_free_row (const struct log *log, uint64_t number, unsigned from,
               uint64_t wanted)
{
  const uint64_t *words = log->chunks[number].bits[LOG_FREE];
  struct log_run run = { .count = 0 };

  while (from < CHUNK_BLOCKS) {
    const uint64_t word = words[from / 64] >> from % 64;

    if (!word) {
      from = (from / 64 + 1) * 64;
      continue;
    }
    from += (unsigned) __builtin_ctzll (word);
    run.first = (uint32_t) (number * CHUNK_BLOCKS + from);
    while (from < CHUNK_BLOCKS && run.count < wanted) {
      const unsigned left = 64 - from % 64;
      const uint64_t used = ~(words[from / 64] >> from % 64);
      const unsigned n = used ? (unsigned) __builtin_ctzll (used) : 64;

      run.count += n;
      from += n;
      if (n < left)
        break;
    }
    run.count = (uint32_t) MIN (run.count, wanted);
    return run;
  }
  return run;
}

/* A search among free addresses. */
struct search {
  uint64_t wanted;
  uint64_t enough; /* as many will do, if no more are found nearby */
  bool far;        /* look everywhere, and take the first that will do */
  unsigned rows;   /* no more of them are looked at, if not */
  uint64_t at;     /* as far as here everything was */
  struct log_run longest;
};

/* Look through the chunk in which s->at is, from there on.  Returns whether that was all. */
static bool
search_chunk (const struct log *log, struct search *s)
{
  const uint64_t number = s->at / CHUNK_BLOCKS;
  unsigned from = s->at % CHUNK_BLOCKS;

  while (s->rows > 0) {
    const struct log_run run = next_free_row (log, number, from, s->wanted);

    if (run.count == 0) {
      s->at = (number + 1) * CHUNK_BLOCKS;
      return false;
    }
    from = run.first % CHUNK_BLOCKS + run.count;
    s->at = (uint64_t) run.first + run.count;
    if (run.count > s->longest.count)
      s->longest = run;
    if (s->longest.count == s->wanted
        || (s->far && s->longest.count >= s->enough))
      return true;
    s->rows -= !s->far;
  }
  return true;
}

/* A row of free addresses, as many as are wanted if there are so many near where the last
 * one was found, else the longest that was seen.  None that will do: its count is 0.
 */
static struct log_run
find_free (struct log *log, struct search *s)
{
  unsigned searched = 0;

  if (log->count[LOG_FREE] < s->enough)
    return (struct log_run) { .count = 0 };
  s->at = log->cursor;
  s->rows = MAX_ROWS;
  /* The chunk of the cursor is looked at twice, the second time from its start. */
  for (uint64_t passed = 0; passed <= log->nr_chunks; ++passed) {
    if (!s->far && (searched == MAX_SEARCHED || passed == MAX_PASSED))
      break;
    if (s->at / CHUNK_BLOCKS >= log->nr_chunks)
      s->at = 0;
    if (chunk_of (log, s->at)->count[LOG_FREE] < s->enough)
      s->at = ROUND_DOWN (s->at, CHUNK_BLOCKS) + CHUNK_BLOCKS;
    else if (search_chunk (log, s))
      break;
    else
      searched++;
  }
  log->cursor = s->at;
  return s->longest.count < s->enough ? (struct log_run) { .count = 0 }
                                      : s->longest;
}

/* Have chunks for the addresses before END.  -1 and ENOMEM. */
static int
have_chunks (struct log *log, uint64_t end)
{
  const size_t wanted = (size_t) ((end - 1) / CHUNK_BLOCKS + 1);

  if (wanted > log->max_chunks) {
    const size_t max = wanted + wanted / 2;
    struct log_chunk *chunks = realloc (log->chunks, max * sizeof *chunks);

    if (!chunks)
      return -1;
    log->chunks = chunks;
    log->max_chunks = max;
  }
  while (log->nr_chunks < wanted) {
    struct log_chunk *chunk = &log->chunks[log->nr_chunks];

    *chunk = (struct log_chunk) {
      .bits = calloc (LOG_NR_KINDS, sizeof *chunk->bits),
    };
    if (!chunk->bits)
      return -1;
    log->nr_chunks++;
  }
  return 0;
}

/* Make the file longer, ahead of what is written: some file systems allocate space behind
 * the end of one that grows.  If that fails, the write will tell.
 */
static void
grow_file (struct log *log)
{
  const uint64_t end = log_offset (log, log->next);
  const uint64_t ahead = MIN (MAX (end / 8, MIN_AHEAD), MAX_AHEAD);
  const uint64_t size = MIN (end + ahead, log_offset (log, log->end_limit));

  if (end <= log->file_size)
    return;
  if (store_truncate (log->store, size) == 0)
    log->file_size = size;
}

/* COUNT new addresses, or fewer, but no fewer than AT_LEAST.  -1 and errno. */
static int
append (struct log *log, uint64_t count, uint64_t at_least,
        struct log_run *run)
{
  assert_held (&log->lock);
  if (log->next > log->end_limit || at_least > log->end_limit - log->next) {
    errno = EFBIG;
    return -1;
  }
  count = MIN (count, log->end_limit - log->next);
  if (have_chunks (log, log->next + count) == -1)
    return -1;
  *run = (struct log_run) { (uint32_t) log->next, (uint32_t) count };
  log->next += count;
  grow_file (log);
  store_grown (log->store, log_offset (log, log->next));
  return 0;
}

/* With WANTED more, is the log more than twice as long as what is in it? */
static bool
is_too_long (const struct log *log, uint64_t wanted)
{
  const uint64_t owned = nr_owned (log),
                 others = log->next - log->head - owned;

  return others > owned && others - owned > wanted;
}

int
log_take (struct log *log, uint64_t wanted, enum log_effort effort,
          uint64_t most, struct log_run *run)
{
  if (store_make_file (log->store) == -1)
    return -1;

  HOLD (&log->lock);

  const uint64_t in_use = log->next - log->head - log->count[LOG_FREE];

  if (in_use >= most) {
    errno = EDQUOT;
    return -1;
  }
  wanted = MIN (wanted, most - in_use);

  /* (No row is longer than a chunk.) */
  struct search search = { .wanted = MIN (wanted, CHUNK_BLOCKS) };

  search.far = effort == LOG_ANY;
  search.enough = search.far || is_too_long (log, wanted) ? 1 : search.wanted;
  *run = find_free (log, &search);
  if (run->count > 0) {
    move (log, run->first, run->count, LOG_FREE, LOG_OWNED);
    return 0;
  }
  return append (log, wanted, 1, run);
}

int
log_take_row (struct log *log, uint64_t count, struct log_run *run)
{
  if (store_make_file (log->store) == -1)
    return -1;

  HOLD (&log->lock);

  return append (log, count, count, run);
}

void
log_give_back (struct log *log, struct log_run run)
{
  if (run.count == 0)
    return;
  store_punch (log->store, log_offset (log, run.first),
               (uint64_t) run.count << log->block_shift);

  HOLD (&log->lock);

  make_free (log, run, LOG_OWNED);
}

bool
log_wait (struct log *log, struct log_run run)
{
  HOLD (&log->lock);

  const bool first = log->count[LOG_WAITING] == 0;

  move (log, run.first, run.count, LOG_OWNED, LOG_WAITING);
  return first;
}

/*----------------------------------------------------------------------
 * For the cleaner
 */

/* What waits in a chunk is taken.  Caller holds the lock. */
static void
take_waiting (struct log *log, struct log_chunk *chunk)
{
  const unsigned n = chunk->count[LOG_WAITING];

  assert_held (&log->lock);
  if (n == 0)
    return;
  for (unsigned i = 0; i < CHUNK_WORDS; ++i) {
    chunk->bits[LOG_TAKEN][i] |= chunk->bits[LOG_WAITING][i];
    chunk->bits[LOG_WAITING][i] = 0;
  }
  chunk->count[LOG_TAKEN] = (uint16_t) (chunk->count[LOG_TAKEN] + n);
  chunk->count[LOG_WAITING] = 0;
  log->count[LOG_TAKEN] += n;
  log->count[LOG_WAITING] -= n;
}

/* What begins to wait meanwhile may be taken too: grace is yet to come. */
bool
log_take_waiting (struct log *log)
{
  size_t i = 0;

  for (;;) {
    HOLD (&log->lock);

    for (unsigned n = 0; n < MAX_TAKEN && i < log->nr_chunks; ++n)
      take_waiting (log, &log->chunks[i++]);
    if (i == log->nr_chunks) {
      log->cleaned = 0;
      return log->count[LOG_TAKEN] > 0;
    }
  }
}

/* The blocks of a window. */
static unsigned
window_blocks (const struct log *log)
{
  return (unsigned) MAX (WINDOW_BYTES >> log->block_shift, 1);
}

/* The first address from log->cleaned on that is taken.  There is one. */
static uint64_t
first_taken (struct log *log)
{
  uint64_t address = log->cleaned;

  for (;;) {
    const struct log_chunk *chunk = chunk_of (log, address);
    const uint64_t word
      = chunk->bits[LOG_TAKEN][address % CHUNK_BLOCKS / 64] >> address % 64;

    if (chunk->count[LOG_TAKEN] == 0)
      address = ROUND_DOWN (address, CHUNK_BLOCKS) + CHUNK_BLOCKS;
    else if (word)
      return address + (unsigned) __builtin_ctzll (word);
    else
      address = ROUND_DOWN (address, 64) + 64;
  }
}

/* Is in the window from START on nothing but what is taken, of which there is some, and
 * what is free?
 */
static bool
window_is_free (const struct log *log, uint64_t start)
{
  bool any = false;

  for (uint64_t i = start; i < MIN (start + window_blocks (log), log->next);
       ++i) {
    if (!has (log, LOG_TAKEN, i) && !has (log, LOG_FREE, i))
      return false;
    any |= has (log, LOG_TAKEN, i);
  }
  return any;
}

bool
log_next_taken (struct log *log, uint64_t bytes, struct log_run *run,
                bool *punch)
{
  HOLD (&log->lock);

  if (log->count[LOG_TAKEN] == 0)
    return false;

  const uint64_t longest = MAX (bytes >> log->block_shift, 1);
  const unsigned window = window_blocks (log);
  uint64_t start = first_taken (log), end;

  *punch = window_is_free (log, ROUND_DOWN (start, (uint64_t) window));
  if (*punch) {
    end = start = ROUND_DOWN (start, (uint64_t) window);
    do
      end += window;
    while (end < log->next && end + window - start <= longest
           && window_is_free (log, end));
    end = MIN (end, log->next);
  }
  else {
    const uint64_t window_end = ROUND_DOWN (start, (uint64_t) window) + window;

    end = start + 1;
    while (end < MIN (window_end, log->next) && has (log, LOG_TAKEN, end))
      end++;
    *punch = 10 * (log->count[LOG_FREE] + log->count[LOG_TAKEN])
             >= log->next - log->head;
  }
  /* The end of the log is about to move back, and what lies behind it is never looked at
   * again: what is free right before it, and was not punched, is punched now.
   */
  if (end == log->next) {
    *punch = true;
    while (end - start < longest && has (log, LOG_FREE, start - 1))
      start--;
  }
  for (uint64_t i = start; i < end && *punch; ++i)
    if (has (log, LOG_FREE, i))
      move (log, i, 1, LOG_FREE, LOG_TAKEN);
  log->cleaned = end;
  *run = (struct log_run) { (uint32_t) start, (uint32_t) (end - start) };
  return true;
}

void
log_free_taken (struct log *log, struct log_run run)
{
  HOLD (&log->lock);

  make_free (log, run, LOG_TAKEN);
}

bool
log_has_waiting (struct log *log)
{
  HOLD (&log->lock);

  return log->count[LOG_WAITING] > 0;
}

/*----------------------------------------------------------------------
 * Figures
 */

struct log_counts
log_count (struct log *log)
{
  HOLD (&log->lock);

  return (struct log_counts) {
    .owned = nr_owned (log),
    .waiting = log->count[LOG_WAITING],
    .taken = log->count[LOG_TAKEN],
    .free = log->count[LOG_FREE],
  };
}

enum log_kind
log_kind_of (struct log *log, uint64_t address)
{
  HOLD (&log->lock);

  for (enum log_kind kind = 0; kind < LOG_NR_KINDS; ++kind)
    if (address >= log->next || has (log, kind, address))
      return address >= log->next ? LOG_FREE : kind;
  return LOG_OWNED;
}
