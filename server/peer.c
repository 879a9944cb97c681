/* SPDX-License-Identifier: BSD-3-Clause */

/* The peers of connections (see peer.h). */

#include <config.h>

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#include <nbdkit-filter.h>

#include "server/peer.h"

static void
set_id (struct peer *p, const void *id, size_t size)
{
  memcpy (p->id, id, size);
  p->size = size;
}

struct peer
peer_of_connection (void)
{
  union {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    struct sockaddr_storage storage;
  } name;
  socklen_t length = sizeof name;
  struct peer p = { .size = 0 };

  memset (&name, 0, sizeof name);
  if (nbdkit_peer_name (&name.any, &length) == -1)
    return p;
  p.family = name.any.sa_family;
  if (p.family == AF_UNIX) {
    const int64_t pid = nbdkit_peer_pid ();

    if (pid > 0) /* 0: in a namespace that we do not see */
      set_id (&p, &pid, sizeof pid);
  }
  else if (p.family == AF_INET)
    set_id (&p, &name.in.sin_addr, sizeof name.in.sin_addr);
  else if (p.family == AF_INET6)
    set_id (&p, &name.in6.sin6_addr, sizeof name.in6.sin6_addr);
  return p;
}

bool
peer_is_same (const struct peer *a, const struct peer *b)
{
  return a->size > 0 && a->family == b->family && a->size == b->size
         && memcmp (a->id, b->id, a->size) == 0;
}
