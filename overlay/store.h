/* SPDX-License-Identifier: BSD-3-Clause */

/* The overlay file, and the bytes in it.
 *
 * The file is sparse, and has no name unless it is published.  Who gets which part of
 * it is in log.h.
 */

#ifndef COW_STORE_H
#define COW_STORE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "common/lock.h"
#include "overlay/newfile.h"
#include "overlay/writeback.h"

/* When is the file written to its disk? */
enum store_write_back {
  STORE_WRITES_BACK_LATE,  /* when the kernel likes to */
  STORE_WRITES_BACK_EARLY, /* while it grows: it is going to be synced */
};

struct store {
  const char *dir; /* constant, as are the next two */
  enum newfile_use use;
  enum store_write_back write_back;
  struct mutex lock; /* held while the file is made */
  struct newfile
    file; /* none until store_make_file, then constant: whoever has
                         * called that, or an address, uses it without the lock */
  struct writeback writeback; /* if early */
};

/* Make a store.  Makes no file yet; it will be in DIR, which must live as long as the
 * store.  USE says whether it may be published.
 */
extern void store_init (struct store *store, const char *dir,
                        enum newfile_use use,
                        enum store_write_back write_back);

/* The file, which has been made, is going to be END bytes long. */
extern void store_grown (struct store *store, uint64_t end);

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

/* Is there a file?  Nobody else uses the store. */
static inline bool
store_has_file (const struct store *store)
{
  return store->file.fd != -1;
}

/* Make the file if it is not there yet.  -1 and errno. */
extern int store_make_file (struct store *store);

/* Read or write at a byte offset of the file, in a part that the caller has.  All of it
 * is done, or -1 is returned with errno.
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

/* Copy COUNT bytes at offset FROM of the file to offset TO, which the caller has.  -1 and
 * errno.
 */
extern int store_copy (const struct store *store, uint64_t from, uint64_t to,
                       uint64_t count);

/* Set space aside for a range that the caller has, so that writing there
 * cannot fail for want of it.  What is there stays.  -1 and errno; EOPNOTSUPP where the file system cannot do that.
 */
extern int store_set_aside (const struct store *store, uint64_t offset,
                            uint64_t count);

/* The same, and it reads as zeroes then. */
extern int store_zero_range (const struct store *store, uint64_t offset,
                             uint64_t count);

/* Write COUNT zeroes.  -1 and errno. */
extern int store_write_zeroes (const struct store *store, uint64_t offset,
                               uint64_t count);

/* How long the file is, in *SIZE.  -1 and errno. */
extern int store_size (const struct store *store, uint64_t *size);

/* How many extents of a range are on the disk, MOST if there are more.  0 where the file
 * system does not tell, as one in memory.
 */
extern uint64_t store_extents_on_disk (const struct store *store,
                                       uint64_t offset, uint64_t count,
                                       uint64_t most);

/* Let the file end at SIZE. */
extern int store_truncate (const struct store *store, uint64_t size);

/* Let the kernel read a range ahead.  Only a hint. */
extern void store_prefetch (const struct store *store, uint64_t offset,
                            uint64_t count);

#endif /* COW_STORE_H */
