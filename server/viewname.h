/* SPDX-License-Identifier: BSD-3-Clause */

/* The names of views: NAME@[FROM..]WHAT[/FORM]. */

#ifndef COW_VIEWNAME_H
#define COW_VIEWNAME_H

#include <stdbool.h>
#include <stddef.h>

#include <nbdkit-filter.h>

/* What a view shows of a moment. */
enum view_form {
  VIEW_DISK, /* the raw disk */
  VIEW_DIFF, /* the bytes of a diff: over the base, or over another moment */
  VIEW_FULL, /* the same with the base's data in it */
};

enum view_moment {
  MOMENT_NONE, /* of FROM only: the diff is over the base */
  MOMENT_BASE, /* the base, as it is below the filter */
  MOMENT_NOW,  /* when the client connects */
  MOMENT_NAMED,
};

/* The longest name of a moment. */
#define MAX_MOMENT_NAME 64

struct view_end {
  enum view_moment moment;
  char name[MAX_MOMENT_NAME + 1]; /* if it is a named one, else "" */
};

struct view_name {
  size_t length; /* of the name of what it is a view of, which may be 0 */
  struct view_end from, what;
  enum view_form form;
};

/* May a moment be called that? */
extern bool viewname_is_moment (const char *text);

/* Is the export NAME a view?  Whatever has an @ is: the last one counts. */
extern bool viewname_is_view (const char *name);

/* Which one is it?  NULL; or what is wrong with it, in words that go on after "the view
 * \"NAME\" ".
 */
extern const char *viewname_parse (const char *name, struct view_name *view);

/* What NBD_OPT_INFO tells of it. */
extern const char *viewname_description (const struct view_name *view);

/* Add to EXPORTS the views that every export has of each name that is in it already, while
 * there is room: only of the base, if BASE_ONLY.  -1 if there is no memory, which was
 * reported.
 */
extern int viewname_list (struct nbdkit_exports *exports, bool base_only);

/* How many names can be in a list, and how long they can be. */
#define MAX_EXPORTS 10000
#define MAX_EXPORT_NAME 4096

#endif /* COW_VIEWNAME_H */
