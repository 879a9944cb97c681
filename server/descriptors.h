/* SPDX-License-Identifier: BSD-3-Clause */

/* Descriptors that parameters name. */

#ifndef COW_DESCRIPTORS_H
#define COW_DESCRIPTORS_H

#include <stdbool.h>

/* The descriptor that a name stands for, as "/dev/fd/3", or -1.  For "-" that is
 * STANDARD.
 */
extern int descriptors_find (const char *name, int standard);

/* Find out what the next function tells.  In .config_complete: later nbdkit does not
 * say it any more.
 */
extern void descriptors_look (void);

/* Was nbdkit started with option -s, so that standard input and output are the
 * client?
 */
extern bool descriptors_serve_client (void);

#endif /* COW_DESCRIPTORS_H */
