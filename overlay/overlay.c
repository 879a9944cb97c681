/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay as an object: its making and end, and freezing it (see overlay.h).
 *
 * Freezing takes the request lock exclusively, and in that hold the root of the map;
 * as a request changes all that it changes in one hold of that lock (rule 7), it is
 * in the frozen map wholly or not at all.  From then on nodes and places are shared
 * by the frozen and the live map, until a change comes (change.c): it copies nodes
 * (map_touch) and moves slots to fresh places.
 *
 * Releasing runs under the release lock, which no request and no freeze ever takes.
 * In one exclusive hold of the request lock the frozen map is taken out of the list;
 * a walk then finds what its neighbours do not have.  Places are given back in runs
 * of the file, and blocks that were zeroed in a place that was shared are punched as
 * rule 6 says.
 *
 * The end: overlay_close freezes and closes in one exclusive hold.  Then views are
 * cut off: from then on nobody but the one who saves uses the file for anything but
 * reading the live disk.
 */

#include <config.h>

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "overlay/private.h"

/* Make the store, and if there is going to be an image, lay its file out for
 * that.  0 or an errno value.
 */
static int
init_store (struct overlay *o, const struct overlay_options *options)
{
  struct qcow2_geometry g;

  if (options->fate == OVERLAY_THROWN_AWAY) {
    store_init (&o->store, options->dir, NEWFILE_ANONYMOUS,
                STORE_WRITES_BACK_LATE);
    places_init (&o->places, &o->store, slot_size (o), 1);
    return 0;
  }

  if (qcow2_geometry_init (&g, o->size, options->block_size, options->format)
      == -1)
    return EFBIG;

  const bool in_place = options->fate == OVERLAY_SAVED_IN_PLACE;

  if (tables_init (&o->tables, &g, &o->places,
                   in_place ? TABLES_SET_ASIDE : TABLES_UNPLANNED)
      == -1)
    return ENOMEM;
  store_init (&o->store, options->dir, NEWFILE_TO_PUBLISH,
              in_place ? STORE_WRITES_BACK_EARLY : STORE_WRITES_BACK_LATE);
  places_init (&o->places, &o->store, slot_size (o),
               ROUND_UP (tables_head_size (&g), slot_size (o))
                 >> o->slot_shift);
  return 0;
}

struct overlay *
overlay_new (uint64_t size, const struct overlay_options *options)
{
  struct overlay *o = calloc (1, sizeof *o);
  int err;

  if (!o)
    return NULL;
  o->size = size;
  o->block_shift = (unsigned) __builtin_ctz (options->block_size);
  o->slot_shift = o->block_shift + (unsigned) __builtin_ctz (SLOT_BLOCKS);
  o->detect_zeroes = options->detect_zeroes;
  o->fate = options->fate;
  atomic_init (&o->life, OVERLAY_OPEN);
  atomic_init (&o->changed, false);
  err = init_store (o, options);
  if (err) {
    free (o);
    errno = err;
    return NULL;
  }
  map_init (&o->map, (size >> o->slot_shift) + (size % slot_size (o) > 0));

  o->map.guard = &o->request_lock;

  rwlock_init (&o->request_lock, RANK_REQUEST);
  rwlock_init (&o->view_lock, RANK_VIEW);
  mutex_init (&o->release_lock, RANK_RELEASE);
  for (unsigned i = 0; i < NR_STRIPES; ++i)
    mutex_init (&o->slot_locks[i], RANK_SLOT);
  return o;
}

void
overlay_free (struct overlay *o)
{
  if (!o)
    return;
  o->map.guard = NULL; /* nobody else has it any more */
  if (atomic_load (&o->life) != OVERLAY_OPEN) {
    map_unlink (&o->map, &o->last);
    map_release (&o->last, NULL);
  }
  for (unsigned i = 0; i < NR_STRIPES; ++i)
    mutex_destroy (&o->slot_locks[i]);
  mutex_destroy (&o->release_lock);
  rwlock_destroy (&o->view_lock);
  rwlock_destroy (&o->request_lock);
  map_destroy (&o->map);
  places_destroy (&o->places);
  store_destroy (&o->store);
  if (has_tables (o))
    tables_destroy (&o->tables);
  free (o);
}

const struct map *
overlay_map (const struct overlay *o)
{
  return &o->last.map;
}

struct store *
overlay_store (struct overlay *o)
{
  return &o->store;
}

struct tables *
overlay_tables (struct overlay *o)
{
  return &o->tables;
}

uint64_t
overlay_size (const struct overlay *o)
{
  return o->size;
}

bool
overlay_is_changed (const struct overlay *o)
{
  return atomic_load (&o->changed);
}

void
overlay_lock_stripes (struct overlay *o, uint64_t stripes)
{
  for (; stripes; stripes &= stripes - 1)
    mutex_lock (&o->slot_locks[__builtin_ctzll (stripes)]);
}

void
overlay_unlock_stripes (struct overlay *o, uint64_t stripes)
{
  for (; stripes; stripes &= stripes - 1)
    mutex_unlock (&o->slot_locks[__builtin_ctzll (stripes)]);
}

void
overlay_punch_blocks (const struct overlay *o, uint64_t place, uint32_t blocks)
{
  while (blocks) {
    const unsigned first = (unsigned) __builtin_ctz (blocks);
    const unsigned count = bitmap_run_of_ones (blocks, first);

    store_punch (&o->store,
                 (place << o->slot_shift)
                   + ((uint64_t) first << o->block_shift),
                 (uint64_t) count << o->block_shift);
    blocks &= ~bitmap_mask (first, count);
  }
}

/*----------------------------------------------------------------------
 * Freezing
 */

struct frozen_map *
overlay_freeze (struct overlay *o)
{
  assert_none_held_from (RANK_RELEASE);

  struct frozen_map *frozen = malloc (sizeof *frozen);

  if (!frozen)
    return NULL;
  {
    HOLD_EXCLUSIVE (&o->request_lock);
    if (!is_closed (o)) {
      map_freeze (&o->map, frozen);
      return frozen;
    }
  }
  free (frozen);
  errno = ESHUTDOWN;
  return NULL;
}

void
overlay_close (struct overlay *o)
{
  assert_none_held_from (RANK_RELEASE);

  /* Rule 7: whoever changes something does so in one hold of the request lock, and
   * so has done all of it by now, or will find this.
   */
  HOLD_EXCLUSIVE (&o->request_lock);

  if (!is_closed (o)) {
    map_freeze (&o->map, &o->last);
    atomic_store (&o->life, OVERLAY_CLOSED);
  }
}

bool
overlay_is_closed (struct overlay *o)
{
  assert_none_held_from (RANK_RELEASE);
  HOLD_SHARED (&o->request_lock);

  return is_closed (o);
}

/* Are views cut off?  Caller holds the view lock or the release lock. */
static bool
views_are_cut (const struct overlay *o)
{
  assert_either_held (&o->view_lock, &o->release_lock);
  return atomic_load (&o->life) == OVERLAY_CUT;
}

int
overlay_read_frozen (struct overlay *o, void *buf, uint64_t count,
                     uint64_t offset)
{
  assert_none_held_from (RANK_RELEASE);
  HOLD_SHARED (&o->view_lock);

  if (views_are_cut (o)) {
    errno = ESHUTDOWN;
    return -1;
  }
  return store_read (&o->store, buf, count, offset);
}

/*----------------------------------------------------------------------
 * Releasing
 */

/* A walk over what is released, and places on their way back. */
struct giving {
  struct overlay *o;
  const struct frozen_map *frozen;
  size_t count;
  uint64_t since_pause; /* bytes */
  uint64_t places[1024];
};

static int
compare_places (const void *a, const void *b)
{
  const uint64_t place_a = *(const uint64_t *) a;
  const uint64_t place_b = *(const uint64_t *) b;

  return (place_a > place_b) - (place_a < place_b);
}

/* Who waits for the file's lock in the kernel gets it after some punching now;
 * without a pause, only after some milliseconds.
 */
static void
pause_after (struct giving *g, uint64_t bytes)
{
  g->since_pause += bytes;
  if (g->since_pause >= PUNCH_BYTES) {
    usleep (1);
    g->since_pause = 0;
  }
}

/* Give the places back that were collected, in runs of the file, from the last one
 * down, so that the end of the file moves back.
 */
static void
give_back_places (struct giving *g)
{
  const uint64_t longest = MAX (PUNCH_BYTES >> g->o->slot_shift, 1);

  qsort (g->places, g->count, sizeof g->places[0], compare_places);
  for (size_t end = g->count; end > 0;) {
    size_t first = end - 1;

    while (first > 0 && end - first < longest
           && g->places[first - 1] + 1 == g->places[first])
      first--;
    places_give_back (&g->o->places, g->places[first], end - first);
    pause_after (g, (end - first) << g->o->slot_shift);
    end = first;
  }
  g->count = 0;
}

static void
place_is_free (void *opaque, uint64_t place)
{
  struct giving *g = opaque;

  if (g->count == sizeof g->places / sizeof g->places[0])
    give_back_places (g);
  g->places[g->count++] = place;
}

/* BLOCKS were zeroed while their place was shared.  Under both locks, look again, at
 * the map that is the next newer one now: the live one, where blocks may have been
 * allocated again, or one that was frozen since.
 */
static void
blocks_are_free (void *opaque, uint64_t nr, uint64_t place, uint32_t blocks)
{
  struct giving *g = opaque;
  struct overlay *o = g->o;

  assert_held (&o->release_lock); /* or the frozen maps might not be there */
  overlay_lock_stripes (o, stripe_of (nr));
  rwlock_lock_shared (&o->request_lock);

  const struct slot_pair pair
    = slot_load (map_find (map_next_newer (&o->map, g->frozen), nr));
  if (pair.place == place)
    overlay_punch_blocks (o, place, blocks & ~bitmap_allocated (pair.state));

  rwlock_unlock (&o->request_lock);
  overlay_unlock_stripes (o, stripe_of (nr));
  pause_after (g, (uint64_t) __builtin_popcount (blocks) << o->block_shift);
}

void
overlay_release (struct overlay *o, struct frozen_map *frozen)
{
  assert_none_held_from (RANK_RELEASE);

  struct giving giving;
  const struct map_release release = {
    .place_is_free = place_is_free,
    .blocks_are_free = blocks_are_free,
    .opaque = &giving,
  };

  HOLD (&o->release_lock);

  {
    HOLD_EXCLUSIVE (&o->request_lock);
    map_unlink (&o->map, frozen);
  }

  /* Once views are cut off, the file may have been saved, and be somebody else's. */
  if (views_are_cut (o))
    map_release (frozen, NULL);
  else {
    giving.o = o;
    giving.frozen = frozen;
    giving.count = 0;
    giving.since_pause = 0;
    map_release (frozen, &release);
    give_back_places (&giving);
  }
  free (frozen);
}

void
overlay_cut_views (struct overlay *o)
{
  assert_none_held_from (RANK_RELEASE);

  /* A release that has begun is waited for; later ones leave the file alone. */
  HOLD (&o->release_lock);

  HOLD_EXCLUSIVE (&o->view_lock);
  atomic_store (&o->life, OVERLAY_CUT);
  o->had_views = o->last.older;
}

bool
overlay_had_views (const struct overlay *o)
{
  return o->had_views;
}

/* Who looks for what is not used, and for how long runs of blocks. */
struct search {
  const struct overlay *o;
  bool (*function) (void *opaque, uint64_t offset, uint64_t count);
  void *opaque;
  unsigned shortest, longest; /* in blocks */
};

/* Of the slot at PLACE, blocks are not used.  False: the search is over. */
static bool
find_in_slot (const struct search *s, uint64_t place, uint32_t blocks)
{
  const struct overlay *o = s->o;

  while (blocks) {
    const unsigned first = (unsigned) __builtin_ctz (blocks);
    const unsigned count = bitmap_run_of_ones (blocks, first);

    if (count >= s->shortest && count <= s->longest
        && !s->function (s->opaque,
                         (place << o->slot_shift)
                           + ((uint64_t) first << o->block_shift),
                         (uint64_t) count << o->block_shift))
      return false;
    blocks &= ~bitmap_mask (first, count);
  }
  return true;
}

/* What of FROZEN has the map not that is to be saved?  No place that FROZEN has was
 * given to another slot.
 */
static bool
find_only_in (const struct search *s, const struct frozen_map *frozen)
{
  const struct map *map = &frozen->map;

  for (uint64_t nr = map_next (map, 0); nr < map->nr_slots;
       nr = map_next (map, nr + 1)) {
    const struct slot_pair pair = slot_load (map_find (map, nr));
    const struct slot_pair last = slot_load (map_find (&s->o->last.map, nr));
    const uint32_t kept
      = last.place == pair.place ? bitmap_allocated (last.state) : 0;

    if (!find_in_slot (s, pair.place, bitmap_allocated (pair.state) & ~kept))
      return false;
  }
  return true;
}

void
overlay_find_unused (struct overlay *o,
                     bool (*function) (void *opaque, uint64_t offset,
                                       uint64_t count),
                     void *opaque)
{
  const struct search searches[] = {
    { o, function, opaque, SLOT_BLOCKS / 2, SLOT_BLOCKS },
    { o, function, opaque, 1, SLOT_BLOCKS / 2 - 1 },
  };

  /* Under the release lock the list does not lose any, and closed, it gains none. */
  HOLD (&o->release_lock);

  for (size_t i = 0; i < 2; ++i)
    for (const struct frozen_map *f = o->last.older; f; f = f->older)
      if (!find_only_in (&searches[i], f))
        return;
}
