/* SPDX-License-Identifier: BSD-3-Clause */

/* The named moments of an export (see history.h). */

#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/history.h"

struct named_moment *
named_moment_new (const char *name)
{
  struct named_moment *n = calloc (1, sizeof *n);

  if (n) {
    (void) snprintf (n->name, sizeof n->name, "%s", name);
    n->made = time (NULL);
  }
  return n;
}

struct named_moment *
history_find (struct named_moment *newest, const char *name)
{
  while (newest && strcmp (newest->name, name) != 0)
    newest = newest->older;
  return newest;
}

uint64_t
history_length (const struct named_moment *newest)
{
  uint64_t length = 0;

  for (; newest; newest = newest->older)
    length++;
  return length;
}

void
history_add (struct named_moment **newest, struct named_moment *named)
{
  named->older = *newest;
  *newest = named;
}

void
history_remove (struct named_moment **newest, struct named_moment *named)
{
  while (*newest != named)
    newest = &(*newest)->older;
  *newest = named->older;
}

void
named_moment_free (struct named_moment *n)
{
  if (!n)
    return;
  moment_let_go (n->moment);
  free (n);
}

void
history_free (struct named_moment *newest)
{
  struct named_moment *oldest = NULL;

  while (newest) {
    struct named_moment *n = newest;

    newest = n->older;
    n->older = oldest; /* that is, newer */
    oldest = n;
  }
  while (oldest) {
    struct named_moment *n = oldest;

    oldest = n->older;
    named_moment_free (n);
  }
}
