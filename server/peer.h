/* SPDX-License-Identifier: BSD-3-Clause */

/* Which program is at the other end of a connection. */

#ifndef COW_PEER_H
#define COW_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A process on this machine, or a host.  Of an unknown one, SIZE is 0. */
struct peer {
  int family;
  size_t size;
  uint8_t id[16];
};

/* Of the connection on behalf of which this is called. */
extern struct peer peer_of_connection (void);

/* Are both known, and the same? */
extern bool peer_is_same (const struct peer *a, const struct peer *b);

#endif /* COW_PEER_H */
