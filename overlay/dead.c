/* SPDX-License-Identifier: BSD-3-Clause */

/* Dead lists (see dead.h).  Their runs lie in chunks, so that a long list never has to be
 * copied to grow, and two of them are joined in a few steps.
 *
 * No chunk is empty but for those that room was promised in, and a few that are kept
 * for the next promise.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "overlay/dead.h"

#define CHUNK_RUNS 63
#define KEPT_ROOM (4 * CHUNK_RUNS)

/* 1 KiB. */
struct dead_chunk {
  struct dead_chunk *next;
  size_t count;
  struct dead_run runs[CHUNK_RUNS];
};

static void
free_chunks (struct dead_chunk *chunk)
{
  while (chunk) {
    struct dead_chunk *next = chunk->next;

    free (chunk);
    chunk = next;
  }
}

void
dead_destroy (struct dead_list *list)
{
  free_chunks (list->open);
  free_chunks (list->full);
  *list = (struct dead_list) { .open = NULL };
}

static void
add_open (struct dead_list *list, struct dead_chunk *chunk)
{
  chunk->next = list->open;
  list->open = chunk;
  list->room += CHUNK_RUNS - chunk->count;
}

static void
add_full (struct dead_list *list, struct dead_chunk *first,
          struct dead_chunk *last)
{
  last->next = list->full;
  if (!list->full)
    list->last = last;
  list->full = first;
}

int
dead_reserve (struct dead_list *list, size_t count)
{
  while (list->room - list->reserved < count) {
    struct dead_chunk *chunk = malloc (sizeof *chunk);

    if (!chunk)
      return -1;
    chunk->count = 0;
    add_open (list, chunk);
  }
  list->reserved += count;
  return 0;
}

void
dead_unreserve (struct dead_list *list, size_t count)
{
  struct dead_chunk **link = &list->open;

  list->reserved -= count;
  while (*link && list->room - list->reserved >= KEPT_ROOM + CHUNK_RUNS) {
    struct dead_chunk *chunk = *link;

    if (chunk->count > 0)
      link = &chunk->next;
    else {
      *link = chunk->next;
      list->room -= CHUNK_RUNS;
      free (chunk);
    }
  }
}

/* Does RUN go on where LAST ends, on the disk and in the log? */
static bool
goes_on (struct dead_run last, struct dead_run run)
{
  return last.block + last.count == run.block
         && (uint64_t) last.address + last.count == run.address;
}

void
dead_add (struct dead_list *list, struct dead_run run)
{
  struct dead_chunk *chunk = list->open;

  list->nr_blocks += run.count;
  list->reserved--;
  if (chunk->count > 0 && goes_on (chunk->runs[chunk->count - 1], run)) {
    chunk->runs[chunk->count - 1].count += run.count;
    return;
  }
  chunk->runs[chunk->count++] = run;
  list->room--;
  if (chunk->count == CHUNK_RUNS) {
    list->open = chunk->next;
    add_full (list, chunk, chunk);
  }
}

/* Full chunks move as they are, and all at once.  The runs of others go where there is
 * room, so that chunks with a run or two do not become many.
 */
void
dead_join (struct dead_list *to, struct dead_list *from)
{
  to->nr_blocks += from->nr_blocks;
  if (from->full)
    add_full (to, from->full, from->last);
  while (from->open) {
    struct dead_chunk *chunk = from->open;

    from->open = chunk->next;
    if (chunk->count > to->room - to->reserved) {
      add_open (to, chunk);
      continue;
    }
    for (size_t i = 0; i < chunk->count; ++i) {
      to->nr_blocks -= chunk->runs[i].count; /* dead_add counts it again */
      to->reserved++;
      dead_add (to, chunk->runs[i]);
    }
    free (chunk);
  }
  *from = (struct dead_list) { .open = NULL };
}

void
dead_swap (struct dead_list *list, struct dead_list *other)
{
  const struct dead_list l = *list;

  *list = *other;
  *other = l;
}

/* A list on its way through the filter. */
struct filter {
  struct dead_list kept;
  struct dead_chunk *emptied; /* chunks to use for it */
  dead_keep *keep;
  void *opaque;
};

static void
filter_keeps (struct filter *f, struct dead_run run)
{
  struct dead_chunk *chunk = f->emptied;

  if (f->kept.room == 0 && chunk) {
    f->emptied = chunk->next;
    add_open (&f->kept, chunk);
  }
  if (dead_reserve (&f->kept, 1) == 0)
    dead_add (&f->kept, run);
}

/* Pieces that stay and follow each other are kept as one. */
static void
filter_run (struct filter *f, struct dead_run run)
{
  struct dead_run kept = { .count = 0 };

  while (run.count > 0) {
    bool stays = false;
    const uint32_t count = f->keep (f->opaque, run, &stays);

    if (stays) {
      if (kept.count == 0)
        kept = (struct dead_run) { run.block, run.address, 0 };
      kept.count += count;
    }
    run.block += count;
    run.address += count;
    run.count -= count;
    if (kept.count > 0 && (!stays || run.count == 0)) {
      filter_keeps (f, kept);
      kept.count = 0;
    }
  }
}

/* As long as no run becomes several, no more are kept than chunks were emptied for, and
 * so no memory is needed.
 */
static void
filter_chunks (struct filter *f, struct dead_chunk *chunk)
{
  while (chunk) {
    struct dead_chunk *next = chunk->next;
    struct dead_run runs[CHUNK_RUNS];
    const size_t count = chunk->count;

    memcpy (runs, chunk->runs, count * sizeof runs[0]);
    chunk->count = 0;
    chunk->next = f->emptied;
    f->emptied = chunk;
    for (size_t i = 0; i < count; ++i)
      filter_run (f, runs[i]);
    chunk = next;
  }
}

void
dead_filter (struct dead_list *list, dead_keep *keep, void *opaque)
{
  struct filter f = { .keep = keep, .opaque = opaque };

  filter_chunks (&f, list->open);
  filter_chunks (&f, list->full);
  free_chunks (f.emptied);
  *list = f.kept;
}

int
dead_look (const struct dead_list *list, struct dead_look *look)
{
  size_t nr_runs = 0;

  for (const struct dead_chunk *c = list->open; c; c = c->next)
    nr_runs += c->count;
  *look = (struct dead_look) {
    .full = list->full,
    .runs = malloc ((nr_runs + 1) * sizeof *look->runs),
  };
  if (!look->runs)
    return -1;
  for (const struct dead_chunk *c = list->open; c; c = c->next) {
    memcpy (look->runs + look->nr_runs, c->runs, c->count * sizeof c->runs[0]);
    look->nr_runs += c->count;
  }
  return 0;
}

uint64_t
dead_count (struct dead_look *look,
            uint32_t (*count) (void *opaque, struct dead_run run),
            void *opaque)
{
  uint64_t sum = 0;

  for (size_t i = 0; i < look->nr_runs; ++i)
    sum += count (opaque, look->runs[i]);
  for (const struct dead_chunk *c = look->full; c; c = c->next)
    for (size_t i = 0; i < c->count; ++i)
      sum += count (opaque, c->runs[i]);
  free (look->runs);
  return sum;
}
