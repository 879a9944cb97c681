/* SPDX-License-Identifier: BSD-3-Clause */

/* The images that overlays start from (see loads.h).
 *
 * A file stays open from the start of the server on, so that it is the one that
 * was checked, whoever nbdkit becomes and whatever replaces it later.  The files
 * of a directory are checked at the start, and opened and checked again for the
 * export that needs them.
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "images/load.h"
#include "server/loads.h"
#include "server/names.h"

struct load_source {
  const char *name; /* as the user gave it */
  char *path;
  bool is_directory;
  struct loaded *image; /* of a file; NULL: it is not there yet */
};

struct loads {
  size_t count;
  struct load_source sources[];
};

static int
report (const char *name, const char *what)
{
  nbdkit_error ("cow-load=%s: %s: %m", name, what);
  return -1;
}

/* Open and check the image PATH, which messages call NAME.  It may be anything, and
 * opening it must not block.  NULL if that failed; *MISSING tells that there is
 * none, which was not reported.
 */
static struct loaded *
open_image (const char *name, const char *path, bool *missing)
{
  const int fd = open (path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);

  *missing = fd == -1 && errno == ENOENT;
  if (fd == -1) {
    if (!*missing)
      report (name, "cannot open it");
    return NULL;
  }
  return load_open (name, fd);
}

static bool
is_image_name (const char *name)
{
  const char *dot = strrchr (name, '.');

  return dot && dot != name && strcmp (dot, ".qcow2") == 0;
}

/* Check all images that exports may start from. */
static int
check_directory (const struct load_source *s)
{
  DIR *dir = opendir (s->path);
  struct dirent *d;
  int r = 0;

  if (!dir)
    return report (s->name, "cannot read the directory");
  while (r == 0 && (errno = 0, d = readdir (dir))) {
    bool missing = false;

    if (!is_image_name (d->d_name))
      continue;

    CLEANUP_FREE char *path = names_join (s->path, d->d_name);
    struct loaded *image = path ? open_image (path, path, &missing) : NULL;
    if (!path)
      r = report (s->name, "cannot check it");
    else if (!image && !missing)
      r = -1;
    load_close (image);
  }
  if (r == 0 && errno)
    r = report (s->name, "cannot read the directory");
  closedir (dir);
  return r;
}

static int
open_source (struct load_source *s, const char *name, const char *save_name)
{
  struct stat st;
  bool missing;

  s->name = name;
  s->path = realpath (name, NULL);
  if (s->path && stat (s->path, &st) == 0 && S_ISDIR (st.st_mode)) {
    s->is_directory = true;
    return check_directory (s);
  }
  free (s->path);
  s->path = names_resolve (name);
  if (!s->path)
    return report (name, "cannot find it");

  s->image = open_image (name, s->path, &missing);
  if (s->image)
    return 0;
  if (missing) {
    CLEANUP_FREE char *target = save_name ? names_resolve (save_name) : NULL;

    if (target && strcmp (target, s->path) == 0)
      return 0;
    nbdkit_error ("cow-load=%s: no such file; only what cow-save names too "
                  "may be missing",
                  name);
  }
  return -1;
}

struct loads *
loads_new (const char *const *names, size_t count, const char *save_name)
{
  struct loads *l = calloc (1, sizeof *l + count * sizeof l->sources[0]);

  if (!l) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  for (; l->count < count; ++l->count) {
    if (open_source (&l->sources[l->count], names[l->count], save_name)
        == -1) {
      l->count++;
      loads_free (l);
      return NULL;
    }
  }
  return l;
}

void
loads_free (struct loads *l)
{
  if (!l)
    return;
  for (size_t i = 0; i < l->count; ++i) {
    load_close (l->sources[i].image);
    free (l->sources[i].path);
  }
  free (l);
}

static bool
source_is (const struct load_source *s, const char *path)
{
  if (!s->is_directory)
    return strcmp (s->path, path) == 0;

  CLEANUP_FREE char *dir = names_directory (path);
  return dir && strcmp (s->path, dir) == 0
         && is_image_name (strrchr (path, '/') + 1);
}

bool
loads_has (const struct loads *l, const char *path)
{
  for (size_t i = 0; l && i < l->count; ++i)
    if (source_is (&l->sources[i], path))
      return true;
  return false;
}

bool
loads_has_only (const struct loads *l, const char *path)
{
  return l && l->count == 1 && l->sources[0].image
         && source_is (&l->sources[0], path);
}

static int
apply_image (const struct loaded *image, const char *name,
             struct overlay *overlay, const struct base *base)
{
  const uint64_t size = load_disk_size (image);

  if (size != ROUND_UP (base->size, UINT64_C (512))) {
    nbdkit_error ("cow-load=%s: the image is of a disk of %" PRIu64
                  " bytes, but the base has %" PRIu64
                  "; it does not belong to this base",
                  name, size, base->size);
    return -1;
  }
  return load_into (image, overlay, base);
}

/* The image of an export in a directory, if there is one. */
static int
apply_from_directory (const struct load_source *s, const char *export_name,
                      struct overlay *overlay, const struct base *base)
{
  CLEANUP_FREE char *name = names_of_export (export_name);
  CLEANUP_FREE char *path = name ? names_join (s->path, name) : NULL;
  bool missing;

  if (!path) {
    if (errno == ENAMETOOLONG) /* so there is none */
      return 0;
    return report (s->name, "cannot look for an image");
  }

  struct loaded *image = open_image (path, path, &missing);
  if (!image)
    return missing ? 0 : -1;

  const int r = apply_image (image, path, overlay, base);
  load_close (image);
  return r;
}

int
loads_apply (const struct loads *l, const char *export_name,
             struct overlay *overlay, const struct base *base)
{
  for (size_t i = 0; i < l->count; ++i) {
    const struct load_source *s = &l->sources[i];
    int r = 0;

    if (s->is_directory)
      r = apply_from_directory (s, export_name, overlay, base);
    else if (s->image)
      r = apply_image (s->image, s->name, overlay, base);
    if (r == -1)
      return -1;
  }
  return 0;
}
