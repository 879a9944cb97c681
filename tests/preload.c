/* SPDX-License-Identifier: BSD-3-Clause */

/* Loaded into nbdkit beside a sanitizer's runtime, by LD_PRELOAD. */

#include <config.h>

#include <locale.h>
#include <stdlib.h>

#define REPLACES __attribute__ ((visibility ("default")))

int dlclose (void *module);

/* The commands that nbdkit runs (shells, clients) go without the runtime. */
__attribute__ ((constructor)) static void
unset_preload (void)
{
  unsetenv ("LD_PRELOAD");
}

/* Modules stay, so that reports at the exit have the names of functions, and
 * so that threads that a module of nbdkit's left behind (the pause filter's,
 * for one) do not return into nowhere while the runtime is still busy.
 */
REPLACES int
dlclose (void *module)
{
  (void) module;
  return 0;
}

/* With the runtime loaded, nbdkit hangs at its exit if it has reported an
 * error before, with this filter and without it: a library that it links
 * (p11-kit) frees a locale then, and waits in vain for a lock of libc's.
 */
REPLACES void
freelocale (locale_t locale)
{
  (void) locale;
}
