/* SPDX-License-Identifier: BSD-3-Clause */

/* The base without a client (see lone.h). */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "server/identity.h"
#include "server/lone.h"

/* A base that does not open and answer within this time cannot be opened. */
#define SECONDS 10

static int
open_base (nbdkit_backend *backend, struct base *base)
{
  nbdkit_next *next = nbdkit_next_context_open (backend, 1, "", 1);

  if (!next)
    return -1;
  if (next->prepare (next) == -1 || base_init (base, next) == -1) {
    nbdkit_next_context_close (next);
    return -1;
  }
  return 0;
}

/* The child: says by one byte that it went well, and is heard in no other way.  What the
 * base answers does not matter, only that it does.
 */
static void __attribute__ ((noreturn))
try_to_open (nbdkit_backend *backend, int fd)
{
  const struct rlimit no_core = { 0, 0 };
  const int null = open ("/dev/null", O_RDWR | O_CLOEXEC);
  struct qcow2_base ignored;
  struct base base;
  int err;

  setrlimit (RLIMIT_CORE, &no_core);
  if (null >= 0)
    dup2 (null, STDERR_FILENO);
  for (int s = SIGHUP; s <= SIGTERM; ++s)
    (void) signal (s, SIG_DFL);
  if (open_base (backend, &base) == -1)
    _exit (1);
  (void) identity_read (&ignored, &base, NULL, &err);
  _exit (write (fd, "", 1) == 1 ? 0 : 1);
}

/* Does the child say within SECONDS that it went well? */
static bool
hear (int fd)
{
  struct pollfd p = { .fd = fd, .events = POLLIN };
  char byte;

  return poll (&p, 1, SECONDS * 1000) == 1 && read (fd, &byte, 1) == 1;
}

/* What happens to the child happens to it alone. */
static bool
can_open (nbdkit_backend *backend)
{
  int fds[2];
  bool heard;

  if (pipe2 (fds, O_CLOEXEC) == -1)
    return false;

  const pid_t child = fork ();
  if (child == 0)
    try_to_open (backend, fds[1]);
  close (fds[1]);
  heard = child > 0 && hear (fds[0]);
  close (fds[0]);
  if (child > 0) {
    kill (child, SIGKILL);
    while (waitpid (child, NULL, 0) == -1 && errno == EINTR)
      ;
  }
  return heard;
}

int
lone_base_open (nbdkit_backend *backend, struct base *base)
{
  return can_open (backend) ? open_base (backend, base) : -1;
}

void
lone_base_close (struct base *base)
{
  base->next->finalize (base->next);
  nbdkit_next_context_close (base->next);
}
