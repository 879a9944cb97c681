/* SPDX-License-Identifier: BSD-3-Clause */

/* The overlay file: places for slots, and the bytes in them.
 *
 * The file is anonymous and sparse.  It is divided into places of one slot's
 * size each, numbered from 1; place 0 is never given out (0 means "nowhere" in
 * the map, and the file's first bytes stay free for a header).
 */

#ifndef COW_STORE_H
#define COW_STORE_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Consecutive places that were given back. */
struct place_run {
  uint64_t first;
  uint64_t count;
};

struct store {
  const char *dir;      /* constant */
  uint64_t place_size;  /* in bytes; constant */
  pthread_mutex_t lock; /* the allocator's lock; guards what follows */
  int fd;               /* -1 until the first place is taken, then constant:
                          * whoever has a place may use it without the lock */
  uint64_t next_place;  /* the first one that was never given out */
  struct place_run *free_runs;
  size_t nr_free_runs, max_free_runs;
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

/* Make a store with places of PLACE_SIZE bytes.  Makes no file yet.  DIR must
 * live as long as the store.
 */
extern void store_init (struct store *store, const char *dir,
                        uint64_t place_size);

/* Close the file, which thereby is gone. */
extern void store_destroy (struct store *store);

/* Take up to WANTED consecutive places.  Returns how many (at least 1), the
 * first in *PLACE; or 0 and errno if there is none to be had: the file cannot
 * be made, or is as long as a file can be.  What the places hold is undefined.
 */
extern uint64_t store_take (struct store *store, uint64_t wanted,
                            uint64_t *place);

/* Give back COUNT consecutive places, of which the map and all requests know
 * nothing any more.  Their bytes are punched.
 */
extern void store_give_back (struct store *store, uint64_t place,
                             uint64_t count);

/* Read or write at a byte offset of the file, which must lie in places that
 * were taken.  All of it is done, or -1 is returned with errno.  store_writev
 * may change the elements of IOV.
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

/* Let the kernel read a range ahead.  Only a hint. */
extern void store_prefetch (const struct store *store, uint64_t offset,
                            uint64_t count);

#endif /* COW_STORE_H */
