/* SPDX-License-Identifier: BSD-3-Clause */

/* The extents of a disk: those of the overlay, and where it has a hole, what the base
 * says.
 */

#include <config.h>

#include <errno.h>

#include "bitmap.h"
#include "blk.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "overlay/look.h"

/* What the base says of a request's holes. */
struct below {
  struct nbdkit_extents *answer; /* NULL: not asked */
  size_t next;    /* the first of its extents that is not behind us */
  uint64_t end;   /* of the last one */
  uint64_t first; /* where it was first asked */
};

static void
cleanup_below (struct below *b)
{
  nbdkit_extents_free (b->answer);
}

#define CLEANUP_BELOW __attribute__ ((cleanup (cleanup_below)))

/* The answer covers at least the beginning of OFFSET .. END-1.  Caller holds no
 * lock.
 */
static int
ask_once (struct below *b, const struct base *base, uint64_t offset,
          uint64_t end, uint32_t flags, int *err)
{
  assert_none_held_from (RANK_RELEASE);

  uint64_t covered;

  cleanup_below (b);
  b->next = 0;
  b->answer = nbdkit_extents_new (offset, base->size);
  if (!b->answer) {
    *err = errno;
    return -1;
  }
  if (base_extents (base, end - offset, offset, flags, b->answer, &covered,
                    err)
      == -1)
    return -1;
  b->end = offset + covered;
  return 0;
}

/* Ask of a run of holes, OFFSET .. RUN_END-1, and of what comes behind it, as far as
 * END.  Caller holds no lock.
 *
 * Each question may make the base search far, and it may have much to say of what the
 * overlay covers, or fail there.  So it is asked of twice what was walked over since
 * the first question: a few times for many holes, and little in vain for few.
 */
static int
ask_below (struct below *b, const struct base *base, uint64_t offset,
           uint64_t run_end, uint64_t end, uint32_t flags, int *err)
{
  assert_none_held_from (RANK_RELEASE);

  uint64_t far;

  if (!b->answer)
    b->first = offset;
  far = MIN (offset + 2 * (offset - b->first), end);
  if (far > run_end && ask_once (b, base, offset, far, flags, err) == 0)
    return 0;
  return ask_once (b, base, offset, run_end, flags, err);
}

/* Add what the answer says of *POS .. END-1, and move *POS behind that. */
static int
add_below (struct below *b, uint64_t *pos, uint64_t end,
           struct nbdkit_extents *extents, int *err)
{
  while (*pos < MIN (end, b->end)) {
    const struct nbdkit_extent e = nbdkit_get_extent (b->answer, b->next);
    const uint64_t e_end = MIN (e.offset + e.length, end);

    if (*pos < e_end) {
      if (nbdkit_add_extent (extents, *pos, e_end - *pos, e.type) == -1) {
        *err = errno;
        return -1;
      }
      *pos = e_end;
    }
    if (e_end == e.offset + e.length)
      b->next++;
  }
  return 0;
}

int
blk_extents (struct disk disk, const struct base *base, uint32_t count,
             uint64_t offset, uint32_t flags, struct nbdkit_extents *extents,
             int *err)
{
  const bool only_one = flags & NBDKIT_FLAG_REQ_ONE;
  const uint64_t end = offset + count;
  CLEANUP_BELOW struct below below = { .answer = NULL };

  /* nbdkit_add_extent merges what touches and is of one kind.  So the first
   * extent is finished when there is a second one.
   */
  while (offset < end && !(only_one && nbdkit_extents_count (extents) > 1)) {
    uint32_t type = 0;
    struct run run;

    /* Reads nothing, so cannot fail. */
    (void) look (disk, offset, end, &run, NULL);

    if (run.state == BLOCK_HOLE && base->can_extents) {
      const uint64_t run_end = offset + run.length;

      /* Whether the first extent goes on is not worth asking the base. */
      if (only_one && nbdkit_extents_count (extents) > 0)
        break;
      if (offset >= below.end
          && ask_below (&below, base, offset, run_end,
                        only_one ? run_end : end, flags, err)
               == -1)
        return -1;
      if (add_below (&below, &offset, run_end, extents, err) == -1)
        return -1;
      if (only_one && offset < run_end)
        break;
      continue;
    }

    if (run.state == BLOCK_ZERO)
      type = NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO;
    if (nbdkit_add_extent (extents, offset, run.length, type) == -1) {
      *err = errno;
      return -1;
    }
    offset += run.length;
  }
  return 0;
}
