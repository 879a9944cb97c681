/* SPDX-License-Identifier: BSD-3-Clause */

/* The files that this server has locked, as images that it loads or replaces.
 *
 * One that it does both to is locked once, so that it is not in its own way.
 */

#ifndef COW_LOCKS_H
#define COW_LOCKS_H

#include "common/imagelock.h"

struct file_lock;

/* Open the file PATH for reading, and lock it.  What is no regular file and no block
 * device is opened without waiting for somebody else, and not locked: *LOCK is NULL.
 * -1 and errno; EAGAIN if another program has it open so that it cannot be used.
 */
extern int locks_open (const char *path, enum image_use use,
                       struct file_lock **lock);

/* Give back one lock.  NULL is allowed.  Keeps errno. */
extern void locks_give_back (struct file_lock *lock, enum image_use use);

#endif /* COW_LOCKS_H */
