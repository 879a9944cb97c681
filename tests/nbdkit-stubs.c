/* SPDX-License-Identifier: BSD-3-Clause */

/* See nbdkit-stubs.h. */

#include <config.h>

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/debug.h"
#include "nbdkit-stubs.h"

int cow_debug_verbose;
unsigned nr_errors;
char last_error[1024];

void
nbdkit_error (const char *fs, ...)
{
  /* No mutex: tests count those that are taken. */
  static atomic_flag busy = ATOMIC_FLAG_INIT;
  char message[sizeof last_error];
  va_list args;

  va_start (args, fs);
  vsnprintf (message, sizeof message, fs, args);
  va_end (args);
  while (atomic_flag_test_and_set (&busy))
    ;
  memcpy (last_error, message, sizeof message);
  nr_errors++;
  atomic_flag_clear (&busy);
}

void
nbdkit_debug (const char *fs, ...)
{
  (void) fs;
}

size_t longest_list = SIZE_MAX;

struct nbdkit_extents {
  struct nbdkit_extent *list;
  size_t count;
  uint64_t start, end, next;
};

struct nbdkit_extents *
nbdkit_extents_new (uint64_t start, uint64_t end)
{
  struct nbdkit_extents *x = calloc (1, sizeof *x);

  if (x) {
    x->start = x->next = start;
    x->end = end;
  }
  return x;
}

void
nbdkit_extents_free (struct nbdkit_extents *x)
{
  if (x)
    free (x->list);
  free (x);
}

size_t
nbdkit_extents_count (const struct nbdkit_extents *x)
{
  return x->count;
}

struct nbdkit_extent
nbdkit_get_extent (const struct nbdkit_extents *x, size_t i)
{
  assert (i < x->count);
  return x->list[i];
}

int
nbdkit_add_extent (struct nbdkit_extents *x, uint64_t offset, uint64_t length,
                   uint32_t type)
{
  assert (offset == x->next);
  x->next = offset + length;
  if (offset >= x->end || length == 0 || x->count >= longest_list)
    return 0;
  if (offset + length > x->end)
    length = x->end - offset;
  if (x->count > 0 && x->list[x->count - 1].type == type) {
    x->list[x->count - 1].length += length;
    return 0;
  }

  struct nbdkit_extent *list
    = realloc (x->list, (x->count + 1) * sizeof *list);
  if (!list) {
    errno = ENOMEM;
    return -1;
  }
  x->list = list;
  list[x->count++] = (struct nbdkit_extent) { .offset = offset,
                                              .length = length,
                                              .type = type };
  return 0;
}

static struct fake_base *
fake_of (nbdkit_next *next)
{
  return (struct fake_base *) next;
}

/* The base is asked only as it allows (rule 9). */
static void
check_request (const struct fake_base *f, uint32_t count, uint64_t offset)
{
  const uint32_t to = f->minimum ? f->minimum : 1;

  assert (count > 0);
  assert (offset + count <= f->size);
  assert (offset % to == 0);
  assert (count % to == 0 || offset + count == f->size);
}

static int
fake_pread (nbdkit_next *next, void *buf, uint32_t count, uint64_t offset,
            uint32_t flags, int *err)
{
  struct fake_base *f = fake_of (next);

  assert (flags == 0);
  check_request (f, count, offset);
  assert (f->maximum == 0 || count <= f->maximum);
  __atomic_add_fetch (&f->nr_reads, 1, __ATOMIC_RELAXED);
  __atomic_add_fetch (&f->bytes_read, count, __ATOMIC_RELAXED);
  __atomic_store_n (&f->read_into, buf, __ATOMIC_RELAXED);
  if (f->fail_with) {
    nbdkit_error ("fake base");
    *err = f->fail_with;
    return -1;
  }
  if (f->during_read) {
    void (*call) (void *) = f->during_read;

    f->during_read = NULL;
    call (f->during_read_arg);
  }
  memcpy (buf, f->bytes + offset, count);
  return 0;
}

static int
fake_cache (nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags,
            int *err)
{
  struct fake_base *f = fake_of (next);

  (void) flags;
  check_request (f, count, offset);
  f->nr_caches++;
  if (f->fail_with) {
    *err = f->fail_with;
    return -1;
  }
  return 0;
}

static int
fake_extents (nbdkit_next *next, uint32_t count, uint64_t offset,
              uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  struct fake_base *f = fake_of (next);
  const uint64_t end = offset + count;

  check_request (f, count, offset);
  f->nr_extents++;
  if (f->fail_with) {
    *err = f->fail_with;
    return -1;
  }
  for (uint64_t pos = offset; pos < end;) {
    const uint64_t size = f->extent_size ? f->extent_size : f->size;
    const uint64_t nr = pos / size;
    const uint64_t stop = (nr + 1) * size;

    if (nbdkit_add_extent (extents, pos, stop - pos,
                           nr % 2 ? NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO
                                  : 0)
        == -1) {
      *err = errno;
      return -1;
    }
    pos = stop;
    if (f->one_extent || (flags & NBDKIT_FLAG_REQ_ONE))
      break;
  }
  return 0;
}

static int64_t
fake_get_size (nbdkit_next *next)
{
  return (int64_t) fake_of (next)->size;
}

static int
fake_block_size (nbdkit_next *next, uint32_t *minimum, uint32_t *preferred,
                 uint32_t *maximum)
{
  const struct fake_base *f = fake_of (next);

  *minimum = f->minimum;
  *preferred = f->minimum ? MAX (f->minimum, 4096) : 0;
  *maximum = f->maximum;
  return 0;
}

static int
fake_can_extents (nbdkit_next *next)
{
  return fake_of (next)->can_extents;
}

static int
fake_can_cache (nbdkit_next *next)
{
  return fake_of (next)->can_cache;
}

nbdkit_next *
fake_next (struct fake_base *fake)
{
  fake->ops.pread = fake_pread;
  fake->ops.cache = fake_cache;
  fake->ops.extents = fake_extents;
  fake->ops.get_size = fake_get_size;
  fake->ops.block_size = fake_block_size;
  fake->ops.can_extents = fake_can_extents;
  fake->ops.can_cache = fake_can_cache;
  return &fake->ops;
}
