/* SPDX-License-Identifier: BSD-3-Clause */

/* The history of an export: its named moments, the newest first. */

#ifndef COW_HISTORY_H
#define COW_HISTORY_H

#include <time.h>

#include "server/moment.h"
#include "server/viewname.h"

struct named_moment {
  struct named_moment *older;
  struct moment *moment;
  time_t made;
  char name[MAX_MOMENT_NAME + 1];
};

/* One without a moment.  NULL and ENOMEM. */
extern struct named_moment *named_moment_new (const char *name);

/* A list is no more than its newest one.  Whoever has it locks it. */

extern uint64_t history_length (const struct named_moment *newest);

/* NULL: there is none of that name. */
extern struct named_moment *history_find (struct named_moment *newest,
                                          const char *name);
extern void history_add (struct named_moment **newest,
                         struct named_moment *named);

/* Take it out of the list; the caller frees it. */
extern void history_remove (struct named_moment **newest,
                            struct named_moment *named);

/* Their moments are held no longer: of one that is in no list; of all of a list, the oldest
 * one first, which is the least work.
 */
extern void named_moment_free (struct named_moment *named);
extern void history_free (struct named_moment *newest);

#endif /* COW_HISTORY_H */
