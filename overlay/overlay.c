/* SPDX-License-Identifier: BSD-3-Clause */

/* An overlay as an object: its making and end, and freezing it (see overlay.h).
 *
 * Freezing takes the request lock exclusively, and in that hold the root of the map;
 * as a request changes all that it changes in one hold of that lock (rule 7), it is
 * in the frozen map wholly or not at all.  From then on nodes and addresses are shared
 * by the frozen and the live map, until a change comes (change.c): it copies nodes
 * (map_touch), and blocks that are written to get fresh addresses.  What the live map owns
 * no longer goes on its dead list, which the next frozen map gets.
 *
 * Releasing runs under the release lock, which no request and no freeze ever takes.
 * In one exclusive hold of the request lock the frozen map is taken out of the list, and
 * the dead list of its newer neighbour taken away.  What of that the older neighbour
 * owns goes on the list of whatever map is the newer neighbour then; all else is owned by
 * nobody, and waits for the cleaner.  No slots are compared, as the live map goes on to
 * change them.
 *
 * The end: overlay_close freezes and closes in one exclusive hold.  Then views are
 * cut off: from then on nobody but the one who saves uses the file for anything but
 * reading the live disk.
 */

#include <config.h>

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "common/lock.h"
#include "overlay/private.h"

/* Make the store, and if there is going to be an image, lay its file out for that, in the
 * portable form.  (One in the extended form is copied, as a cluster there is a whole slot.
 * Where there is no room for the copy, the file can still become a portable one.)  0 or an
 * errno value.
 */
static int
init_store (struct overlay *o, const struct overlay_options *options)
{
  struct qcow2_geometry *g = &o->geometry, portable;

  if (options->fate == OVERLAY_THROWN_AWAY) {
    store_init (&o->store, options->dir, NEWFILE_ANONYMOUS,
                STORE_WRITES_BACK_LATE);
    log_init (&o->log, &o->store, o->block_shift, 1);
    return 0;
  }

  if (qcow2_geometry_init (g, o->size, options->block_size, options->format)
      == -1)
    return EFBIG;
  portable = *g;
  if (g->format == QCOW2_EXTENDED)
    (void) qcow2_geometry_init (&portable, o->size, options->block_size,
                                QCOW2_PORTABLE);

  const bool fits = portable.format == QCOW2_PORTABLE;
  const bool in_place = options->fate == OVERLAY_SAVED_IN_PLACE && fits;
  const bool is_synced = in_place && g->format == QCOW2_PORTABLE;

  if (tables_init (&o->tables, &portable, &o->log,
                   in_place ? TABLES_SET_ASIDE : TABLES_UNPLANNED)
      == -1)
    return ENOMEM;
  store_init (&o->store, options->dir, NEWFILE_TO_PUBLISH,
              is_synced ? STORE_WRITES_BACK_EARLY : STORE_WRITES_BACK_LATE);
  log_init (&o->log, &o->store, o->block_shift,
            fits ? tables_head_size (&portable) >> o->block_shift : 1);
  return 0;
}

/* It comes from calloc. */
_Static_assert(_Alignof(struct overlay) <= _Alignof(max_align_t),
               "an overlay is aligned as calloc does it");

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
  o->max_blocks = options->max_bytes
                    ? MAX (options->max_bytes >> o->block_shift, 1)
                    : LOG_UNLIMITED;
  o->fate = options->fate;
  atomic_init (&o->life, OVERLAY_OPEN);
  atomic_init (&o->changed_in, 0);
  grace_init (&o->grace);
  cleaning_init (&o->cleaning, options->cleaner, &o->log, &o->grace);
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
  mutex_init (&o->dead_lock, RANK_DEAD);
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
  /* Without a file nothing was ever cleaned.  (The set of overlays frees such a one while
   * it holds its lock.)
   */
  if (store_has_file (&o->store))
    cleaner_leave (&o->cleaning);
  o->map.guard = NULL; /* nobody else has it any more */
  if (atomic_load (&o->life) != OVERLAY_OPEN) {
    map_unlink (&o->map, &o->last);
    map_release (&o->last);
    dead_destroy (&o->last.map.dead);
  }
  for (unsigned i = 0; i < NR_STRIPES; ++i)
    mutex_destroy (&o->slot_locks[i]);
  mutex_destroy (&o->release_lock);
  rwlock_destroy (&o->view_lock);
  rwlock_destroy (&o->request_lock);
  mutex_destroy (&o->dead_lock);
  cleaning_destroy (&o->cleaning);
  map_destroy (&o->map);
  log_destroy (&o->log);
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

const struct qcow2_geometry *
overlay_geometry (const struct overlay *o)
{
  return &o->geometry;
}

uint64_t
overlay_size (const struct overlay *o)
{
  return o->size;
}

uint64_t
overlay_max_bytes (const struct overlay *o)
{
  return o->max_blocks == LOG_UNLIMITED ? 0 : o->max_blocks << o->block_shift;
}

bool
overlay_is_changed (const struct overlay *o)
{
  return atomic_load (&o->changed_in) > 0;
}

bool
overlay_is_changed_since (const struct overlay *o,
                          const struct frozen_map *frozen)
{
  return atomic_load (&o->changed_in) > frozen->generation;
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

/*----------------------------------------------------------------------
 * Freezing
 */

/* All request locks are held exclusively before the first overlay is frozen, and until the
 * last one is: so what was acknowledged of one before something was sent to another is
 * in the first one's frozen map if that is in the other one's.
 */
int
overlay_freeze_all (struct overlay *const *overlays, size_t count,
                    struct frozen_map **frozen)
{
  bool closed = false;
  size_t made = 0;

  assert_none_held_from (RANK_RELEASE);

  while (made < count && (frozen[made] = malloc (sizeof **frozen)))
    made++;
  if (made == count) {
    for (size_t i = 0; i < count; ++i) {
      rwlock_lock_exclusively (&overlays[i]->request_lock);
      closed |= is_closed (overlays[i]);
    }
    for (size_t i = 0; i < count && !closed; ++i)
      map_freeze (&overlays[i]->map, frozen[i]);
    for (size_t i = count; i-- > 0;)
      rwlock_unlock (&overlays[i]->request_lock);
    if (!closed)
      return 0;
  }
  while (made-- > 0)
    free (frozen[made]);
  errno = closed ? ESHUTDOWN : ENOMEM;
  return -1;
}

struct frozen_map *
overlay_freeze (struct overlay *o)
{
  struct frozen_map *frozen;

  return overlay_freeze_all (&o, 1, &frozen) == 0 ? frozen : NULL;
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

/* What becomes of a dead list. */
struct burial {
  struct overlay *o;
  const struct map *older; /* or NULL; nobody changes it */
  bool tell;               /* the cleaner */
};

static bool
owns (const struct map *map, uint64_t block, uint32_t address)
{
  const struct slot *slot = map_find (map, block / SLOT_BLOCKS);
  const unsigned nr = block % SLOT_BLOCKS;

  if (!slot)
    return false;
  const struct slot_pair pair = slot_load (slot);
  return bitmap_state (pair.state, nr) == BLOCK_ALLOCATED
         && slot_address (pair, nr) == address;
}

/* For dead_filter: what the older map owns stays, all else waits. */
static uint32_t
bury (void *opaque, struct dead_run run, bool *stays)
{
  struct burial *b = opaque;
  uint32_t count = 1;

  if (!b->older) {
    *stays = false;
    count = run.count;
  }
  else {
    *stays = owns (b->older, run.block, run.address);
    while (count < run.count
           && owns (b->older, run.block + count, run.address + count)
                == *stays)
      count++;
  }
  if (!*stays)
    b->tell |= log_wait (&b->o->log, (struct log_run) { run.address, count });
  return count;
}

/* FROZEN was unlinked, and has the dead list that its newer neighbour had: of what is in
 * it, nobody owns what FROZEN->older does not.  Nobody else can come to that list, and
 * under the release lock the older map stays.
 */
static void
bury_dead (struct overlay *o, struct frozen_map *frozen)
{
  struct burial burial
    = { .o = o, .older = frozen->older ? &frozen->older->map : NULL };

  assert_held (&o->release_lock);
  dead_filter (&frozen->map.dead, bury, &burial);
  {
    /* The newer neighbour may be one that was frozen since: then it is that one, and not
     * the live map, which has the older map next to it.
     */
    HOLD_SHARED (&o->request_lock);
    HOLD (&o->dead_lock);
    dead_join (&map_next_newer (&o->map, frozen)->dead, &frozen->map.dead);
  }
  if (burial.tell)
    cleaner_wake (&o->cleaning);
}

void
overlay_release (struct overlay *o, struct frozen_map *frozen)
{
  assert_none_held_from (RANK_RELEASE);

  HOLD (&o->release_lock);

  {
    HOLD_EXCLUSIVE (&o->request_lock);
    map_unlink (&o->map, frozen);
  }
  bury_dead (o, frozen);
  map_release (frozen);
  free (frozen);
}

/* For dead_count: what the older map does not own either. */
static uint32_t
count_alone (void *opaque, struct dead_run run)
{
  const struct map *older = opaque;
  uint32_t count = run.count;

  for (uint32_t i = 0; older && i < run.count; ++i)
    count -= owns (older, run.block + i, run.address + i);
  return count;
}

int
overlay_taken_by (struct overlay *o, const struct frozen_map *frozen,
                  uint64_t *bytes)
{
  struct dead_look look;

  assert_none_held_from (RANK_RELEASE);

  /* Meanwhile no list is filtered or joined to another one, so that what was looked at
   * stays; and the neighbours stay.
   */
  HOLD (&o->release_lock);
  {
    HOLD_SHARED (&o->request_lock);
    HOLD (&o->dead_lock);
    if (dead_look (&map_next_newer (&o->map, frozen)->dead, &look) == -1)
      return -1;
  }
  *bytes = dead_count (&look, count_alone,
                       frozen->older ? (void *) &frozen->older->map : NULL)
           << o->block_shift;
  return 0;
}

void
overlay_cut_views (struct overlay *o)
{
  assert_none_held_from (RANK_RELEASE);

  /* From here on nothing is punched, or given out again. */
  cleaner_leave (&o->cleaning);

  HOLD (&o->release_lock);
  HOLD_EXCLUSIVE (&o->view_lock);
  atomic_store (&o->life, OVERLAY_CUT);
}
