/* SPDX-License-Identifier: BSD-3-Clause */

/* Naming moments of overlays, and telling what there is (see moments.h).
 *
 * What a command is about is found under the set's lock, and gets a user more, so that
 * nobody frees it.  Then the locks of all these entries are taken, in ascending order of
 * their addresses, for as long as their histories are looked at and changed.  To give
 * back what a moment had, and to find out what one takes, can last: that is done without
 * them.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "server/entry.h"
#include "server/moments.h"
#include "server/names.h"

static int __attribute__ ((format (printf, 2, 3)))
refuse (struct refusal *refusal, const char *fs, ...)
{
  va_list args;

  va_start (args, fs);
  (void) vsnprintf (refusal->text, sizeof refusal->text, fs, args);
  va_end (args);
  return -1;
}

static int
compare_addresses (const void *a, const void *b)
{
  const uintptr_t x = *(const uintptr_t *) a, y = *(const uintptr_t *) b;

  return x < y ? -1 : x > y;
}

/* Exports that a command is about, in ascending order of their addresses. */
struct chosen {
  struct overlays *s;
  struct overlay_entry **entries;
  size_t count;   /* that have a user more, */
  size_t locked;  /* and of them, that are locked */
  uint64_t users; /* others, of the last one */
  bool missing;   /* one of them is not there, or not ready */
};

static void
unlock_chosen (struct chosen *c)
{
  while (c->locked > 0)
    mutex_unlock (&c->entries[--c->locked]->lock);
}

static void
release_chosen (struct chosen *c)
{
  unlock_chosen (c);
  while (c->count > 0)
    overlays_put (c->s, c->entries[--c->count]);
  free (c->entries);
}

/* Find COUNT exports, so that nobody frees them.  -1 and REFUSAL. */
static int
find_exports (struct chosen *c, char *const *exports, size_t count,
              struct refusal *refusal)
{
  struct overlays *s = c->s;

  HOLD (&s->lock);

  if (s->state != SET_OPEN)
    return refuse (refusal, "the server ends");
  for (; c->count < count; ++c->count) {
    struct overlay_entry *entry = overlays_find (s, exports[c->count]);

    if (!entry && *exports[c->count] == '\0' && s->default_name)
      entry = overlays_find (s, s->default_name);
    c->missing = !entry || entry->state != ENTRY_READY;
    if (c->missing)
      return refuse (refusal,
                     "export \"%s\": no client uses it, and nothing was "
                     "written to it; connect to it first",
                     printable (exports[c->count]).text);
    c->users = entry->users++;
    c->entries[c->count] = entry;
  }
  return 0;
}

/* The same, and lock them.  release_chosen in any case. */
static int
choose (struct chosen *c, char *const *exports, size_t count,
        struct refusal *refusal)
{
  c->entries = calloc (count, sizeof (struct overlay_entry *));
  if (!c->entries)
    return refuse (refusal, "out of memory");
  if (find_exports (c, exports, count, refusal) == -1)
    return -1;
  qsort (c->entries, count, sizeof (struct overlay_entry *),
         compare_addresses);
  for (size_t i = 1; i < count; ++i)
    if (c->entries[i] == c->entries[i - 1])
      return refuse (refusal, "export \"%s\" is named twice",
                     printable (c->entries[i]->name).text);
  for (; c->locked < count; ++c->locked)
    mutex_lock (&c->entries[c->locked]->lock);
  return 0;
}

/* Freeze them at one moment, into MOMENTS, one for each entry.  (The order of the overlays'
 * addresses is another one.)  -1 and errno.
 */
static int
freeze_chosen (const struct chosen *c, struct moment **moments)
{
  CLEANUP_FREE struct overlay **overlays
    = calloc (c->count, sizeof (struct overlay *));
  CLEANUP_FREE struct moment **made
    = calloc (c->count, sizeof (struct moment *));

  if (!overlays || !made) {
    errno = ENOMEM;
    return -1;
  }
  for (size_t i = 0; i < c->count; ++i)
    overlays[i] = c->entries[i]->overlay;
  qsort (overlays, c->count, sizeof (struct overlay *), compare_addresses);
  if (moments_new (overlays, c->count, made) == -1)
    return -1;
  for (size_t i = 0; i < c->count; ++i) {
    const struct overlay **found
      = bsearch (&c->entries[i]->overlay, overlays, c->count,
                 sizeof (struct overlay *), compare_addresses);

    moments[i] = made[found - (const struct overlay **) overlays];
  }
  return 0;
}

/* Make a moment of all of them that is called NAME.  -1 and errno. */
static int
name_moments (const struct chosen *c, const char *name)
{
  CLEANUP_FREE struct moment **moments
    = calloc (c->count, sizeof (struct moment *));
  CLEANUP_FREE struct named_moment **named
    = calloc (c->count, sizeof (struct named_moment *));
  size_t made = 0;
  int err = ENOMEM;

  while (moments && named && made < c->count
         && (named[made] = named_moment_new (name)))
    made++;
  if (made == c->count && freeze_chosen (c, moments) == 0) {
    for (size_t i = 0; i < c->count; ++i) {
      named[i]->moment = moments[i];
      history_add (&c->entries[i]->history, named[i]);
    }
    return 0;
  }
  if (made == c->count)
    err = errno;
  while (made > 0)
    named_moment_free (named[--made]);
  errno = err;
  return -1;
}

/* May the export have a moment more, called NAME?  -1 and REFUSAL. */
static int
check_new_moment (const struct overlay_entry *entry, uint64_t max,
                  const char *name, struct refusal *refusal)
{
  if (history_find (entry->history, name))
    return refuse (refusal,
                   "export \"%s\" has a moment \"%s\" already; forget that "
                   "one, or choose another name",
                   printable (entry->name).text, name);
  if (history_length (entry->history) >= max)
    return refuse (
      refusal,
      "export \"%s\" has as many moments as cow-max-moments=%" PRIu64
      " allows; forget one",
      printable (entry->name).text, max);
  return 0;
}

int
moments_make (struct overlays *s, const char *name, char *const *exports,
              size_t count, struct refusal *refusal)
{
  struct chosen chosen = { .s = s };
  int r;

  if (!viewname_is_moment (name))
    return refuse (refusal,
                   "\"%s\" cannot be the name of a moment: that is 1 to %d "
                   "letters, digits, and . _ - inside",
                   printable (name).text, MAX_MOMENT_NAME);
  r = choose (&chosen, exports, count, refusal);
  for (size_t i = 0; i < count && r == 0; ++i)
    r = check_new_moment (chosen.entries[i], s->options.max_moments, name,
                          refusal);
  if (r == 0 && name_moments (&chosen, name) == -1)
    r = refuse (refusal,
                errno == ESHUTDOWN ? "the server ends" : "out of memory");
  release_chosen (&chosen);
  return r;
}

int
moments_forget (struct overlays *s, const char *name, char *const *exports,
                size_t count, struct refusal *refusal)
{
  struct chosen chosen = { .s = s };
  struct named_moment *forgotten = NULL;
  int r = choose (&chosen, exports, count, refusal);

  for (size_t i = 0; i < count && r == 0; ++i)
    if (!history_find (chosen.entries[i]->history, name))
      r = refuse (refusal, "export \"%s\" has no moment \"%s\"",
                  printable (chosen.entries[i]->name).text,
                  printable (name).text);
  for (size_t i = 0; i < count && r == 0; ++i) {
    struct named_moment **history = &chosen.entries[i]->history;
    struct named_moment *named = history_find (*history, name);

    history_remove (history, named);
    history_add (&forgotten, named);
  }

  /* What only they had is given back without a lock that clients wait for. */
  unlock_chosen (&chosen);
  history_free (forgotten);
  release_chosen (&chosen);
  return r;
}

int
moments_drop (struct overlays *s, const char *export, struct refusal *refusal)
{
  struct chosen chosen = { .s = s };
  int r = choose (&chosen, (char *const *) &export, 1, refusal);

  unlock_chosen (&chosen);
  if (r == 0) {
    HOLD (&s->lock);

    /* Nobody but this command has it, and from here on nobody finds it.  Where it was the
     * only one, the end is as if nobody had ever connected.
     */
    if (s->state != SET_OPEN)
      r = refuse (refusal, "the server ends");
    else if (chosen.entries[0]->users == 1) {
      overlays_remove (s, chosen.entries[0]);
      s->had_user &= s->count > 0;
    }
    else
      r = refuse (
        refusal,
        "export \"%s\" is in use; disconnect its clients, those that "
        "read views too",
        printable (chosen.entries[0]->name).text);
  }
  release_chosen (&chosen);
  return r;
}

/*----------------------------------------------------------------------
 * Telling what there is
 */

/* A copy of a history, which holds its moments: to look at what each takes can last.  -1
 * and ENOMEM.
 */
static int
copy_history (const struct named_moment *newest, struct named_moment **copy)
{
  struct named_moment **end = copy;

  for (*end = NULL; newest; newest = newest->older) {
    struct named_moment *n = named_moment_new (newest->name);

    if (!n)
      return -1;
    n->made = newest->made;
    n->moment = moment_hold (newest->moment);
    *end = n;
    end = &n->older;
  }
  return 0;
}

struct moment_facts {
  char made[32];
  uint64_t taken; /* bytes that only this moment takes */
};

/* -1 and ENOMEM. */
static int
find_facts (const struct named_moment *m, struct moment_facts *facts)
{
  struct tm tm;

  (void) gmtime_r (&m->made, &tm);
  (void) strftime (facts->made, sizeof facts->made, "%Y-%m-%dT%H:%M:%SZ", &tm);
  return overlay_taken_by (moment_overlay (m->moment),
                           moment_frozen (m->moment), &facts->taken);
}

/* -1 and ENOMEM. */
static int
describe_history (const struct named_moment *m, FILE *stream)
{
  for (; m; m = m->older) {
    struct moment_facts facts;

    if (find_facts (m, &facts) == -1)
      return -1;
    (void) fprintf (stream, "moment=%s\nmade=%s\ntaken=%" PRIu64 "\n", m->name,
                    facts.made, facts.taken);
  }
  return 0;
}

/* -1 and REFUSAL; *MISSING if there is no such overlay (yet). */
static int
describe_export (struct overlays *s, const char *name, FILE *stream,
                 struct refusal *refusal, bool *missing)
{
  struct chosen chosen = { .s = s };
  struct named_moment *history = NULL;
  CLEANUP_FREE char *encoded = names_encode (name);
  int r = choose (&chosen, (char *const *) &name, 1, refusal);

  *missing = chosen.missing;
  if (r == 0) {
    r = encoded ? copy_history (chosen.entries[0]->history, &history) : -1;
    unlock_chosen (&chosen);
    if (r == 0) {
      (void) fprintf (
        stream, "export=%s\nsize=%" PRIu64 "\nconnections=%" PRIu64 "\n",
        encoded, overlay_size (chosen.entries[0]->overlay), chosen.users);
      r = describe_history (history, stream);
    }
    if (r == -1)
      (void) refuse (refusal, "out of memory");
  }
  history_free (history);
  release_chosen (&chosen);
  return r;
}

int
moments_describe (struct overlays *s, const char *export, FILE *stream,
                  struct refusal *refusal)
{
  struct name_list list;
  bool missing;
  int r = 0;

  if (export)
    return describe_export (s, export, stream, refusal, &missing);

  list = overlays_names (s);
  if (!list.names)
    return refuse (refusal, "out of memory");
  for (size_t i = 0; i < list.count; ++i) {
    if (r == 0
        && describe_export (s, list.names[i], stream, refusal, &missing) == -1
        && !missing) /* it has gone meanwhile, or is just being loaded */
      r = -1;
    free (list.names[i]);
  }
  free (list.names);
  return r;
}

/* The same of what clients see in the list of exports. */
static int
list_history (const char *export, const struct named_moment *m,
              struct nbdkit_exports *exports)
{
  for (; m && nbdkit_exports_count (exports) < MAX_EXPORTS; m = m->older) {
    CLEANUP_FREE char *name = NULL, *description = NULL;
    struct moment_facts facts;

    if (asprintf (&name, "%s@%s", export, m->name) == -1) {
      name = NULL;
      return -1;
    }
    if (strlen (name) > MAX_EXPORT_NAME)
      continue;
    if (find_facts (m, &facts) == -1
        || asprintf (&description,
                     "the disk as of %s; forgetting it gives back %" PRIu64
                     " bytes",
                     facts.made, facts.taken)
             == -1) {
      description = NULL;
      return -1;
    }
    if (nbdkit_add_export (exports, name, description) == -1)
      return -1;
  }
  return 0;
}

static int
list_moments_of (struct overlays *s, const char *name,
                 struct nbdkit_exports *exports)
{
  struct chosen chosen = { .s = s };
  struct named_moment *history = NULL;
  struct refusal gone;
  int r = 0;

  if (choose (&chosen, (char *const *) &name, 1, &gone) == 0) {
    r = copy_history (chosen.entries[0]->history, &history);
    unlock_chosen (&chosen);
    if (r == 0)
      r = list_history (name, history, exports);
  }
  history_free (history);
  release_chosen (&chosen);
  return r;
}

int
moments_list (struct overlays *s, struct nbdkit_exports *exports)
{
  struct name_list list = overlays_names (s);
  int r = list.names ? 0 : -1;

  for (size_t i = 0; i < list.count; ++i) {
    if (r == 0)
      r = list_moments_of (s, list.names[i], exports);
    free (list.names[i]);
  }
  free (list.names);
  if (r == -1)
    nbdkit_error ("cow: out of memory");
  return r;
}
