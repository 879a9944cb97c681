/* SPDX-License-Identifier: BSD-3-Clause */

/* Names of files, and of what others have named. */

#ifndef COW_NAMES_H
#define COW_NAMES_H

/* Parameters of the plugin and of other filters, whose values may name files. */
struct parameter {
  const char *key, *value;
};

/* A name that was not made here (a client's for an export, one in an image) as it may
 * stand in a log: in one line, without what does something to a terminal, and not too
 * long.
 */
struct printable {
  char text[256];
};
extern struct printable printable (const char *name);

/* Where a file of the name PATH is, or would be made: an absolute path without
 * symbolic links.  Its directory must exist.  In memory that the caller frees; NULL
 * and errno.
 */
extern char *names_resolve (const char *path);

/* The directory of an absolute path, in memory that the caller frees; NULL and
 * ENOMEM.
 */
extern char *names_directory (const char *path);

/* A and B one behind the other with a slash in between, likewise. */
extern char *names_join (const char *a, const char *b);

/* An export's name as one word, which can also be the name of a file: "default" for the
 * default export "", and otherwise the name, in which blanks and whatever could leave the
 * directory, clash with another one or hide the file is percent-encoded.  Likewise; NULL
 * and ENOMEM.
 */
extern char *names_encode (const char *export_name);

/* The export's name that WORD encodes, or is, into WORD.  -1 if there is none. */
extern int names_decode (char *word);

/* The name of the file that holds the diff of an export: that, and .qcow2.  Likewise;
 * ENAMETOOLONG if no file can have that name.
 */
extern char *names_of_export (const char *export_name);

#endif /* COW_NAMES_H */
