/* SPDX-License-Identifier: BSD-3-Clause */

/* Descriptors that parameters name (see descriptors.h).
 *
 * Knows nothing of overlays, of images, or of nbdkit's functions.
 */

#include <config.h>

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "server/descriptors.h"

int
descriptors_find (const char *name, int standard)
{
  static const char *const prefixes[]
    = { "/dev/fd/", "/proc/self/fd/", "/proc/thread-self/fd/" };

  if (strcmp (name, "-") == 0)
    return standard;
  if (strcmp (name, "/dev/stdin") == 0)
    return STDIN_FILENO;
  if (strcmp (name, "/dev/stdout") == 0)
    return STDOUT_FILENO;
  if (strcmp (name, "/dev/stderr") == 0)
    return STDERR_FILENO;
  for (size_t i = 0; i < sizeof prefixes / sizeof prefixes[0]; ++i) {
    const size_t length = strlen (prefixes[i]);
    unsigned long number;
    char *end;

    if (strncmp (name, prefixes[i], length) != 0 || name[length] < '0'
        || name[length] > '9')
      continue;
    number = strtoul (name + length, &end, 10);
    if (*end == '\0' && number <= INT_MAX)
      return (int) number;
  }
  return -1;
}

/* Filters are not told of option -s, so this looks at the command line, where options
 * may also stand between and in front of others ("-fs").
 */
bool
descriptors_serve_client (void)
{
  static const char with_value[] = "eDgiPptUu";
  FILE *f = fopen ("/proc/self/cmdline", "re");
  CLEANUP_FREE char *arg = NULL;
  size_t size = 0;
  bool found = false, is_value = true; /* the first is the program's name */

  if (!f)
    return false;
  while (!found && getdelim (&arg, &size, '\0', f) > 0) {
    if (is_value) {
      is_value = false;
      continue;
    }
    if (strcmp (arg, "--") == 0)
      break;
    if (strcmp (arg, "--run") == 0)
      is_value = true;
    if (strcmp (arg, "--single") == 0 || strcmp (arg, "--stdin") == 0)
      found = true;
    for (const char *c = arg + 1; arg[0] == '-' && arg[1] != '-' && *c; ++c) {
      if (strchr (with_value, *c)) {
        is_value = c[1] == '\0';
        break;
      }
      found |= *c == 's';
    }
  }
  (void) fclose (f);
  return found;
}
