/* SPDX-License-Identifier: BSD-3-Clause */

/* An image that comes from a pipe (see spool.h).
 *
 * Its tables may lie anywhere in it, so all of it has to be there first.
 */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/bytes.h"
#include "common/cleanup.h"
#include "overlay/newfile.h"
#include "server/tmpdir.h"
#include "server/spool.h"

#define SPOOL_BYTES (1u << 20)

/* Read what there is, and wait for it.  0 at the end; -1 and errno. */
static ssize_t
read_some (int fd, void *buf)
{
  /* A FIFO that nobody has written yet has no end: poll waits there. */
  struct pollfd p = { .fd = fd, .events = POLLIN };
  ssize_t r;

  do {
    (void) poll (&p, 1, -1);
    r = read (fd, buf, SPOOL_BYTES);
  } while (r == -1 && (errno == EINTR || errno == EAGAIN));
  return r;
}

/* Copy all of FD to a file in DIR. */
static int
copy (const char *name, int fd, int to, const char *dir)
{
  CLEANUP_FREE char *buf = malloc (SPOOL_BYTES);
  uint64_t total = 0;
  ssize_t n = 0;

  if (!buf) {
    nbdkit_error ("cow-load=%s: out of memory", name);
    return -1;
  }
  while ((n = read_some (fd, buf)) > 0) {
    if (bytes_write (to, buf, (size_t) n) == -1) {
      nbdkit_error (
        "cow-load=%s: what comes from a pipe is first copied to %s, "
        "which took %" PRIu64 " bytes of it: %m; make room there, "
        "or set TMPDIR to another directory",
        name, dir, total);
      return -1;
    }
    total += (uint64_t) n;
  }
  if (n == -1)
    nbdkit_error ("cow-load=%s: cannot read it: %m", name);
  return n == -1 ? -1 : 0;
}

int
spool_read (const char *name, int fd)
{
  const char *tried;
  CLEANUP_FREE char *dir = tmpdir_find (&tried);
  struct newfile file;
  int r;

  if (!dir || newfile_make (&file, dir, NEWFILE_ANONYMOUS) == -1) {
    nbdkit_error ("cow-load=%s: what comes from a pipe is first copied to %s, "
                  "where no file can be made: %m; set TMPDIR to another "
                  "directory",
                  name, dir ? dir : tried);
    return -1;
  }

  /* What is too long for "ulimit -f" is an error like any other. */
  void (*const old) (int) = signal (SIGXFSZ, SIG_IGN);
  r = copy (name, fd, file.fd, dir);
  (void) signal (SIGXFSZ, old);

  if (r == 0)
    return file.fd;
  newfile_discard (&file);
  return -1;
}
