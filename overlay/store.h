/* SPDX-License-Identifier: BSD-3-Clause */

/* The overlay file: places for slots, and the bytes in them.
 *
 * The file is sparse, and has no name unless it is published.  It is divided into
 * places of one slot's size each.  Those at its head, at least place 0, are never
 * given out (0 means "nowhere" in the map): they are free for the header and
 * tables of an image.
 */

#ifndef COW_STORE_H
#define COW_STORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "overlay/newfile.h"
#include "overlay/writeback.h"

/* Consecutive places. */
struct place_run {
  uint64_t first;
  uint64_t count;
};

struct store {
  const char *dir; /* constant, as are the next three */
  enum newfile_use use;
  uint64_t place_size;  /* in bytes */
  uint64_t end_limit;   /* no place ends behind it */
  atomic_bool no_clone; /* the file system cannot share ranges of a file */
  pthread_mutex_t lock; /* the allocator's lock; guards what follows */
  struct newfile file;  /* none until the first place is taken, then constant:
                          * whoever has a place may use it without the lock */
  uint64_t next_place;  /* behind the last one that is given out */
  uint64_t *free_words; /* bitmap of the places that were given back */
  size_t nr_free_words;
  uint64_t nr_free;           /* bits in it */
  uint64_t first_free;        /* no place before this one has its bit set */
  bool write_back_early;      /* constant */
  struct writeback writeback; /* if so */
};

/* The directory for overlay files, $TMPDIR or else /var/tmp, as an absolute
 * path in memory that the caller frees, once it is known that a file can be
 * made there.  NULL and errno if not; *NAME is then what was tried.
 */
extern char *store_find_dir (const char **name);

/* Can a file be made in DIR?  0, or -1 and errno. */
extern int store_check_dir (const char *dir);

/* The hard limit on open files, and raising the soft one to it. */
extern uint64_t store_file_limit (void);
extern void store_raise_file_limit (void);

/* Let a write past RLIMIT_FSIZE fail with EFBIG in place of killing the
 * process with SIGXFSZ.
 */
extern void store_ignore_file_size_signal (void);

/* Make a store with places of PLACE_SIZE bytes, the first HEAD (at least 1) of
 * which are not given out.  Makes no file yet; it will be in DIR, which must live
 * as long as the store.  USE says whether it may be published.
 */
extern void store_init (struct store *store, const char *dir,
                        enum newfile_use use, uint64_t place_size,
                        uint64_t head);

/* From now on, start to write the file to its disk while it grows: it is going to be
 * synced.  To be called before the first place is taken.
 */
extern void store_write_back_early (struct store *store);

/* Has some of the file been lost on its way to the disk, as far as early write-back was
 * told, or as far as the kernel has tried (writeback.h)?  0, or -1 and errno.  Caller
 * is alone with the store, as with store_sync.
 */
extern int store_check_early (struct store *store);
extern int store_check_written (struct store *store);

/* Sync the file.  0, or -1 and errno, also if some of it was lost before. */
extern int store_sync (struct store *store);

/* Close the file, which is gone unless it was published. */
extern void store_destroy (struct store *store);

/* Make the file if it is not there yet.  -1 and errno. */
extern int store_make_file (struct store *store);

/* Where the last place that was given out ends: a byte offset in the file. */
extern uint64_t store_end (struct store *store);

/* Take up to WANTED consecutive places.  Returns how many (at least 1), the
 * first in *PLACE; or 0 and errno if there is none to be had: the file cannot
 * be made, or is as long as a file can be.  What the places hold is undefined.
 */
extern uint64_t store_take (struct store *store, uint64_t wanted,
                            uint64_t *place);

/* Give back COUNT consecutive places, of which maps and requests know nothing any
 * more.  Their bytes are punched, before anybody else can take them.
 */
extern void store_give_back (struct store *store, uint64_t place,
                             uint64_t count);

/* Read or write at a byte offset of the file, which must lie in the head or in
 * places that were taken.  All of it is done, or -1 is returned with errno.
 * store_writev may change the elements of IOV.
 */
extern int store_read (const struct store *store, void *buf, size_t count,
                       uint64_t offset);
extern int store_writev (const struct store *store, struct iovec *iov,
                         int nr_iov, uint64_t offset);

/* Give the bytes of a range back to the file system.  Only saves space, and so
 * has no result.  Keeps errno.
 */
extern void store_punch (const struct store *store, uint64_t offset,
                         uint64_t count);

/* Copy COUNT bytes at offset FROM of the file to offset TO, in a place that was taken;
 * where the file system can share them, it does.  -1 and errno.
 */
extern int store_copy (struct store *store, uint64_t from, uint64_t to,
                       uint64_t count);

/* Set space aside for a range of the head or of a place that was taken, so that
 * writing there cannot fail for want of it.  What is there stays.  -1 and errno;
 * EOPNOTSUPP where the file system cannot do that.
 */
extern int store_set_aside (const struct store *store, uint64_t offset,
                            uint64_t count);

/* Let the file end at SIZE. */
extern int store_truncate (const struct store *store, uint64_t size);

/* Let the kernel read a range ahead.  Only a hint. */
extern void store_prefetch (const struct store *store, uint64_t offset,
                            uint64_t count);

#endif /* COW_STORE_H */
