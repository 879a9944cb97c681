/* SPDX-License-Identifier: BSD-3-Clause */

/* Bytes: are they zero, and all of them to a descriptor. */

#ifndef COW_BYTES_H
#define COW_BYTES_H

#include <stdbool.h>
#include <stddef.h>

/* Are all COUNT bytes of BUF zero?  (There may be none.) */
extern bool bytes_are_zero (const char *buf, size_t count);

/* Write all of BUF to FD, which may be a pipe, and may not block.  -1 and errno. */
extern int bytes_write (int fd, const char *buf, size_t count);

#endif /* COW_BYTES_H */
