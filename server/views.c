/* SPDX-License-Identifier: BSD-3-Clause */

/* Views (see views.h).
 *
 * A view holds its moments, so that what it shows does not change and nothing of it
 * needs a lock; only the overlay's file is read under the lock by which views are cut
 * off at the server's end (overlay_read_frozen).
 *
 * Which connection gets which view: see viewers.c.
 *
 * An image is planned once, when its size is asked first, and is then shared by all
 * connections to the view.  The plan of a full image asks the base for its extents.  An
 * increment is planned from a map of its own, which has only the blocks that differ.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/debug.h"
#include "common/lock.h"
#include "images/image.h"
#include "server/views.h"

/* Extents of the base are asked for so many bytes at a time: in blocks of 512 bytes
 * they fit into what nbdkit takes of them in one list.
 */
#define EXTENTS_BYTES (UINT64_C (256) << 20)

struct view {
  struct view_source source; /* constant, as are the next three */
  const struct view_options *options;
  struct overlay *overlay; /* NULL: of the base alone */
  struct qcow2_base base;
  bool has_base;
  struct mutex lock;   /* held while the image is planned */
  struct image *image; /* NULL: not planned yet; then constant, as are... */
  struct image_data of_base;
  struct map
    made; /* if the moment has no map of its own that is all of the image */
};

/*----------------------------------------------------------------------
 * Making
 */

struct view *
view_new (const struct view_source *source, const struct qcow2_base *identity,
          const struct view_options *options)
{
  const struct moment *any = source->what ? source->what : source->from;
  struct view *v = calloc (1, sizeof *v);

  if (!v) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  v->source = *source;
  v->options = options;
  v->overlay = any ? moment_overlay (any) : NULL;
  if (identity) {
    v->base = *identity;
    v->has_base = true;
  }
  if (source->what)
    moment_hold (source->what);
  if (source->from)
    moment_hold (source->from);
  map_init (&v->made, any ? moment_frozen (any)->map.nr_slots : 0);
  mutex_init (&v->lock, RANK_PLAN);
  return v;
}

void
view_free (struct view *v)
{
  if (!v)
    return;
  image_free (v->image);
  free (v->of_base.runs);
  map_destroy (&v->made);
  moment_let_go (v->source.what);
  moment_let_go (v->source.from);
  mutex_destroy (&v->lock);
  free (v);
}

const struct view_source *
view_source (const struct view *v)
{
  return &v->source;
}

/*----------------------------------------------------------------------
 * Planning an image
 */

static void
cleanup_extents (struct nbdkit_extents **extents)
{
  nbdkit_extents_free (*extents);
}

/* Add what the base says of COUNT bytes at OFFSET.  Returns of how many from there on; 0
 * and errno.
 */
static uint64_t
find_data (struct view *v, const struct base *base, uint64_t offset,
           uint64_t count)
{
  __attribute__ ((cleanup (cleanup_extents))) struct nbdkit_extents *extents
    = nbdkit_extents_new (offset, base->size);
  const uint64_t end = offset + count;
  uint64_t covered, done = 0;
  int err = EIO;

  if (!extents)
    return 0;
  if (base_extents (base, count, offset, 0, extents, &covered, &err) == -1) {
    errno = err;
    return 0;
  }
  for (size_t i = 0; i < nbdkit_extents_count (extents); ++i) {
    const struct nbdkit_extent e = nbdkit_get_extent (extents, i);

    /* It may say more than it was asked for. */
    if (e.offset >= end)
      break;
    const uint64_t e_end = MIN (e.offset + e.length, end);

    if (!(e.type & NBDKIT_EXTENT_ZERO)
        && image_data_add (&v->of_base, v->options->block_size, e.offset,
                           e_end - e.offset)
             == -1)
      return 0;
    done = e_end - offset;
  }
  return done;
}

/* Find out where the base has data between START and END, bytes.  -1 and errno. */
static int
find_data_of (struct view *v, const struct base *base, uint64_t start,
              uint64_t end)
{
  if (start < end && !base->can_extents)
    return image_data_add (&v->of_base, v->options->block_size, start,
                           end - start);

  while (start < end) {
    const uint64_t n
      = find_data (v, base, start, MIN (EXTENTS_BYTES, end - start));

    if (n == 0)
      return -1;
    if (overlay_is_closed (v->overlay)) { /* it may take long */
      errno = ESHUTDOWN;
      return -1;
    }
    start += n;
  }
  return 0;
}

/* The map of a moment; that of the base has nothing in it. */
static const struct map *
map_of (const struct moment *moment, const struct map *empty)
{
  return moment ? &moment_frozen (moment)->map : empty;
}

static struct slot_pair
pair_of (const struct map *map, uint64_t nr)
{
  const struct slot *slot = map_find (map, nr);

  return slot ? slot_load (slot) : (struct slot_pair) { .where = 0 };
}

/* Put BLOCKS of slot NR, which are allocated or zero in PAIR, into the map that is made. -1
 * and errno.
 */
static int
add_blocks (struct view *v, uint64_t nr, struct slot_pair pair,
            uint32_t blocks)
{
  struct slot *slot = map_touch (&v->made, nr);
  uint32_t to[SLOT_BLOCKS];
  struct slot_step step = { .to = to };

  if (!slot)
    return -1;
  step.found = slot_load (slot);
  step.fresh = blocks & bitmap_allocated (pair.state);
  step.state = bitmap_set_allocated (
    bitmap_set_zero (step.found.state, blocks & bitmap_zero (pair.state)),
    step.fresh);
  for (uint32_t left = step.fresh; left; left &= left - 1) {
    const unsigned block = (unsigned) __builtin_ctz (left);

    to[block] = slot_address (pair, block);
  }
  if (slot_prepare (&v->made, &step) == -1)
    return -1;
  slot_store (slot, &step);
  return 0;
}

/* Blocks START .. END-1 become zero in the map that is made.  -1 and errno. */
static int
add_zeroes (struct view *v, uint64_t start, uint64_t end)
{
  const struct slot_pair zero = { .state = UINT64_MAX << 32 };
  const uint64_t leaf = LEAF_SLOTS * SLOT_BLOCKS;

  while (start < end) {
    const uint64_t nr = start / SLOT_BLOCKS;
    const unsigned first = start % SLOT_BLOCKS;
    const unsigned count = (unsigned) MIN (SLOT_BLOCKS - first, end - start);

    if (start % leaf == 0 && end - start >= leaf
        && map_ready_leaf (&v->made, nr)) {
      map_zero_leaf (&v->made, nr);
      start += leaf;
      continue;
    }
    if (add_blocks (v, nr, zero, bitmap_mask (first, count)) == -1)
      return -1;
    start += count;
  }
  return 0;
}

/* Blocks in which the later moment has holes, and the other one has not. */
struct holes {
  uint64_t start, end;
};

/* They are the base's at the later moment; where that is zero, they become zero.  -1 and
 * errno.
 */
static int
add_holes (struct view *v, const struct base *base, struct holes *holes)
{
  const uint32_t bs = v->options->block_size;
  size_t i = v->of_base.nr_runs;
  uint64_t at = holes->start;

  if (find_data_of (v, base, at * bs, MIN (holes->end * bs, base->size)) == -1)
    return -1;
  if (i > 0)
    i--; /* what touches it has been joined to it */
  for (; i < v->of_base.nr_runs; ++i) {
    const struct image_data_run run = v->of_base.runs[i];

    if (run.start > at && add_zeroes (v, at, run.start) == -1)
      return -1;
    at = MAX (at, run.end);
  }
  if (at < holes->end && add_zeroes (v, at, holes->end) == -1)
    return -1;
  *holes = (struct holes) { .start = 0 };
  return 0;
}

/* The base is asked about so many blocks at a time. */
#define MAX_HOLES (UINT64_C (1) << 20)

/* BLOCKS of slot NR are not the same at both moments; PAIR is the later one.  -1 and errno. */
static int
add_different (struct view *v, const struct base *base, struct holes *holes,
               uint64_t nr, struct slot_pair pair, uint32_t blocks)
{
  const uint32_t in_slot = blocks & bitmap_holes (pair.state);

  if (blocks != in_slot && add_blocks (v, nr, pair, blocks & ~in_slot) == -1)
    return -1;
  for (unsigned i = 0; i < SLOT_BLOCKS; ++i) {
    const uint64_t start = nr * SLOT_BLOCKS + i;
    const unsigned count = bitmap_run_of_ones (in_slot, i);

    if (count == 0)
      continue;
    if ((start != holes->end || start - holes->start >= MAX_HOLES)
        && holes->start < holes->end && add_holes (v, base, holes) == -1)
      return -1;
    if (holes->start == holes->end)
      holes->start = start;
    holes->end = start + count;
    i += count;
  }
  return 0;
}

/* Are all slots of the leaf of slot NR, which is its first one, zero at the later moment, and
 * was nothing near them touched at the other one?  Then the leaf takes no memory.
 */
static bool
is_new_zero_leaf (const struct map *from, const struct map *what, uint64_t nr)
{
  if (nr % LEAF_SLOTS != 0 || map_in_row (what, nr) < LEAF_SLOTS
      || map_find (from, nr))
    return false;
  for (uint64_t i = 0; i < LEAF_SLOTS; ++i)
    if (pair_of (what, nr + i).state != UINT64_MAX << 32)
      return false;
  return true;
}

/* Go over all that differs.  -1 and errno. */
static int
compare_maps (struct view *v, const struct base *base, const struct map *from,
              const struct map *what)
{
  struct holes holes = { .start = 0 };

  for (uint64_t nr = map_next_different (from, what, 0); nr < what->nr_slots;
       nr = map_next_different (from, what, nr + 1)) {
    if (is_new_zero_leaf (from, what, nr) && map_ready_leaf (&v->made, nr)) {
      map_zero_leaf (&v->made, nr);
      nr += LEAF_SLOTS - 1;
      continue;
    }

    const struct slot_pair pair = pair_of (what, nr);
    const uint32_t blocks = slot_different_blocks (pair_of (from, nr), pair);

    if (blocks && add_different (v, base, &holes, nr, pair, blocks) == -1)
      return -1;
    if (nr % LEAF_SLOTS == 0 && overlay_is_closed (v->overlay)) {
      errno = ESHUTDOWN;
      return -1;
    }
  }
  return holes.start < holes.end ? add_holes (v, base, &holes) : 0;
}

/* Find out which blocks are not the same at both moments.  -1 and errno. */
static int
find_differences (struct view *v, const struct base *base)
{
  struct map empty;
  int r;

  /* There may be something of an earlier try. */
  map_destroy (&v->made);
  map_init (&v->made, v->made.nr_slots);
  v->of_base.nr_runs = 0;
  map_init (&empty, v->made.nr_slots);
  r = compare_maps (v, base, map_of (v->source.from, &empty),
                    map_of (v->source.what, &empty));
  map_destroy (&empty);
  return r;
}

/* Caller holds the lock of the view.  -1 and errno. */
static int
plan (struct view *v, const struct base *base)
{
  const struct view_options *o = v->options;
  struct image_source source = { .map = map_of (v->source.what, &v->made) };
  CLEANUP_FREE char *made_up = NULL;

  assert_held (&v->lock);
  if (qcow2_geometry_init (&source.geometry, base->size, o->block_size,
                           o->format)
      == -1) {
    errno = EFBIG;
    return -1;
  }
  if (v->source.from) {
    /* What is behind an increment nobody knows but the one who has it. */
    if (find_differences (v, base) == -1)
      return -1;
    source.map = &v->made;
    source.of_base = &v->of_base;
    v->base.known = true;
    v->base.is_increment = true;
    source.base = &v->base;
  }
  else if (v->source.form == VIEW_FULL) {
    v->of_base.nr_runs = 0;
    if (find_data_of (v, base, 0, base->size) == -1)
      return -1;
    source.of_base = &v->of_base;
  }
  else {
    if (image_set_backing (&source, o->backing, o->backing_format, &made_up)
        == -1)
      return -1;
    source.base = v->has_base ? &v->base : NULL;
  }
  v->image = image_plan (&source);
  return v->image ? 0 : -1;
}

int64_t
view_size (struct view *v, const struct base *base)
{
  if (v->source.form == VIEW_DISK)
    return (int64_t) base->size;

  HOLD (&v->lock);

  if (!v->image && plan (v, base) == -1) {
    if (errno == EFBIG)
      nbdkit_error ("cow: image refused: a disk of %" PRIu64
                    " bytes is too large "
                    "for a qcow2 image with blocks of cow-block-size=%" PRIu32,
                    base->size, v->options->block_size);
    else
      nbdkit_error ("cow: image refused: it cannot be planned: %m");
    return -1;
  }
  return (int64_t) image_size (v->image);
}

/*----------------------------------------------------------------------
 * Reading
 */

/* A read of an image. */
struct view_reading {
  struct view *view;
  const struct base *base;
  int base_err; /* of the base, which has reported it */
};

static int
read_file (void *opaque, void *buf, uint64_t count, uint64_t offset)
{
  const struct view_reading *r = opaque;

  return overlay_read_frozen (r->view->overlay, buf, count, offset);
}

static int
read_base (void *opaque, void *buf, uint64_t count, uint64_t offset)
{
  struct view_reading *r = opaque;
  const uint64_t size = r->base->size;
  const uint64_t n = offset < size ? MIN (count, size - offset) : 0;

  memset ((char *) buf + n, 0, count - n);
  return n > 0 ? base_read (r->base, buf, n, offset, &r->base_err) : 0;
}

static int
read_image (struct view *v, const struct base *base, void *buf, uint32_t count,
            uint64_t offset, int *err)
{
  struct view_reading reading = { .view = v, .base = base };
  const struct image_reader reader
    = { .read_file = read_file, .read_base = read_base, .opaque = &reading };

  if (image_read (v->image, &reader, buf, count, offset) == 0)
    return 0;
  *err = reading.base_err ? reading.base_err : blk_error (v->overlay, errno);
  return -1;
}

int
view_read (struct view *v, const struct base *base, void *buf, uint32_t count,
           uint64_t offset, int *err)
{
  if (v->source.form != VIEW_DISK)
    return read_image (v, base, buf, count, offset, err);
  if (!v->source.what)
    return base_read (base, buf, count, offset, err);
  return blk_read (frozen_disk (v->overlay, moment_frozen (v->source.what)),
                   base, ON_READ_PASS, buf, count, offset, err);
}

bool
view_can_extents (const struct view *v, const struct base *base)
{
  return v->source.form == VIEW_DISK && (v->source.what || base->can_extents);
}

int
view_extents (struct view *v, const struct base *base, uint32_t count,
              uint64_t offset, uint32_t flags, struct nbdkit_extents *extents,
              int *err)
{
  uint64_t covered;

  if (!v->source.what)
    return base_extents (base, count, offset, flags, extents, &covered, err);
  return blk_extents (frozen_disk (v->overlay, moment_frozen (v->source.what)),
                      base, count, offset, flags, extents, err);
}
