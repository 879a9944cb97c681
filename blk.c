/* SPDX-License-Identifier: BSD-3-Clause */

/* Block operations on an overlay: read, write, zero, cache (overlay.h has the object
 * itself, blk-extents.c the extents).
 *
 * A disk is cut into blocks, 32 of them are a slot.  The map says of each block in which
 * state it is: a hole (read the base), allocated (read the file) or zero; and where it
 * lies in the overlay file (its address).  A block never becomes a hole again.
 *
 * Reading walks over the runs of one state (look.h).  Everything that changes the map
 * goes through a struct change (change.h).
 *
 * Of the rules in HACKING that keep acknowledged writes safe these are kept here:
 *
 *  3 base read holding no lock       edges_read, fetch; looked at again after
 *  4 allocated blocks need no slot
 *    lock, checked before writing    blk_write
 *  5 allocated is written whole      blk_write, blk_zero, keep
 *  6 zero and trim only change
 *    state                           zero_blocks
 *  8 one block, one read             edges_read, find_run
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "bitmap.h"
#include "blk.h"
#include "common/bytes.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "common/lock.h"
#include "overlay/change.h"
#include "overlay/look.h"
#include "overlay/private.h"

/* What can be done about an error of the overlay's file; "" where that is not known. */
static const char *
advice (int err)
{
  switch (err) {
  case ENOSPC:
  case EDQUOT:
    return "; what was written before can be read, and trimming some of it "
           "makes room";
  case EFBIG:
    return "; what was written before can be read, and trimming some of it "
           "makes room: the file is as long as its file system, or ulimit -f, "
           "allows";
  case ENOENT:
    return "; make that directory again";
  case EMFILE:
  case ENFILE:
    return "; raise the limit on open files";
  case EACCES:
  case EROFS:
    return "; let the server make files there";
  default:
    return "";
  }
}

int
blk_error (const struct overlay *o, int err)
{
  if (err == ESHUTDOWN) /* nothing is wrong: the server ends */
    return err;

  errno = err;
  if (err == ENOMEM)
    nbdkit_error ("cow: out of memory for the map of an overlay");
  else if (err == EDQUOT && overlay_max_bytes (o) > 0)
    nbdkit_error ("cow: an overlay has taken all of the %" PRIu64
                  " bytes that cow-max-bytes allows it; trim some of what was "
                  "written, or forget moments",
                  overlay_max_bytes (o));
  else
    nbdkit_error ("cow: overlay file in %s: %m%s", o->store.dir, advice (err));

  switch (err) {
  case EPERM:
  case EROFS:
  case ENOMEM:
  case ENOSPC:
  case EDQUOT:
  case EFBIG:
    return err;
  default:
    return EIO;
  }
}

/* Is there no room, so that it is worth waiting for the cleaner? */
static bool
is_full (int err)
{
  return err == ENOSPC || err == EDQUOT || err == EFBIG;
}

/*----------------------------------------------------------------------
 * The blocks at the two ends of a request that it does not cover wholly
 */

/* Of the block that ends the disk, what lies past the disk's end is nobody's:
 * a request that goes as far as the end covers that block.
 */
struct edges {
  uint64_t offset, end;   /* the request */
  uint64_t head, tail;    /* offsets of its first and last block: the same
                           * one, or neighbours, or not */
  uint64_t before, after; /* bytes of these blocks it leaves out */
  bool need_before;       /* they are the base's: head is a hole */
  bool need_after;        /* the same of tail, and inside the disk */
  char *bytes;            /* of the head block, then, if it is another, of the
                           * tail block; only what is left out is filled in */
};

static void
cleanup_edges (struct edges *e)
{
  free (e->bytes);
}

#define CLEANUP_EDGES __attribute__ ((cleanup (cleanup_edges)))

/* Caller holds the request lock (this is the first look of rule 3). */
static void
edges_look (struct edges *e, const struct overlay *o, uint32_t count,
            uint64_t offset)
{
  const uint64_t bs = block_size (o);

  assert_held (&o->request_lock);
  e->offset = offset;
  e->end = offset + count;
  e->head = ROUND_DOWN (offset, bs);
  e->tail = ROUND_DOWN (e->end - 1, bs);
  e->before = offset - e->head;
  e->after = e->tail + bs - e->end;
  e->need_before = e->before > 0 && state_at (o, e->head) == BLOCK_HOLE;
  e->need_after
    = e->after > 0 && e->end < o->size && state_at (o, e->tail) == BLOCK_HOLE;
  e->bytes = NULL;
}

/* The memory for the tail block. */
static char *
tail_bytes (const struct edges *e, const struct overlay *o)
{
  return e->tail == e->head ? e->bytes : e->bytes + block_size (o);
}

/* Get the memory, and read what is needed of the base: each byte once, and in
 * one request where the two blocks touch.  The rest is zero.  Caller holds no
 * lock (rule 3).
 */
static int
edges_read (struct edges *e, const struct overlay *o, const struct base *base,
            int *err)
{
  assert_none_held_from (RANK_RELEASE);

  const uint64_t bs = block_size (o);
  const uint64_t tail_end = MIN (e->tail + bs, o->size);

  if (e->before == 0 && e->after == 0)
    return 0;
  e->bytes = calloc (e->tail == e->head ? 1 : 2, bs);
  if (!e->bytes) {
    *err = errno;
    nbdkit_error ("calloc: %m");
    return -1;
  }

  if (e->need_before && e->need_after && e->tail - e->head <= bs)
    return base_read (base, e->bytes, tail_end - e->head, e->head, err);
  if (e->need_before
      && base_read (base, e->bytes, e->before, e->head, err) == -1)
    return -1;
  if (e->need_after
      && base_read (base, tail_bytes (e, o) + (e->end - e->tail),
                    tail_end - e->end, e->end, err)
           == -1)
    return -1;
  return 0;
}

/*----------------------------------------------------------------------
 * Keeping bytes of the base
 */

/* What is kept of the base is read in whole blocks, and in whole blocks of the
 * base, so that nothing is read twice.
 */
static uint64_t
unit_to_keep (const struct overlay *o, const struct base *base)
{
  return MAX (block_size (o), base->min_request);
}

/* Read blocks START .. END-1 of the base, END being block aligned or the end of
 * the disk, and fill up the last one with zeroes.  The caller frees them, and
 * holds no lock (rule 3).  NULL if it failed, which was reported, and *ERR.
 */
static char *
fetch (const struct overlay *o, const struct base *base, uint64_t start,
       uint64_t end, int *err)
{
  assert_none_held_from (RANK_RELEASE);

  const uint64_t padded = ROUND_UP (end, block_size (o)) - start;
  char *bytes = malloc (padded);

  if (!bytes) {
    *err = errno;
    nbdkit_error ("malloc: %m");
    return NULL;
  }
  if (base_read (base, bytes, end - start, start, err) == -1) {
    free (bytes);
    return NULL;
  }
  memset (bytes + (end - start), 0, padded - (end - start));
  return bytes;
}

/* Put BYTES, which fetch read, into those of their blocks that are holes still
 * (the second look of rule 3).  0 or an errno value; reports nothing.
 */
static int
try_keep (struct overlay *o, char *bytes, uint64_t start, uint64_t end,
          enum log_effort effort)
{
  const struct iovec part
    = { .iov_base = bytes, .iov_len = ROUND_UP (end, block_size (o)) - start };
  CLEANUP_CHANGE struct change c;
  int err;

  end = start + part.iov_len;
  change_init (&c, o, effort);
  err = change_begin (&c, start, end, 0, 0);
  if (err)
    return err;
  change_allocate_holes (&c, start, end);
  err = change_prepare (&c, start, end);
  if (!err)
    err = change_write (&c, &part, 1, start);
  return change_end (&c, err);
}

static int
keep (struct overlay *o, char *bytes, uint64_t start, uint64_t end)
{
  const int err = try_keep (o, bytes, start, end, LOG_TIDY);

  if (!is_full (err))
    return err;
  cleaner_round (&o->cleaning);
  return try_keep (o, bytes, start, end, LOG_ANY);
}

/*----------------------------------------------------------------------
 * Requests
 */

/* Read a run of holes and keep them, whole blocks that the client wants, or around
 * what it wants.  -1 if they cannot be read.  Caller holds no lock.
 */
static int
read_and_keep (struct overlay *o, const struct base *base, void *buf,
               uint64_t offset, uint64_t end, int *err)
{
  assert_none_held_from (RANK_RELEASE);

  const uint64_t unit = unit_to_keep (o, base);
  const uint64_t start = ROUND_DOWN (offset, unit);
  const uint64_t stop = MIN (ROUND_UP (end, unit), o->size);
  CLEANUP_FREE char *around = NULL;
  char *bytes = buf;

  if (start == offset && stop == end && stop % block_size (o) == 0) {
    if (base_read (base, buf, end - offset, offset, err) == -1)
      return -1;
  }
  else {
    bytes = around = fetch (o, base, start, stop, err);
    /* What cannot be read around it need not keep the client from what it wants. */
    if (!around)
      return base_read (base, buf, end - offset, offset, err);
    memcpy (buf, around + (offset - start), end - offset);
  }

  /* The client has what it asked for, kept or not, and need not wait for room. */
  errno = try_keep (o, bytes, start, stop, LOG_TIDY);
  if (errno)
    VERBOSE ("not kept in the overlay: %s", strerror (errno));
  return 0;
}

/* Read a run of holes.  Caller holds no lock. */
static int
read_holes (struct disk disk, const struct base *base, enum on_read on_read,
            void *buf, uint64_t offset, uint64_t end, int *err)
{
  assert_none_held_from (RANK_RELEASE);
  return on_read == ON_READ_KEEP && !disk.frozen
           ? read_and_keep (disk.overlay, base, buf, offset, end, err)
           : base_read (base, buf, end - offset, offset, err);
}

int
blk_read (struct disk disk, const struct base *base, enum on_read on_read,
          void *buf, uint32_t count, uint64_t offset, int *err)
{
  const uint64_t end = offset + count;

  while (offset < end) {
    struct run run;
    const int r = look (disk, offset, end, &run, buf);

    if (r) {
      *err = blk_error (disk.overlay, r);
      return -1;
    }
    if (run.state == BLOCK_ZERO)
      memset (buf, 0, run.length);
    else if (run.state == BLOCK_HOLE
             && read_holes (disk, base, on_read, buf, offset,
                            offset + run.length, err)
                  == -1)
      return -1;

    buf = (char *) buf + run.length;
    offset += run.length;
  }
  return 0;
}

/* Write to blocks that were all allocated a moment ago.  Caller holds the
 * request lock, but no slot lock: another request may zero a block meanwhile.
 * That one overlaps this one, and the block is as it would be had it come last;
 * so there is nothing to write.  Nor does it matter if that happens after the last look:
 * the address is not given to anybody before this request has ended (rule 6).
 */
static int
overwrite (const struct overlay *o, const char *buf, uint64_t offset,
           uint64_t end)
{
  assert_held (&o->request_lock);
  while (offset < end) {
    const struct run run = find_run (o, offset, end);
    struct iovec part = { .iov_base = (char *) buf, .iov_len = run.length };

    if (run.state == BLOCK_ALLOCATED
        && store_writev (&o->store, &part, 1, run.file_offset) == -1)
      return errno;
    buf += run.length;
    offset += run.length;
  }
  return 0;
}

/* Do the bytes OFFSET .. END-1 of the disk, in BUF, cover a block of zeroes? */
static bool
has_zero_block (const struct overlay *o, const char *buf, uint64_t offset,
                uint64_t end)
{
  const uint64_t bs = block_size (o);

  for (uint64_t block = ROUND_UP (offset, bs); block + bs <= end; block += bs)
    if (bytes_are_zero (buf + (block - offset), bs))
      return true;
  return false;
}

/* Let blocks that would become allocated, or stay so, and of which all bytes are
 * at hand and zero, become zero.  The bytes from OFFSET of the disk on are in
 * PARTS.  Of an allocated block that the request does not cover, not all bytes are
 * at hand.
 */
static void
detect_zeroes (struct change *c, const struct iovec *parts, int nr_parts,
               uint64_t offset)
{
  const struct overlay *o = c->o;
  const uint64_t bs = block_size (o);
  uint64_t end = offset;

  for (int i = 0; i < nr_parts; ++i)
    end += parts[i].iov_len;

  for (uint64_t block = ROUND_UP (offset, bs); block < end; block += bs) {
    struct iovec iov[MAX_PARTS];
    bool zero = block + bs <= end || end == o->size;

    const int nr_iov = slice_parts (parts, nr_parts, block - offset,
                                    MIN (block + bs, end) - offset, iov);
    for (int i = 0; i < nr_iov && zero; ++i)
      zero = bytes_are_zero (iov[i].iov_base, iov[i].iov_len);
    if (zero)
      change_make_zero (c, block);
  }
}

/* Write to blocks of any state.  What the request leaves out of the blocks at
 * its ends is in E.
 */
static int
write_blocks (struct overlay *o, const char *buf, const struct edges *e,
              enum log_effort effort)
{
  const uint64_t bs = block_size (o);
  CLEANUP_CHANGE struct change c;
  struct iovec before = { .iov_len = 0 }, after = { .iov_len = 0 };
  int err;

  change_init (&c, o, effort);
  err = change_begin (&c, e->offset, e->end, 0, 0);
  if (err)
    return err;
  change_allocate (&c, e->head, e->tail + bs);

  /* Rule 5.  A block that is allocated gets the request's own bytes and no
   * others, for somebody else may be writing those.  Any other one is written
   * whole: a hole with the base's bytes, which it also was when they were read
   * as it cannot have become one since; a zero block, which may have been a
   * hole then, with zeroes.
   */
  if (e->before > 0 && change_found (&c, e->head) != BLOCK_ALLOCATED) {
    before = (struct iovec) { .iov_base = e->bytes, .iov_len = e->before };
    if (change_found (&c, e->head) == BLOCK_ZERO)
      memset (before.iov_base, 0, before.iov_len);
  }
  if (e->after > 0 && change_found (&c, e->tail) != BLOCK_ALLOCATED) {
    after = (struct iovec) { .iov_base = tail_bytes (e, o) + (bs - e->after),
                             .iov_len = e->after };
    if (change_found (&c, e->tail) == BLOCK_ZERO)
      memset (after.iov_base, 0, after.iov_len);
  }

  const struct iovec parts[MAX_PARTS] = {
    before,
    { .iov_base = (char *) buf, .iov_len = e->end - e->offset },
    after,
  };
  const uint64_t start = e->offset - before.iov_len;

  if (o->detect_zeroes)
    detect_zeroes (&c, parts, MAX_PARTS, start);
  err = change_prepare (&c, e->offset, e->end);
  if (!err)
    err = change_write (&c, parts, MAX_PARTS, start);
  return change_end (&c, err);
}

/* 0, an errno value, or -1 and *ERR if the base cannot be read, which was reported. */
static int
try_write (struct overlay *o, const struct base *base, const void *buf,
           uint32_t count, uint64_t offset, enum log_effort effort, int *err)
{
  CLEANUP_EDGES struct edges edges = { .bytes = NULL };

  /* Rule 4: all blocks are looked at before the first byte is written, and the
   * request lock is held until the bytes are in the file.  Should a block be
   * zeroed between its last look and the write, the bytes count for nothing:
   * whoever allocates it again writes it whole (rule 5).
   */
  {
    HOLD_REQUEST (o);
    if (is_closed (o))
      return ESHUTDOWN;
    if (all_allocated (o, offset, offset + count)
        && !any_shared (o, offset, offset + count)
        && !(o->detect_zeroes
             && has_zero_block (o, buf, offset, offset + count)))
      return overwrite (o, buf, offset, offset + count);
    edges_look (&edges, o, count, offset);
  }

  if (edges_read (&edges, o, base, err) == -1)
    return -1;
  return write_blocks (o, buf, &edges, effort);
}

int
blk_write (struct overlay *o, const struct base *base, const void *buf,
           uint32_t count, uint64_t offset, int *err)
{
  int r = try_write (o, base, buf, count, offset, LOG_TIDY, err);

  if (is_full (r)) {
    cleaner_round (&o->cleaning);
    r = try_write (o, base, buf, count, offset, LOG_ANY, err);
  }
  if (r > 0)
    *err = blk_error (o, r);
  return r ? -1 : 0;
}

/* Zero the bytes of the request that are in the block at BLOCK, one of those at
 * its ends that it does not cover wholly.
 */
static int
zero_edge (struct change *c, const struct edges *e, uint64_t block)
{
  const uint64_t bs = block_size (c->o);
  const uint64_t from = MAX (e->offset, block);
  const uint64_t to = MIN (e->end, block + bs);
  char *bytes = block == e->head ? e->bytes : tail_bytes (e, c->o);
  struct iovec part = { .iov_base = bytes, .iov_len = bs };

  memset (bytes + (from - block), 0, to - from);

  switch (change_found (c, block)) {
  case BLOCK_ALLOCATED: /* just the request's own bytes */
    part.iov_base = bytes + (from - block);
    part.iov_len = to - from;
    return change_write (c, &part, 1, from);

  case BLOCK_ZERO: /* to be allocated, or nothing is written */
    memset (bytes, 0, bs);
    return change_write (c, &part, 1, block);

  case BLOCK_HOLE: /* written whole, rule 5 */
  default:
    return change_write (c, &part, 1, block);
  }
}

static int
zero_blocks (struct overlay *o, const struct edges *e, enum zero_effort effort,
             enum zero_space space, enum log_effort log_effort)
{
  const uint64_t bs = block_size (o);
  const bool head_partial = e->before > 0;
  const bool tail_partial = e->after > 0 && e->end < o->size;
  const uint64_t whole_start = head_partial ? e->head + bs : e->head;
  const uint64_t whole_end = tail_partial ? e->tail : e->tail + bs;
  const bool has_space = space == ZERO_HAS_SPACE && whole_start < whole_end;
  uint64_t partial[2];
  unsigned nr_partial = 0;
  CLEANUP_CHANGE struct change c;
  int err = 0;

  change_init (&c, o, log_effort);
  if (has_space)
    err
      = change_provide (&c, (e->tail - e->head) / bs + 1, effort == ZERO_FAST);
  if (!err)
    err = change_begin (&c, e->offset, e->end, has_space ? 0 : whole_start,
                        has_space ? 0 : whole_end);
  if (err)
    return err;
  if (has_space)
    change_allocate_provided (&c, whole_start, whole_end);
  if (head_partial)
    partial[nr_partial++] = e->head;
  if (tail_partial && !(head_partial && e->tail == e->head))
    partial[nr_partial++] = e->tail;

  /* Of these blocks those that are zero stay as they are, unless they are to have space;
   * the others are written to, and holes become allocated.
   */
  for (unsigned i = 0; i < nr_partial; ++i)
    if (space == ZERO_HAS_SPACE || change_found (&c, partial[i]) != BLOCK_ZERO)
      change_allocate (&c, partial[i], partial[i] + bs);
  err = change_prepare (&c, e->offset, e->end);
  for (unsigned i = 0; i < nr_partial && !err; ++i)
    err = zero_edge (&c, e, partial[i]);
  return change_end (&c, err);
}

int
blk_zero (struct overlay *o, const struct base *base, enum zero_effort effort,
          enum zero_space space, uint32_t count, uint64_t offset, int *err)
{
  CLEANUP_EDGES struct edges edges = { .bytes = NULL };
  int r;

  {
    HOLD_REQUEST (o);
    edges_look (&edges, o, count, offset);
  }

  /* Before anything was changed.  A block does not become a hole later. */
  if (effort == ZERO_FAST && (edges.need_before || edges.need_after)) {
    *err = ENOTSUP;
    return -1;
  }

  if (edges_read (&edges, o, base, err) == -1)
    return -1;
  r = zero_blocks (o, &edges, effort, space, LOG_TIDY);
  if (is_full (r)) {
    cleaner_round (&o->cleaning);
    r = zero_blocks (o, &edges, effort, space, LOG_ANY);
  }
  if (r == ENOTSUP && effort == ZERO_FAST)
    *err = r;
  else if (r)
    *err = blk_error (o, r);
  return r ? -1 : 0;
}

/* Read a run of holes, START .. END-1, into the overlay, in pieces that the
 * base takes.  Caller holds no lock.
 */
static int
prefetch_and_keep (struct overlay *o, const struct base *base, uint64_t start,
                   uint64_t end, int *err)
{
  assert_none_held_from (RANK_RELEASE);

  const uint64_t unit = unit_to_keep (o, base);
  const uint64_t longest = MAX (ROUND_DOWN (base->max_request, unit), unit);

  start = ROUND_DOWN (start, unit);
  end = MIN (ROUND_UP (end, unit), o->size);
  while (start < end) {
    const uint64_t piece_end = MIN (end, start + longest);
    CLEANUP_FREE char *bytes = fetch (o, base, start, piece_end, err);

    if (!bytes)
      return -1;

    const int r = keep (o, bytes, start, piece_end);
    if (r) {
      *err = blk_error (o, r);
      return -1;
    }
    start = piece_end;
  }
  return 0;
}

int
blk_cache (struct overlay *o, const struct base *base, enum on_cache on_cache,
           uint32_t count, uint64_t offset, int *err)
{
  uint64_t pos = ROUND_DOWN (offset, block_size (o));
  const uint64_t end
    = MIN (ROUND_UP (offset + count, block_size (o)), o->size);

  while (pos < end) {
    struct run run;
    int r = 0;

    {
      HOLD_REQUEST (o);
      run = find_run (o, pos, end);
      if (run.state == BLOCK_ALLOCATED)
        store_prefetch (&o->store, run.file_offset, run.length);
    }
    if (run.state == BLOCK_HOLE && on_cache == ON_CACHE_KEEP)
      r = prefetch_and_keep (o, base, pos, pos + run.length, err);
    else if (run.state == BLOCK_HOLE)
      r = base_cache (base, run.length, pos, err);
    if (r == -1)
      return -1;
    pos += run.length;
  }
  return 0;
}
