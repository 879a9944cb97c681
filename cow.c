/* SPDX-License-Identifier: BSD-3-Clause */

/* The filter as nbdkit sees it: parameters and callbacks, nothing else.
 *
 * What a client may do never depends on what the base can do.  The base is
 * opened read only; writes, zeroes and trims end in the overlay (blk.h).
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "base.h"
#include "blk.h"
#include "cleanup.h"
#include "debug.h"
#include "overlays.h"

/* The callbacks have the parameters that nbdkit gives them. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

#define MIN_BLOCK_SIZE UINT32_C (4096)
#define MAX_BLOCK_SIZE (UINT32_C (2) << 20)

/* -D cow.verbose=1.  nbdkit finds it by its name. */
NBDKIT_DLL_PUBLIC int cow_debug_verbose;

/* Parameters. */
static uint32_t cow_block_size = MIN_BLOCK_SIZE;
static bool cow_on_cache;
static enum {
  COW_ON_READ_FALSE,
  COW_ON_READ_TRUE,
  COW_ON_READ_PATH
} cow_on_read;
static const char *cow_on_read_path;
static enum scope cow_scope = SCOPE_EXPORT;
static uint64_t cow_max_overlays = 1024;

/* All overlays of this server. */
static struct overlays *overlays;

/* A connection. */
struct handle {
  char *export_name;
  struct base base;            /* set by .prepare */
  struct overlay_entry *entry; /* set by .prepare, NULL if that failed */
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
  overlays_free (overlays);
  overlays = NULL;
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
parse_on_cache (const char *value)
{
  const int r = nbdkit_parse_bool (value);

  if (r == -1) {
    nbdkit_error ("cow-on-cache=%s: must be true or false", value);
    return -1;
  }
  cow_on_cache = r;
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
cow_config (nbdkit_next_config *next, nbdkit_backend *nxdata, const char *key,
            const char *value)
{
  if (strcmp (key, "cow-block-size") == 0)
    return parse_block_size (value);
  if (strcmp (key, "cow-on-read") == 0)
    return parse_on_read (value);
  if (strcmp (key, "cow-on-cache") == 0)
    return parse_on_cache (value);
  if (strcmp (key, "cow-scope") == 0)
    return parse_scope (value);
  if (strcmp (key, "cow-max-overlays") == 0)
    return parse_max_overlays (value);
  return next (nxdata, key, value);
}

#define cow_config_help                                                       \
  "cow-block-size=<N>             Size of a block (default 4K).\n"            \
  "cow-on-cache=<BOOL>            Copy prefetched data to the overlay.\n"     \
  "cow-on-read=<BOOL>|/PATH       Copy data that is read to the overlay.\n"   \
  "cow-scope=export|connection    What has an overlay of its own (export).\n" \
  "cow-max-overlays=<N>           Most overlays at a time (default 1024)."

/* Here and not in .after_fork: there it is too late to fail. */
static int
cow_get_ready (int thread_model)
{
  if (overlays) {
    nbdkit_error ("cow: this filter can stand in front of a plugin only once; "
                  "leave out one --filter=cow");
    return -1;
  }
  overlays = overlays_new (cow_scope, cow_max_overlays, cow_block_size);
  return overlays ? 0 : -1;
}

static int
cow_after_fork (nbdkit_backend *backend)
{
  return overlays_start (overlays);
}

static void *
cow_open (nbdkit_next_open *next, nbdkit_context *context, int readonly,
          const char *export_name, int is_tls)
{
  /* The base is never written. */
  if (next (context, 1, export_name) == -1)
    return NULL;

  struct handle *h = calloc (1, sizeof *h);
  if (h)
    h->export_name = strdup (export_name);
  if (!h || !h->export_name) {
    nbdkit_error ("cow: out of memory");
    free (h);
    return NULL;
  }
  return h;
}

static void
cow_close (void *handle)
{
  struct handle *h = handle;

  if (h->entry)
    overlays_put (overlays, h->entry);
  free (h->export_name);
  free (h);
}

static int
cow_prepare (nbdkit_next *next, void *handle, int readonly)
{
  struct handle *h = handle;

  if (base_init (&h->base, next) == -1)
    return -1;
  h->entry = overlays_get (overlays, h->export_name, h->base.size);
  if (!h->entry)
    return -1;
  VERBOSE ("export \"%s\": connected, %" PRIu64 " bytes%s", h->export_name,
           h->base.size, readonly ? ", read only" : "");
  return 0;
}

static int64_t
cow_get_size (nbdkit_next *next, void *handle)
{
  const struct handle *h = handle;

  return (int64_t) h->base.size;
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

/* Can_write, can_flush, can_trim, can_fast_zero, can_extents.  With -r, nbdkit
 * itself refuses all that writes.
 */
static int
cow_can (nbdkit_next *next, void *handle)
{
  return 1;
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
  return NBDKIT_CACHE_NATIVE;
}

static int
cow_can_multi_conn (nbdkit_next *next, void *handle)
{
  /* All connections to an export see the same disk, and what one of them wrote
   * is seen by all as soon as it is acknowledged.
   */
  return cow_scope == SCOPE_EXPORT;
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

static int
cow_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count,
           uint64_t offset, uint32_t flags, int *err)
{
  const struct handle *h = handle;

  log_request (h, "read", count, offset, "");
  return blk_read (overlay_of (h->entry), &h->base, on_read_now (), buf, count,
                   offset, err);
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

  log_request (h, fast ? "fast zero" : "zero", count, offset,
               fua_text (flags));
  return blk_zero (overlay_of (h->entry), &h->base,
                   fast ? ZERO_FAST : ZERO_ANY, count, offset, err);
}

static int
cow_trim (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset,
          uint32_t flags, int *err)
{
  const struct handle *h = handle;

  log_request (h, "trim", count, offset, fua_text (flags));
  return blk_zero (overlay_of (h->entry), &h->base, ZERO_ANY, count, offset,
                   err);
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
  return blk_extents (overlay_of (h->entry), &h->base, count, offset, flags,
                      extents, err);
}

static struct nbdkit_filter filter = {
  .name = "cow",
  .longname = "nbdkit copy-on-write (COW) filter",
  .description = "A writable disk on top of any base, which is never written.",
  .unload = cow_unload,
  .config = cow_config,
  .config_help = cow_config_help,
  .get_ready = cow_get_ready,
  .after_fork = cow_after_fork,
  .open = cow_open,
  .close = cow_close,
  .prepare = cow_prepare,
  .get_size = cow_get_size,
  .block_size = cow_get_block_size,
  .can_write = cow_can,
  .can_flush = cow_can,
  .can_trim = cow_can,
  .can_zero = cow_can_zero,
  .can_fast_zero = cow_can,
  .can_extents = cow_can,
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
