/* SPDX-License-Identifier: BSD-3-Clause */

/* The limits of the process: how many files it may open, and how long they get. */

#ifndef COW_LIMITS_H
#define COW_LIMITS_H

#include <stdint.h>

/* The hard limit on open files, and raising the soft one to it. */
extern uint64_t limits_open_files (void);
extern void limits_raise_open_files (void);

/* How long a file can be: every byte has an offset that off_t can hold, and lies
 * within the limit of the process.
 */
extern uint64_t limits_file_size (void);

/* Let a write past that limit fail with EFBIG in place of killing the process with
 * SIGXFSZ.
 */
extern void limits_ignore_file_size_signal (void);

#endif /* COW_LIMITS_H */
