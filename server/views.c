/* SPDX-License-Identifier: BSD-3-Clause */

/* Views (see views.h).
 *
 * A view holds a frozen map, so that what it shows does not change and nothing of it
 * needs a lock; only the overlay's file is read under the lock by which views are cut
 * off at the server's end (overlay_read_frozen).
 *
 * An image is planned once, when its size is asked first, and is then shared by all
 * connections to the view.  The plan of a full image asks the base for its extents.
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

static const struct {
  const char *suffix, *description;
} kinds[NR_VIEWS] = {
  [VIEW_BASE] = { "@base", "the base, without what was written" },
  [VIEW_SNAPSHOT] = { "@snapshot", "the disk, frozen when you connect" },
  [VIEW_DIFF] = { "@diff.qcow2", "a qcow2 image of what was written" },
  [VIEW_FULL] = { "@full.qcow2", "a qcow2 image of the whole disk" },
};

struct view {
  enum view_kind kind; /* constant, as are the next three */
  const struct view_options *options;
  struct overlay *overlay;   /* NULL: of the base */
  struct frozen_map *frozen; /* likewise */
  struct qcow2_base base;    /* likewise */
  struct mutex lock;         /* held while the image is planned */
  struct image *image; /* NULL: not planned yet; then constant, as is... */
  struct image_data of_base;
};

/*----------------------------------------------------------------------
 * Names
 */

enum view_kind
view_of_name (const char *name, size_t *length)
{
  const size_t all = strlen (name);

  for (enum view_kind kind = 0; kind < NR_VIEWS; ++kind) {
    const size_t n = strlen (kinds[kind].suffix);

    if (all >= n && strcmp (name + (all - n), kinds[kind].suffix) == 0) {
      *length = all - n;
      return kind;
    }
  }
  *length = all;
  return VIEW_NONE;
}

const char *
view_description (enum view_kind kind)
{
  return kinds[kind].description;
}

int
views_list (struct nbdkit_exports *exports, enum view_kind last)
{
  const size_t longest = 4096; /* what NBD allows */
  const size_t nr_names = nbdkit_exports_count (exports);

  for (size_t i = 0; i < nr_names; ++i) {
    size_t length;

    /* There are no views of what looks like a view. */
    if (view_of_name (nbdkit_get_export (exports, i).name, &length)
        != VIEW_NONE)
      continue;
    for (enum view_kind kind = 0; kind <= last; ++kind) {
      CLEANUP_FREE char *name = NULL;

      if (nbdkit_exports_count (exports) >= MAX_EXPORTS)
        return 0;
      if (asprintf (&name, "%s%s", nbdkit_get_export (exports, i).name,
                    kinds[kind].suffix)
          == -1) {
        name = NULL;
        nbdkit_error ("cow: out of memory");
        return -1;
      }
      if (strlen (name) <= longest
          && nbdkit_add_export (exports, name, kinds[kind].description) == -1)
        return -1;
    }
  }
  return 0;
}

/*----------------------------------------------------------------------
 * Making
 */

struct view *
view_new (enum view_kind kind, struct overlay *overlay,
          const struct qcow2_base *identity,
          const struct view_options *options)
{
  struct view *v = calloc (1, sizeof *v);

  if (!v) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  v->kind = kind;
  v->options = options;
  v->overlay = overlay;
  if (overlay) {
    v->base = *identity;
    v->frozen = overlay_freeze (overlay);
    if (!v->frozen) {
      if (errno == ESHUTDOWN)
        nbdkit_debug ("cow: view refused: the server ends");
      else
        nbdkit_error ("cow: out of memory");
      free (v);
      return NULL;
    }
  }
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
  if (v->overlay)
    overlay_release (v->overlay, v->frozen);
  mutex_destroy (&v->lock);
  free (v);
}

static void
cleanup_extents (struct nbdkit_extents **extents)
{
  nbdkit_extents_free (*extents);
}

/* Add what the base says of COUNT bytes at OFFSET.  Returns how many it has spoken of;
 * 0 and errno.
 */
static uint64_t
find_data (struct view *v, const struct base *base, uint64_t offset,
           uint64_t count)
{
  __attribute__ ((cleanup (cleanup_extents))) struct nbdkit_extents *extents
    = nbdkit_extents_new (offset, base->size);
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

    if (!(e.type & NBDKIT_EXTENT_ZERO)
        && image_data_add (&v->of_base, v->options->block_size, e.offset,
                           e.length)
             == -1)
      return 0;
    done = e.offset + e.length - offset;
  }
  return done;
}

/* Find out where the base has data.  -1 and errno. */
static int
find_all_data (struct view *v, const struct base *base)
{
  v->of_base.nr_runs = 0;
  if (base->size > 0 && !base->can_extents)
    return image_data_add (&v->of_base, v->options->block_size, 0, base->size);

  for (uint64_t at = 0; at < base->size;) {
    const uint64_t n
      = find_data (v, base, at, MIN (EXTENTS_BYTES, base->size - at));

    if (n == 0)
      return -1;
    if (overlay_is_closed (v->overlay)) { /* it may take long */
      errno = ESHUTDOWN;
      return -1;
    }
    at += n;
  }
  return 0;
}

/* Caller holds the lock of the view.  -1 and errno. */
static int
plan (struct view *v, const struct base *base)
{
  const struct view_options *o = v->options;
  struct image_source source = { .map = &v->frozen->map };
  CLEANUP_FREE char *made_up = NULL;

  assert_held (&v->lock);
  if (qcow2_geometry_init (&source.geometry, base->size, o->block_size,
                           o->format)
      == -1) {
    errno = EFBIG;
    return -1;
  }
  if (v->kind == VIEW_FULL) {
    if (find_all_data (v, base) == -1)
      return -1;
    source.of_base = &v->of_base;
  }
  else {
    if (image_set_backing (&source, o->backing, o->backing_format, &made_up)
        == -1)
      return -1;
    source.base = &v->base;
  }
  v->image = image_plan (&source);
  return v->image ? 0 : -1;
}

int64_t
view_size (struct view *v, const struct base *base)
{
  if (v->kind == VIEW_BASE || v->kind == VIEW_SNAPSHOT)
    return (int64_t) base->size;

  HOLD (&v->lock);

  if (!v->image && plan (v, base) == -1) {
    if (errno == EFBIG)
      nbdkit_error ("cow: %s refused: a disk of %" PRIu64
                    " bytes is too large "
                    "for a qcow2 image with blocks of cow-block-size=%" PRIu32,
                    kinds[v->kind].suffix, base->size, v->options->block_size);
    else
      nbdkit_error ("cow: %s refused: cannot plan the image: %m",
                    kinds[v->kind].suffix);
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
  switch (v->kind) {
  case VIEW_BASE:
    return base_read (base, buf, count, offset, err);
  case VIEW_SNAPSHOT:
    return blk_read (frozen_disk (v->overlay, v->frozen), base, ON_READ_PASS,
                     buf, count, offset, err);
  default:
    return read_image (v, base, buf, count, offset, err);
  }
}

bool
view_can_extents (const struct view *v, const struct base *base)
{
  return v->kind == VIEW_BASE ? base->can_extents : v->kind == VIEW_SNAPSHOT;
}

int
view_extents (struct view *v, const struct base *base, uint32_t count,
              uint64_t offset, uint32_t flags, struct nbdkit_extents *extents,
              int *err)
{
  uint64_t covered;

  if (v->kind == VIEW_BASE)
    return base_extents (base, count, offset, flags, extents, &covered, err);
  return blk_extents (frozen_disk (v->overlay, v->frozen), base, count, offset,
                      flags, extents, err);
}
