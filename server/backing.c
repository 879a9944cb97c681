/* SPDX-License-Identifier: BSD-3-Clause */

/* Backing files (see backing.h).
 *
 * This filter reads none of them.  But who opens the diff in qemu does, and a name that
 * leads nowhere, or to another disk than the base, is best told early.
 *
 * What an image names is not trusted: it is looked at (stat) and never opened.  What the
 * user has named may be.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "format/qcow2.h"
#include "server/backing.h"

/* Does qemu take NAME for something else than the name of a file?  "PROTOCOL:", before
 * any slash.
 */
static bool
has_protocol (const char *name)
{
  return name[strcspn (name, ":/")] == ':';
}

char *
backing_find (const char *name, const char *dir, bool *missing)
{
  CLEANUP_FREE char *joined = NULL;

  *missing = false;
  if (*name == '\0' || has_protocol (name) || (*name != '/' && !dir))
    return NULL;
  if (*name != '/') {
    joined = names_join (dir, name);
    if (!joined)
      return NULL;
    name = joined;
  }

  char *path = realpath (name, NULL);
  *missing = !path && (errno == ENOENT || errno == ENOTDIR);
  return path;
}

/* It need not be there yet. */
bool
backing_is (const char *name, const char *dir, const char *path)
{
  struct stat a, b;

  if (has_protocol (name))
    return false;
  CLEANUP_FREE char *joined
    = *name == '/' ? strdup (name) : names_join (dir, name);
  CLEANUP_FREE char *resolved = joined ? names_resolve (joined) : NULL;

  if (!resolved)
    return false;
  return strcmp (resolved, path) == 0
         || (stat (resolved, &a) == 0 && stat (path, &b) == 0
             && a.st_dev == b.st_dev && a.st_ino == b.st_ino);
}

static bool
has_a_disk (const struct stat *st)
{
  return S_ISREG (st->st_mode) || S_ISBLK (st->st_mode);
}

/* Is the file PATH, which the user has named, a qcow2 image? */
static bool
is_image (const char *path)
{
  const int fd = open (path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  struct stat st;
  char buf[512];
  ssize_t r = -1;

  if (fd == -1)
    return false;
  if (fstat (fd, &st) == 0 && has_a_disk (&st))
    r = pread (fd, buf, sizeof buf, 0);
  close (fd);
  return r > 0 && qcow2_is_image (buf, (size_t) r);
}

int
backing_check (const char *name, const char *format, const char *dir)
{
  bool missing;
  CLEANUP_FREE char *path = backing_find (name, dir ? dir : ".", &missing);

  if (missing && (dir || *name == '/'))
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: cow-save-backing=%s: there is no "
                    "such file%s%s; the diff cannot be opened without it\n",
                    name, *name == '/' ? "" : " in ", *name == '/' ? "" : dir);
  if (path && !format && is_image (path)) {
    nbdkit_error ("cow-save-backing=%s: it is a qcow2 image; say "
                  "cow-save-backing-format=qcow2, or raw if its bytes are the "
                  "disk",
                  name);
    return -1;
  }
  return 0;
}

/* Do the parameters tell which file the base is?  The plugins that serve one call it
 * "file"; "arg" is for the program that one of them runs.
 */
static bool
may_name_the_base (const struct parameter *p)
{
  return strcmp (p->key, "file") == 0 || strcmp (p->key, "arg") == 0;
}

void
backing_compare (const char *image, const char *backing,
                 const struct parameter *others, size_t nr_others)
{
  const struct parameter *base = NULL;
  struct stat st, other;

  if (stat (backing, &st) == -1)
    return;
  for (size_t i = 0; i < nr_others; ++i) {
    if (stat (others[i].value, &other) == -1 || !has_a_disk (&other))
      continue;
    if (other.st_dev == st.st_dev && other.st_ino == st.st_ino)
      return;
    if (may_name_the_base (&others[i]))
      base = &others[i];
  }
  if (base)
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: cow-load=%s: its backing file is "
                    "%s, and the base is another file, %s=%s; the disk is a "
                    "mix of the two if they differ\n",
                    image, printable (backing).text, base->key, base->value);
}
