/* SPDX-License-Identifier: BSD-3-Clause */

/* The base without a client. */

#ifndef COW_LONE_H
#define COW_LONE_H

#include "base.h"

/* Open the base that is the same for every client, in .cleanup.  Plugins that
 * choose it by the client's export name cannot do that, and some crash, or do not answer
 * when it is read for identity_read; so both are tried first in a child process.  -1 if
 * it cannot be done, which is not reported.
 */
extern int lone_base_open (nbdkit_backend *backend, struct base *base);
extern void lone_base_close (struct base *base);

#endif /* COW_LONE_H */
