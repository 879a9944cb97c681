/* SPDX-License-Identifier: BSD-3-Clause */

/* A file that gets its name when it is complete.
 *
 * Until then it has none, or where the file system cannot do that, a temporary
 * one.  Whoever looks at the name sees what was there before or all of the new
 * file, also after a crash.
 */

#ifndef COW_NEWFILE_H
#define COW_NEWFILE_H

#include <stdbool.h>
#include <sys/types.h>

struct newfile {
  int fd;          /* -1: there is no file */
  char *temp_name; /* absolute; NULL: it has no name, or was published */
  bool published;
};

#define NEWFILE_NONE                                                          \
  (struct newfile)                                                            \
  {                                                                           \
    .fd = -1                                                                  \
  }

/* What is to become of a file that can have no nameless file in its directory:
 * is it going to be published?
 */
enum newfile_use {
  NEWFILE_ANONYMOUS, /* it never gets a name */
  NEWFILE_TO_PUBLISH,
};

/* Make a file in DIR, an absolute path.  -1 and errno. */
extern int newfile_make (struct newfile *file, const char *dir,
                         enum newfile_use use);

/* Can a file be made in DIR?  0, or -1 and errno. */
extern int newfile_check_dir (const char *dir);

/* Close the file, which thereby is gone, unless it was published. */
extern void newfile_discard (struct newfile *file);

/* What may stand where the file is to get its name. */
enum newfile_target {
  NEWFILE_IS_NEW,   /* nothing: EEXIST if there is something */
  NEWFILE_REPLACES, /* a file, which is replaced */
};

/* What publishing does, in this order. */
enum newfile_step {
  NEWFILE_SYNC,
  NEWFILE_NAME,
  NEWFILE_SYNC_DIRECTORY,
};

/* Sync the file, give it the mode MODE and the name PATH, an absolute path in the
 * file system where it was made, and sync the directory.  -1 and errno, and in
 * *STEP what failed; then PATH is what it was, or if only the last step failed
 * (file->published), the new file.
 */
extern int newfile_publish (struct newfile *file, const char *path,
                            enum newfile_target target, mode_t mode,
                            enum newfile_step *step);

/* Give a file that could not be synced the name PATH, which nothing has yet, and mode
 * 0600: better than to lose it.  -1 and errno.
 */
extern int newfile_name_unsynced (struct newfile *file, const char *path);

#endif /* COW_NEWFILE_H */
