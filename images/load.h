/* SPDX-License-Identifier: BSD-3-Clause */

/* Bringing a qcow2 image into an overlay (cow-load).
 *
 * The file is not trusted: all of its structure is checked when it is opened,
 * and each entry again when it is used.  It is only read, and nothing that it
 * names is opened.  Sizes and offsets are in bytes.
 */

#ifndef COW_LOAD_H
#define COW_LOAD_H

#include <stdint.h>

#include "base.h"
#include "blk.h"
#include "format/qcow2.h"

/* An image that was opened and checked.  Constant until it is closed, so any
 * number of threads may use it.
 */
struct loaded;

/* Check the image in the file FD, which is open for reading and close-on-exec,
 * and belongs to the image from now on, also when this fails.  Messages call it
 * NAME.  Takes the time to read the tables and to expand what is compressed.
 * NULL if this filter cannot or must not load it, after reporting why in one
 * line: "cow-load=NAME: offset N: what is wrong".  Warns on standard error of
 * internal snapshots, which are ignored.
 */
extern struct loaded *load_open (const char *name, int fd);

/* Close the file.  NULL is allowed. */
extern void load_close (struct loaded *image);

/* The bytes of the disk that it does not leave to what is below: this bounds the
 * memory for the map of an overlay that it is brought into.
 */
extern uint64_t load_changed_bytes (const struct loaded *image);

/* All that its header says. */
extern const struct qcow2_header *load_header (const struct loaded *image);

/* Write its data clusters to OVERLAY, zero its zero clusters, and leave the
 * unallocated ones as they are ("Cluster mapping").  What is beyond the end of
 * the overlay is left out.  Reads BASE where a cluster covers a block in part.
 * The caller holds no lock.  -1 if it fails, after reporting why: then part of
 * the image may have been brought in.
 */
extern int load_into (const struct loaded *image, struct overlay *overlay,
                      const struct base *base);

#endif /* COW_LOAD_H */
