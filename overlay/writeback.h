/* SPDX-License-Identifier: BSD-3-Clause */

/* Starting to write a file to its disk while it grows.
 *
 * The kernel leaves that for half a minute.  A file that is going to be synced as a
 * whole is then still in memory, and syncing it takes as long as writing it.  Here a
 * thread asks for it about once a second, for what was added to the file more than a
 * second ago; parts that are written to again later are left to the kernel.  The
 * thread ends when the file no longer grows.
 */

#ifndef COW_WRITEBACK_H
#define COW_WRITEBACK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/lock.h"

struct writeback {
  struct mutex lock; /* guards what follows; taken last of all */
  pthread_cond_t stopped;
  bool stop;
  bool running; /* the thread; it does not look at anything here after that */
  bool to_join; /* there was one */
  uint64_t end; /* of the file, in bytes; never moves back */
  uint64_t asked; /* the file was asked for as far as this */
  int error;      /* that the kernel has answered with, or 0 */
  int fd;
  pthread_t thread;
};

extern void writeback_init (struct writeback *w);

/* The file FD has grown to END bytes.  A little more than before is left alone, and so
 * is a file for which no thread can be had.
 */
extern void writeback_grown (struct writeback *w, int fd, uint64_t end);

/* End the thread, for good, which may have to wait for the disk: only then is it known
 * what it was told.  0, or -1 and errno if some of the file was lost.  Whoever calls
 * this and what follows is alone with the file.
 */
extern int writeback_end (struct writeback *w);

/* The same, and has the file FD lost something as far as the kernel has written it?
 * What it cannot write to the disk it takes for written, and forgets.  Waits for what
 * it is writing, but does not ask for more.  0, or -1 and errno: a sync will not tell
 * that again.
 */
extern int writeback_check (struct writeback *w, int fd);

/* To be called before FD is closed. */
extern void writeback_destroy (struct writeback *w);

#endif /* COW_WRITEBACK_H */
