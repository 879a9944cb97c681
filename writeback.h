/* SPDX-License-Identifier: BSD-3-Clause */

/* Starting to write a file to its disk while it grows.
 *
 * The kernel leaves that for half a minute.  A file that is going to be synced as a
 * whole is then still in memory, and syncing it takes as long as writing it.  Here a
 * thread asks for it about once a second, for what was added to the file more than a
 * second ago; parts that are written to again later are left to the kernel.
 */

#ifndef COW_WRITEBACK_H
#define COW_WRITEBACK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct writeback {
  pthread_mutex_t lock; /* guards what follows; taken last of all */
  pthread_cond_t changed;
  bool stop;
  bool idle;  /* the thread waits for the file to grow */
  bool tried; /* to start the thread; constant from then on: started, fd */
  bool started;
  int fd;
  uint64_t end; /* of the file, in bytes; never moves back */
  pthread_t thread;
};

extern void writeback_init (struct writeback *w);

/* The file FD has grown to END bytes.  A small file is left alone, and so is one for
 * which no thread can be had.
 */
extern void writeback_grown (struct writeback *w, int fd, uint64_t end);

/* End the thread, which may have to wait for the disk.  To be called before FD is
 * closed.
 */
extern void writeback_destroy (struct writeback *w);

#endif /* COW_WRITEBACK_H */
