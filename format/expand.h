/* SPDX-License-Identifier: BSD-3-Clause */

/* Expanding compressed clusters of a qcow2 image (docs/interop/qcow2.txt in
 * qemu, "Compressed Clusters Descriptor").
 *
 * Pure: buffers in, buffers out.  The bytes are not trusted.
 */

#ifndef COW_EXPAND_H
#define COW_EXPAND_H

#include <stdbool.h>
#include <stddef.h>

enum compression {
  COMPRESSION_ZLIB, /* a raw deflate stream */
  COMPRESSION_ZSTD, /* one frame */
};

/* Was the filter built with the library for this one? */
extern bool expander_knows (enum compression compression);

/* The state of a library, which is used again for each cluster. */
struct expander;

/* NULL and errno: out of memory, or ENOTSUP. */
extern struct expander *expander_new (enum compression compression);

extern void expander_free (struct expander *expander);

/* Expand what is at the beginning of the COUNT bytes of IN into OUT, where it
 * must come to exactly SIZE bytes.  Returns how many bytes of IN it took; 0 and
 * errno, EINVAL or ENOMEM, if it does not.  Not for two threads at once.
 */
extern size_t expander_run (struct expander *expander, const void *in,
                            size_t count, void *out, size_t size);

#endif /* COW_EXPAND_H */
