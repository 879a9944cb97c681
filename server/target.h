/* SPDX-License-Identifier: BSD-3-Clause */

/* What cow-save names, and whether it may be written. */

#ifndef COW_TARGET_H
#define COW_TARGET_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>
#include <time.h>

#include "format/qcow2.h"
#include "server/loads.h"
#include "server/names.h"
#include "server/locks.h"
#include "overlay/newfile.h"

enum target_kind {
  TARGET_FILE, /* gets the one image, and its name when that is complete */
  TARGET_DIRECTORY, /* of such files, one for an export */
  TARGET_STREAM,    /* gets the one image, written from its start to its end */
};

/* Constant, but for fd. */
struct target {
  enum target_kind kind;
  const char *name; /* as the user gave it */
  char *path;       /* where that is; NULL for descriptors of a stream */
  char *directory;  /* of the file or files; NULL for streams */
  int fd; /* of a stream; -1: it is a FIFO that is opened to be written,
                     * or was closed */
  mode_t new_mode;        /* of files that replace none */
  struct file_lock *lock; /* on a file that is replaced or written, or NULL */
  struct other_file *others;
  size_t nr_others;
};

/* Find out what NAME is, and check all that can be checked.  What OTHERS name is not to be
 * overwritten.  To be called while standard output is open.  NULL if it cannot be written, which was reported.
 */
extern struct target *target_new (const char *name, const struct loads *loads,
                                  const struct parameter *others,
                                  size_t nr_others);
extern void target_free (struct target *target);

/* Make the directory NAME if it is missing and one of LOADS, names of what is to be
 * loaded: as a file that is loaded and saved may be missing, it may be, too.  To be called
 * before that is looked at.  -1 if it cannot be made, which was reported.
 */
extern int target_make_directory (const char *name, const char *const *loads,
                                  size_t nr_loads);

/* Lock the file PATH, which is going to be replaced: until the lock is given back
 * (locks_give_back, IMAGE_WRITE) neither qemu nor another server takes it.  *LOCK is NULL
 * where there is none, or none that can be opened.  -1 if another program uses it, and a
 * text as below.
 */
extern int target_lock_file (const char *path, struct file_lock **lock,
                             char **why);

/* A file as it was when it was looked at. */
struct target_seen {
  bool is_there; /* else nothing of the following */
  dev_t device;
  ino_t inode;
  off_t size;
  struct timespec modified;
};

/* Look at the file PATH. */
extern struct target_seen target_look (const char *path);

/* Is it still what was SEEN? */
extern bool target_is_as_seen (const char *path,
                               const struct target_seen *seen);

/* May the file PATH be made or replaced?  0, and what stands there and the mode
 * that it is to get; or -1 and a text that says why not, which the caller frees
 * (NULL if there is no memory for one).
 */
extern int target_check_file (const struct target *target,
                              const struct loads *loads, const char *path,
                              enum newfile_target *what, mode_t *mode,
                              char **why);

/* Decode the header of a file.  -1 and errno if it cannot be read, EAGAIN if another
 * program uses it; *IS_IMAGE tells whether it is one that this filter could load.
 */
extern int target_read_header (const char *path, struct qcow2_header *header,
                               bool *is_image);

/* Open a stream: its descriptor is in target->fd.  Waits for a while until somebody
 * reads a FIFO.  -1 and errno.
 */
extern int target_open_stream (struct target *target);

#endif /* COW_TARGET_H */
