/* SPDX-License-Identifier: BSD-3-Clause */

/* Descriptors that parameters name (see descriptors.h).
 *
 * Knows nothing of overlays or of images.
 */

#include <config.h>

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nbdkit-filter.h>

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

/* Set by descriptors_look, before anybody asks. */
static bool serve_client;

void
descriptors_look (void)
{
  serve_client = !nbdkit_stdio_safe ();
}

bool
descriptors_serve_client (void)
{
  return serve_client;
}
