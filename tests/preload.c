/* Loaded into nbdkit beside a sanitizer's runtime, by LD_PRELOAD. */

#include <stdlib.h>

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
__attribute__ ((visibility ("default"))) int
dlclose (void *module)
{
  (void) module;
  return 0;
}
