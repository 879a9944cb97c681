/* SPDX-License-Identifier: BSD-3-Clause */

/* What an image is made of (see source.h). */

#include <config.h>

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "common/cleanup.h"
#include "images/source.h"

int
image_data_add (struct image_data *data, uint32_t bs, uint64_t offset,
                uint64_t count)
{
  const uint64_t start = offset / bs, end = (offset + count - 1) / bs + 1;
  struct image_data_run *last
    = data->nr_runs > 0 ? &data->runs[data->nr_runs - 1] : NULL;

  if (last && start <= last->end) {
    last->end = MAX (last->end, end);
    return 0;
  }
  if (data->nr_runs == data->max_runs) {
    const size_t max = data->max_runs ? 2 * data->max_runs : 16;
    struct image_data_run *runs = realloc (data->runs, max * sizeof *runs);

    if (!runs)
      return -1;
    data->runs = runs;
    data->max_runs = max;
  }
  data->runs[data->nr_runs++]
    = (struct image_data_run) { .start = start, .end = end };
  return 0;
}

int
image_set_backing (struct image_source *source, const char *backing,
                   const char *format, char **made_up)
{
  *made_up = NULL;
  source->backing_file = backing;
  source->backing_format = format ? format : "raw";
  if (backing && strcmp (backing, "none") == 0)
    source->backing_file = source->backing_format = NULL;
  if (backing)
    return 0;

  /* Opens anywhere, and reads as zeroes, which null-co by itself does not. */
  if (asprintf (made_up,
                "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"null-co\","
                "\"size\":%" PRIu64 ",\"read-zeroes\":true}}",
                source->geometry.disk_size)
      == -1) {
    *made_up = NULL;
    errno = ENOMEM;
    return -1;
  }
  source->backing_file = *made_up;
  return 0;
}

/* The first run of the base's data that ends behind BLOCK. */
static size_t
find_data_run (const struct image_data *data, uint64_t block)
{
  size_t low = 0, high = data->nr_runs;

  while (low < high) {
    const size_t middle = low + (high - low) / 2;

    if (data->runs[middle].end <= block)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/* The blocks of slot NR where the base has data, the first run that ends behind its
 * start being number I.
 */
static uint32_t
data_blocks (const struct image_data *data, size_t i, uint64_t nr)
{
  const uint64_t start = nr * SLOT_BLOCKS, end = start + SLOT_BLOCKS;
  uint32_t blocks = 0;

  for (; i < data->nr_runs && data->runs[i].start < end; ++i) {
    const uint64_t from = MAX (start, data->runs[i].start);
    const uint64_t to = MIN (end, data->runs[i].end);

    blocks |= bitmap_mask ((unsigned) (from - start), (unsigned) (to - from));
  }
  return blocks;
}

uint64_t
next_slot (const struct image_source *s, uint64_t nr, uint64_t end,
           struct image_slot *slot)
{
  const struct image_data *data = s->of_base;

  while (nr < end) {
    uint64_t at = map_next (s->map, nr);
    size_t run = 0;

    if (data) {
      run = find_data_run (data, nr * SLOT_BLOCKS);
      if (run < data->nr_runs)
        at = MIN (at, MAX (nr, data->runs[run].start / SLOT_BLOCKS));
    }
    if (at >= end)
      break;

    const struct slot *found = map_find (s->map, at);
    slot->pair = found ? slot_load (found) : (struct slot_pair) { .where = 0 };
    slot->of_base = 0;
    if (data) {
      slot->of_base
        = data_blocks (data, run, at) & bitmap_holes (slot->pair.state);
      slot->pair.state
        = bitmap_set_allocated (slot->pair.state, slot->of_base);
    }
    if (slot->pair.state != 0)
      return at;
    nr = at + 1;
  }
  return end;
}

uint64_t
whole_slots_of_base (const struct image_source *s, uint64_t nr, uint64_t end)
{
  const struct image_data *data = s->of_base;

  if (!data)
    return 0;
  const size_t run = find_data_run (data, nr * SLOT_BLOCKS);
  if (run == data->nr_runs || data->runs[run].start > nr * SLOT_BLOCKS)
    return 0;
  end = MIN (end,
             MIN (map_next (s->map, nr), data->runs[run].end / SLOT_BLOCKS));
  return end > nr ? end - nr : 0;
}

bool
is_zero_table (const struct image_source *s, uint64_t nr)
{
  const uint64_t start = nr * s->geometry.slots_per_l2, end = l2_end (s, nr);
  uint64_t count;

  if (end - start < s->geometry.slots_per_l2)
    return false;
  for (uint64_t at = start; at < end; at += count) {
    const struct slot *slots = map_find (s->map, at);

    if (!slots)
      return false;
    count = MIN (map_in_row (s->map, at), end - at);
    for (uint64_t i = 0; i < count; ++i)
      if (slot_load (&slots[i]).state != bitmap_set_zero (0, UINT32_MAX))
        return false;
  }
  return true;
}
