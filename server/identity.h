/* SPDX-License-Identifier: BSD-3-Clause */

/* Which base a diff belongs to.
 *
 * A diff says which base it was made over (struct qcow2_base), and is not laid over
 * another one: that would be a mix of two disks.
 */

#ifndef COW_IDENTITY_H
#define COW_IDENTITY_H

#include <stdint.h>

#include "base.h"
#include "blk.h"
#include "format/qcow2.h"

/* Find out what can be said of BASE, which the user calls ID (NULL: nothing).  Reads
 * its first 64 KiB.  Caller holds no lock that a request takes.  -1 and *ERR if they
 * cannot be read, which the base has reported: then there is no checksum.
 */
extern int identity_read (struct qcow2_base *identity, const struct base *base,
                          const char *id, int *err);

/* What an image is going to be laid over. */
struct identity_below {
  const struct qcow2_base *identity; /* of the base */
  const struct base *base;
  /* NULL: the image comes first.  Else others were brought in here already, and it
   * may also have been made over the disk that they make.
   */
  struct overlay *overlay;
};

/* Does the diff that is called NAME belong there?  One that says nothing does.
 * Caller holds no lock that a request takes.  -1 if not, which was reported.
 */
extern int identity_check (const char *name, const struct qcow2_header *diff,
                           const struct identity_below *below);

/* Warns, once in the life of the server, if BASE, of the export NAME, starts with a
 * qcow2 header: clients then see a container in place of the disk in it.  Reads it.
 * Caller holds no lock that a request takes.
 */
extern void identity_warn_of_container (const char *name,
                                        const struct base *base);

#endif /* COW_IDENTITY_H */
