/* SPDX-License-Identifier: BSD-3-Clause */

/* The directory for temporary files. */

#ifndef COW_TMPDIR_H
#define COW_TMPDIR_H

/* $TMPDIR or else /var/tmp, as an absolute path in memory that the caller frees, once
 * it is known that a file can be made there.  NULL and errno if not; *NAME is then
 * what was tried.
 */
extern char *tmpdir_find (const char **name);

#endif /* COW_TMPDIR_H */
