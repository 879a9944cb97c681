/* SPDX-License-Identifier: BSD-3-Clause */

/* The names of views (see viewname.h). */

#include <config.h>

#include <stdio.h>
#include <string.h>

#include "common/cleanup.h"
#include "server/viewname.h"

static const struct {
  const char *text, *description;
  enum view_moment moment;
  enum view_form form;
} shorthands[] = {
  { "base", "the base, without what was written", MOMENT_BASE, VIEW_DISK },
  { "snapshot", "the disk, frozen when you connect", MOMENT_NOW, VIEW_DISK },
  { "diff.qcow2", "a qcow2 image of what was written", MOMENT_NOW, VIEW_DIFF },
  { "full.qcow2", "a qcow2 image of the whole disk", MOMENT_NOW, VIEW_FULL },
};
#define NR_SHORTHANDS (sizeof shorthands / sizeof shorthands[0])

bool
viewname_is_moment (const char *text)
{
  const size_t length = strlen (text);

  if (length == 0 || length > MAX_MOMENT_NAME || text[0] == '.'
      || text[0] == '-' || text[length - 1] == '.' || strstr (text, "..")
      || strcmp (text, "now") == 0)
    return false;
  for (size_t i = 0; i < NR_SHORTHANDS; ++i)
    if (strcmp (text, shorthands[i].text) == 0)
      return false;
  return strspn (text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                       "0123456789._-")
         == length;
}

bool
viewname_is_view (const char *name)
{
  return strchr (name, '@');
}

/* The LENGTH characters at TEXT name this end of a view.  False if they name none. */
static bool
parse_end (const char *text, size_t length, struct view_end *end)
{
  if (length > MAX_MOMENT_NAME)
    return false;
  memcpy (end->name, text, length);
  end->name[length] = '\0';
  if (viewname_is_moment (end->name)) {
    end->moment = MOMENT_NAMED;
    return true;
  }
  end->moment = strcmp (end->name, "base") == 0  ? MOMENT_BASE
                : strcmp (end->name, "now") == 0 ? MOMENT_NOW
                                                 : MOMENT_NONE;
  end->name[0] = '\0';
  return end->moment != MOMENT_NONE;
}

const char *
viewname_parse (const char *name, struct view_name *view)
{
  const char *at = strrchr (name, '@'), *text = at + 1;
  const char *slash = strchr (text, '/'), *dots = strstr (text, "..");

  *view = (struct view_name) { .length = (size_t) (at - name) };
  for (size_t i = 0; i < NR_SHORTHANDS; ++i)
    if (strcmp (text, shorthands[i].text) == 0) {
      view->what.moment = shorthands[i].moment;
      view->form = shorthands[i].form;
      return NULL;
    }

  if (slash) {
    if (strcmp (slash, "/diff.qcow2") == 0)
      view->form = VIEW_DIFF;
    else if (strcmp (slash, "/full.qcow2") == 0)
      view->form = VIEW_FULL;
    else
      return "has no such form: it is /diff.qcow2 or /full.qcow2";
  }
  if (dots) {
    if (!parse_end (text, (size_t) (dots - text), &view->from))
      return "does not begin with the name of a moment";
    text = dots + 2;
  }
  if (!parse_end (text, slash ? (size_t) (slash - text) : strlen (text),
                  &view->what))
    return "names no moment that there can be";
  if (dots && view->form != VIEW_DIFF)
    return "is what changed between two moments: put /diff.qcow2 behind it";
  if (view->from.moment == MOMENT_NOW)
    return "cannot begin with now; give the moment a name";
  if (view->from.moment == MOMENT_BASE)
    view->from.moment = MOMENT_NONE; /* as diffs are anyway */
  if (view->what.moment == MOMENT_BASE && view->from.moment == MOMENT_NONE
      && view->form != VIEW_DISK)
    return "would be an image of the base: use @base";
  return NULL;
}

const char *
viewname_description (const struct view_name *view)
{
  if (view->from.moment != MOMENT_NONE)
    return "a qcow2 image of what changed between two moments";
  if (view->what.moment == MOMENT_NAMED)
    switch (view->form) {
    case VIEW_DISK:
      return "the disk as of a moment";
    case VIEW_DIFF:
      return "a qcow2 image of what was written until a moment";
    case VIEW_FULL:
    default:
      return "a qcow2 image of the disk as of a moment";
    }
  for (size_t i = 0; i < NR_SHORTHANDS; ++i)
    if (shorthands[i].moment == view->what.moment
        && shorthands[i].form == view->form)
      return shorthands[i].description;
  return NULL;
}

int
viewname_list (struct nbdkit_exports *exports, bool base_only)
{
  const size_t nr_names = nbdkit_exports_count (exports);

  for (size_t i = 0; i < nr_names; ++i) {
    /* There are no views of what looks like a view. */
    if (viewname_is_view (nbdkit_get_export (exports, i).name))
      continue;
    for (size_t j = 0; j < (base_only ? 1 : NR_SHORTHANDS); ++j) {
      CLEANUP_FREE char *name = NULL;

      if (nbdkit_exports_count (exports) >= MAX_EXPORTS)
        return 0;
      if (asprintf (&name, "%s@%s", nbdkit_get_export (exports, i).name,
                    shorthands[j].text)
          == -1) {
        name = NULL;
        nbdkit_error ("cow: out of memory");
        return -1;
      }
      if (strlen (name) <= MAX_EXPORT_NAME
          && nbdkit_add_export (exports, name, shorthands[j].description)
               == -1)
        return -1;
    }
  }
  return 0;
}
