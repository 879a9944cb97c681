/* SPDX-License-Identifier: BSD-3-Clause */

/* The directory for temporary files (see tmpdir.h). */

#include <config.h>

#include <errno.h>
#include <stdlib.h>

#include "overlay/newfile.h"
#include "server/tmpdir.h"

char *
tmpdir_find (const char **name)
{
  const char *tmpdir = getenv ("TMPDIR");

  *name = tmpdir && *tmpdir ? tmpdir : "/var/tmp";

  /* Absolute, because a server in the background changes to "/". */
  char *dir = realpath (*name, NULL);
  if (!dir)
    return NULL;
  if (newfile_check_dir (dir) == -1) {
    const int err = errno;

    free (dir);
    errno = err;
    return NULL;
  }
  return dir;
}
