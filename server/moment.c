/* SPDX-License-Identifier: BSD-3-Clause */

/* Moments of overlays (see moment.h). */

#include <config.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "common/cleanup.h"
#include "server/moment.h"

struct moment {
  struct overlay *overlay;   /* constant */
  struct frozen_map *frozen; /* likewise */
  atomic_uint holders;
};

static struct moment *
new_moment (struct overlay *overlay)
{
  struct moment *m = malloc (sizeof *m);

  if (m) {
    *m = (struct moment) { .overlay = overlay };
    atomic_init (&m->holders, 1);
  }
  return m;
}

int
moments_new (struct overlay *const *overlays, size_t count,
             struct moment **moments)
{
  CLEANUP_FREE struct frozen_map **frozen
    = calloc (count, sizeof (struct frozen_map *));
  size_t made = 0;
  int err = ENOMEM;

  while (frozen && made < count
         && (moments[made] = new_moment (overlays[made])))
    made++;
  if (made == count && overlay_freeze_all (overlays, count, frozen) == 0) {
    for (size_t i = 0; i < count; ++i)
      moments[i]->frozen = frozen[i];
    return 0;
  }
  if (made == count)
    err = errno;
  while (made-- > 0)
    free (moments[made]);
  errno = err;
  return -1;
}

struct moment *
moment_hold (struct moment *m)
{
  atomic_fetch_add (&m->holders, 1);
  return m;
}

void
moment_let_go (struct moment *m)
{
  if (!m || atomic_fetch_sub (&m->holders, 1) > 1)
    return;
  overlay_release (m->overlay, m->frozen);
  free (m);
}

struct overlay *
moment_overlay (const struct moment *m)
{
  return m->overlay;
}

struct frozen_map *
moment_frozen (const struct moment *m)
{
  return m->frozen;
}
