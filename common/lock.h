/* SPDX-License-Identifier: BSD-3-Clause */

/* Locks, and what the comments say of them: "caller holds".
 *
 * In builds with --enable-debug each thread knows which locks it holds.  There it is an
 * error, and ends the process, to take them in another order than that of their ranks,
 * and to come to an assertion below that is not true.  In other builds a lock is
 * pthread's own, and an assertion is nothing.
 */

#ifndef COW_LOCK_H
#define COW_LOCK_H

#include <pthread.h>
#include <stdbool.h>

#include "common/cleanup.h"

/* The order in which locks are taken (HACKING has it with reasons).  Of one rank a
 * thread holds several only in ascending order of their addresses.
 */
enum lock_rank {
  RANK_SET,   /* of the set of overlays; no other one is taken under it */
  RANK_ENTRY, /* of one overlay in the set */
  RANK_PLAN,  /* of a view, while its image is planned */
  RANK_ROUND, /* of the cleaner, on one overlay */
  RANK_RELEASE, /* this and those that follow are taken by operations on an overlay */
  RANK_SLOT,
  RANK_REQUEST,
  RANK_VIEW,
  RANK_NODE,
  RANK_DEAD,
  RANK_TABLES,
  RANK_LOG,
  RANK_STORE,
  RANK_WRITE_BACK,
  RANK_CLEANER,
  RANK_FILE_LOCKS,
  NR_RANKS,
};

/* One that is always there, in a file. */
#ifdef COW_DEBUG
#define MUTEX_INITIALIZER(r)                                                  \
  {                                                                           \
    .pthread = PTHREAD_MUTEX_INITIALIZER, .rank = (r)                         \
  }
#else
#define MUTEX_INITIALIZER(r)                                                  \
  {                                                                           \
    .pthread = PTHREAD_MUTEX_INITIALIZER                                      \
  }
#endif

struct mutex {
  pthread_mutex_t pthread;
#ifdef COW_DEBUG
  enum lock_rank rank; /* constant */
#endif
};

/* It lets the one who wants it exclusively in before others. */
struct rwlock {
  pthread_rwlock_t pthread;
#ifdef COW_DEBUG
  enum lock_rank rank; /* constant */
#endif
};

enum lock_hold { HOLD_EXCLUSIVELY, HOLD_TOGETHER };

#ifdef COW_DEBUG
extern void lock_is_taken (const void *lock, enum lock_rank rank,
                           enum lock_hold how);
extern void lock_is_let_go (const void *lock);

/* For the macros below; WHERE is the place in the source. */
extern void lock_assert_held (const void *lock, const char *where);
extern void lock_assert_held_exclusively (const void *lock, const char *where);
extern void lock_assert_either_held (const void *const locks[2],
                                     const char *where);
extern void lock_assert_none_from (enum lock_rank rank, const char *where);

#define LOCK_SET_RANK(lock, r) ((lock)->rank = (r))
#define LOCK_IS_TAKEN(lock, how) lock_is_taken (lock, (lock)->rank, how)
#define LOCK_IS_LET_GO(lock) lock_is_let_go (lock)
#define LOCK_WHERE_(line) __FILE__ ":" #line
#define LOCK_WHERE(line) LOCK_WHERE_ (line)
#define LOCK_ASSERT(what, arg) lock_assert_##what (arg, LOCK_WHERE (__LINE__))
#else
#define LOCK_SET_RANK(lock, r) ((void) (r))
#define LOCK_IS_TAKEN(lock, how) ((void) (how))
#define LOCK_IS_LET_GO(lock) ((void) 0)
#define LOCK_ASSERT(what, arg) ((void) (arg))
#endif

/* The calling thread holds the lock, at least together with others. */
#define assert_held(lock) LOCK_ASSERT (held, lock)

/* It holds the lock, and nobody else does. */
#define assert_held_exclusively(lock) LOCK_ASSERT (held_exclusively, lock)

/* It holds one of both. */
#define assert_either_held(lock, other)                                       \
  LOCK_ASSERT (either_held, ((const void *const[]) { (lock), (other) }))

/* It holds no lock of this rank, nor of those behind it. */
#define assert_none_held_from(rank) LOCK_ASSERT (none_from, rank)

/* Locking can only fail by misuse (recursion, an uninitialized lock), so results are
 * not looked at.
 */
static inline void
mutex_init (struct mutex *m, enum lock_rank rank)
{
  pthread_mutex_init (&m->pthread, NULL);
  LOCK_SET_RANK (m, rank);
}

static inline void
mutex_destroy (struct mutex *m)
{
  pthread_mutex_destroy (&m->pthread);
}

static inline void
mutex_lock (struct mutex *m)
{
  LOCK_IS_TAKEN (m, HOLD_EXCLUSIVELY);
  pthread_mutex_lock (&m->pthread);
}

static inline void
mutex_unlock (struct mutex *m)
{
  LOCK_IS_LET_GO (m);
  pthread_mutex_unlock (&m->pthread);
}

/* The default kind lets a stream of readers starve a writer. */
static inline void
rwlock_init (struct rwlock *l, enum lock_rank rank)
{
  pthread_rwlockattr_t attr;

  pthread_rwlockattr_init (&attr);
  pthread_rwlockattr_setkind_np (&attr,
                                 PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
  pthread_rwlock_init (&l->pthread, &attr);
  pthread_rwlockattr_destroy (&attr);
  LOCK_SET_RANK (l, rank);
}

static inline void
rwlock_destroy (struct rwlock *l)
{
  pthread_rwlock_destroy (&l->pthread);
}

static inline void
rwlock_lock_shared (struct rwlock *l)
{
  LOCK_IS_TAKEN (l, HOLD_TOGETHER);
  pthread_rwlock_rdlock (&l->pthread);
}

static inline void
rwlock_lock_exclusively (struct rwlock *l)
{
  LOCK_IS_TAKEN (l, HOLD_EXCLUSIVELY);
  pthread_rwlock_wrlock (&l->pthread);
}

static inline void
rwlock_unlock (struct rwlock *l)
{
  LOCK_IS_LET_GO (l);
  pthread_rwlock_unlock (&l->pthread);
}

static inline void
cleanup_unlock_mutex (struct mutex **m)
{
  mutex_unlock (*m);
}

static inline void
cleanup_unlock_rwlock (struct rwlock **l)
{
  rwlock_unlock (*l);
}

#define LOCK_HOLD_(type, lock, take)                                          \
  __attribute__ ((cleanup (cleanup_unlock_##type))) struct type *COW_CONCAT ( \
    held_, __LINE__)                                                          \
    = (lock);                                                                 \
  take (COW_CONCAT (held_, __LINE__))

/* Hold a lock until the scope is left. */
#define HOLD(m) LOCK_HOLD_ (mutex, m, mutex_lock)
#define HOLD_SHARED(l) LOCK_HOLD_ (rwlock, l, rwlock_lock_shared)
#define HOLD_EXCLUSIVE(l) LOCK_HOLD_ (rwlock, l, rwlock_lock_exclusively)

#endif /* COW_LOCK_H */
