/* SPDX-License-Identifier: BSD-3-Clause */

/* Bytes (see bytes.h). */

#include <config.h>

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"

bool
bytes_are_zero (const char *buf, size_t count)
{
  return count == 0 || (buf[0] == 0 && memcmp (buf, buf + 1, count - 1) == 0);
}

int
bytes_write (int fd, const char *buf, size_t count)
{
  while (count > 0) {
    const ssize_t r = write (fd, buf, count);

    if (r == -1 && errno == EAGAIN) {
      struct pollfd p = { .fd = fd, .events = POLLOUT };

      (void) poll (&p, 1, -1);
      continue;
    }
    if (r == -1 && errno == EINTR)
      continue;
    if (r == -1)
      return -1;
    buf += r;
    count -= (size_t) r;
  }
  return 0;
}
