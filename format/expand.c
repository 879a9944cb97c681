/* SPDX-License-Identifier: BSD-3-Clause */

/* Expanding compressed clusters (see expand.h).
 *
 * Memory stays small whatever the bytes say: zlib has at most its window of 32
 * KiB, and zstd is given a whole frame and the whole output, which then is its
 * window.
 */

#include <config.h>

#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>
#ifdef HAVE_ZSTD
#include <zstd.h>
#endif

#include "format/expand.h"

/* Negative: no header, no checksum.  qemu writes with a smaller window, which
 * this one takes too.
 */
#define WINDOW_BITS (-15)

struct expander {
  enum compression compression;
  z_stream zlib; /* if that */
#ifdef HAVE_ZSTD
  ZSTD_DCtx *zstd; /* if that, else NULL */
#endif
};

bool
expander_knows (enum compression compression)
{
#ifdef HAVE_ZSTD
  return compression == COMPRESSION_ZLIB || compression == COMPRESSION_ZSTD;
#else
  return compression == COMPRESSION_ZLIB;
#endif
}

/* -1 and errno. */
static int
start (struct expander *e)
{
  if (e->compression == COMPRESSION_ZLIB) {
    errno = ENOMEM;
    return inflateInit2 (&e->zlib, WINDOW_BITS) == Z_OK ? 0 : -1;
  }
#ifdef HAVE_ZSTD
  e->zstd = ZSTD_createDCtx ();
  errno = ENOMEM;
  return e->zstd ? 0 : -1;
#else
  errno = ENOTSUP;
  return -1;
#endif
}

struct expander *
expander_new (enum compression compression)
{
  struct expander *e = calloc (1, sizeof *e);

  if (!e)
    return NULL;
  e->compression = compression;
  if (start (e) == -1) {
    const int err = errno;

    free (e);
    errno = err;
    return NULL;
  }
  return e;
}

void
expander_free (struct expander *e)
{
  if (!e)
    return;
  if (e->compression == COMPRESSION_ZLIB)
    inflateEnd (&e->zlib);
#ifdef HAVE_ZSTD
  ZSTD_freeDCtx (e->zstd);
#endif
  free (e);
}

static size_t
run_zlib (struct expander *e, const void *in, size_t count, void *out,
          size_t size)
{
  inflateReset (&e->zlib);
  e->zlib.next_in = (Bytef *) in;
  e->zlib.avail_in = (uInt) count;
  e->zlib.next_out = out;
  e->zlib.avail_out = (uInt) size;

  const int r = inflate (&e->zlib, Z_FINISH);
  if (r == Z_STREAM_END && e->zlib.avail_out == 0)
    return e->zlib.total_in;
  errno = r == Z_MEM_ERROR ? ENOMEM : EINVAL;
  return 0;
}

#ifdef HAVE_ZSTD
static size_t
run_zstd (struct expander *e, const void *in, size_t count, void *out,
          size_t size)
{
  uint32_t magic;

  /* The library may know frames of older formats, and frames to be skipped. */
  errno = EINVAL;
  if (count < sizeof magic)
    return 0;
  memcpy (&magic, in, sizeof magic);
  if (le32toh (magic) != ZSTD_MAGICNUMBER)
    return 0;

  /* What lies behind the frame is something else. */
  const size_t taken = ZSTD_findFrameCompressedSize (in, count);
  if (ZSTD_isError (taken))
    return 0;
  return ZSTD_decompressDCtx (e->zstd, out, size, in, taken) == size ? taken
                                                                     : 0;
}
#endif

size_t
expander_run (struct expander *e, const void *in, size_t count, void *out,
              size_t size)
{
#ifdef HAVE_ZSTD
  if (e->compression == COMPRESSION_ZSTD)
    return run_zstd (e, in, count, out, size);
#endif
  return run_zlib (e, in, count, out, size);
}
