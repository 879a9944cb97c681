/* SPDX-License-Identifier: BSD-3-Clause */

/* The limits of the process (see limits.h). */

#include <config.h>

#include <signal.h>
#include <stddef.h>
#include <sys/resource.h>

#include "common/cleanup.h"
#include "common/limits.h"

uint64_t
limits_open_files (void)
{
  struct rlimit limit;

  if (getrlimit (RLIMIT_NOFILE, &limit) == -1
      || limit.rlim_max == RLIM_INFINITY)
    return UINT64_MAX;
  return limit.rlim_max;
}

void
limits_raise_open_files (void)
{
  struct rlimit limit;

  if (getrlimit (RLIMIT_NOFILE, &limit) == 0
      && limit.rlim_cur != limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit (RLIMIT_NOFILE, &limit); /* the old one does for a while */
  }
}

uint64_t
limits_file_size (void)
{
  struct rlimit limit;

  if (getrlimit (RLIMIT_FSIZE, &limit) == -1)
    return INT64_MAX;
  return MIN (limit.rlim_cur, INT64_MAX);
}

void
limits_ignore_file_size_signal (void)
{
  struct sigaction action;

  if (sigaction (SIGXFSZ, NULL, &action) == 0
      && !(action.sa_flags & SA_SIGINFO) && action.sa_handler == SIG_DFL) {
    action.sa_handler = SIG_IGN;
    sigaction (SIGXFSZ, &action, NULL);
  }
}
