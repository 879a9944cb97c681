/* SPDX-License-Identifier: BSD-3-Clause */

/* System calls and allocations that fail, come up short, or are interrupted,
 * at will.  A test that uses them is linked with -Wl,--wrap= for each name in
 * faults.c.
 */

#ifndef COW_FAULTS_H
#define COW_FAULTS_H

#include <stdatomic.h>
#include <stdbool.h>

/* Make the N-th call from now on fail with ERR, and all after it; 1 is the next
 * one, 0 none.  Allocations fail with ENOMEM whatever ERR is.  Calls that only
 * save space (punches) do not count.
 */
extern void fail_calls_from (int n, int err);

/* The errno with which the first one has failed, 0 if none has.  Ends the
 * failing as well.
 */
extern int call_has_failed (void);

/* In front of the N-th call from now on (system calls as above, and looks at the
 * map), or in front of the N-th taking of a mutex, call FUNCTION, once.
 */
extern void interrupt_call (int n, void (*function) (void *arg), void *arg);
extern void interrupt_mutex (int n, void (*function) (void *arg), void *arg);

/* Has that call come?  Ends the waiting for it as well. */
extern bool call_was_interrupted (void);

/* From now on reads and writes transfer one byte less than asked, at least
 * one, and every other one is interrupted.
 */
extern bool short_transfers;

/* Fail with EOPNOTSUPP every punch, and whatever makes a range zero, or not; how many
 * punches there were.
 */
extern bool fail_punches;
extern atomic_uint nr_punches;
extern atomic_ullong longest_punch; /* in bytes */

/* Fail every change of a file's length; say that no thread can be had. */
extern bool fail_truncates, no_threads;

/* Called in front of the next punch, once: reset before the call. */
extern void (*before_punch) (void);

/* Bytes that were read from files. */
extern atomic_ullong bytes_read_from_files;

/* Bytes that the file takes which was opened last. */
extern unsigned long long bytes_of_last_file (void);

/* Say that there is no O_TMPFILE. */
extern bool no_tmpfile;

/* Say that the file system does not know where the holes of a file are. */
extern bool no_seek_data;

#endif /* COW_FAULTS_H */
