/* SPDX-License-Identifier: BSD-3-Clause */

/* Who gets which part of the overlay file.
 *
 * The file is divided into places of one slot's size each.  Those at its head, at
 * least place 0, are never given out (0 means "nowhere" in the map): they are free for
 * the header and tables of an image.
 */

#ifndef COW_PLACES_H
#define COW_PLACES_H

#include <stddef.h>
#include <stdint.h>

#include "common/lock.h"
#include "overlay/store.h"

/* Consecutive places. */
struct place_run {
  uint64_t first;
  uint64_t count;
};

struct places {
  struct store *store;  /* constant, as are the next two */
  uint64_t size;        /* of a place, in bytes */
  uint64_t end_limit;   /* no place ends behind it */
  struct mutex lock;    /* guards what follows */
  uint64_t next;        /* behind the last place that is given out */
  uint64_t *free_words; /* bitmap of the places that were given back */
  size_t nr_free_words;
  uint64_t nr_free;    /* bits in it */
  uint64_t first_free; /* no place before this one has its bit set */
};

/* Divide STORE into places of SIZE bytes, the first HEAD (at least 1) of which are not
 * given out.
 */
extern void places_init (struct places *places, struct store *store,
                         uint64_t size, uint64_t head);
extern void places_destroy (struct places *places);

/* Where the last place that was given out ends: a byte offset in the file. */
extern uint64_t places_end (struct places *places);

/* Take up to WANTED consecutive places; the file is made with the first ones.  Returns
 * how many (at least 1), the first in *PLACE; or 0 and errno if there is none to be
 * had: the file cannot be made, or is as long as a file can be.  What the places hold
 * is undefined.
 */
extern uint64_t places_take (struct places *places, uint64_t wanted,
                             uint64_t *place);

/* Take COUNT consecutive places, no fewer, at the end of the file.  -1 and errno. */
extern int places_take_row (struct places *places, uint64_t count,
                            uint64_t *place);

/* Give back COUNT consecutive places, of which maps and requests know nothing any
 * more.  Their bytes are punched, before anybody else can take them.
 */
extern void places_give_back (struct places *places, uint64_t place,
                              uint64_t count);

#endif /* COW_PLACES_H */
