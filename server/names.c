/* SPDX-License-Identifier: BSD-3-Clause */

/* Names of files (see names.h).
 *
 * Knows nothing of overlays, of images, or of nbdkit.
 */

#include <config.h>

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "server/names.h"

#define SUFFIX ".qcow2"

char *
names_directory (const char *path)
{
  const char *slash = strrchr (path, '/');

  return slash == path ? strdup ("/")
                       : strndup (path, (size_t) (slash - path));
}

char *
names_join (const char *a, const char *b)
{
  char *path;
  const char *slash = a[strlen (a) - 1] == '/' ? "" : "/";

  if (asprintf (&path, "%s%s%s", a, slash, b) == -1) {
    errno = ENOMEM;
    return NULL;
  }
  return path;
}

/* The same without following the last component of PATH. */
static char *
resolve_directory (const char *path)
{
  const char *slash = strrchr (path, '/');
  const char *base = slash ? slash + 1 : path;
  CLEANUP_FREE char *named
    = slash ? strndup (path, (size_t) (slash + 1 - path)) : strdup (".");
  CLEANUP_FREE char *dir = named ? realpath (named, NULL) : NULL;

  if (!dir)
    return NULL;
  if (*base == '\0') {
    errno = EISDIR;
    return NULL;
  }
  return names_join (dir, base);
}

char *
names_resolve (const char *path)
{
  char *resolved = resolve_directory (path);

  /* As many links as the kernel follows. */
  for (int i = 0; resolved && i < 40; ++i) {
    char to[PATH_MAX];
    const ssize_t length = readlink (resolved, to, sizeof to - 1);
    CLEANUP_FREE char *link = resolved;

    if (length == -1 && (errno == EINVAL || errno == ENOENT)) {
      link = NULL;
      return resolved; /* no link, or nothing yet */
    }
    resolved = NULL;
    if (length == -1)
      return NULL;
    to[length] = '\0';

    CLEANUP_FREE char *dir = names_directory (link);
    CLEANUP_FREE char *next = to[0] == '/' ? strdup (to)
                              : dir        ? names_join (dir, to)
                                           : NULL;
    if (!next)
      return NULL;
    resolved = resolve_directory (next);
  }
  if (resolved) {
    free (resolved);
    errno = ELOOP;
  }
  return NULL;
}

/* Must the character at I of an export's name be encoded? */
static bool
is_special (const char *name, size_t i)
{
  const unsigned char c = (unsigned char) name[i];

  return c <= ' ' || c == 0x7f || c == '%' || c == '/'
         || (i == 0 && (c == '.' || strcmp (name, "default") == 0));
}

/* How many bytes the character at TEXT has, if a terminal only shows it: in UTF-8, and no
 * control character (those from U+0080 on are some, too).  Else 0.
 */
static size_t
shown_bytes (const char *text)
{
  const unsigned char *c = (const unsigned char *) text;
  const size_t length = c[0] < 0x80   ? 1
                        : c[0] < 0xc2 ? 0
                        : c[0] < 0xe0 ? 2
                        : c[0] < 0xf0 ? 3
                        : c[0] < 0xf5 ? 4
                                      : 0;

  for (size_t i = 1; i < length; ++i)
    if ((c[i] & 0xc0) != 0x80)
      return 0;
  /* The last two have fewer bytes in UTF-8. */
  if ((length == 1 && iscntrl (c[0])) || (c[0] == 0xc2 && c[1] < 0xa0)
      || (c[0] == 0xe0 && c[1] < 0xa0) || (c[0] == 0xf0 && c[1] < 0x90))
    return 0;
  return length;
}

struct printable
printable (const char *name)
{
  struct printable p;
  size_t to = 0;

  while (*name) {
    const size_t shown = shown_bytes (name);
    const size_t n = shown > 0 ? shown : 1;

    if (to + n >= sizeof p.text)
      break;
    if (shown > 0)
      memcpy (p.text + to, name, n);
    else
      p.text[to] = '?';
    to += n;
    name += n;
  }
  p.text[to] = '\0';
  return p;
}

char *
names_encode (const char *export_name)
{
  const char *name = *export_name ? export_name : "default";
  char *word = malloc (3 * strlen (name) + 1), *to = word;

  if (!word)
    return NULL;
  for (size_t i = 0; name[i]; ++i) {
    if (*export_name && is_special (name, i))
      to += sprintf (to, "%%%02X", (unsigned char) name[i]);
    else
      *to++ = name[i];
  }
  *to = '\0';
  return word;
}

static int
hexadecimal (char c)
{
  const char *const digits = "0123456789ABCDEFabcdef", *found;

  found = c ? strchr (digits, c) : NULL;
  if (!found)
    return -1;
  return (int) (found - digits < 16 ? found - digits : found - digits - 6);
}

int
names_decode (char *word)
{
  char *to = word;

  if (strcmp (word, "default") == 0) {
    *word = '\0';
    return 0;
  }
  /* What is wrong is left as it is. */
  for (const char *c = word; (c = strchr (c, '%')); ++c)
    if (hexadecimal (c[1]) == -1 || hexadecimal (c[2]) == -1
        || hexadecimal (c[1]) + hexadecimal (c[2]) == 0)
      return -1;
  for (; *word; ++to)
    if (*word == '%') {
      *to = (char) (hexadecimal (word[1]) << 4 | hexadecimal (word[2]));
      word += 3;
    }
    else
      *to = *word++;
  *to = '\0';
  return 0;
}

char *
names_of_export (const char *export_name)
{
  char *name = names_encode (export_name), *file = NULL;

  if (name && asprintf (&file, "%s" SUFFIX, name) == -1)
    file = NULL;
  free (name);
  if (!file)
    errno = ENOMEM;
  else if (strlen (file) > NAME_MAX) {
    free (file);
    file = NULL;
    errno = ENAMETOOLONG;
  }
  return file;
}
