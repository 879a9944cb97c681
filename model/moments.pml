/* SPDX-License-Identifier: BSD-3-Clause */

/* Which moment a connection gets, and freezing several overlays at one moment: of overlay.pml
 * only the request lock, a counter in place of the disk, and generations.
 *
 *   MOMENTS     tells check that this model is meant
 *   WRITES=N    so many writes, each to the first overlay and then to the second
 *   LOOKERS=N   clients that connect to a view of the first overlay, one after the other
 *   COMMANDS    one that freezes both, and one that names them in the other order
 *
 * Broken rules are macros BREAK_M_..., see check.
 */


/* What is wrong, by its name. */
bool acknowledged_not_in_the_moment;
bool frozen_at_two_moments;

/* The request lock: so many requests hold it, or one process has it for itself. */
byte holders[2];
bool exclusive[2];

byte content[2];      /* of the disk: the number of the last write */
byte acknowledged[2]; /* that number, once the client knows */
byte generation[2] = 1;
byte changed_in[2];   /* the generation of the last change */

/* The view of the first overlay that somebody has. */
bool has_view;
byte view_content, view_generation;

inline lock_shared (o) { atomic { !exclusive[o] -> holders[o]++ } }
inline unlock_shared (o) { atomic { holders[o]-- } }
inline lock_exclusively (o)
{
  atomic { !exclusive[o] && holders[o] == 0 -> exclusive[o] = true }
}
inline unlock_exclusively (o) { exclusive[o] = false }

inline note_change (o) { changed_in[o] = generation[o] }

inline write (o, number)
{
  lock_shared (o);
#ifndef BREAK_M_NOTED_LATER
  note_change (o);
#endif
  content[o] = number;
#ifdef BREAK_M_NOTED_LATER
  acknowledged[o] = number;
  note_change (o);
  unlock_shared (o);
#else
  unlock_shared (o);
  acknowledged[o] = number
#endif
}

proctype writer ()
{
  byte n;

  for (n : 1 .. WRITES) {
    write (0, n);
    write (1, n)
  }
}

/* All look under a lock of the overlay's entry, which is this one. */
bool entry_locked;

#ifdef LOOKERS
proctype lookers ()
{
  byte i, before, got;

  for (i : 1 .. LOOKERS) {
    before = acknowledged[0]; /* all that is known when it connects */
    atomic { !entry_locked -> entry_locked = true }
    if
#ifdef BREAK_M_SHARES_ANY
    :: has_view
#else
    :: has_view && changed_in[0] <= view_generation
#endif
      -> got = view_content
    :: else ->
      lock_exclusively (0);
      got = content[0];
      view_content = content[0];
      view_generation = generation[0];
#ifndef BREAK_M_SAME_GENERATION
      generation[0]++;
#endif
      has_view = true;
      unlock_exclusively (0)
    fi;
    entry_locked = false;
    if
    :: got < before -> assert (acknowledged_not_in_the_moment)
    :: else
    fi
  }
}
#endif

proctype command (byte first)
{
  byte second = 1 - first;
  byte frozen[2];

#ifdef BREAK_M_ONE_BY_ONE
  lock_exclusively (0);
  frozen[0] = content[0];
  unlock_exclusively (0);
  lock_exclusively (1);
  frozen[1] = content[1];
  unlock_exclusively (1);
#else
#ifdef BREAK_M_ORDER_OF_NAMES
  lock_exclusively (first);
  lock_exclusively (second);
#else
  lock_exclusively (0);
  lock_exclusively (1);
#endif
  frozen[0] = content[0];
  frozen[1] = content[1];
  unlock_exclusively (1);
  unlock_exclusively (0);
#endif
  /* Each number goes to the first overlay before it goes to the second. */
  if
  :: frozen[1] > frozen[0] || frozen[0] > frozen[1] + 1 ->
    assert (frozen_at_two_moments)
  :: else
  fi
}

init
{
  atomic {
    run writer ();
#ifdef LOOKERS
    run lookers ();
    run lookers ();
#endif
#ifdef COMMANDS
    run command (0);
    run command (1);
#endif
    skip
  }
}
