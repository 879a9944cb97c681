/* SPDX-License-Identifier: BSD-3-Clause */

/* Asking the base (see base.h).  Keeps rule 9 of HACKING: inside its size, and
 * aligned as it demands.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "common/lock.h"

/* Where the base names no maximum: the longest read that a client may send to
 * nbdkit, and so one that every plugin must expect.
 */
#define MAX_REQUEST (UINT32_C (64) << 20)

static void
cleanup_extents (struct nbdkit_extents **extents)
{
  nbdkit_extents_free (*extents);
}

#define CLEANUP_EXTENTS __attribute__ ((cleanup (cleanup_extents)))

/* The result of a request to the base that failed.  Where a client or a filter
 * above did not ask for a fast zero, nbdkit takes ENOTSUP for a bug and aborts.
 */
static int
failed (int *err)
{
  if (*err == ENOTSUP || *err == EOPNOTSUPP)
    *err = EIO;
  return -1;
}

int
base_init (struct base *base, nbdkit_next *next)
{
  uint32_t minimum, preferred, maximum;
  const int64_t size = next->get_size (next);

  if (size == -1
      || next->block_size (next, &minimum, &preferred, &maximum) == -1)
    return -1;

  const int can_extents = next->can_extents (next);
  const int can_cache = next->can_cache (next);
  if (can_extents == -1 || can_cache == -1)
    return -1;

  base->next = next;
  base->size = (uint64_t) size;
  base->min_request = MAX (minimum, 1);
  base->max_request
    = MAX (ROUND_DOWN (MIN (maximum ? maximum : MAX_REQUEST, MAX_REQUEST),
                       base->min_request),
           base->min_request);
  base->preferred = preferred;
  base->can_extents = can_extents;
  base->can_cache = can_cache;
  return 0;
}

/* The smallest range that the base accepts around [*START, *END). */
static void
align (const struct base *base, uint64_t *start, uint64_t *end)
{
  const uint64_t to = base->min_request;

  *start = ROUND_DOWN (*start, to);
  *end = MIN (ROUND_UP (*end, to), base->size);
}

/* Read a range that the base accepts. */
static int
read_aligned (const struct base *base, char *buf, uint64_t count,
              uint64_t offset, int *err)
{
  while (count > 0) {
    const uint32_t n = (uint32_t) MIN (count, base->max_request);

    VERBOSE ("reading %" PRIu32 " bytes at %" PRIu64 " of the base", n,
             offset);
    if (base->next->pread (base->next, buf, n, offset, 0, err) == -1)
      return failed (err);
    buf += n;
    offset += n;
    count -= n;
  }
  return 0;
}

int
base_read (const struct base *base, void *buf, uint64_t count, uint64_t offset,
           int *err)
{
  assert_none_held_from (RANK_RELEASE); /* rule 3 */

  CLEANUP_FREE char *bounce = NULL;
  uint64_t start = offset, end = offset + count;

  align (base, &start, &end);
  if (end - start == count)
    return read_aligned (base, buf, count, offset, err);

  bounce = malloc (end - start);
  if (!bounce) {
    *err = errno;
    nbdkit_error ("malloc: %m");
    return -1;
  }
  if (read_aligned (base, bounce, end - start, start, err) == -1)
    return -1;
  memcpy (buf, bounce + (offset - start), count);
  return 0;
}

int
base_cache (const struct base *base, uint64_t count, uint64_t offset, int *err)
{
  assert_none_held_from (RANK_RELEASE); /* rule 3 */

  uint64_t start = offset, end = offset + count;

  if (base->can_cache == NBDKIT_CACHE_NONE)
    return 0;

  align (base, &start, &end);
  while (start < end) {
    const uint32_t n = (uint32_t) MIN (end - start, base->max_request);

    VERBOSE ("base prefetches %" PRIu32 " bytes at %" PRIu64, n, start);
    if (base->next->cache (base->next, n, start, 0, err) == -1)
      return failed (err);
    start += n;
  }
  return 0;
}

/* Add the part of ANSWER that lies in [*POS, END), and move *POS behind it. */
static int
add_clipped (const struct nbdkit_extents *answer, uint64_t *pos, uint64_t end,
             struct nbdkit_extents *extents, int *err)
{
  for (size_t i = 0; i < nbdkit_extents_count (answer) && *pos < end; ++i) {
    const struct nbdkit_extent e = nbdkit_get_extent (answer, i);
    const uint64_t e_end = MIN (e.offset + e.length, end);

    if (e_end <= *pos)
      continue;
    if (nbdkit_add_extent (extents, *pos, e_end - *pos, e.type) == -1) {
      *err = errno;
      return -1;
    }
    *pos = e_end;
  }
  return 0;
}

int
base_extents (const struct base *base, uint64_t count, uint64_t offset,
              uint32_t flags, struct nbdkit_extents *extents,
              uint64_t *covered, int *err)
{
  assert_none_held_from (RANK_RELEASE); /* rule 3 */

  /* A 32 bit length that keeps to every alignment there is. */
  const uint64_t longest = UINT32_C (1) << 31;
  const uint64_t end = offset + MIN (count, longest - base->min_request);
  uint64_t pos = offset, ask = offset, ask_end = end;

  align (base, &ask, &ask_end);
  CLEANUP_EXTENTS struct nbdkit_extents *answer
    = nbdkit_extents_new (ask, base->size);
  if (!answer) {
    *err = errno;
    return -1;
  }
  /* One extent is not enough where it may end before it gets to offset. */
  if (base->next->extents (base->next, (uint32_t) (ask_end - ask), ask,
                           ask == offset ? flags : 0, answer, err)
      == -1)
    return failed (err);
  if (add_clipped (answer, &pos, end, extents, err) == -1)
    return -1;

  /* Extents that end before they get to offset all the same say nothing of it.
   * "Data" is true of everything.
   */
  if (pos == offset) {
    const uint64_t next
      = ROUND_DOWN (pos, (uint64_t) base->min_request) + base->min_request;

    pos = MIN (next, end);
    if (nbdkit_add_extent (extents, offset, pos - offset, 0) == -1) {
      *err = errno;
      return -1;
    }
  }
  *covered = pos - offset;
  return 0;
}
