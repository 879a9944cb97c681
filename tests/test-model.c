/* Compares a disk that several connections change at random with a model.
 *
 *   test-model [OPTIONS] URI-OR-SOCKET BASEFILE
 *
 * The server shows one disk, whose content at the start is that of BASEFILE.
 * Several connections, a thread each, send it random requests, several of them
 * at a time, and check all answers against a plain array of bytes.
 *
 * To know every byte although nobody knows the order of things, each round
 * divides the disk at random places, with no regard for blocks, into segments
 * with one owner each.
 *
 *     block            block            block            block
 *   |----------------|----------------|----------------|-----------
 *   |  A  |    B    |any|   A     |  C  |any|       B
 *
 *   - Only its owner changes a byte, and never by two requests at a time that
 *     overlap, so the owner knows at any time what the byte is.  Blocks, and
 *     the slots they are in, are fought over by all.
 *   - A few segments belong to anybody.  They are not checked while the round
 *     lasts.  Afterwards each byte must be what some request wrote that was not
 *     followed by another (the requests are stamped as they begin and end).
 *     What they are for: a request of one connection may cover a block
 *     of which another connection writes a part.
 *   - Reads, prefetches and queries of extents may go anywhere; bytes of others
 *     are not looked at.
 *
 * Between the rounds nothing is in flight, and all of the disk and its extents
 * are compared.
 *
 * The state of each block is modelled too.  (A zero that leaves no hole writes.)  It
 * never depends on the order of requests, except where one zeroes a whole block of which another writes
 * bytes of anybody's; such blocks may then be in either state.
 *
 * Snapshots may be held meanwhile.  One that was made between two rounds must have what
 * the disk had then, however often it is read while others write; one that was made in
 * the middle of a round must have the same whenever it is read.  They go in any order.
 *
 * A seed determines the segments and all requests of each connection, though
 * not how those of different connections meet.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */

#ifdef HAVE_CONFIG_H
#include <config.h>
#endif

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <libnbd.h>

#define MAX_CONNECTIONS 64
#define MAX_DEPTH 64

/* Longest zero and trim, in multiples of the longest write. */
#define ZERO_FACTOR 16

/* A segment that belongs to anybody is not longer than this. */
#define MAX_ANYBODY (64 * 1024)

/* How many requests a connection may be ahead of the others in a sweep. */
#define MAX_AHEAD 8

/* Lines of history that a failure prints. */
#define MAX_HISTORY 40

enum op {
  OP_READ,
  OP_WRITE,
  OP_ZERO,
  OP_TRIM,
  OP_CACHE,
  OP_FLUSH,
  OP_EXTENTS,
  NR_OPS,
};

static const char *const op_names[NR_OPS] = {
  "read", "write", "zero", "trim", "cache", "flush", "extents",
};

/* How often each is chosen. */
static const unsigned op_weights[NR_OPS] = { 26, 34, 16, 8, 5, 3, 8 };

/* States of a block; a set of them where the order of requests decides. */
#define HOLE 1      /* never changed: the base shows */
#define ALLOCATED 2 /* was written */
#define ZERO 4      /* was zeroed as a whole, and not written since */

/* What happened to a block in a round. */
#define WRITTEN 1
#define ZEROED_PARTLY 2
#define ZEROED_WHOLLY 4

/* Types of extents, as base:allocation defines them. */
#define TYPE_DATA 0
#define TYPE_HOLE_ZERO (LIBNBD_STATE_HOLE | LIBNBD_STATE_ZERO)
#define ANY_TYPE 0xf /* a set of types has bit T for type T */

struct request {
  enum op op;
  unsigned round;
  unsigned number; /* counted by the connection */
  unsigned connection;
  uint32_t flags;
  uint64_t offset;
  uint64_t length;
  const uint8_t *data; /* of a write: in the pool or in the zeroes */
  uint64_t began;      /* stamps, the same clock for all connections */
  uint64_t ended;      /* 0: no answer yet */
  int error;           /* errno, 0 if it succeeded */
};

/* A request in flight. */
struct command {
  bool used;
  int64_t cookie;
  size_t index;    /* in the connection's log */
  bool may_refuse; /* a fast zero that may get ENOTSUP */
  uint8_t *buf;    /* of a read */
  size_t buf_size;
  uint32_t *entries; /* of a query of extents: length, type, length ... */
  size_t nr_entries;
  size_t max_entries;
  unsigned replies;
};

struct random {
  uint64_t state;
};

/* One connection.  Only its thread uses it while a round lasts, between the
 * rounds the main thread does.
 */
struct connection {
  unsigned id;
  struct nbd_handle *nbd;
  struct random random;
  struct command commands[MAX_DEPTH];
  unsigned in_flight;
  unsigned depth; /* limit of in_flight in this round */
  struct request *log;
  size_t nr_log;
  size_t max_log;
  size_t log_of_round;  /* first of the present round */
  atomic_uint progress; /* requests made in this round; others look at it */
  pthread_t thread;
};

#define ANYBODY (-1)
#define NOBODY (-2)

struct segment {
  uint64_t start;
  int owner; /* a connection, ANYBODY, or NOBODY in the mark of the end */
};

/* Who owns what.  Constant while requests are in flight. */
struct layout {
  struct segment *segments; /* ends with one at the disk's end */
  size_t nr_segments;
  size_t max_segments;
  uint8_t *exclusive; /* of each block: 1 + who owns all of it, or 0 */
};

/* Where a round's requests go to. */
struct round {
  unsigned number;
  unsigned nr_requests;        /* of each connection */
  uint64_t max_request;        /* of reads and writes */
  uint64_t focus_start, focus; /* most are in here */
  bool sweep; /* all move through it together, so that blocks are fought
               * over when they are touched for the first time */
  bool duels; /* requests for whole blocks and, from others, for bytes of
               * anybody's in the same blocks */
};

struct base_extent {
  uint64_t start;
  uint32_t type;
};

static struct {
  const char *server;
  const char *base_file;
  const char *base_map;
  const char *result;
  uint64_t block_size;
  unsigned requests;
  unsigned rounds;
  unsigned connections;
  unsigned depth;
  uint64_t max_request;
  unsigned timeout;
  uint64_t seed;
  bool kept_reads; /* reads or prefetches may allocate blocks */
  bool lax;
  unsigned views; /* snapshots at a time */
  bool full;      /* there may be no space left */
} options = {
  .block_size = 4096,
  .requests = 4000,
  .rounds = 8,
  .connections = 4,
  .depth = 8,
  .max_request = 4 << 20,
  .timeout = 300,
};

/* The disk.  Bytes and blocks of the model are changed by their owner. */
static uint64_t disk_size;
static uint64_t nr_blocks;
static uint8_t *model;
static uint8_t *base;
static uint8_t *states;
static _Atomic uint8_t *events; /* of this round; any thread adds to them */

static struct base_extent *base_extents; /* ends with one at the disk's end */
static size_t nr_base_extents;

/* What is written: pieces of a pool of random bytes, or zeroes.  Constant. */
static uint8_t *pool;
static size_t pool_size;
static uint8_t *zeroes;

static struct layout round_layout; /* of the round */
static struct layout solo_layout;  /* all belongs to one connection */
static const struct layout *layout;
static struct round the_round;

static struct connection connections[MAX_CONNECTIONS];
static unsigned weights[NR_OPS]; /* 0 if the server does not offer it */
static uint32_t offered_flags;
static atomic_uint_fast64_t clock_now = 1;

/* A snapshot that is held, and what it must have.  Only the main thread uses them between
 * the rounds, and one other while a round lasts.
 */
#define MAX_VIEWS 16

struct view {
  struct nbd_handle *nbd; /* NULL: none */
  uint8_t *content;
};
static struct view views[MAX_VIEWS];
static atomic_bool round_ended;
static unsigned nr_checked_views;

static atomic_uint nr_full; /* requests that found no space left */

/* The first failure; the others are not looked at. */
static atomic_bool failed;
static struct {
  pthread_mutex_t lock;
  char text[2048];
  bool has_offset;
  uint64_t offset;
  uint8_t got[16];
  size_t nr_got;
} failure = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* Functions, because their arguments are often random numbers. */
static inline uint64_t
least (uint64_t x, uint64_t y)
{
  return x < y ? x : y;
}

static inline uint64_t
most (uint64_t x, uint64_t y)
{
  return x > y ? x : y;
}

/* Random numbers -------------------------------------------------------- */

static uint64_t
random_next (struct random *random)
{
  uint64_t z = random->state += UINT64_C (0x9e3779b97f4a7c15);

  z = (z ^ z >> 30) * UINT64_C (0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C (0x94d049bb133111eb);
  return z ^ z >> 31;
}

/* A generator of its own for each purpose, so that they do not depend on each
 * other.
 */
static struct random
random_for (unsigned round, unsigned who)
{
  struct random random = { options.seed };

  random.state = random_next (&random) + round;
  random.state = random_next (&random) + who;
  return random;
}

/* 0 .. n-1; n must not be 0. */
static uint64_t
random_below (struct random *random, uint64_t n)
{
  return random_next (random) % n;
}

static bool
one_in (struct random *random, unsigned n)
{
  return random_below (random, n) == 0;
}

/* low .. high, small ones as likely as large ones. */
static uint64_t
random_length (struct random *random, uint64_t low, uint64_t high)
{
  uint64_t span, more;
  unsigned bits;

  if (high <= low)
    return low;
  span = high - low;
  bits = random_below (random, 65 - __builtin_clzll (span));
  more = bits == 0 ? 0 : random_next (random) >> (64 - bits);
  return low + least (more, span);
}

/* Failures -------------------------------------------------------------- */

static void die (const char *fs, ...)
  __attribute__ ((format (printf, 1, 2), noreturn));
static void fail (const char *fs, ...) __attribute__ ((format (printf, 1, 2)));

/* It cannot be tested; nothing is said about the server. */
static void
die (const char *fs, ...)
{
  va_list args;

  fprintf (stderr, "model: ");
  va_start (args, fs);
  vfprintf (stderr, fs, args);
  va_end (args);
  fprintf (stderr, "\n");
  exit (2);
}

static void *
checked (void *pointer)
{
  if (pointer == NULL)
    die ("out of memory");
  return pointer;
}

static const char *
format_request (const struct request *r, char *buf, size_t size)
{
  static const struct {
    uint32_t flag;
    enum op only;
    const char *name;
  } names[] = {
    { LIBNBD_CMD_FLAG_FUA, NR_OPS, " fua" },
    { LIBNBD_CMD_FLAG_NO_HOLE, NR_OPS, " no-hole" },
    { LIBNBD_CMD_FLAG_FAST_ZERO, NR_OPS, " fast" },
    { LIBNBD_CMD_FLAG_REQ_ONE, NR_OPS, " one" },
  };
  size_t n;

  n = snprintf (
    buf, size, "round %u connection %u request %u: %s %" PRIu64 "+%" PRIu64,
    r->round, r->connection, r->number, op_names[r->op], r->offset, r->length);
  for (size_t i = 0; i < sizeof names / sizeof names[0]; ++i) {
    if (r->flags & names[i].flag && n < size)
      n += snprintf (buf + n, size - n, "%s", names[i].name);
  }
  return buf;
}

/* Returns true for the first failure, whose caller then fills in the rest and
 * calls failure_done.
 */
static bool
failure_begin (void)
{
  pthread_mutex_lock (&failure.lock);
  if (!atomic_load (&failed))
    return true;
  pthread_mutex_unlock (&failure.lock);
  return false;
}

static void
failure_done (void)
{
  atomic_store (&failed, true);
  pthread_mutex_unlock (&failure.lock);
}

static void
fail (const char *fs, ...)
{
  va_list args;

  if (!failure_begin ())
    return;
  va_start (args, fs);
  vsnprintf (failure.text, sizeof failure.text, fs, args);
  va_end (args);
  failure_done ();
}

/* A failure of a request at a place of the disk, whose history is printed. */
static void __attribute__ ((format (printf, 3, 4)))
fail_at (const struct request *r, uint64_t offset, const char *fs, ...)
{
  char line[256];
  size_t n;
  va_list args;

  if (!failure_begin ())
    return;
  n = snprintf (failure.text, sizeof failure.text,
                "%s\nat offset %" PRIu64 " (block %" PRIu64 ", byte %" PRIu64
                " of it): ",
                format_request (r, line, sizeof line), offset,
                offset / options.block_size, offset % options.block_size);
  va_start (args, fs);
  vsnprintf (failure.text + n, sizeof failure.text - n, fs, args);
  va_end (args);
  failure.has_offset = true;
  failure.offset = offset;
  failure_done ();
}

static const char *
format_bytes (const uint8_t *bytes, size_t n, char *buf)
{
  for (size_t i = 0; i < n; ++i)
    sprintf (buf + 3 * i, " %02x", bytes[i]);
  return buf;
}

static size_t
first_difference (const uint8_t *a, const uint8_t *b, size_t n)
{
  size_t i = 0;

  while (n - i > 4096 && memcmp (a + i, b + i, 4096) == 0)
    i += 4096;
  while (i < n && a[i] == b[i])
    i++;
  return i;
}

static bool
is_zero (const uint8_t *bytes, size_t n)
{
  return n == 0 || (bytes[0] == 0 && memcmp (bytes, bytes + 1, n - 1) == 0);
}

/* GOT differs from EXPECTED, N bytes from OFFSET on. */
static void
fail_bytes (const struct request *r, uint64_t offset, const uint8_t *expected,
            const uint8_t *got, size_t n)
{
  char expected_text[64], got_text[64];
  const char *hint = "";
  size_t first = first_difference (expected, got, n);
  size_t last = n - 1;
  size_t shown = least (n - first, sizeof failure.got);

  while (expected[last] == got[last])
    last--;
  if (memcmp (got + first, base + offset + first, shown) == 0)
    hint = " (the base's)";
  else if (is_zero (got + first, shown))
    hint = " (zeroes)";
  fail_at (r, offset + first,
           "wrong bytes, up to offset %" PRIu64 "\nexpected%s\ngot     %s%s",
           offset + last,
           format_bytes (expected + first, shown, expected_text),
           format_bytes (got + first, shown, got_text), hint);

  pthread_mutex_lock (&failure.lock);
  if (failure.nr_got == 0 && failure.offset == offset + first) {
    memcpy (failure.got, got + first, shown);
    failure.nr_got = shown;
  }
  pthread_mutex_unlock (&failure.lock);
}

static int
compare_began (const void *a, const void *b)
{
  const struct request *x = *(const struct request *const *) a;
  const struct request *y = *(const struct request *const *) b;

  return x->began < y->began ? -1 : x->began > y->began;
}

static bool
covers (const struct request *r, uint64_t offset)
{
  return r->offset <= offset && offset - r->offset < r->length;
}

/* Would R alone have made the failing bytes what they are? */
static bool
explains (const struct request *r)
{
  size_t n;

  if (failure.nr_got == 0 || !covers (r, failure.offset))
    return false;
  n = least (failure.nr_got, r->offset + r->length - failure.offset);
  switch (r->op) {
  case OP_WRITE:
    return memcmp (failure.got, r->data + (failure.offset - r->offset), n)
           == 0;
  case OP_ZERO:
  case OP_TRIM:
    return is_zero (failure.got, n);
  default:
    return false;
  }
}

static void
print_history_line (const struct request *r)
{
  char line[256];

  fprintf (stderr, "%c%c %s [%" PRIu64 " - ",
           covers (r, failure.offset) ? '*' : ' ', explains (r) ? '=' : ' ',
           format_request (r, line, sizeof line), r->began);
  if (r->ended)
    fprintf (stderr, "%" PRIu64 "]%s%s\n", r->ended, r->error ? " " : "",
             r->error ? strerror (r->error) : "");
  else
    fprintf (stderr, "in flight]\n");
}

static bool
changes_bytes (const struct request *r)
{
  return r->op == OP_WRITE || r->op == OP_ZERO || r->op == OP_TRIM;
}

/* Could R have had a part in what START .. END-1 is? */
static bool
is_history (const struct request *r, uint64_t start, uint64_t end)
{
  if (r->offset >= end || start >= r->offset + r->length)
    return false;
  if (r->op == OP_READ || r->op == OP_CACHE)
    return options.kept_reads;
  return changes_bytes (r);
}

/* What was last done to the block of the failing byte. */
static void
print_history (void)
{
  const struct request **found = NULL;
  uint64_t start = failure.offset - failure.offset % options.block_size;
  size_t n = 0, max = 0;

  for (unsigned c = 0; c < options.connections; ++c) {
    for (size_t i = 0; i < connections[c].nr_log; ++i) {
      if (!is_history (&connections[c].log[i], start,
                       start + options.block_size))
        continue;
      if (n == max)
        found
          = checked (realloc (found, (max = 2 * max + 64) * sizeof found[0]));
      found[n++] = &connections[c].log[i];
    }
  }
  fprintf (stderr,
           "requests to this block, with the times when they began and ended"
           " (*: to this byte, =: would explain what was got):\n");
  if (n > 0)
    qsort (found, n, sizeof found[0], compare_began);
  for (size_t i = n > MAX_HISTORY ? n - MAX_HISTORY : 0; i < n; ++i)
    print_history_line (found[i]);
  free (found);
}

static void
print_failure (void)
{
  fprintf (stderr, "model: FAILED: seed %" PRIu64 ", round %u\n%s\n",
           options.seed, the_round.number, failure.text);
  if (failure.has_offset)
    print_history ();
}

/* Segments -------------------------------------------------------------- */

/* Adds a segment, or makes the last one longer.  The last one ends where this
 * one starts, or nowhere if it started there.
 */
static void
add_segment (struct layout *l, uint64_t start, int owner)
{
  if (l->nr_segments > 0 && l->segments[l->nr_segments - 1].start == start)
    l->nr_segments--;
  if (l->nr_segments > 0 && l->segments[l->nr_segments - 1].owner == owner)
    return;
  if (l->nr_segments == l->max_segments) {
    l->max_segments = 2 * l->max_segments + 64;
    l->segments = checked (
      realloc (l->segments, l->max_segments * sizeof l->segments[0]));
  }
  l->segments[l->nr_segments++] = (struct segment) { start, owner };
}

/* The segments but for the one that marks the end. */
static size_t
count_segments (void)
{
  return layout->nr_segments - 1;
}

static uint64_t
segment_end (size_t i)
{
  return layout->segments[i + 1].start;
}

static size_t
find_segment (uint64_t offset)
{
  size_t low = 0, high = count_segments ();

  while (high - low > 1) {
    size_t middle = low + (high - low) / 2;

    if (layout->segments[middle].start <= offset)
      low = middle;
    else
      high = middle;
  }
  return low;
}

static uint64_t
block_start (uint64_t block)
{
  return block * options.block_size;
}

static uint64_t
block_end (uint64_t block)
{
  return least (disk_size, (block + 1) * options.block_size);
}

static void
find_exclusive_blocks (struct layout *l)
{
  size_t s = 0;

  for (uint64_t b = 0; b < nr_blocks; ++b) {
    while (l->segments[s + 1].start <= block_start (b))
      s++;
    l->exclusive[b] = block_end (b) <= l->segments[s + 1].start
                        ? l->segments[s].owner + 1
                        : 0;
  }
}

/* Everything belongs to connection ID. */
static void
make_solo_layout (unsigned id)
{
  solo_layout.nr_segments = 0;
  add_segment (&solo_layout, 0, id);
  add_segment (&solo_layout, disk_size, NOBODY);
  memset (solo_layout.exclusive, id + 1, nr_blocks);
  layout = &solo_layout;
}

static int
choose_owner (struct random *random, int previous)
{
  int owner = random_below (random, options.connections);

  if (owner == previous)
    owner = (owner + 1) % options.connections;
  return owner;
}

/* Divides START .. END-1 into segments of MIN .. MAX bytes, one in ANYBODYS
 * for anybody (0: none).
 */
static void
add_segments (struct random *random, uint64_t start, uint64_t end,
              uint64_t min, uint64_t max, unsigned anybodys)
{
  uint64_t length;
  int owner = ANYBODY;

  while (start < end) {
    length = random_length (random, min, max);
    if (anybodys && owner != ANYBODY && one_in (random, anybodys)) {
      owner = ANYBODY;
      length = least (length, MAX_ANYBODY);
    }
    else
      owner = choose_owner (random, owner);
    add_segment (&round_layout, start, owner);
    start += most (length, 1);
  }
}

/* Divides START .. END-1 into runs of whole blocks, with a piece of anybody's
 * in each block.
 */
static void
add_duels (struct random *random, uint64_t start, uint64_t end)
{
  int owner = ANYBODY;

  for (uint64_t next; start < end; start = next) {
    uint64_t piece, length;

    next = least (end, block_end (start / options.block_size));
    if (owner == ANYBODY || one_in (random, 4))
      owner = choose_owner (random, owner);
    add_segment (&round_layout, start, owner);
    piece = start + random_below (random, next - start);
    length = random_length (random, 1, least (MAX_ANYBODY, next - piece));
    add_segment (&round_layout, piece, ANYBODY);
    if (piece + length < next)
      add_segment (&round_layout, piece + length, owner);
  }
}

/* Segments of MIN .. MAX bytes in the focus and long ones elsewhere. */
static void
make_round_layout (struct random *random, uint64_t min, uint64_t max,
                   unsigned anybodys)
{
  uint64_t focus_end = the_round.focus_start + the_round.focus;
  uint64_t long_min = disk_size / 64, long_max = disk_size / 4;

  round_layout.nr_segments = 0;
  add_segments (random, 0, the_round.focus_start, long_min, long_max, 0);
  if (the_round.duels)
    add_duels (random, the_round.focus_start, focus_end);
  else
    add_segments (random, the_round.focus_start, focus_end, min, max,
                  anybodys);
  add_segments (random, focus_end, disk_size, long_min, long_max, 0);
  add_segment (&round_layout, disk_size, NOBODY);
  find_exclusive_blocks (&round_layout);
  layout = &round_layout;
}

/* The part of START .. END-1 that is in segment I. */
struct piece {
  uint64_t start, end;
};

static struct piece
piece_of (size_t i, uint64_t start, uint64_t end)
{
  return (struct piece) { most (start, layout->segments[i].start),
                          least (end, segment_end (i)) };
}

/* The model -------------------------------------------------------------- */

static void
check_own_bytes (const struct connection *c, const struct request *r,
                 const uint8_t *got)
{
  uint64_t end = r->offset + r->length;

  for (size_t i = find_segment (r->offset);
       i < count_segments () && layout->segments[i].start < end; ++i) {
    struct piece p = piece_of (i, r->offset, end);
    const uint8_t *g = got + (p.start - r->offset);

    if (layout->segments[i].owner != (int) c->id)
      continue;
    if (memcmp (g, model + p.start, p.end - p.start) != 0)
      fail_bytes (r, p.start, model + p.start, g, p.end - p.start);
  }
}

static void
change_own_bytes (const struct connection *c, const struct request *r)
{
  uint64_t end = r->offset + r->length;

  for (size_t i = find_segment (r->offset);
       i < count_segments () && layout->segments[i].start < end; ++i) {
    struct piece p = piece_of (i, r->offset, end);

    if (layout->segments[i].owner != (int) c->id)
      continue;
    if (r->op == OP_WRITE)
      memcpy (model + p.start, r->data + (p.start - r->offset),
              p.end - p.start);
    else
      memset (model + p.start, 0, p.end - p.start);
  }
}

/* The state of a block that was in STATE after what HAPPENED to it, in an
 * order that is not known.
 */
static uint8_t
state_after (uint8_t state, uint8_t happened)
{
  if (happened & WRITTEN)
    return happened & ZEROED_WHOLLY ? ALLOCATED | ZERO : ALLOCATED;
  if (happened & ZEROED_WHOLLY)
    return ZERO;
  /* The other bytes have to be taken from the base.  In a block that reads as
   * zeroes nothing has to be written.
   */
  if (happened & ZEROED_PARTLY && state == HOLE)
    return ALLOCATED;
  return state;
}

static void
change_blocks (const struct connection *c, const struct request *r)
{
  uint64_t end = r->offset + r->length;
  uint64_t last = (end - 1) / options.block_size;

  for (uint64_t b = r->offset / options.block_size; b <= last; ++b) {
    bool whole = r->offset <= block_start (b) && block_end (b) <= end;
    bool written = r->op == OP_WRITE || r->flags & LIBNBD_CMD_FLAG_NO_HOLE;
    uint8_t event = written ? WRITTEN : whole ? ZEROED_WHOLLY : ZEROED_PARTLY;

    if (layout->exclusive[b] == c->id + 1)
      states[b] = state_after (states[b], event);
    else
      atomic_fetch_or (&events[b], event);
  }
}

/* At the end of a round, with its layout. */
static void
settle_shared_blocks (void)
{
  for (uint64_t b = 0; b < nr_blocks; ++b) {
    states[b] = state_after (states[b], atomic_load (&events[b]));
    atomic_store (&events[b], 0);
  }
}

/* Known never to need the base again. */
static bool
is_changed (uint64_t block)
{
  return states[block] != HOLE || atomic_load (&events[block]) != 0;
}

/* May this fast zero be refused?  Only where a block that it covers in part
 * may have to be read from the base, or space has to be found.
 */
static bool
may_refuse (const struct request *r)
{
  uint64_t end = r->offset + r->length;
  uint64_t first = r->offset / options.block_size;
  uint64_t last = (end - 1) / options.block_size;

  if (options.lax)
    return true;
  /* Not every file system sets space aside at once. */
  if (options.full && r->flags & LIBNBD_CMD_FLAG_NO_HOLE)
    return true;
  if (r->offset > block_start (first) && !is_changed (first))
    return true;
  if (end < block_end (last) && !is_changed (last))
    return true;
  return first == last && end < block_end (first) && !is_changed (first);
}

static const struct base_extent *
find_base_extent (uint64_t offset)
{
  size_t low = 0, high = nr_base_extents;

  while (high - low > 1) {
    size_t middle = low + (high - low) / 2;

    if (base_extents[middle].start <= offset)
      low = middle;
    else
      high = middle;
  }
  return &base_extents[low];
}

/* The types that may be reported at OFFSET, as a set.  *END is lowered to
 * where this ends.
 */
static unsigned
allowed_types (uint64_t offset, uint64_t *end)
{
  uint64_t block = offset / options.block_size;
  const struct base_extent *e;
  unsigned allowed;

  *end = least (*end, block_end (block));
  switch (states[block]) {
  case ALLOCATED:
    return 1 << TYPE_DATA;
  case ZERO:
    return 1 << TYPE_HOLE_ZERO;
  case ALLOCATED | ZERO:
    return 1 << TYPE_DATA | 1 << TYPE_HOLE_ZERO;
  }
  if (base_extents == NULL)
    return ANY_TYPE;
  e = find_base_extent (offset);
  *end = least (*end, e[1].start);
  allowed = 1 << e->type;
  if (options.kept_reads)
    allowed |= 1 << TYPE_DATA;
  return allowed;
}

/* Extents --------------------------------------------------------------- */

static void
check_zero_bytes (const struct connection *c, const struct request *r,
                  uint64_t start, uint64_t end)
{
  for (size_t i = find_segment (start);
       i < count_segments () && layout->segments[i].start < end; ++i) {
    struct piece p = piece_of (i, start, end);

    if (layout->segments[i].owner != (int) c->id)
      continue;
    if (!is_zero (model + p.start, p.end - p.start)) {
      while (model[p.start] == 0)
        p.start++;
      fail_at (r, p.start, "reported as zero, but it is %02x", model[p.start]);
    }
  }
}

/* Those blocks of START .. END-1 whose state is known to this connection. */
static void
check_types (const struct connection *c, const struct request *r,
             uint64_t start, uint64_t end, uint32_t type)
{
  for (uint64_t next; start < end; start = next) {
    uint64_t block = start / options.block_size;
    unsigned allowed;

    next = least (end, block_end (block));
    if (layout->exclusive[block] != c->id + 1)
      continue;
    allowed = allowed_types (start, &next);
    if (!(allowed & 1 << type)) {
      fail_at (r, start,
               "type %" PRIu32 ", expected %s; the block should be %s", type,
               allowed == 1 << TYPE_DATA        ? "0"
               : allowed == 1 << TYPE_HOLE_ZERO ? "3"
                                                : "another",
               states[block] == HOLE        ? "a hole"
               : states[block] == ALLOCATED ? "allocated"
               : states[block] == ZERO      ? "zero"
                                            : "allocated or zero");
      return;
    }
    if (states[block] == (ALLOCATED | ZERO))
      states[block] = type == TYPE_DATA ? ALLOCATED : ZERO;
  }
}

/* One extent of the answer to R, which may go on after the end of R. */
static void
check_extent (const struct connection *c, const struct request *r,
              uint64_t start, uint64_t length, uint32_t type)
{
  uint64_t end;

  if (length == 0) {
    fail_at (r, start, "an extent of no length");
    return;
  }
  if (length > disk_size - start) {
    fail_at (r, start, "an extent beyond the end of the disk");
    return;
  }
  if (type & ~(uint32_t) TYPE_HOLE_ZERO) {
    fail_at (r, start, "unknown type %" PRIu32, type);
    return;
  }
  end = least (start + length, r->offset + r->length);
  if (start >= end)
    return;
  if (type & LIBNBD_STATE_ZERO)
    check_zero_bytes (c, r, start, end);
  if (!options.lax)
    check_types (c, r, start, end, type);
}

/* Returns how many bytes the answer is about. */
static uint64_t
check_extents (const struct connection *c, const struct request *r,
               const struct command *command)
{
  uint64_t start = r->offset;

  if (command->replies != 1 || command->nr_entries < 2) {
    fail_at (r, start, "no extents in the reply, or more than one list");
    return 0;
  }
  if (r->flags & LIBNBD_CMD_FLAG_REQ_ONE
      && (command->nr_entries > 2 || command->entries[0] > r->length))
    fail_at (r, start, "more than the one extent that was asked for");

  for (size_t i = 0; i < command->nr_entries && !atomic_load (&failed);
       i += 2) {
    const uint32_t *e = command->entries + i;

    if (i > 0 && e[1] == e[-1])
      fail_at (r, start, "two neighbours of type %" PRIu32, e[1]);
    check_extent (c, r, start, e[0], e[1]);
    start += e[0];
  }
  return start - r->offset;
}

static int
receive_extents (void *opaque, const char *context, uint64_t offset,
                 uint32_t *entries, size_t nr_entries, int *error)
{
  struct command *command = opaque;

  (void) offset;
  (void) error;
  if (strcmp (context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0)
    return 0;
  if (nr_entries > command->max_entries) {
    command->max_entries = nr_entries;
    command->entries
      = checked (realloc (command->entries, nr_entries * sizeof entries[0]));
  }
  memcpy (command->entries, entries, nr_entries * sizeof entries[0]);
  command->nr_entries = nr_entries;
  command->replies++;
  return 0;
}

/* Sending requests ------------------------------------------------------ */

/* What a request is about, as far as others of its connection must stay away
 * from it.  Queries of extents are about whole blocks.
 */
static struct piece
extent_of (const struct request *r)
{
  struct piece p = { r->offset, r->offset + r->length };

  if (r->op == OP_EXTENTS) {
    p.start -= p.start % options.block_size;
    p.end = block_end ((p.end - 1) / options.block_size);
  }
  return p;
}

static bool
conflict (const struct request *a, const struct request *b)
{
  struct piece p, q;

  if (a->length == 0 || b->length == 0)
    return false;
  if (!changes_bytes (a) && !changes_bytes (b))
    return false;
  p = extent_of (a);
  q = extent_of (b);
  return p.start < q.end && q.start < p.end;
}

static bool
conflicts_in_flight (const struct connection *c, const struct request *r)
{
  for (unsigned i = 0; i < MAX_DEPTH; ++i) {
    const struct command *command = &c->commands[i];

    if (command->used && conflict (&c->log[command->index], r))
      return true;
  }
  return false;
}

static uint8_t byte_of (const struct request *r, uint64_t offset);

/* A request found no space left.  It has changed the state of no block; but of the bytes of
 * blocks that were allocated already, any may be new.
 */
static void
settle_failed (struct connection *c, const struct request *r)
{
  const uint64_t end = r->offset + r->length;
  uint8_t *got = checked (malloc (r->length));

  if (nbd_pread (c->nbd, got, r->length, r->offset, 0) == -1)
    fail_at (r, r->offset, "read after it failed: %s", nbd_get_error ());
  for (size_t i = find_segment (r->offset);
       i < count_segments () && layout->segments[i].start < end
       && !atomic_load (&failed);
       ++i) {
    const struct piece p = piece_of (i, r->offset, end);

    if (layout->segments[i].owner != (int) c->id)
      continue;
    for (uint64_t o = p.start; o < p.end; ++o) {
      const uint8_t byte = got[o - r->offset];

      if (byte != model[o] && byte != byte_of (r, o)) {
        fail_at (r, o, "after it failed: got %02x, neither old nor new", byte);
        break;
      }
      model[o] = byte;
    }
  }
  free (got);
}

static void
complete (struct connection *c, struct command *command, int error)
{
  struct request *r = &c->log[command->index];

  r->ended = atomic_fetch_add (&clock_now, 1);
  r->error = error;
  command->used = false;
  c->in_flight--;

  if (error == ENOSPC && options.full && changes_bytes (r)) {
    atomic_fetch_add (&nr_full, 1);
    settle_failed (c, r);
    return;
  }
  if (error) {
    if (error != ENOTSUP || !command->may_refuse)
      fail_at (r, r->offset, "failed: %s", strerror (error));
    return;
  }
  switch (r->op) {
  case OP_READ:
    check_own_bytes (c, r, command->buf);
    break;
  case OP_WRITE:
  case OP_ZERO:
  case OP_TRIM:
    change_own_bytes (c, r);
    change_blocks (c, r);
    break;
  case OP_EXTENTS:
    check_extents (c, r, command);
    break;
  default:
    break;
  }
}

static struct command *
find_command (struct connection *c, int64_t cookie)
{
  for (unsigned i = 0; i < MAX_DEPTH; ++i) {
    if (c->commands[i].used && c->commands[i].cookie == cookie)
      return &c->commands[i];
  }
  return NULL;
}

/* Waits for an answer and looks at it. */
static void
complete_one (struct connection *c)
{
  struct command *command;
  int64_t cookie;
  int r;

  /* 0 or -1 while there is none. */
  while ((cookie = nbd_aio_peek_command_completed (c->nbd)) <= 0) {
    r = nbd_poll (c->nbd, options.timeout * 1000);
    if (r == 0)
      fail ("connection %u got no answer for %u s", c->id, options.timeout);
    else if (r == -1 || nbd_aio_is_dead (c->nbd))
      fail ("connection %u: %s", c->id,
            r == -1 ? nbd_get_error () : "the server closed it");
    else
      continue;
    return;
  }
  command = find_command (c, cookie);
  r = nbd_aio_command_completed (c->nbd, cookie);
  if (command == NULL || r == 0)
    fail ("connection %u: an answer to nothing", c->id);
  else
    complete (c, command, r == 1 ? 0 : nbd_get_errno ());
}

static void
drain (struct connection *c)
{
  while (c->in_flight > 0 && !atomic_load (&failed))
    complete_one (c);
}

static int64_t
send_request (struct connection *c, const struct request *r,
              struct command *command)
{
  switch (r->op) {
  case OP_READ:
    if (command->buf_size < r->length) {
      free (command->buf);
      command->buf_size = r->length;
      command->buf = checked (malloc (r->length));
    }
    return nbd_aio_pread (c->nbd, command->buf, r->length, r->offset,
                          NBD_NULL_COMPLETION, r->flags);
  case OP_WRITE:
    return nbd_aio_pwrite (c->nbd, r->data, r->length, r->offset,
                           NBD_NULL_COMPLETION, r->flags);
  case OP_ZERO:
    return nbd_aio_zero (c->nbd, r->length, r->offset, NBD_NULL_COMPLETION,
                         r->flags);
  case OP_TRIM:
    return nbd_aio_trim (c->nbd, r->length, r->offset, NBD_NULL_COMPLETION,
                         r->flags);
  case OP_CACHE:
    return nbd_aio_cache (c->nbd, r->length, r->offset, NBD_NULL_COMPLETION,
                          r->flags);
  case OP_FLUSH:
    return nbd_aio_flush (c->nbd, NBD_NULL_COMPLETION, r->flags);
  default:
    return nbd_aio_block_status (
      c->nbd, r->length, r->offset,
      (nbd_extent_callback) { .callback = receive_extents,
                              .user_data = command },
      NBD_NULL_COMPLETION, r->flags);
  }
}

static size_t
log_request (struct connection *c, const struct request *r)
{
  if (c->nr_log == c->max_log) {
    c->max_log = 2 * c->max_log + 1024;
    c->log = checked (realloc (c->log, c->max_log * sizeof c->log[0]));
  }
  c->log[c->nr_log] = *r;
  c->log[c->nr_log].number = c->nr_log;
  c->log[c->nr_log].connection = c->id;
  c->log[c->nr_log].round = the_round.number;
  return c->nr_log++;
}

/* Sends a request as soon as it is allowed to be in flight. */
static void
submit (struct connection *c, const struct request *template)
{
  struct command *command = c->commands;
  struct request *r;

  while ((c->in_flight >= c->depth || conflicts_in_flight (c, template))
         && !atomic_load (&failed))
    complete_one (c);
  if (atomic_load (&failed))
    return;

  while (command->used)
    command++;
  command->index = log_request (c, template);
  r = &c->log[command->index];
  command->replies = 0;
  command->nr_entries = 0;
  command->may_refuse = r->flags & LIBNBD_CMD_FLAG_FAST_ZERO && may_refuse (r);
  r->began = atomic_fetch_add (&clock_now, 1);
  command->cookie = send_request (c, r, command);
  if (command->cookie == -1) {
    fail_at (r, r->offset, "not sent: %s", nbd_get_error ());
    return;
  }
  command->used = true;
  c->in_flight++;
}

/* Making requests up ---------------------------------------------------- */

static uint64_t
choose_point (struct random *random, unsigned i)
{
  uint64_t point, width;
  size_t s;

  if (one_in (random, 16))
    return random_below (random, disk_size);
  if (!the_round.sweep)
    return the_round.focus_start + random_below (random, the_round.focus);

  width = least (the_round.focus, 4 * options.block_size);
  point = the_round.focus_start + random_below (random, width)
          + (the_round.focus - width) * i / the_round.nr_requests;
  if (the_round.duels && one_in (random, 2)) {
    s = find_segment (point);
    if (layout->segments[s + 1].owner == ANYBODY)
      point = layout->segments[s + 1].start;
  }
  return point;
}

static bool
may_change (const struct connection *c, size_t segment)
{
  int owner = layout->segments[segment].owner;

  return owner == (int) c->id || owner == ANYBODY;
}

/* The surroundings of *POINT that a connection may change.  If that is nothing,
 * *POINT is moved.  Returns false if there is nothing on all of the disk.
 */
static bool
find_reach (struct connection *c, uint64_t *point, struct piece *reach)
{
  size_t n = count_segments ();
  size_t first = find_segment (*point), last, tried;

  for (tried = 0; tried < n && !may_change (c, first); ++tried)
    first = (first + 1) % n;
  if (tried == n)
    return false;
  if (tried > 0)
    *point = layout->segments[first].start
             + random_below (&c->random, segment_end (first)
                                           - layout->segments[first].start);
  last = first;
  if (the_round.duels || one_in (&c->random, 2)) {
    for (int i = 0; i < 4; ++i) {
      if (first > 0 && may_change (c, first - 1))
        first--;
      if (last + 1 < n && may_change (c, last + 1))
        last++;
    }
  }
  *reach
    = (struct piece) { layout->segments[first].start, segment_end (last) };
  return true;
}

/* Moves the edges of R to multiples of something, as most clients would. */
static void
align_some (struct random *random, struct request *r,
            const struct piece *reach, uint64_t max)
{
  const uint64_t units[] = { 512, 4096, options.block_size };
  uint64_t unit = units[random_below (random, 3)];
  uint64_t start = r->offset, end = r->offset + r->length;

  if (one_in (random, 2) && start - start % unit >= reach->start)
    start -= start % unit;
  if (one_in (random, 2)) {
    if (end - end % unit > start)
      end -= end % unit;
    else if (end % unit && end + unit - end % unit <= reach->end)
      end += unit - end % unit;
  }
  if (end - start <= max) {
    r->offset = start;
    r->length = end - start;
  }
}

/* The block of POINT, if all of it is in reach. */
static bool
choose_whole_block (struct request *r, uint64_t point,
                    const struct piece *reach)
{
  uint64_t start = block_start (point / options.block_size);
  uint64_t end = block_end (point / options.block_size);

  if (start < reach->start || end > reach->end
      || end - start > the_round.max_request)
    return false;
  r->offset = start;
  r->length = end - start;
  return true;
}

static void
choose_range (struct random *random, struct request *r, uint64_t point,
              const struct piece *reach)
{
  uint64_t max = the_round.max_request;
  uint64_t room = reach->end - reach->start;

  if (one_in (random, the_round.duels ? 2 : 16)
      && choose_whole_block (r, point, reach))
    return;
  if (r->op == OP_ZERO || r->op == OP_TRIM || r->op == OP_CACHE)
    max *= ZERO_FACTOR;
  if (r->op == OP_EXTENTS)
    max = UINT32_C (1) << 31;
  /* Lest cow-on-read leave no holes to fight over. */
  else if (options.kept_reads && !changes_bytes (r) && the_round.sweep)
    max = least (max, 2 * options.block_size);
  max = least (max, room);
  r->length = one_in (random, 24) ? max : random_length (random, 1, max);
  r->offset = point - least (point, random_below (random, r->length));
  r->offset = most (r->offset, reach->start);
  r->offset = least (r->offset, reach->end - r->length);
  if (one_in (random, 2))
    align_some (random, r, reach, max);
}

static enum op
choose_op (struct random *random)
{
  unsigned sum = 0, n;
  enum op op = 0;

  if (the_round.duels && one_in (random, 2)) {
    op = one_in (random, 2)   ? OP_WRITE
         : one_in (random, 2) ? OP_ZERO
                              : OP_TRIM;
    if (weights[op] > 0)
      return op;
    op = 0;
  }
  for (unsigned i = 0; i < NR_OPS; ++i)
    sum += weights[i];
  n = random_below (random, sum);
  while (n >= weights[op])
    n -= weights[op++];
  return op;
}

static uint32_t
choose_flags (struct random *random, enum op op)
{
  uint32_t flags = 0;

  if (op == OP_WRITE || op == OP_ZERO || op == OP_TRIM) {
    if (one_in (random, 8))
      flags |= LIBNBD_CMD_FLAG_FUA;
  }
  if (op == OP_ZERO) {
    if (one_in (random, 3))
      flags |= LIBNBD_CMD_FLAG_NO_HOLE;
    if (one_in (random, 2))
      flags |= LIBNBD_CMD_FLAG_FAST_ZERO;
  }
  flags &= offered_flags;
  if (op == OP_EXTENTS && one_in (random, 4))
    flags |= LIBNBD_CMD_FLAG_REQ_ONE;
  return flags;
}

static void
choose_data (struct random *random, struct request *r)
{
  r->data = pool + random_below (random, pool_size - options.max_request);
  if (one_in (random, 16))
    r->data = zeroes;
}

/* The I-th request of a connection in this round.  Depends on nothing but the
 * seed.
 */
static struct request
make_request (struct connection *c, unsigned i)
{
  struct random *random = &c->random;
  struct piece reach = { 0, disk_size };
  struct request r = { .op = choose_op (random) };
  uint64_t point = choose_point (random, i);
  bool anywhere;

  if (r.op == OP_FLUSH)
    return r;
  anywhere = !changes_bytes (&r) && one_in (random, 3);
  if (!anywhere && !find_reach (c, &point, &reach)) {
    if (changes_bytes (&r))
      r.op = OP_READ;
  }
  r.flags = choose_flags (random, r.op);
  choose_range (random, &r, point, &reach);
  if (r.op == OP_WRITE)
    choose_data (random, &r);
  return r;
}

static unsigned
slowest_progress (void)
{
  unsigned slowest = UINT_MAX;

  for (unsigned i = 0; i < options.connections; ++i)
    slowest = least (slowest, atomic_load (&connections[i].progress));
  return slowest;
}

/* Waits until the others have come as far, about: in a sweep they are to meet. */
static void
keep_in_step (struct connection *c, unsigned i)
{
  const struct timespec moment = { 0, 50000 };

  atomic_store (&c->progress, i);
  while (the_round.sweep && i > MAX_AHEAD
         && slowest_progress () < i - MAX_AHEAD && !atomic_load (&failed)) {
    if (c->in_flight > 0)
      complete_one (c);
    else
      nanosleep (&moment, NULL);
  }
}

static void *
run_connection (void *opaque)
{
  struct connection *c = opaque;

  for (unsigned i = 0; i < the_round.nr_requests && !atomic_load (&failed);
       ++i) {
    struct request r = make_request (c, i);

    keep_in_step (c, i);
    submit (c, &r);
  }
  atomic_store (&c->progress, UINT_MAX);
  drain (c);
  return NULL;
}

/* What belonged to anybody ---------------------------------------------- */

/* A request of this round and a segment of anybody's that it changed. */
struct contest {
  size_t segment;
  const struct request *request;
};

struct contests {
  struct contest *list;
  size_t n, max;
};

static void
add_contest (struct contests *all, size_t segment, const struct request *r)
{
  if (all->n == all->max) {
    all->max = 2 * all->max + 256;
    all->list = checked (realloc (all->list, all->max * sizeof all->list[0]));
  }
  all->list[all->n++] = (struct contest) { segment, r };
}

static int
compare_contests (const void *a, const void *b)
{
  const struct contest *x = a, *y = b;

  return x->segment < y->segment ? -1 : x->segment > y->segment;
}

static void
find_contests (struct contests *all)
{
  for (unsigned i = 0; i < options.connections; ++i) {
    const struct connection *c = &connections[i];

    for (size_t j = c->log_of_round; j < c->nr_log; ++j) {
      const struct request *r = &c->log[j];
      uint64_t end = r->offset + r->length;

      if (!changes_bytes (r) || (r->error && r->error != ENOSPC))
        continue;
      for (size_t s = find_segment (r->offset);
           s < count_segments () && layout->segments[s].start < end; ++s) {
        if (layout->segments[s].owner == ANYBODY)
          add_contest (all, s, r);
      }
    }
  }
  if (all->n > 0)
    qsort (all->list, all->n, sizeof all->list[0], compare_contests);
}

static int
compare_offsets (const void *a, const void *b)
{
  uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;

  return x < y ? -1 : x > y;
}

static uint8_t
byte_of (const struct request *r, uint64_t offset)
{
  return r->op == OP_WRITE ? r->data[offset - r->offset] : 0;
}

/* START .. END-1 was changed by all of a list of requests or by none of it, so
 * each byte must be that of one which ended after the last one began.  One that failed
 * may have changed it, or not.
 */
static void
check_contested_piece (const struct contest *list, size_t n, uint64_t start,
                       uint64_t end, const uint8_t *got,
                       const struct request *reader)
{
  uint64_t last_began = 0;
  bool tried = false; /* somebody failed to change it, or did so in part */

  for (size_t i = 0; i < n; ++i) {
    if (!covers (list[i].request, start))
      continue;
    if (list[i].request->error)
      tried = true;
    else
      last_began = most (last_began, list[i].request->began);
  }
  if (last_began == 0 && !tried) {
    if (memcmp (got, model + start, end - start) != 0)
      fail_bytes (reader, start, model + start, got, end - start);
    return;
  }
  for (uint64_t o = start; o < end; ++o) {
    const struct request *r = NULL;
    bool found = last_began == 0 && got[o - start] == model[o];

    for (size_t i = 0; i < n && !found; ++i) {
      r = list[i].request;
      found = covers (r, o) && r->ended >= last_began
              && byte_of (r, o) == got[o - start];
    }
    if (!found) {
      fail_at (reader, o,
               "got %02x, which none of the last requests wrote (this byte "
               "belongs to anybody)%s",
               got[o - start],
               base[o] == got[o - start] ? "; the base has it" : "");
      return;
    }
  }
}

static void
check_contested_segment (const struct contest *list, size_t n,
                         struct piece segment, const uint8_t *got,
                         const struct request *reader)
{
  uint64_t *cuts = checked (malloc ((2 * n + 2) * sizeof cuts[0]));
  size_t nr = 0;

  cuts[nr++] = segment.start;
  cuts[nr++] = segment.end;
  for (size_t i = 0; i < n; ++i) {
    const struct request *r = list[i].request;

    cuts[nr++] = most (segment.start, r->offset);
    cuts[nr++] = least (segment.end, r->offset + r->length);
  }
  qsort (cuts, nr, sizeof cuts[0], compare_offsets);
  for (size_t i = 0; i + 1 < nr && !atomic_load (&failed); ++i) {
    if (cuts[i] < cuts[i + 1])
      check_contested_piece (list, n, cuts[i], cuts[i + 1],
                             got + (cuts[i] - segment.start), reader);
  }
  free (cuts);
}

/* Checks what became of the bytes of anybody, and puts it into the model.  In
 * the layout of the round, with nothing in flight.
 */
static void
settle_contests (struct connection *c)
{
  struct contests all = { 0 };
  size_t next;
  uint8_t *got = NULL;

  find_contests (&all);
  for (size_t i = 0; i < all.n && !atomic_load (&failed); i = next) {
    size_t s = all.list[i].segment;
    struct piece p = { layout->segments[s].start, segment_end (s) };
    struct request r = { .op = OP_READ,
                         .round = the_round.number,
                         .connection = c->id,
                         .number = c->nr_log,
                         .offset = p.start,
                         .length = p.end - p.start };

    for (next = i; next < all.n && all.list[next].segment == s; ++next)
      ;
    got = checked (realloc (got, r.length));
    if (nbd_pread (c->nbd, got, r.length, r.offset, 0) == -1) {
      fail_at (&r, r.offset, "failed: %s", nbd_get_error ());
      break;
    }
    check_contested_segment (all.list + i, next - i, p, got, &r);
    memcpy (model + p.start, got, p.end - p.start);
  }
  free (got);
  free (all.list);
}

/* Snapshots -------------------------------------------------------------- */

static struct nbd_handle *connect_to (const char *server, const char *export);

static void
open_view (struct view *v)
{
  v->nbd = connect_to (options.server, "@snapshot");
  v->content = checked (malloc (disk_size));
  /* From now on, the next one is another one. */
  nbd_pread (v->nbd, v->content, 1, 0, 0);
}

static void
close_view (struct view *v)
{
  nbd_shutdown (v->nbd, 0);
  nbd_close (v->nbd);
  free (v->content);
  *v = (struct view) { .nbd = NULL };
}

/* Read START .. END-1 into BUF, or compare it with what the view must have.  -1 if that
 * failed, which was reported.
 */
static int
read_view (struct view *v, uint64_t start, uint64_t end, uint8_t *into)
{
  static uint8_t buf[1 << 20];

  for (uint64_t n; start < end; start += n) {
    n = least (sizeof buf, end - start);

    const struct request r = { .op = OP_READ,
                               .round = the_round.number,
                               .connection = MAX_CONNECTIONS,
                               .offset = start,
                               .length = n };

    if (nbd_pread (v->nbd, into ? into + start : buf, n, start, 0) == -1) {
      fail_at (&r, start, "snapshot: %s", nbd_get_error ());
      return -1;
    }
    if (!into && memcmp (buf, v->content + start, n) != 0) {
      fail_bytes (&r, start, v->content + start, buf, n);
      return -1;
    }
  }
  return 0;
}

/* Nothing is in flight: what the disk has is known. */
static void
views_between_rounds (void)
{
  struct random random = random_for (the_round.number, MAX_CONNECTIONS + 3);

  for (unsigned i = 0; i < options.views; ++i) {
    struct view *v = &views[i];

    if (!v->nbd) {
      open_view (v);
      memcpy (v->content, model, disk_size);
    }
    else if (one_in (&random, 3)) {
      if (read_view (v, 0, disk_size, NULL) == -1)
        return;
      nr_checked_views++;
      close_view (v);
    }
  }
}

/* While others write.  Looks at parts of what is held, lets one of them go, and makes one
 * that nobody knows the content of.
 */
static void *
views_in_round (void *opaque)
{
  struct random random = random_for (the_round.number, MAX_CONNECTIONS + 4);
  const unsigned gone = random_below (&random, options.views);
  unsigned turn = 0;

  (void) opaque;
  while (!atomic_load (&round_ended) && !atomic_load (&failed)) {
    struct view *v = &views[turn++ % options.views];

    if (!v->nbd) {
      open_view (v);
      if (read_view (v, 0, disk_size, v->content) == -1)
        return NULL;
    }
    const uint64_t start = random_below (&random, disk_size);

    if (read_view (v, start, least (start + (4 << 20), disk_size), NULL) == -1)
      return NULL;
    if (turn == options.views)
      close_view (&views[gone]);
  }
  return NULL;
}

/* Rounds ---------------------------------------------------------------- */

static void
check_bytes (struct connection *c, uint64_t offset, uint64_t end)
{
  uint64_t max = least (options.max_request, 1 << 20);

  while (offset < end && !atomic_load (&failed)) {
    struct request r = { .op = OP_READ, .offset = offset };

    r.length = random_length (&c->random, max / 8 + 1, max);
    r.length = least (r.length, end - offset);
    submit (c, &r);
    offset += r.length;
  }
  drain (c);
}

/* Where reads fill holes, holes are left alone until the end. */
static void
check_all_bytes (struct connection *c)
{
  if (!options.kept_reads || the_round.number == options.rounds) {
    check_bytes (c, 0, disk_size);
    return;
  }
  for (uint64_t next, b = 0; b < nr_blocks; b = next) {
    for (next = b; next < nr_blocks && states[next] != HOLE; ++next)
      ;
    if (b < next)
      check_bytes (c, block_start (b), block_end (next - 1));
    else
      next++;
  }
}

static void
check_all_extents (struct connection *c)
{
  uint64_t offset = 0, max;

  if (weights[OP_EXTENTS] == 0)
    return;
  max = one_in (&c->random, 2) ? disk_size : disk_size / 8 + 1;
  while (offset < disk_size && !atomic_load (&failed)) {
    struct request r = { .op = OP_EXTENTS, .offset = offset };
    uint64_t covered = 0;

    r.length = least (random_length (&c->random, max / 2 + 1, max),
                      disk_size - offset);
    r.length = least (r.length, UINT32_C (1) << 31);
    submit (c, &r);
    drain (c);
    /* The answer is still there, in the only command that was used. */
    for (size_t i = 0; i < c->commands[0].nr_entries; i += 2)
      covered += c->commands[0].entries[i];
    offset += least (r.length, covered);
  }
}

static void
check_disk (void)
{
  struct random random = random_for (the_round.number, MAX_CONNECTIONS);
  struct connection *c
    = &connections[random_below (&random, options.connections)];

  settle_shared_blocks ();
  settle_contests (c);
  make_solo_layout (c->id);
  c->depth = options.depth;
  check_all_bytes (c);
  check_all_extents (c);
}

/* Zeroes the focus, or some of it, so that also blocks that were changed in
 * earlier rounds can be fought over for the first time again.
 */
static void
zero_focus (struct random *random)
{
  struct connection *c
    = &connections[random_below (random, options.connections)];
  struct request r = { .op = one_in (random, 2) ? OP_ZERO : OP_TRIM };
  uint64_t part = random_length (random, 1, the_round.focus);

  if (weights[r.op] == 0)
    return;
  make_solo_layout (c->id);
  r.offset = the_round.focus_start + random_below (random, part);
  r.length = the_round.focus_start + the_round.focus - r.offset;
  r.length = least (r.length, ZERO_FACTOR * the_round.max_request);
  submit (c, &r);
  drain (c);
}

static void
choose_focus (struct random *random, uint64_t length)
{
  the_round.focus = least (length, disk_size);
  the_round.focus_start = 0;
  if (the_round.focus < disk_size)
    the_round.focus_start
      = random_below (random, disk_size - the_round.focus + 1);
}

static void
plan_round (unsigned number)
{
  struct random random = random_for (number, MAX_CONNECTIONS + 1);
  uint64_t block = options.block_size;
  unsigned share = options.requests / options.rounds + 1;
  uint64_t min, max;

  the_round = (struct round) { .number = number,
                               .nr_requests = share,
                               .max_request = options.max_request };
  switch ((options.seed + number) % 6) {
  case 0: /* many owners in each of a few blocks */
    choose_focus (&random,
                  least (random_length (&random, 1, 64) * block, 16 << 20));
    min = 200;
    max = 4096;
    break;
  case 1: /* the same, through as many blocks as there are requests for */
  case 2:
    the_round.sweep = true;
    choose_focus (&random, least (share / 2 * block + 1, 32 << 20));
    min = 200;
    max = most (block / 2, 2048);
    break;
  case 3: /* some blocks each, of a few slots */
    the_round.sweep = one_in (&random, 2);
    choose_focus (&random, random_length (&random, 16, 512) * block);
    min = block / 4;
    max = 8 * block;
    break;
  case 4: /* the same blocks for one owner each and for anybody */
    the_round.sweep = true;
    the_round.duels = options.connections > 1;
    choose_focus (&random, least (share / 2 * block + 1, 128 << 20));
    min = block;
    max = 4 * block;
    break;
  default: /* large parts of all of the disk */
    choose_focus (&random, disk_size);
    min = disk_size / (8 * options.connections);
    max = disk_size / options.connections;
    break;
  }
  /* Duels are about holes. */
  if (!the_round.duels && one_in (&random, 2))
    zero_focus (&random);
  make_round_layout (&random, min, max,
                     options.connections > 1 && one_in (&random, 2) ? 6 : 0);
  for (unsigned i = 0; i < options.connections; ++i) {
    struct connection *c = &connections[i];

    c->random = random_for (number, i);
    c->depth = one_in (&c->random, 4)
                 ? 1 + random_below (&c->random, options.depth)
                 : options.depth;
    c->log_of_round = c->nr_log;
    atomic_store (&c->progress, 0);
  }
}

/* Now and then all of the disk is written, as far as there is space, and then all space is
 * given back.
 */
static void
change_all (enum op op)
{
  struct connection *c = &connections[0];
  struct request r = { .op = op, .data = pool };

  make_solo_layout (c->id);
  for (; r.offset < disk_size; r.offset += r.length) {
    r.length
      = least (least (options.max_request, 1 << 20), disk_size - r.offset);
    submit (c, &r);
  }
  drain (c);
}

static void
run_round (unsigned number)
{
  pthread_t views_thread;
  int err;

  if (options.full && number % 2 == 0)
    change_all (number % 4 == 0 ? OP_TRIM : OP_WRITE);
  plan_round (number);
  atomic_store (&round_ended, false);
  if (options.views > 0) {
    err = pthread_create (&views_thread, NULL, views_in_round, NULL);
    if (err)
      die ("cannot start a thread: %s", strerror (err));
  }
  for (unsigned i = 0; i < options.connections; ++i) {
    struct connection *c = &connections[i];

    err = pthread_create (&c->thread, NULL, run_connection, c);
    if (err)
      die ("cannot start a thread: %s", strerror (err));
  }
  for (unsigned i = 0; i < options.connections; ++i)
    pthread_join (connections[i].thread, NULL);
  atomic_store (&round_ended, true);
  if (options.views > 0)
    pthread_join (views_thread, NULL);
  if (!atomic_load (&failed))
    check_disk ();
  if (!atomic_load (&failed))
    views_between_rounds ();
}

/* Start and end --------------------------------------------------------- */

static struct nbd_handle *
connect_to (const char *server, const char *export)
{
  struct nbd_handle *nbd = nbd_create ();
  int r;

  if (nbd == NULL
      || nbd_add_meta_context (nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) == -1
      || nbd_set_pread_initialize (nbd, false) == -1
      || nbd_set_export_name (nbd, export) == -1)
    die ("%s", nbd_get_error ());
  r = strstr (server, "://") ? nbd_connect_uri (nbd, server)
                             : nbd_connect_unix (nbd, server);
  if (r == -1)
    die ("%s: %s: %s", server, export, nbd_get_error ());
  return nbd;
}

static void
open_connection (struct connection *c, unsigned id)
{
  c->id = id;
  c->depth = options.depth;
  c->nbd = connect_to (options.server, "");
}

/* 1 is yes; an answer of no is a failure unless --lax, an error always is. */
static bool
offers (const char *what, int answer)
{
  if (answer == -1)
    die ("%s: %s", what, nbd_get_error ());
  if (answer == 0 && !options.lax)
    fail ("the server does not offer %s", what);
  return answer;
}

static void
look_at_offer (struct nbd_handle *nbd)
{
  int64_t size;

  memcpy (weights, op_weights, sizeof weights);
  if (!offers ("zero", nbd_can_zero (nbd)))
    weights[OP_ZERO] = 0;
  if (!offers ("trim", nbd_can_trim (nbd)))
    weights[OP_TRIM] = 0;
  if (!offers ("flush", nbd_can_flush (nbd)))
    weights[OP_FLUSH] = 0;
  if (!offers ("extents",
               nbd_can_meta_context (nbd, LIBNBD_CONTEXT_BASE_ALLOCATION)))
    weights[OP_EXTENTS] = 0;
  if (nbd_can_cache (nbd) != 1)
    weights[OP_CACHE] = 0;

  offered_flags = LIBNBD_CMD_FLAG_NO_HOLE;
  if (offers ("fua", nbd_can_fua (nbd)))
    offered_flags |= LIBNBD_CMD_FLAG_FUA;
  if (offers ("fast zero", nbd_can_fast_zero (nbd)))
    offered_flags |= LIBNBD_CMD_FLAG_FAST_ZERO;
  offers ("writes", nbd_is_read_only (nbd) == 0);
  if (options.connections > 1)
    offers ("multi-conn", nbd_can_multi_conn (nbd));

  size = nbd_get_size (nbd);
  if (size != (int64_t) disk_size)
    fail ("the disk's size is %" PRIi64 ", not %" PRIu64, size, disk_size);
  if (nbd_get_block_size (nbd, LIBNBD_SIZE_MINIMUM) > 1)
    fail ("the server wants aligned requests");
  size = nbd_get_block_size (nbd, LIBNBD_SIZE_MAXIMUM);
  if (size > 0)
    options.max_request = least (options.max_request, (uint64_t) size);
}

/* Reads BASEFILE twice: to be changed, and as it is.  (Mapping it would be less
 * work, but on tmpfs that turns its holes into data, and so changes the
 * extents that are compared.)
 */
static void
open_base (void)
{
  struct stat st;
  int fd = open (options.base_file, O_RDONLY | O_CLOEXEC);
  ssize_t n;

  if (fd == -1 || fstat (fd, &st) == -1)
    die ("%s: %s", options.base_file, strerror (errno));
  disk_size = st.st_size;
  if (disk_size == 0)
    die ("%s: empty", options.base_file);
  base = malloc (disk_size);
  model = malloc (disk_size);
  if (!base || !model)
    die ("malloc: %s", strerror (errno));
  for (uint64_t done = 0; done < disk_size; done += n) {
    n = pread (fd, model + done, disk_size - done, done);
    if (n <= 0)
      die ("%s: read: %s", options.base_file, n ? strerror (errno) : "short");
  }
  memcpy (base, model, disk_size);
  close (fd);
}

/* Lines of offset, length, type as nbdinfo --map prints them. */
static void
open_base_map (void)
{
  uint64_t offset, length, next = 0;
  uint32_t type;
  size_t n = 0, max = 0;
  char line[256];
  FILE *fp = fopen (options.base_map, "r");

  if (fp == NULL)
    die ("%s: %s", options.base_map, strerror (errno));
  while (fgets (line, sizeof line, fp)) {
    if (sscanf (line, "%" SCNu64 " %" SCNu64 " %" SCNu32, &offset, &length,
                &type)
          != 3
        || offset != next || type > TYPE_HOLE_ZERO)
      die ("%s: cannot understand: %s", options.base_map, line);
    if (n + 1 >= max)
      base_extents = checked (
        realloc (base_extents, (max = 2 * max + 64) * sizeof base_extents[0]));
    base_extents[n++] = (struct base_extent) { offset, type };
    next += length;
  }
  fclose (fp);
  if (next != disk_size)
    die ("%s: ends at %" PRIu64, options.base_map, next);
  base_extents[n].start = disk_size;
  nr_base_extents = n;
}

static void
make_model (void)
{
  struct random random = random_for (0, MAX_CONNECTIONS + 2);

  nr_blocks = (disk_size + options.block_size - 1) / options.block_size;
  states = checked (malloc (nr_blocks));
  memset (states, HOLE, nr_blocks);
  events = checked (calloc (nr_blocks, sizeof events[0]));
  round_layout.exclusive = checked (malloc (nr_blocks));
  solo_layout.exclusive = checked (malloc (nr_blocks));

  zeroes = checked (calloc (1, options.max_request));
  pool_size = (options.max_request + (1 << 20)) / 8 * 8;
  pool = checked (malloc (pool_size));
  for (size_t i = 0; i < pool_size; i += 8) {
    uint64_t word = random_next (&random);

    memcpy (pool + i, &word, 8);
  }
}

/* After check_disk, the model has one answer for each byte. */
static void
write_result (void)
{
  FILE *fp = fopen (options.result, "w");

  if (fp == NULL || fwrite (model, 1, disk_size, fp) != disk_size
      || fclose (fp) != 0)
    die ("%s: %s", options.result, strerror (errno));
}

static void
close_all (void)
{
  for (unsigned i = 0; i < options.connections; ++i) {
    struct connection *c = &connections[i];

    /* Not when it may still be busy. */
    if (!atomic_load (&failed))
      nbd_shutdown (c->nbd, 0);
    nbd_close (c->nbd);
    for (unsigned j = 0; j < MAX_DEPTH; ++j) {
      free (c->commands[j].buf);
      free (c->commands[j].entries);
    }
    free (c->log);
  }
  for (unsigned i = 0; i < options.views; ++i)
    if (views[i].nbd)
      close_view (&views[i]);
  free (model);
  free (base);
  free (states);
  free ((void *) events);
  free (round_layout.exclusive);
  free (round_layout.segments);
  free (solo_layout.exclusive);
  free (solo_layout.segments);
  free (base_extents);
  free (zeroes);
  free (pool);
}

static void
usage (FILE *fp)
{
  fprintf (
    fp,
    "usage: test-model [OPTIONS] URI-OR-SOCKET BASEFILE\n"
    "  --block-size=N      of the filter (4096)\n"
    "  --connections=N     (4)\n"
    "  --depth=N           requests of each in flight (8)\n"
    "  --requests=N        of each, in all rounds together (4000)\n"
    "  --rounds=N          (8)\n"
    "  --max-request=N     longest read and write in bytes (4194304)\n"
    "  --seed=N            (or $MODEL_SEED; otherwise from the clock)\n"
    "  --timeout=N         seconds to wait for an answer (300)\n"
    "  --base-map=FILE     extents of the base, from nbdinfo --map\n"
    "  --result=FILE       write there what the disk must hold at the end\n"
    "  --cow-on-read       blocks may be allocated by reads\n"
    "  --cow-on-cache      blocks may be allocated by prefetches\n"
    "  --views=N           so many snapshots at a time; the server is given "
    "as a\n"
    "                      socket (0)\n"
    "  --full              space may run out\n"
    "  --lax               for servers other than this filter: what is not\n"
    "                      offered is not used, fast zero may be refused,\n"
    "                      extents need not be exact\n");
}

static uint64_t
parse_number (const char *what, const char *text, uint64_t min, uint64_t max)
{
  char *end;
  uint64_t n;

  errno = 0;
  n = strtoull (text, &end, 0);
  if (errno || end == text || *end || n < min || n > max)
    die ("%s: must be a number from %" PRIu64 " to %" PRIu64, what, min, max);
  return n;
}

static uint64_t
default_seed (void)
{
  const char *text = getenv ("MODEL_SEED");
  struct timespec now;

  if (text && *text)
    return parse_number ("MODEL_SEED", text, 0, UINT64_MAX);
  clock_gettime (CLOCK_REALTIME, &now);
  return ((uint64_t) now.tv_sec * 1000000007 + now.tv_nsec) % 1000000000
         ^ (uint64_t) getpid ();
}

static void
parse_options (int argc, char *argv[])
{
  static const struct option long_options[] = {
    { "base-map", required_argument, NULL, 'm' },
    { "block-size", required_argument, NULL, 'b' },
    { "connections", required_argument, NULL, 'c' },
    { "cow-on-cache", no_argument, NULL, 'k' },
    { "cow-on-read", no_argument, NULL, 'k' },
    { "depth", required_argument, NULL, 'd' },
    { "full", no_argument, NULL, 'f' },
    { "help", no_argument, NULL, 'h' },
    { "lax", no_argument, NULL, 'l' },
    { "max-request", required_argument, NULL, 'x' },
    { "requests", required_argument, NULL, 'n' },
    { "result", required_argument, NULL, 'o' },
    { "rounds", required_argument, NULL, 'r' },
    { "seed", required_argument, NULL, 's' },
    { "timeout", required_argument, NULL, 't' },
    { "views", required_argument, NULL, 'v' },
    { NULL, 0, NULL, 0 },
  };
  bool has_seed = false;
  int o;

  while ((o = getopt_long (argc, argv, "", long_options, NULL)) != -1) {
    switch (o) {
    case 'b':
      options.block_size
        = parse_number ("--block-size", optarg, 1, UINT32_C (1) << 30);
      break;
    case 'c':
      options.connections
        = parse_number ("--connections", optarg, 1, MAX_CONNECTIONS);
      break;
    case 'd':
      options.depth = parse_number ("--depth", optarg, 1, MAX_DEPTH);
      break;
    case 'f':
      options.full = true;
      break;
    case 'h':
      usage (stdout);
      exit (0);
    case 'k':
      options.kept_reads = true;
      break;
    case 'l':
      options.lax = true;
      break;
    case 'm':
      options.base_map = optarg;
      break;
    case 'n':
      options.requests = parse_number ("--requests", optarg, 1, 1 << 30);
      break;
    case 'o':
      options.result = optarg;
      break;
    case 'r':
      options.rounds = parse_number ("--rounds", optarg, 1, 1 << 30);
      break;
    case 's':
      options.seed = parse_number ("--seed", optarg, 0, UINT64_MAX);
      has_seed = true;
      break;
    case 't':
      options.timeout = parse_number ("--timeout", optarg, 1, 1000000);
      break;
    case 'v':
      options.views = parse_number ("--views", optarg, 0, MAX_VIEWS);
      break;
    case 'x':
      options.max_request
        = parse_number ("--max-request", optarg, 1, 32 << 20);
      break;
    default:
      usage (stderr);
      exit (2);
    }
  }
  if (argc - optind != 2) {
    usage (stderr);
    exit (2);
  }
  if (!has_seed)
    options.seed = default_seed ();
  options.server = argv[optind];
  options.base_file = argv[optind + 1];
}

static size_t
count_requests (void)
{
  size_t n = 0;

  for (unsigned i = 0; i < options.connections; ++i)
    n += connections[i].nr_log;
  return n;
}

int
main (int argc, char *argv[])
{
  parse_options (argc, argv);
  printf ("model: seed %" PRIu64 "\n", options.seed);
  fflush (stdout);
  open_base ();
  if (options.base_map)
    open_base_map ();
  for (unsigned i = 0; i < options.connections; ++i)
    open_connection (&connections[i], i);
  look_at_offer (connections[0].nbd);
  make_model ();

  for (unsigned i = 1; i <= options.rounds && !atomic_load (&failed); ++i)
    run_round (i);
  if (atomic_load (&failed))
    print_failure ();
  else {
    if (options.result)
      write_result ();
    if (options.full)
      printf ("model: %u found no space left\n", atomic_load (&nr_full));
    if (options.views > 0)
      printf ("model: %u snapshots agree\n", nr_checked_views);
    printf ("model: %zu requests agree\n", count_requests ());
  }
  close_all ();
  return atomic_load (&failed) ? 1 : 0;
}
