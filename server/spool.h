/* SPDX-License-Identifier: BSD-3-Clause */

/* An image that comes from a pipe. */

#ifndef COW_SPOOL_H
#define COW_SPOOL_H

/* Read FD, a pipe, FIFO or socket that may not block, to its end, into a file without
 * a name in the directory for temporary files.  Waits for a FIFO to be written.
 * Returns that file's descriptor; -1 if it failed, which was reported as a fault of
 * cow-load=NAME.
 */
extern int spool_read (const char *name, int fd);

#endif /* COW_SPOOL_H */
