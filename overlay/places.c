/* SPDX-License-Identifier: BSD-3-Clause */

/* Who gets which part of the overlay file (see places.h).
 *
 * Places are given out by appending, several at a time for a large request, so
 * that what is written in order lies in order.  Whoever took a place has it
 * alone until it stands in the map or is given back; so reading, writing and
 * punching need no lock.  A place is punched before it can be given out again.
 *
 * Knows nothing of blocks, of the map, or of nbdkit.
 */

#include <config.h>

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "common/cleanup.h"
#include "common/limits.h"
#include "overlay/places.h"

void
places_init (struct places *p, struct store *store, uint64_t size,
             uint64_t head)
{
  *p = (struct places) {
    .store = store,
    .size = size,
    .end_limit = limits_file_size (),
    .next = head,
  };
  mutex_init (&p->lock, RANK_PLACES);
}

void
places_destroy (struct places *p)
{
  mutex_destroy (&p->lock);
  free (p->free_words);
}

uint64_t
places_end (struct places *p)
{
  HOLD (&p->lock);

  return p->next * p->size;
}

/* Was the place given back?  Caller holds the lock. */
static bool
is_free (const struct places *p, uint64_t place)
{
  assert_held (&p->lock);

  return place / 64 < p->nr_free_words
         && (p->free_words[place / 64] >> place % 64 & 1);
}

static void
clear_free (struct places *p, uint64_t place)
{
  p->free_words[place / 64] &= ~(UINT64_C (1) << place % 64);
  p->nr_free--;
}

/* Take up to WANTED consecutive places from those that were given back, the first
 * ones of the file.  Caller holds the lock, and there are some.
 */
static uint64_t
take_free (struct places *p, uint64_t wanted, uint64_t *place)
{
  assert_held (&p->lock);

  uint64_t i = p->first_free, count = 0;

  while (!is_free (p, i))
    i = p->free_words[i / 64] >> i % 64 == 0 ? (i / 64 + 1) * 64 : i + 1;
  *place = i;
  for (; count < wanted && is_free (p, i); ++i, ++count)
    clear_free (p, i);
  p->first_free = i;
  return count;
}

/* Take up to WANTED places at the end of the file.  Caller holds the lock.  0 and
 * errno.
 */
static uint64_t
append (struct places *p, uint64_t wanted, uint64_t *place)
{
  assert_held (&p->lock);

  const uint64_t last = p->end_limit / p->size - 1;

  if (p->next > last || last == UINT64_MAX) {
    errno = EFBIG;
    return 0;
  }
  *place = p->next;
  const uint64_t count = MIN (wanted, last - p->next + 1);
  p->next += count;
  store_grown (p->store, p->next * p->size);
  return count;
}

int
places_take_row (struct places *p, uint64_t count, uint64_t *place)
{
  if (store_make_file (p->store) == -1)
    return -1;

  HOLD (&p->lock);

  const uint64_t got = append (p, count, place);
  if (got == count)
    return 0;
  p->next -= got;
  errno = EFBIG;
  return -1;
}

uint64_t
places_take (struct places *p, uint64_t wanted, uint64_t *place)
{
  if (store_make_file (p->store) == -1)
    return 0;

  HOLD (&p->lock);

  return p->nr_free > 0 ? take_free (p, wanted, place)
                        : append (p, wanted, place);
}

/* Make room in the bitmap for places before END.  Caller holds the lock.  -1 and
 * ENOMEM.
 */
static int
grow_free_words (struct places *p, uint64_t end)
{
  assert_held (&p->lock);

  const size_t needed = (size_t) ((end - 1) / 64 + 1);

  if (needed <= p->nr_free_words)
    return 0;

  const size_t nr = needed + needed / 2;
  uint64_t *words = realloc (p->free_words, nr * sizeof *words);
  if (!words)
    return -1;
  memset (words + p->nr_free_words, 0,
          (nr - p->nr_free_words) * sizeof *words);
  p->free_words = words;
  p->nr_free_words = nr;
  return 0;
}

/* Let the end of the file move back over places that were given back before.  Caller
 * holds the lock.
 */
static void
forget_free_places_at_end (struct places *p)
{
  while (p->nr_free > 0 && is_free (p, p->next - 1)) {
    uint64_t *word = &p->free_words[(p->next - 1) / 64];

    if (p->next % 64 == 0 && *word == UINT64_MAX) {
      *word = 0;
      p->nr_free -= 64;
      p->next -= 64;
    }
    else
      clear_free (p, --p->next);
  }
}

void
places_give_back (struct places *p, uint64_t place, uint64_t count)
{
  store_punch (p->store, place * p->size, count * p->size);

  HOLD (&p->lock);

  if (place + count == p->next) {
    p->next = place;
    forget_free_places_at_end (p);
    return;
  }

  /* Without memory to remember them, these places are not used again.  They were
   * punched: what is lost is a range of file offsets, no space.
   */
  if (grow_free_words (p, place + count) == -1)
    return;
  for (uint64_t i = place; i < place + count; ++i)
    p->free_words[i / 64] |= UINT64_C (1) << i % 64;
  p->nr_free += count;
  p->first_free = MIN (p->first_free, place);
}
