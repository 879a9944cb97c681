/* SPDX-License-Identifier: BSD-3-Clause */

/* A plugin that, for each read, forks a child that dies by a signal: SIGABRT at offset 0,
 * else SIGTERM.  Some plugins have such children (interpreters do), which share handlers
 * of signals and open files with the server.
 */

#include <config.h>

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static void *
forking_open (int readonly)
{
  (void) readonly;
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t
forking_get_size (void *handle)
{
  (void) handle;
  return 1 << 20;
}

static int
forking_pread (void *handle, void *buf, uint32_t count, uint64_t offset,
               uint32_t flags)
{
  const struct rlimit no_core = { 0, 0 };
  const pid_t child = fork ();
  int status;

  (void) handle;
  (void) flags;
  if (child == 0) {
    setrlimit (RLIMIT_CORE, &no_core);
    (void) raise (offset == 0 ? SIGABRT : SIGTERM);
    _exit (0); /* after a handler that only takes note of it */
  }
  while (waitpid (child, &status, 0) == -1 && errno == EINTR)
    ;
  memset (buf, 'b', count);
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "forking",
  .open = forking_open,
  .get_size = forking_get_size,
  .pread = forking_pread,
};

NBDKIT_REGISTER_PLUGIN (plugin)
