/* SPDX-License-Identifier: BSD-3-Clause */

/* The filter as nbdkit sees it: parameters and callbacks, nothing else.
 *
 * What a client may do never depends on what the base can do.  The base is
 * opened read only; writes, zeroes and trims end in the overlay (blk.h).
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "base.h"
#include "blk.h"
#include "common/cleanup.h"
#include "common/debug.h"
#include "server/backing.h"
#include "server/descriptors.h"
#include "server/ending.h"
#include "server/identity.h"
#include "server/loads.h"
#include "server/lone.h"
#include "server/overlays.h"
#include "server/save.h"
#include "server/target.h"
#include "server/control.h"
#include "server/moments.h"
#include "server/names.h"
#include "server/views.h"

/* The callbacks have the parameters that nbdkit gives them. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

/* Objects of two versions would load, and not work. */
_Static_assert(
  __builtin_strcmp (NBDKIT_HEADERS, NBDKIT_VERSION_STRING) == 0,
  "nbdkit has changed since this was configured: run ./configure again");

#define MIN_BLOCK_SIZE UINT32_C (4096)
#define MAX_BLOCK_SIZE (UINT32_C (2) << 20)

/* -D cow.verbose=1.  nbdkit finds it by its name. */
NBDKIT_DLL_PUBLIC int cow_debug_verbose;

/* Parameters. */
static uint32_t cow_block_size = MIN_BLOCK_SIZE;
static bool cow_on_cache;
static bool cow_detect_zeroes;
static enum {
  COW_ON_READ_FALSE,
  COW_ON_READ_TRUE,
  COW_ON_READ_PATH
} cow_on_read;
static const char *cow_on_read_path;
static enum scope cow_scope = SCOPE_EXPORT;
static int64_t cow_max_bytes; /* 0: any */
static uint64_t cow_max_moments = UINT64_MAX;
static uint64_t cow_max_overlays = 1024;
static bool cow_views;
static char *cow_control; /* an absolute path */
static struct control *control;
static const char *cow_base_id;
static bool cow_base_check = true;
static struct save_options cow_save;
static const char *save_detail; /* a cow-save-* that was given, */
static const char *view_detail; /* one that is about images of views, too */
static const char **cow_loads;
static size_t nr_cow_loads;

/* Those of the plugin and of filters below. */
static struct parameter *others;
static size_t nr_others;

/* All overlays of this server. */
static struct overlays *overlays;

/* Something could not be saved. */
static atomic_bool save_failed;

/* A connection. */
struct handle {
  char *export_name;           /* what there is an overlay for */
  bool is_view;                /* else the live disk */
  struct view_name view_name;  /* of a view */
  struct base base;            /* set by .prepare */
  struct overlay_entry *entry; /* set by .prepare, NULL if that failed, or the
                                * base is viewed */
  struct view *view;           /* set by .prepare, NULL: the live disk */
  struct viewer *viewer;       /* of a view of the overlay; likewise */
  atomic_bool looked;          /* whether the base is a container */
};

/* A request, for -D cow.verbose=1; TEXT says with what options. */
static void
log_request (const struct handle *h, const char *what, uint32_t count,
             uint64_t offset, const char *text)
{
  VERBOSE ("export \"%s\": %s %" PRIu32 " bytes at %" PRIu64 "%s",
           h->export_name, what, count, offset, text);
}

static const char *
fua_text (uint32_t flags)
{
  return flags & NBDKIT_FLAG_FUA ? ", fua" : "";
}

static void
cow_unload (void)
{
  control_free (control);
  control = NULL;
  overlays_free (overlays);
  overlays = NULL;
  free (cow_control);
  free (cow_loads);
  free (others);
}

static int
parse_block_size (const char *value)
{
  const int64_t size = nbdkit_parse_size (value);

  if (size < MIN_BLOCK_SIZE || (size & (size - 1)) != 0) {
    nbdkit_error ("cow-block-size=%s: must be a power of two, 4K or more "
                  "(more than 2M means 2M)",
                  value);
    return -1;
  }
  cow_block_size = (uint32_t) MIN (size, (int64_t) MAX_BLOCK_SIZE);
  return 0;
}

static int
parse_on_read (const char *value)
{
  if (value[0] == '/') {
    cow_on_read = COW_ON_READ_PATH;
    cow_on_read_path = value;
    return 0;
  }

  const int r = nbdkit_parse_bool (value);
  if (r == -1) {
    nbdkit_error ("cow-on-read=%s: must be true, false, or the absolute path "
                  "of a file whose existence means true",
                  value);
    return -1;
  }
  cow_on_read = r ? COW_ON_READ_TRUE : COW_ON_READ_FALSE;
  return 0;
}

static int
parse_bool (const char *key, const char *value, bool *result)
{
  const int r = nbdkit_parse_bool (value);

  if (r == -1) {
    nbdkit_error ("%s=%s: must be true or false", key, value);
    return -1;
  }
  *result = r;
  return 0;
}

static int
parse_scope (const char *value)
{
  if (strcmp (value, "export") == 0)
    cow_scope = SCOPE_EXPORT;
  else if (strcmp (value, "connection") == 0)
    cow_scope = SCOPE_CONNECTION;
  else {
    nbdkit_error ("cow-scope=%s: must be export or connection", value);
    return -1;
  }
  return 0;
}

static int
parse_max_bytes (const char *value)
{
  cow_max_bytes = nbdkit_parse_size (value);
  if (cow_max_bytes <= 0) {
    nbdkit_error (
      "cow-max-bytes=%s: must be a size, as 10G, of more than 0 bytes", value);
    return -1;
  }
  return 0;
}

static int
parse_control (const char *value)
{
  if (cow_control || *value == '\0') {
    nbdkit_error ("cow-control=%s: must be given once, and name a socket",
                  value);
    return -1;
  }
  cow_control
    = nbdkit_absolute_path (value); /* a server may change directory */
  return cow_control ? 0 : -1;
}

static int
parse_max_overlays (const char *value)
{
  if (nbdkit_parse_uint64_t ("cow-max-overlays", value, &cow_max_overlays)
        == -1
      || cow_max_overlays == 0) {
    nbdkit_error ("cow-max-overlays=%s: must be a number, 1 or more", value);
    return -1;
  }
  return 0;
}

static int
parse_save_format (const char *value)
{
  if (strcmp (value, "portable") == 0)
    cow_save.format = QCOW2_PORTABLE;
  else if (strcmp (value, "extended") == 0)
    cow_save.format = QCOW2_EXTENDED;
  else {
    nbdkit_error ("cow-save-format=%s: must be portable or extended", value);
    return -1;
  }
  return 0;
}

/* The parameters that begin with "cow-save".  1: this is none. */
static int
parse_save (const char *key, const char *value)
{
  if (strcmp (key, "cow-save") == 0) {
    if (cow_save.target) {
      nbdkit_error ("cow-save=%s: can be given only once", value);
      return -1;
    }
    cow_save.target = value;
    return 0;
  }
  if (strncmp (key, "cow-save-", 9) != 0)
    return 1;

  if (strcmp (key, "cow-save-compact") == 0) {
    save_detail = key;
    return parse_bool (key, value, &cow_save.compact);
  }
  view_detail = key;
  if (strcmp (key, "cow-save-backing") == 0)
    cow_save.backing = value;
  else if (strcmp (key, "cow-save-backing-format") == 0)
    cow_save.backing_format = value;
  else if (strcmp (key, "cow-save-format") == 0)
    return parse_save_format (value);
  else
    return 1;
  return 0;
}

static int
parse_base_id (const char *value)
{
  if (!qcow2_is_base_id (value)) {
    nbdkit_error ("cow-base-id=%s: must be a text of 1 to %d bytes in one "
                  "line",
                  printable (value).text, QCOW2_MAX_BASE_ID);
    return -1;
  }
  cow_base_id = value;
  return 0;
}

static int
add_load (const char *value)
{
  const char **loads
    = realloc (cow_loads, (nr_cow_loads + 1) * sizeof *cow_loads);

  if (!loads) {
    nbdkit_error ("cow: out of memory");
    return -1;
  }
  cow_loads = loads;
  cow_loads[nr_cow_loads++] = value;
  return 0;
}

/* Remember a parameter that is not ours. */
static int
add_other (const char *key, const char *value)
{
  struct parameter *p = realloc (others, (nr_others + 1) * sizeof *others);

  if (!p) {
    nbdkit_error ("cow: out of memory");
    return -1;
  }
  others = p;
  others[nr_others++] = (struct parameter) { .key = key, .value = value };
  return 0;
}

static int
cow_config (nbdkit_next_config *next, nbdkit_backend *nxdata, const char *key,
            const char *value)
{
  const int saves = parse_save (key, value);

  if (saves <= 0)
    return saves;
  if (strcmp (key, "cow-base-check") == 0)
    return parse_bool (key, value, &cow_base_check);
  if (strcmp (key, "cow-base-id") == 0)
    return parse_base_id (value);
  if (strcmp (key, "cow-block-size") == 0)
    return parse_block_size (value);
  if (strcmp (key, "cow-on-read") == 0)
    return parse_on_read (value);
  if (strcmp (key, "cow-on-cache") == 0)
    return parse_bool (key, value, &cow_on_cache);
  if (strcmp (key, "cow-detect-zeroes") == 0)
    return parse_bool (key, value, &cow_detect_zeroes);
  if (strcmp (key, "cow-load") == 0)
    return add_load (value);
  if (strcmp (key, "cow-scope") == 0)
    return parse_scope (value);
  if (strcmp (key, "cow-max-overlays") == 0)
    return parse_max_overlays (value);
  if (strcmp (key, "cow-max-moments") == 0)
    return nbdkit_parse_uint64_t (key, value, &cow_max_moments);
  if (strcmp (key, "cow-max-bytes") == 0)
    return parse_max_bytes (value);
  if (strcmp (key, "cow-control") == 0)
    return parse_control (value);
  if (strcmp (key, "cow-views") == 0)
    return parse_bool (key, value, &cow_views);
  if (add_other (key, value) == -1)
    return -1;
  return next (nxdata, key, value);
}

/* Parameters that contradict each other. */
static int
cow_config_complete (nbdkit_next_config_complete *next, nbdkit_backend *nxdata)
{
  descriptors_look ();
  if (cow_control && cow_scope == SCOPE_CONNECTION) {
    nbdkit_error ("cow-control=%s: with cow-scope=connection no overlay has a "
                  "name that a command could use; use cow-scope=export",
                  cow_control);
    return -1;
  }
  if (cow_control && !cow_views) {
    nbdkit_error ("cow-control=%s: nobody could read a moment that is named; "
                  "add cow-views=true",
                  cow_control);
    return -1;
  }
  if (save_detail && !cow_save.target) {
    nbdkit_error ("%s: says how to save, but not where to; add cow-save",
                  save_detail);
    return -1;
  }
  if (view_detail && !cow_save.target && !cow_views) {
    nbdkit_error ("%s: says how to save, but not where to; add cow-save, or "
                  "cow-views=true",
                  view_detail);
    return -1;
  }
  if (save_check_options (&cow_save) == -1)
    return -1;
  if (cow_save.target && cow_scope == SCOPE_CONNECTION) {
    nbdkit_error ("cow-save=%s: cannot be used with cow-scope=connection, "
                  "which throws away each overlay when its client "
                  "disconnects; leave out one of them",
                  cow_save.target);
    return -1;
  }
  if (cow_save.format == QCOW2_EXTENDED
      && cow_block_size > QCOW2_MAX_EXTENDED_BLOCK_SIZE) {
    nbdkit_error ("cow-save-format=extended: takes blocks of 64K at the most; "
                  "lower cow-block-size, or use cow-save-format=portable");
    return -1;
  }
  return next (nxdata);
}

#define cow_config_help                                                       \
  "cow-base-check=<BOOL>          Refuse a diff of another base (default "    \
  "true).\n"                                                                  \
  "cow-base-id=<TEXT>             What the base is called; a diff keeps "     \
  "it.\n"                                                                     \
  "cow-block-size=<N>             Size of a block (default 4K).\n"            \
  "cow-detect-zeroes=<BOOL>       Take no space for zeroes that are "         \
  "written.\n"                                                                \
  "cow-load=<FILE>|<DIR>/|-       Start from a diff; repeat for more.\n"      \
  "cow-on-cache=<BOOL>            Copy prefetched data to the overlay.\n"     \
  "cow-on-read=<BOOL>|/PATH       Copy data that is read to the overlay.\n"   \
  "cow-save=<FILE>|<DIR>/|-       At exit, save the changes as qcow2.\n"      \
  "cow-save-backing=<NAME>|none   Backing file that the image names.\n"       \
  "cow-save-backing-format=<FMT>  Its format (default raw).\n"                \
  "cow-save-compact=<BOOL>        Save a copy in the order of the disk.\n"    \
  "cow-save-format=portable|extended  Kind of L2 entries (portable).\n"       \
  "cow-scope=export|connection    What has an overlay of its own (export).\n" \
  "cow-max-overlays=<N>           Most overlays at a time (default 1024).\n"  \
  "cow-max-bytes=<SIZE>           Most that an overlay takes (no limit).\n"   \
  "cow-max-moments=<N>            Most named moments of an export (no "       \
  "limit).\n"                                                                 \
  "cow-control=<SOCKET>           Commands for a running server: name "       \
  "moments.\n"                                                                \
  "cow-views=<BOOL>               Exports NAME@base, @snapshot, "             \
  "@diff.qcow2\n"                                                             \
  "                               and @full.qcow2 show what NAME is."

/* Look at what is to be loaded, and where to save. */
static int
find_images (struct overlays_options *options)
{
  if (cow_save.target
      && target_make_directory (cow_save.target, cow_loads, nr_cow_loads)
           == -1)
    return -1;
  if (nr_cow_loads > 0) {
    const struct loads_options loads = {
      .save_name = cow_save.target,
      .any_base = !cow_base_check,
      .others = others,
      .nr_others = nr_others,
    };

    options->loads = loads_new (cow_loads, nr_cow_loads, &loads);
    if (!options->loads)
      return -1;
  }
  if (cow_save.target) {
    options->save = save_new (&cow_save, options->loads, others, nr_others);
    if (!options->save) {
      loads_free (options->loads);
      return -1;
    }
  }
  else if (save_names_backing (&cow_save) /* of views */
           && backing_check (cow_save.backing, cow_save.backing_format, NULL)
                == -1) {
    loads_free (options->loads);
    return -1;
  }
  return 0;
}

/* Here and not in .after_fork: there it is too late to fail. */
static int
cow_get_ready (int thread_model)
{
  struct overlays_options options = {
    .scope = cow_scope,
    .max = cow_max_overlays,
    .max_moments = cow_max_moments,
    .overlay = { .block_size = cow_block_size,
                 .detect_zeroes = cow_detect_zeroes,
                 .max_bytes = (uint64_t) cow_max_bytes,
                 .format = cow_save.format },
    .base_id = cow_base_id,
    .views = cow_views,
    .view = { .block_size = cow_block_size,
              .format = cow_save.format,
              .backing = cow_save.backing,
              .backing_format = cow_save.backing_format },
  };

  if (cow_views && thread_model == NBDKIT_THREAD_MODEL_SERIALIZE_CONNECTIONS) {
    nbdkit_error ("cow-views=true: the plugin, or a filter, serves one "
                  "connection at a time, so that a view would wait for its "
                  "disk to be disconnected; leave out cow-views");
    return -1;
  }
  if (overlays) {
    nbdkit_error ("cow: this filter can stand in front of a plugin only once; "
                  "leave out one --filter=cow");
    return -1;
  }
  if (find_images (&options) == -1)
    return -1;
  overlays = overlays_new (&options);
  if (overlays && cow_control) {
    control = control_new (cow_control, overlays);
    if (!control)
      return -1;
  }
  return overlays ? 0 : -1;
}

/* Called by the thread that waits for the server's end. */
static void
save_now (void)
{
  if (overlays_save (overlays) == -1)
    save_failed = true;
}

static int
cow_after_fork (nbdkit_backend *backend)
{
  if (overlays_start (overlays) == -1)
    return -1;
  if (cow_save.target && ending_watch (save_now) == -1) {
    nbdkit_error ("cow-save=%s: cannot watch for the server's end: %m",
                  cow_save.target);
    return -1;
  }
  if (control && control_start (control) == -1) {
    nbdkit_error ("cow-control=%s: cannot start a thread: %m", cow_control);
    return -1;
  }
  return 0;
}

/* An image of a disk that nobody connected to. */
static void
save_untouched (nbdkit_backend *backend)
{
  struct base base;

  if (lone_base_open (backend, &base) == -1) {
    (void) fprintf (stderr,
                    "nbdkit: cow: warning: cow-save=%s: nothing was saved, as "
                    "no client has connected, and the base does not tell its "
                    "size or does not answer\n",
                    cow_save.target);
    return;
  }
  if (overlays_save_base (overlays, &base) == -1)
    save_failed = true;
  lone_base_close (&base);
}

/* All clients have gone, and the signal that ends the server may have been seen
 * long ago, or there was none.
 */
static void
cow_cleanup (nbdkit_backend *backend)
{
  control_free (control);
  control = NULL;
  if (!cow_save.target)
    return;
  ending_finish ();
  if (overlays_want_base (overlays))
    save_untouched (backend);
  if (save_failed)
    ending_fail ();
}

/* What is below puts the name of its default export, if it has one, behind the COUNT
 * names of its list if it is asked to; or that is the one name of its list.
 */
static void
learn_default_name (nbdkit_next_list_exports *next, nbdkit_backend *nxdata,
                    int readonly, size_t count)
{
  struct nbdkit_exports *exports = nbdkit_exports_new ();

  if (exports && nbdkit_use_default_export (exports) == 0
      && next (nxdata, readonly, exports) == 0
      && (nbdkit_exports_count (exports) == 1
          || nbdkit_exports_count (exports) > count))
    overlays_set_default_name (
      overlays,
      nbdkit_get_export (exports, nbdkit_exports_count (exports) - 1).name);
  nbdkit_exports_free (exports);
}

static int
cow_list_exports (nbdkit_next_list_exports *next, nbdkit_backend *nxdata,
                  int readonly, int is_tls, struct nbdkit_exports *exports)
{
  if (next (nxdata, readonly, exports) == -1)
    return -1;
  if (!cow_views)
    return 0;
  if (!overlays_know_default_name (overlays)
      && nbdkit_exports_count (exports) < MAX_EXPORTS)
    learn_default_name (next, nxdata, readonly,
                        nbdkit_exports_count (exports));
  if (overlays_list (overlays, exports) == -1)
    return -1;
  if (viewname_list (exports, cow_scope != SCOPE_EXPORT) == -1)
    return -1;
  return moments_list (overlays, exports);
}

/* Remember what "" means, for views of it. */
static const char *
cow_default_export (nbdkit_next_default_export *next, nbdkit_backend *nxdata,
                    int readonly, int is_tls)
{
  const char *name = next (nxdata, readonly);

  if (cow_views && name)
    overlays_set_default_name (overlays, name);
  return name;
}

/* Is that the base by itself, without its overlay? */
static bool
is_base_view (const struct handle *h)
{
  return h->is_view && h->view_name.what.moment == MOMENT_BASE
         && h->view_name.form == VIEW_DISK;
}

/* Find out what NAME is a view of.  -1 if it is refused, which was reported. */
static int
parse_view_name (struct handle *h, const char *name)
{
  const char *problem = viewname_parse (name, &h->view_name);

  h->is_view = true;
  if (problem) {
    nbdkit_error ("cow: export refused: the view \"%s\" %s",
                  printable (name).text, problem);
    return -1;
  }
  if (!is_base_view (h) && cow_scope == SCOPE_CONNECTION) {
    nbdkit_error ("cow: export refused: with cow-scope=connection each "
                  "connection has a disk of its own, of which others have no "
                  "view; use cow-scope=export");
    return -1;
  }
  return 0;
}

static int
parse_export_name (struct handle *h, const char *name)
{
  size_t length = strlen (name);

  if (cow_views && viewname_is_view (name)) {
    if (parse_view_name (h, name) == -1)
      return -1;
    length = h->view_name.length;
  }
  if (length == 0 && h->is_view && !is_base_view (h))
    h->export_name = overlays_default_name (overlays);
  else if (!(h->export_name = strndup (name, length)))
    nbdkit_error ("cow: out of memory");
  if (!h->export_name)
    return -1;
  if (h->is_view && viewname_is_view (h->export_name)) {
    nbdkit_error ("cow: export refused: there are no views of a view");
    return -1;
  }
  return 0;
}

static void
free_handle (struct handle *h)
{
  free (h->export_name);
  free (h);
}

static void *
cow_open (nbdkit_next_open *next, nbdkit_context *context, int readonly,
          const char *export_name, int is_tls)
{
  struct handle *h = calloc (1, sizeof *h);

  if (!h) {
    nbdkit_error ("cow: out of memory");
    return NULL;
  }
  /* The base is never written. */
  if (parse_export_name (h, export_name) == -1
      || next (context, 1, h->export_name) == -1) {
    free_handle (h);
    return NULL;
  }
  return h;
}

static void
cow_close (void *handle)
{
  struct handle *h = handle;

  if (is_base_view (h))
    view_free (h->view);
  else if (h->viewer)
    overlays_put_view (h->entry, h->viewer);
  if (h->entry)
    overlays_put (overlays, h->entry);
  free_handle (h);
}

static int
cow_prepare (nbdkit_next *next, void *handle, int readonly)
{
  struct handle *h = handle;

  if (base_init (&h->base, next) == -1)
    return -1;
  if (is_base_view (h)) {
    h->view = view_new (&(struct view_source) { .what = NULL }, NULL, NULL);
    return h->view ? 0 : -1;
  }
  h->entry = overlays_get (overlays, h->export_name, &h->base);
  if (!h->entry)
    return -1;
  if (h->is_view) {
    h->viewer = overlays_get_view (overlays, h->entry, &h->view_name);
    if (!h->viewer)
      return -1;
    h->view = h->viewer->view;
    return 0;
  }
  VERBOSE ("export \"%s\": connected, %" PRIu64 " bytes%s", h->export_name,
           h->base.size, readonly ? ", read only" : "");
  return 0;
}

static int64_t
cow_get_size (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  if (!h->view)
    return (int64_t) h->base.size;

  const int64_t size = view_size (h->view, &h->base);

  if (h->viewer)
    viewer_is_ready (h->viewer); /* planning an image may have taken long */
  return size;
}

static const char *
cow_export_description (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->view ? viewname_description (&h->view_name)
                 : next->export_description (next);
}

static int
cow_get_block_size (nbdkit_next *next, void *handle, uint32_t *minimum,
                    uint32_t *preferred, uint32_t *maximum)
{
  const struct handle *h = handle;

  *minimum = 1;
  *preferred = MAX (cow_block_size, h->base.preferred);
  *maximum = UINT32_MAX;
  return 0;
}

/* Can_flush, can_trim, can_fast_zero.  With -r, and of what cannot be written, nbdkit
 * itself refuses all that writes.
 */
static int
cow_can (nbdkit_next *next, void *handle)
{
  return 1;
}

static int
cow_can_write (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return !h->view;
}

static int
cow_can_extents (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return !h->view || view_can_extents (h->view, &h->base);
}

static int
cow_can_zero (nbdkit_next *next, void *handle)
{
  return NBDKIT_ZERO_NATIVE;
}

static int
cow_can_fua (nbdkit_next *next, void *handle)
{
  return NBDKIT_FUA_NATIVE;
}

static int
cow_can_cache (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return h->view ? NBDKIT_CACHE_NONE : NBDKIT_CACHE_NATIVE;
}

static int
cow_can_multi_conn (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  /* All connections to an export see the same disk, and what one of them wrote
   * is seen by all as soon as it is acknowledged.  Views do not change.
   */
  return cow_scope == SCOPE_EXPORT || h->view;
}

static enum on_read
on_read_now (void)
{
  switch (cow_on_read) {
  case COW_ON_READ_TRUE:
    return ON_READ_KEEP;
  case COW_ON_READ_PATH:
    return access (cow_on_read_path, F_OK) == 0 ? ON_READ_KEEP : ON_READ_PASS;
  case COW_ON_READ_FALSE:
  default:
    return ON_READ_PASS;
  }
}

/* A client has read BUF.  If a disk starts with it that looks like an image, it may be
 * that the base is served as one by mistake.
 */
static void
look_for_container (struct handle *h, const void *buf, uint32_t count,
                    uint64_t offset)
{
  if (offset == 0 && h->view_name.form == VIEW_DISK
      && qcow2_is_image (buf, count) && !atomic_exchange (&h->looked, true))
    identity_warn_of_container (h->export_name, &h->base);
}

static int
cow_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count,
           uint64_t offset, uint32_t flags, int *err)
{
  struct handle *h = handle;
  int r;

  log_request (h, "read", count, offset, "");
  if (h->viewer)
    viewer_reads (h->viewer);
  if (h->view)
    r = view_read (h->view, &h->base, buf, count, offset, err);
  else
    r = blk_read (live_disk (overlay_of (h->entry)), &h->base, on_read_now (),
                  buf, count, offset, err);
  if (r == 0)
    look_for_container (h, buf, count, offset);
  return r;
}

/* FUA and flush have nothing to do: map and file die with the process, so that
 * nothing is made more lasting by syncing it.
 */
static int
cow_pwrite (nbdkit_next *next, void *handle, const void *buf, uint32_t count,
            uint64_t offset, uint32_t flags, int *err)
{
  const struct handle *h = handle;

  log_request (h, "write", count, offset, fua_text (flags));
  return blk_write (overlay_of (h->entry), &h->base, buf, count, offset, err);
}

static int
cow_flush (nbdkit_next *next, void *handle, uint32_t flags, int *err)
{
  const struct handle *h = handle;

  VERBOSE ("export \"%s\": flush", h->export_name);
  return 0;
}

static int
cow_zero (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
          uint32_t flags, int *err)
{
  const struct handle *h = handle;
  const bool fast = flags & NBDKIT_FLAG_FAST_ZERO;
  const bool holes = flags & NBDKIT_FLAG_MAY_TRIM;

  log_request (h, fast ? "fast zero" : "zero", count, offset,
               fua_text (flags));
  return blk_zero (
    overlay_of (h->entry), &h->base, fast ? ZERO_FAST : ZERO_ANY,
    holes ? ZERO_GIVES_BACK : ZERO_HAS_SPACE, count, offset, err);
}

static int
cow_trim (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
          uint32_t flags, int *err)
{
  const struct handle *h = handle;

  log_request (h, "trim", count, offset, fua_text (flags));
  return blk_zero (overlay_of (h->entry), &h->base, ZERO_ANY, ZERO_GIVES_BACK,
                   count, offset, err);
}

static int
cow_cache (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
           uint32_t flags, int *err)
{
  const struct handle *h = handle;

  log_request (h, "cache", count, offset, "");
  return blk_cache (overlay_of (h->entry), &h->base,
                    cow_on_cache ? ON_CACHE_KEEP : ON_CACHE_PASS, count,
                    offset, err);
}

static int
cow_extents (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
             uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  const struct handle *h = handle;

  log_request (h, "extents of", count, offset,
               flags & NBDKIT_FLAG_REQ_ONE ? ", one" : "");
  if (h->viewer)
    viewer_reads (h->viewer);
  if (h->view)
    return view_extents (h->view, &h->base, count, offset, flags, extents,
                         err);
  return blk_extents (live_disk (overlay_of (h->entry)), &h->base, count,
                      offset, flags, extents, err);
}

static struct nbdkit_filter filter = {
  .name = "cow",
  .longname = "nbdkit copy-on-write (COW) filter",
  .description = "A writable disk on top of any base, which is never written.",
  .unload = cow_unload,
  .config = cow_config,
  .config_complete = cow_config_complete,
  .config_help = cow_config_help,
  .get_ready = cow_get_ready,
  .after_fork = cow_after_fork,
  .cleanup = cow_cleanup,
  .list_exports = cow_list_exports,
  .default_export = cow_default_export,
  .open = cow_open,
  .close = cow_close,
  .prepare = cow_prepare,
  .get_size = cow_get_size,
  .export_description = cow_export_description,
  .block_size = cow_get_block_size,
  .can_write = cow_can_write,
  .can_flush = cow_can,
  .can_trim = cow_can,
  .can_zero = cow_can_zero,
  .can_fast_zero = cow_can,
  .can_extents = cow_can_extents,
  .can_fua = cow_can_fua,
  .can_multi_conn = cow_can_multi_conn,
  .can_cache = cow_can_cache,
  .pread = cow_pread,
  .pwrite = cow_pwrite,
  .flush = cow_flush,
  .zero = cow_zero,
  .trim = cow_trim,
  .cache = cow_cache,
  .extents = cow_extents,
};

NBDKIT_REGISTER_FILTER (filter)
