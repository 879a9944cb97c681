/* SPDX-License-Identifier: BSD-3-Clause */

/* The protocol of an overlay: what requests, freezes and releases do to the
 * map and to the bytes of the file, and which locks they hold meanwhile.
 *
 * Checked exhaustively by spin, see README for what is modelled and how it is
 * run.  The rules are those of HACKING ("What makes it correct",
 * "Freezing"); comments call them by number, and F stands for "Freezing".
 *
 * The disk has two slots of two blocks of two bytes: bytes 0 .. 3 are slot 0,
 * 4 .. 7 slot 1.  The overlay file has NPLACE places of four bytes.  A node of
 * the tree is a root, with LEAVES children, or a leaf.
 *
 * What is one step here.  Each load and store of a word that somebody else may
 * use at the same time is a step of its own, and so is each byte that is read
 * from the file or written to it.  d_step and atomic join:
 *
 *  (a) ghost variables, which only the checking uses, with the step they
 *      belong to;
 *  (b) taking or letting go of one lock, which is atomic in the real code;
 *  (c) what only the holder of a lock may change or look at, with the step
 *      that precedes or follows it in the same hold: nobody can tell when it
 *      happened.  Each such place says which lock;
 *  (d) looking at what does not change while it can be looked at (nodes of a
 *      frozen map that is held; the list of frozen maps under the request
 *      lock);
 *  (e) letting go of several locks at the end of a request: whoever waits for
 *      one may as well have come a moment later.
 *
 * Where a `skip' seems to do nothing: spin lets no d_step come right after a
 * loop, and no inline be empty.
 *
 * Which processes run is chosen by macros.  A range of bytes is written as two
 * digits, first and end: 26 is bytes 2 .. 5, 4 is 0 .. 3.
 *
 *   WRITE_A, WRITE_B, WRITE_C=range   a client writes
 *   ZERO=range                        a client zeroes or trims
 *   READ=range                        a client reads
 *   KEEP=range                        cow-on-read or a prefetch keeps holes
 *   VIEWS=n                           freeze and release, n times
 *   END                               the final freeze, which closes
 *
 * and how it starts:
 *
 *   INIT0, INIT1    state words of the slots: 1, 2 the first and second block
 *                   allocated, 4, 8 zero
 *   STRIPES         slot locks: 1 (both slots have the same) or 2
 *   LEAVES          leaves: 1 (both slots are in the same) or 2
 *   NPLACE          places of the file; a request that gets none fails
 *   ALL_SPACE       see README: a release also punches blocks that were zeroed
 *                   while their place was shared, and a zero punches in a shared
 *                   place the blocks that no frozen map has allocated
 *   SPACE           at the end, what is not allocated has no bytes (not where
 *                   a write without slot lock may meet a zero)
 *   NODE_REUSE      a freed node is given out again at once.  Else it never
 *                   is, so that any use of it is noticed
 *
 * BREAK_... breaks one rule each; see check.
 */

#ifndef STRIPES
#define STRIPES 2
#endif
#ifndef LEAVES
#define LEAVES 1
#endif
#ifndef NPLACE
#define NPLACE 4
#endif
#ifndef INIT0
#define INIT0 3
#endif
#ifndef INIT1
#define INIT1 3
#endif
#ifndef VIEWS
#define VIEWS 0
#endif
#ifdef END
#define NFREEZE (VIEWS + 1)
#else
#define NFREEZE VIEWS
#endif

/* A node is copied at most once for each freeze.  (One more, so that the model
 * does not come to its end where a broken rule copies twice.)
 */
#define NROOT (NFREEZE + 2)
#define NLEAF (LEAVES * (NFREEZE + 1) + 1)

#if defined ALL_SPACE && !defined BREAK_F_LEAVES_REST
#define PUNCH_REST
#endif
#if defined ALL_SPACE && !defined BREAK_6_PUNCHES_BY_SLOT
#define PUNCH_UNSHARED_BLOCKS
#endif

#define FIRST(range) ((range) / 10)
#define STOP(range) ((range) % 10)

/* Who wrote a byte.  Operations 2 .. 5 happen once each. */
#define OP_BASE 0   /* it is the base's */
#define OP_BEFORE 1 /* it was written before the model starts */
#define OP_A 2
#define OP_B 3
#define OP_C 4
#define OP_ZERO 5
#define OP_ZERO_BEFORE 6
#define ZEROES (1 << OP_ZERO | 1 << OP_ZERO_BEFORE)

/* The value of a byte of the file tells who wrote it and for which slot. */
#define VALUE(op, slot) (1 + 2 * (op) + (slot))
#define JUNK 255 /* a fresh place, and nobody has written here */

#define ALLOCATED(state) ((state) & 3)
#define ZERO_BLOCKS(state) ((state) >> 2)
#define HOLES(state) (3 & ~(ALLOCATED (state) | ZERO_BLOCKS (state)))
#define SLOT_OF(x) ((x) / 4)
#define BLOCK_OF(x) (1 << ((x) % 4) / 2)
#define AT(place, x) ((place) * 4 + (x) % 4)
#define LEAF_OF(s) ((s) % LEAVES)
#define STRIPE_OF(s) ((s) % STRIPES)

/*----------------------------------------------------------------------
 * The overlay
 */

typedef root_node {
  bool used;           /* neither free nor never made */
  byte generation;
  byte child[LEAVES];  /* 0: none */
};

typedef leaf_node {
  bool used;
  byte generation;
  byte place[2]; /* of slot 0 and of slot 1 (one of them unused if LEAVES is 2) */
  byte state[2];
};

root_node root[NROOT + 1]; /* [0] is not used */
leaf_node leaf[NLEAF + 1];
byte live;                 /* root of the live map; 0: none yet */
byte generation = 1;

byte file[(NPLACE + 1) * 4];
bool taken[NPLACE + 1];    /* places given out */

#if NFREEZE > 0
byte nr_frozen;            /* how often was frozen; frozen map i is of
                            * generation i + 1 */
byte nr_views;             /* ghost: how many of those were views */
bool held[NFREEZE];        /* is the frozen map still held? */
byte frozen_root[NFREEZE];
byte seen[NFREEZE * 8];    /* ghost: the disk as it was when it was frozen */
#endif
byte newest;               /* generation of the newest frozen map that is
                            * held; 0: there is none */
bool closed;

/*----------------------------------------------------------------------
 * Locks
 */

bool slot_lock[STRIPES];
bool release_lock;

/* The request lock prefers writers: nobody gets it shared while somebody waits
 * for it exclusively.  An exclusive hold is one step (c), so there is no "held
 * exclusively".
 */
byte sharers;
byte waiting;
#define MAY_SHARE (waiting == 0)
#define MAY_EXCLUDE (sharers == 0)
#ifdef BREAK_F_FREEZES_AMID_REQUESTS
#define MAY_FREEZE true
#else
#define MAY_FREEZE MAY_EXCLUDE
#endif
#ifdef BREAK_F_UNLINKS_AMID_REQUESTS
#define MAY_UNLINK true
#else
#define MAY_UNLINK MAY_EXCLUDE
#endif

/* The locks of nodes and of the allocator are held for one step each, and need
 * no variable.
 */

/*----------------------------------------------------------------------
 * Ghosts: what NBD allows to be read
 *
 * allowed[x] has a bit for each operation whose byte X may be what a read sees
 * that starts now: those that are under way, and those that are done, unless
 * another one began after them and is done too.
 */

byte allowed[8];
byte done;     /* operations that were acknowledged */
byte invoked;  /* operations that were sent */
byte older[7]; /* for each, those that were done when it was sent */

/* Names for what goes wrong, as spin prints the text of an assertion.  They
 * are never set.
 */
hidden byte acknowledged_write_lost, foreign_byte, unwritten_byte,
  frozen_map_changed, request_frozen_half_done, node_used_after_free,
  node_freed_twice, place_freed_twice, place_leaked, place_given_back_in_use,
  node_leaked, punched_bytes_leaked, place_not_punched, lock_left_held,
  not_in_the_final_image, end_of_the_model;
#define WRONG(what) assert (what)

/* Scratch, good within one step. */
hidden byte t_x, t_y, t_root, t_leaf, t_state, t_value, t_bits, t_mask;

/* VALUE is what somebody sees of byte X: is that one of the operations OPS? */
inline expect (value, x, ops)
{
  if
  :: value == 0 -> if :: (ops) & ZEROES :: else -> WRONG (acknowledged_write_lost) fi
  :: value == JUNK -> WRONG (unwritten_byte)
  :: else ->
    if :: (value - 1) % 2 == SLOT_OF (x) :: else -> WRONG (foreign_byte) fi;
    if :: (ops) & (1 << ((value - 1) / 2)) :: else -> WRONG (acknowledged_write_lost) fi
  fi;
  skip
}

#define CHECK_ROOT(r) if :: root[r].used :: else -> WRONG (node_used_after_free) fi
#define CHECK_LEAF(l) if :: leaf[l].used :: else -> WRONG (node_used_after_free) fi

/* Byte X of the disk by the map of root R, in t_value.  Within one step. */
inline look_at_byte (r, x)
{
  t_value = VALUE (OP_BASE, SLOT_OF (x));
  if
  :: r != 0 ->
    CHECK_ROOT (r);
    t_leaf = root[r].child[LEAF_OF (SLOT_OF (x))];
    if
    :: t_leaf != 0 ->
      CHECK_LEAF (t_leaf);
      t_state = leaf[t_leaf].state[SLOT_OF (x)];
      if
      :: ALLOCATED (t_state) & BLOCK_OF (x) ->
        t_value = file[AT (leaf[t_leaf].place[SLOT_OF (x)], x)]
      :: else ->
        if :: ZERO_BLOCKS (t_state) & BLOCK_OF (x) -> t_value = 0 :: else fi
      fi
    :: else
    fi
  :: else
  fi;
  skip
}

/* The place of slot S by the map of root R, in t_y.  Within one step. */
inline look_at_place (r, s)
{
  t_y = 0;
  if
  :: r != 0 ->
    CHECK_ROOT (r);
    t_leaf = root[r].child[LEAF_OF (s)];
    if
    :: t_leaf != 0 -> CHECK_LEAF (t_leaf); t_y = leaf[t_leaf].place[s]
    :: else
    fi
  :: else
  fi;
  skip
}

/* Is slot S, at PLACE, shared: has the newest frozen map still held the same
 * place?  In t_y.  Within one step (d); the caller holds the request lock.
 */
inline is_shared (s, place)
{
#if NFREEZE > 0
  if
  :: newest != 0 && place != 0 ->
    look_at_place (frozen_root[newest - 1], s);
    t_y = (t_y == place)
  :: else -> t_y = 0
  fi
#else
  t_y = 0
#endif
}

/* The request that runs this is sent, with its first step; is acknowledged,
 * with its last one; or fails, and must not be seen.
 */
inline sent ()
{
  invoked = invoked | 1 << op;
  older[op] = done;
  for (t_x : from .. to - 1) { allowed[t_x] = allowed[t_x] | 1 << op };
  skip
}

inline acknowledged ()
{
  for (t_x : from .. to - 1) { allowed[t_x] = allowed[t_x] & ~older[op] }
  done = done | 1 << op
}

inline failed ()
{
  invoked = invoked & ~(1 << op);
  older[op] = 0;
  for (t_x : from .. to - 1) { allowed[t_x] = allowed[t_x] & ~(1 << op) };
  skip
}

/*----------------------------------------------------------------------
 * Nodes and places
 */

/* Make a node, t_y.  Spin's inlines cannot be given an array, so it is a macro. */
#ifdef NODE_REUSE
#define FIND_NODE(node, last) \
  t_y = 1; \
  do \
  :: t_y > last -> WRONG (end_of_the_model) \
  :: t_y <= last && node[t_y].used -> t_y++ \
  :: else -> break \
  od; \
  node[t_y].used = true
#else
/* A node that was never used has no generation. */
#define FIND_NODE(node, last) \
  t_y = 1; \
  do \
  :: t_y > last -> WRONG (end_of_the_model) \
  :: t_y <= last && node[t_y].generation != 0 -> t_y++ \
  :: else -> break \
  od; \
  node[t_y].used = true
#endif

#define COPY_ROOT(from) \
  FIND_NODE (root, NROOT); \
  root[t_y].generation = generation; \
  for (t_x : 0 .. LEAVES - 1) { root[t_y].child[t_x] = root[from].child[t_x] }

#define COPY_LEAF(from) \
  FIND_NODE (leaf, NLEAF); \
  leaf[t_y].generation = generation; \
  for (t_x : 0 .. 1) { \
    leaf[t_y].place[t_x] = leaf[from].place[t_x]; \
    leaf[t_y].state[t_x] = leaf[from].state[t_x] \
  }

inline free_root (r)
{
  if :: root[r].used :: else -> WRONG (node_freed_twice) fi;
  root[r].used = false;
  for (t_x : 0 .. LEAVES - 1) { root[r].child[t_x] = 0 };
  skip
}

inline free_leaf (l)
{
  if :: leaf[l].used :: else -> WRONG (node_freed_twice) fi;
  leaf[l].used = false;
  for (t_x : 0 .. 1) { leaf[l].place[t_x] = 0; leaf[l].state[t_x] = 0 };
  skip
}

/* Does node N have to be made or copied before it is changed?  Its generation
 * never changes, and `newest' not under the request lock (d).
 */
#ifdef BREAK_F_NODE_IN_PLACE
#define IS_FROZEN(array, n) ((n) == 0)
#elif defined BREAK_F_NEWEST_EVER
#define IS_FROZEN(array, n) ((n) == 0 || array[n].generation < generation)
#else
#define IS_FROZEN(array, n) ((n) == 0 || array[n].generation <= newest)
#endif

/* Under the lock of the node above or of the node itself, whichever guards the
 * pointer: look at it again.
 */
#ifdef BREAK_F_NO_LOOK_AGAIN
#define LOOK_AGAIN(pointer, n) true
#else
#define LOOK_AGAIN(pointer, n) ((pointer) == (n))
#endif

/* Let n_root and n_leaf be nodes that may be changed, on the way to slot S.
 *
 * Loading a pointer is a step.  Copying is one step: it is done under a lock,
 * all who change that pointer do so under that lock, what is copied does not
 * change (it belongs to a frozen map) and others see nothing of it but the
 * store of the pointer.
 */
inline touch (s)
{
  do
  :: d_step {
      n_root = live;
      if :: n_root != 0 -> CHECK_ROOT (n_root) :: else fi;
      t_mask = IS_FROZEN (root, n_root)
    };
    if
    :: !IS_FROZEN (root, n_root) -> break
    :: else ->
      d_step {
        if
        :: LOOK_AGAIN (live, n_root) ->
          COPY_ROOT (n_root);
          live = t_y;
#ifdef BREAK_F_NODE_FREED_BY_COPIER
          if :: n_root != 0 -> free_root (n_root) :: else fi
#endif
        :: else
        fi
      }
    fi
  od;
  do
  :: d_step {
      CHECK_ROOT (n_root);
      n_leaf = root[n_root].child[LEAF_OF (s)];
      if :: n_leaf != 0 -> CHECK_LEAF (n_leaf) :: else fi
    };
    if
    :: !IS_FROZEN (leaf, n_leaf) -> break
    :: else ->
      d_step {
        CHECK_ROOT (n_root);
        if
        :: LOOK_AGAIN (root[n_root].child[LEAF_OF (s)], n_leaf) ->
          COPY_LEAF (n_leaf);
          root[n_root].child[LEAF_OF (s)] = t_y;
#ifdef BREAK_F_NODE_FREED_BY_COPIER
          if :: n_leaf != 0 -> free_leaf (n_leaf) :: else fi
#endif
        :: else
        fi
      }
    fi
  od;
  skip
}

/* Let n_leaf be the leaf of slot S in the live map, or 0, changing nothing. */
inline find (s)
{
  d_step { n_root = live; n_leaf = 0 };
  if
  :: n_root != 0 ->
    d_step { CHECK_ROOT (n_root); n_leaf = root[n_root].child[LEAF_OF (s)]; n_root = 0 }
  :: else
  fi;
  skip
}

/* Place and state word of slot S as one consistent pair, in `place' and
 * `state', holding no slot lock (rule 1).
 */
inline load_pair (s)
{
  place = 0;
  state = 0;
  if
  :: n_leaf != 0 ->
    d_step { CHECK_LEAF (n_leaf); state = leaf[n_leaf].state[s] };
    d_step { CHECK_LEAF (n_leaf); place = leaf[n_leaf].place[s] };
#ifndef BREAK_1_TORN_PAIR
    do
    :: d_step { CHECK_LEAF (n_leaf); again_state = leaf[n_leaf].state[s] };
      d_step {
        CHECK_LEAF (n_leaf);
        again_place = leaf[n_leaf].place[s];
        t_y = (again_state == state && again_place == place);
        state = again_state;
        place = again_place;
        again_state = t_y; /* is it consistent? */
        again_place = 0
      };
      if
      :: again_state -> again_state = 0; break
      :: else
      fi
    od
#endif
  :: else
  fi;
  skip
}

/* Take a place, under the allocator's lock (b): 0 if there is none.  Within
 * one step.
 */
inline take_place (result)
{
  t_y = 1;
  do
  :: t_y <= NPLACE && taken[t_y] -> t_y++
  :: else -> break
  od;
  if
  :: t_y <= NPLACE ->
    taken[t_y] = true;
    result = t_y;
    for (t_x : 0 .. 3) {
      if :: file[AT (t_y, t_x)] == 0 :: else -> WRONG (place_not_punched) fi;
      file[AT (t_y, t_x)] = JUNK /* rule 5: nothing relies on what it holds */
    }
  :: else -> result = 0
  fi;
  skip
}

/* Give a place back, whose bytes were punched.  Within one step. */
inline give_back_place (p)
{
  if :: taken[p] :: else -> WRONG (place_freed_twice) fi;
  taken[p] = false
}

inline punch_place (p)
{
  for (t_x : 0 .. 3) { file[AT (p, t_x)] = 0 };
  skip
}

/*----------------------------------------------------------------------
 * Requests that change something
 */

#define WRITES 0
#define ZEROES_BLOCKS 1
#define KEEPS 2

/* Blocks of slot S that the request FROM .. TO-1 touches, and that it covers
 * wholly.
 */
#define COVERS(x) (from <= (x) && (x) < to)
#define BLOCKS(s) \
  ((COVERS (4 * (s)) || COVERS (4 * (s) + 1)) \
   | (COVERS (4 * (s) + 2) || COVERS (4 * (s) + 3)) << 1)
#define WHOLE(s) \
  ((COVERS (4 * (s)) && COVERS (4 * (s) + 1)) \
   | (COVERS (4 * (s) + 2) && COVERS (4 * (s) + 3)) << 1)

/* The first look of a write, and if all its blocks are allocated and in slots
 * that are not shared, the write itself (rule 4).  Sets `over' then.
 */
inline first_look ()
{
  d_step {
    MAY_SHARE ->
    sent ();
    if
    :: closed -> over = true; failed ()
    :: else -> sharers++
    fi
  };
  if
  :: !over ->
    s = from / 4;
    unlocked = true;
    do
    :: s <= last && unlocked ->
      find (s);
      load_pair (s);
      d_step {
        is_shared (s, place);
#ifdef BREAK_4_IGNORES_SHARED
        t_y = 0;
#endif
        unlocked = (BLOCKS (s) & ~ALLOCATED (state)) == 0 && !t_y;
        where[s] = place;
#ifdef BREAK_3_NO_SECOND_LOOK
        looked[s] = state;
#endif
#ifdef BREAK_F_SHARED_LOOKED_AT_BEFORE
        was_shared[s] = t_y;
#endif
        n_leaf = 0; place = 0; state = 0
      };
#ifdef BREAK_4_NO_CHECK_OF_ALL
      if :: unlocked -> overwrite (s, s) :: else fi;
#endif
      s++
    :: else -> break
    od;
#ifdef BREAK_4_NO_CHECK_OF_ALL
    skip;
#else
    if :: unlocked -> overwrite (from / 4, last) :: else fi;
#endif
#ifdef BREAK_4_WAITS_HOLDING
    if
    :: unlocked -> d_step { sharers--; acknowledged (); over = true }
    :: else
    fi;
#else
    d_step {
      sharers--;
      where[0] = 0; where[1] = 0;
      s = 0;
      if :: unlocked -> acknowledged (); over = true :: else fi;
      unlocked = false
    }
#endif
  :: else
  fi;
  skip
}

/* Write the request's own bytes, one by one, to slots FIRST_SLOT .. LAST_SLOT
 * at the places in `where'.  Somebody may make a block zero meanwhile: then the
 * bytes count for nothing, and whoever allocates it again writes it whole.
 */
inline overwrite (first_slot, last_slot)
{
#ifdef BREAK_4_LETS_GO_EARLY
  sharers--;
#endif
  x = (from > 4 * (first_slot) -> from : 4 * (first_slot));
  do
  :: x < to && x <= 4 * (last_slot) + 3 ->
    d_step { file[AT (where[SLOT_OF (x)], x)] = VALUE (op, SLOT_OF (x)); x++ }
  :: else -> break
  od;
  x = 0;
#ifdef BREAK_4_LETS_GO_EARLY
  MAY_SHARE -> sharers++;
#endif
}

inline lock_slots ()
{
#ifndef BREAK_2_NO_SLOT_LOCK
#ifdef BREAK_2_DESCENDING
  if
  :: op == OP_B && from < 4 && last == 1 ->
    atomic { !slot_lock[1] -> slot_lock[1] = true };
    atomic { !slot_lock[0] -> slot_lock[0] = true }
  :: else ->
#endif
  if
  :: STRIPES == 1 || from < 4 -> atomic { !slot_lock[0] -> slot_lock[0] = true }
  :: else
  fi;
#if STRIPES == 2
  if
  :: last == 1 -> atomic { !slot_lock[1] -> slot_lock[1] = true }
  :: else
  fi
#endif
#ifdef BREAK_2_DESCENDING
  fi;
#endif
#endif
  skip
}

/* Within one step (e). */
inline unlock_slots ()
{
#ifndef BREAK_2_NO_SLOT_LOCK
  if :: STRIPES == 1 || from < 4 -> slot_lock[0] = false :: else fi;
#if STRIPES == 2
  if :: last == 1 -> slot_lock[1] = false :: else fi;
#endif
#endif
  skip
}

/* Decide what happens to slot S, whose pair was found under its lock.  Only
 * this process's variables.
 *
 *   write[s]      blocks of which bytes are written
 *   new_state[s]  the new state word
 *   bring[s]      blocks whose old bytes are brought along to the new place
 */
inline decide (s)
{
  if
  :: kind == WRITES ->
    write[s] = BLOCKS (s);
    t_mask = 0
  :: kind == ZEROES_BLOCKS ->
    /* At its ends, what it does not cover wholly: written whole if it is a hole,
     * just the request's bytes if it is allocated.
     */
    t_mask = WHOLE (s);
    write[s] = BLOCKS (s) & ~t_mask & ~ZERO_BLOCKS (found[s])
  :: else ->
    t_mask = 0;
    write[s] = BLOCKS (s) & HOLES (found[s])
  fi;
  new_state[s] = ((ALLOCATED (found[s]) & ~t_mask) | write[s]) |
                 ((ZERO_BLOCKS (found[s]) & ~write[s]) | t_mask) << 2;
  zeroed[s] = ALLOCATED (found[s]) & t_mask;
  bring[s] = 0;
  moves[s] = write[s] != 0 && (where[s] == 0 || shared[s]);
#ifdef BREAK_F_OVERWRITES_SHARED
  moves[s] = write[s] != 0 && where[s] == 0;
#endif
#ifdef BREAK_F_ZERO_NEVER_MOVES
  if :: kind == ZEROES_BLOCKS && where[s] != 0 -> moves[s] = false :: else fi;
#endif
  if
  :: moves[s] && where[s] != 0 ->
    bring[s] = ALLOCATED (found[s]) & ~t_mask & ~(kind == WRITES -> WHOLE (s) : 0);
#ifdef BREAK_F_BRINGS_NOTHING
    bring[s] = 0
#endif
  :: else
  fi;
  skip
}

/* What byte X of the file gets, in t_value; t_y: does it get something? */
inline byte_to_write (x)
{
  t_y = 1;
  t_bits = BLOCK_OF (x);
  if
  :: (write[SLOT_OF (x)] & t_bits) && kind != KEEPS && COVERS (x) ->
    t_value = (kind == WRITES -> VALUE (op, SLOT_OF (x)) : 0)
#ifdef BREAK_5_MERGED_COPY
  :: (write[SLOT_OF (x)] & ALLOCATED (found[SLOT_OF (x)]) & t_bits) && !COVERS (x) ->
    t_value = merged[x]
#endif
  :: else ->
    if
    :: (bring[SLOT_OF (x)] & t_bits) ->
      t_value = file[AT (where[SLOT_OF (x)], x)]
    :: !(bring[SLOT_OF (x)] & t_bits) &&
         (write[SLOT_OF (x)] & ~ALLOCATED (found[SLOT_OF (x)]) & t_bits) ->
      /* Rule 5: the rest of a block that becomes allocated. */
#ifdef BREAK_5_NOT_WHOLE
      t_y = 0
#else
      t_value = (ZERO_BLOCKS (found[SLOT_OF (x)]) & t_bits -> 0 :
                 VALUE (OP_BASE, SLOT_OF (x)))
#endif
    :: else -> t_y = 0
    fi
  fi;
  skip
}

/* Store the new pair of slot S, in the order of rule 1.  Only the holder of
 * the slot lock stores, but others load at any time.
 */
#define LATER(s) (ALLOCATED (new_state[s]) & ~ALLOCATED (found[s]))
#define BOTH(s) (LATER (s) | LATER (s) << 2)
#define BETWEEN(s) ((new_state[s] & ~BOTH (s)) | (found[s] & BOTH (s)))

inline store_pair (s)
{
  if
  :: new_place[s] != where[s] ->
#ifdef BREAK_1_PLACE_LAST
    d_step { CHECK_LEAF (node[s]); leaf[node[s]].state[s] = new_state[s] };
#else
#ifndef BREAK_1_PLACE_FIRST
    if
    :: BETWEEN (s) != found[s] ->
      d_step { CHECK_LEAF (node[s]); leaf[node[s]].state[s] = BETWEEN (s) }
    :: else
    fi;
#endif
#endif
    d_step { CHECK_LEAF (node[s]); leaf[node[s]].place[s] = new_place[s] }
  :: else
  fi;
  if
  :: new_state[s] != found[s] ->
    d_step { CHECK_LEAF (node[s]); leaf[node[s]].state[s] = new_state[s] }
  :: else
  fi;
  skip
}

inline store_all ()
{
  s = low;
  do
  :: s <= high -> store_pair (s); s++
  :: else -> break
  od;
  s = 0
}

inline write_all ()
{
  x = 4 * low;
  do
  :: x <= 4 * high + 3 ->
    d_step {
      byte_to_write (x);
      if
      :: t_y -> file[AT (new_place[SLOT_OF (x)], x)] = t_value
      :: else
      fi;
      /* Up to the next one: only this process's variables. */
      do
      :: x++;
        if
        :: x > 4 * high + 3 -> break
        :: else -> byte_to_write (x); if :: t_y -> break :: else fi
        fi
      od
    }
  :: else -> break
  od;
  x = 0
}

proctype request (byte op; byte kind; byte from; byte to)
{
  byte s, x, n_root, n_leaf, place, state, again_state, again_place;
  byte node[2], where[2], found[2], new_place[2], new_state[2];
  byte write[2], bring[2], zeroed[2];
  bool shared[2], moves[2];
  bool over, unlocked, no_space;
  byte last = (to - 1) / 4;
  byte low, high;
#ifdef BREAK_3_NO_SECOND_LOOK
  byte looked[2];
#endif
#ifdef BREAK_F_SHARED_LOOKED_AT_BEFORE
  bool was_shared[2];
#endif
#ifdef BREAK_5_MERGED_COPY
  byte merged[8];
#endif
  byte punching;

  if
  :: kind == WRITES -> first_look ()
#ifdef BREAK_3_NO_SECOND_LOOK
  :: kind == KEEPS ->
    d_step { MAY_SHARE -> sharers++ };
    find (last);
    load_pair (last);
    d_step { sharers--; looked[last] = state; n_leaf = 0; state = 0; place = 0 }
#endif
  :: else
  fi;
  if :: over -> goto end :: else fi;

  /* Here the base is read, with no lock held (rule 3).  Its bytes are
   * always VALUE (OP_BASE, slot), so there is nothing to do for it.
   */

  lock_slots ();
#ifdef BREAK_4_WAITS_HOLDING
  if :: kind == WRITES -> sharers-- :: else fi;
#endif
  d_step {
    MAY_SHARE ->
    if :: kind == ZEROES_BLOCKS -> sent () :: else fi;
    if
#ifndef BREAK_7_CLOSED_LOOKED_AT_ONCE
    :: closed -> /* ESHUTDOWN */
      unlock_slots ();
      if :: kind != KEEPS -> failed () :: else fi;
      over = true
#endif
    :: else -> sharers++
    fi;
    low = from / 4;
    high = last
  };
  if :: over -> goto end :: else fi;

#ifdef BREAK_7_TWO_HOLDS
  high = low;
again:
#endif
  /* The second look, at all slots. */
  s = low;
  do
  :: s <= high ->
    touch (s);
    d_step {
      /* Its pair changes under the slot lock only, which we hold (c). */
      CHECK_LEAF (n_leaf);
      node[s] = n_leaf;
      found[s] = leaf[n_leaf].state[s];
      where[s] = leaf[n_leaf].place[s];
      new_place[s] = where[s];
      is_shared (s, where[s]);
      shared[s] = t_y;
#ifdef BREAK_F_SHARED_LOOKED_AT_BEFORE
      shared[s] = was_shared[s];
#endif
#ifdef BREAK_3_NO_SECOND_LOOK
      if :: kind != ZEROES_BLOCKS -> found[s] = looked[s] :: else fi;
#endif
      decide (s);
      n_leaf = 0; n_root = 0
    };
    s++
  :: else -> break
  od;

  s = low;
  do
  :: s <= high ->
    if
    :: moves[s] ->
      d_step {
        take_place (new_place[s]);
        if :: new_place[s] == 0 -> no_space = true; new_place[s] = where[s] :: else fi
      }
    :: else
    fi;
    if :: no_space -> break :: else fi;
    s++
  :: else -> break
  od;

  if
  :: no_space ->
    /* Rule 7: what was taken is given back.  Nobody else knows these places.
     * Blocks that were going to be allocated are punched where the slot has
     * its own place: they may have been written.  A shared slot that got no
     * place is left alone.
     */
    s = low;
    do
    :: s <= high ->
      if
      :: new_place[s] != where[s] ->
#ifndef BREAK_7_KEEPS_PLACE
        d_step { punch_place (new_place[s]) };
        d_step { give_back_place (new_place[s]) }
#else
        skip
#endif
      :: else ->
        d_step {
          if
#ifdef BREAK_7_UNDO_PUNCHES_SHARED
          :: where[s] != 0 ->
#else
          :: where[s] != 0 && !shared[s] ->
#endif
            for (t_x : 0 .. 3) {
              if
              :: write[s] & ~ALLOCATED (found[s]) & BLOCK_OF (t_x) ->
                file[AT (where[s], t_x)] = 0
              :: else
              fi
            }
          :: else
          fi
        }
      fi;
      s++
    :: else -> break
    od;
    skip;
    d_step {
      sharers--;
      unlock_slots ();
      if :: kind != KEEPS -> failed () :: else fi;
      zeroed[0] = 0; zeroed[1] = 0
    };
    goto end
  :: else
  fi;

#ifdef BREAK_5_MERGED_COPY
  d_step {
    for (t_x : 0 .. 7) { merged[t_x] = file[AT (where[SLOT_OF (t_x)], t_x)] }
  };
#endif
#ifdef BREAK_1_STATE_FIRST
  store_all ();
  write_all ();
#else
  write_all ();
  store_all ();
#endif

#ifdef BREAK_7_TWO_HOLDS
  if
  :: high < last ->
    sharers--;
    MAY_SHARE -> sharers++;
    d_step { low++; high++ };
    goto again
  :: else
  fi;
#endif

  /* A zero is acknowledged after its punch, but it would be no less right to
   * do so here, and it demands more: what comes later must survive the punch.
   */
  d_step {
    sharers--;
    unlock_slots ();
    if :: kind != KEEPS -> acknowledged () :: else fi;
    for (t_x : 0 .. 1) {
#ifndef BREAK_6_PUNCHES_WITHOUT_LOOK
      where[t_x] = 0;
#endif
      node[t_x] = 0; found[t_x] = 0;
      new_place[t_x] = 0; new_state[t_x] = 0; write[t_x] = 0; bring[t_x] = 0;
      shared[t_x] = 0; moves[t_x] = 0
    };
    s = 0
  };

  /* The punch (rule 6), slot by slot. */
  do
  :: s <= last && zeroed[s] == 0 -> s++
  :: s <= last && zeroed[s] != 0 ->
#ifdef BREAK_6_PUNCHES_WITHOUT_LOOK
    punching = zeroed[s];
    place = where[s];
#else
#ifndef BREAK_6_PUNCHES_UNLOCKED
    atomic { !slot_lock[STRIPE_OF (s)] -> slot_lock[STRIPE_OF (s)] = true };
#endif
    d_step {
      MAY_SHARE ->
      sharers++
    };
    d_step {
      /* Under the slot lock the pair does not change (c), and any leaf that
       * the live root has led to in this hold has it.
       */
      CHECK_ROOT (live);
      t_leaf = root[live].child[LEAF_OF (s)];
      CHECK_LEAF (t_leaf);
      n_leaf = t_leaf;
      place = leaf[n_leaf].place[s];
      state = leaf[n_leaf].state[s];
      n_leaf = 0;
#if defined PUNCH_UNSHARED_BLOCKS && NFREEZE > 0
      /* What the oldest frozen map with this place has not allocated, the
       * newer ones and the live map have not either.
       */
      t_x = NFREEZE;
      do
      :: t_x > 0 ->
        t_x--;
        if
        :: held[t_x] ->
          look_at_place (frozen_root[t_x], s);
          if :: t_y == place && place != 0 -> state = leaf[t_leaf].state[s] :: else fi
        :: else
        fi
      :: else -> break
      od;
      t_y = 0;
#else
      is_shared (s, place);
#endif
#ifdef BREAK_6_PUNCHES_SHARED
      t_y = 0;
#endif
      punching = ((place == 0 || t_y) -> 0 : 3 & ~ALLOCATED (state));
      state = 0
    };
#ifdef BREAK_6_LOOKS_IN_ANOTHER_HOLD
    d_step { sharers--; slot_lock[STRIPE_OF (s)] = false };
    atomic { !slot_lock[STRIPE_OF (s)] -> slot_lock[STRIPE_OF (s)] = true };
    d_step { MAY_SHARE -> sharers++ };
#endif
#endif
    do
    :: punching != 0 ->
      d_step {
        t_x = (punching & 1 -> 0 : 2);
        file[AT (place, t_x)] = 0;
        file[AT (place, t_x + 1)] = 0;
        punching = punching & ~(1 << (t_x / 2))
      }
    :: else -> break
    od;
    skip;
#ifndef BREAK_6_PUNCHES_WITHOUT_LOOK
    d_step {
      sharers--;
#ifndef BREAK_6_PUNCHES_UNLOCKED
      slot_lock[STRIPE_OF (s)] = false;
#endif
      zeroed[s] = 0;
      place = 0;
      s++
    }
#else
    d_step { zeroed[s] = 0; where[s] = 0; place = 0; s++ }
#endif
  :: else -> break
  od;
end:
  skip
}

/*----------------------------------------------------------------------
 * Reading
 */

proctype reader (byte from; byte to)
{
  byte s, x, n_root, n_leaf, place, state, again_state, again_place;
  byte may[8];
  byte sent_before;

  d_step {
    MAY_SHARE ->
    sharers++;
    for (t_x : from .. to - 1) { may[t_x] = allowed[t_x] };
    sent_before = invoked;
    x = from;
    s = from / 4
  };
  do
  :: x < to ->
    find (s);
    load_pair (s);
    n_leaf = 0;
#ifdef BREAK_4_READS_UNLOCKED
    sharers--;
#endif
    do
    :: x < to && SLOT_OF (x) == s ->
      d_step {
        t_value = VALUE (OP_BASE, s);
        if
        :: ALLOCATED (state) & BLOCK_OF (x) -> t_value = file[AT (place, x)]
        :: else ->
          if :: ZERO_BLOCKS (state) & BLOCK_OF (x) -> t_value = 0 :: else fi
        fi;
        /* Whatever was allowed when it began, or was sent since. */
        expect (t_value, x, may[x] | (invoked & ~sent_before));
        may[x] = 0;
        x++
      }
    :: else -> break
    od;
    skip;
    /* Another run: the lock is let go, and taken again. */
#ifndef BREAK_4_READS_UNLOCKED
    d_step { sharers--; place = 0; state = 0 };
#endif
    if
    :: x < to -> d_step { MAY_SHARE -> sharers++; s++ }
    :: else
    fi
  :: else -> break
  od
}

/*----------------------------------------------------------------------
 * Freezing and releasing
 */

#if NFREEZE > 0

/* Is the request OP, of RANGE, whole or not there at all in what was frozen? */
inline expect_whole (f, op, range)
{
  t_y = 0;
  for (t_x : FIRST (range) .. STOP (range) - 1) {
    if
    :: seen[f * 8 + t_x] == (op == OP_ZERO -> 0 : VALUE (op, SLOT_OF (t_x))) &&
         !(op == OP_ZERO && (allowed[t_x] & 1 << OP_ZERO_BEFORE)) ->
      t_y = 1
    :: else
    fi
  };
  if
  :: t_y && (invoked & 1 << op) ->
    for (t_x : FIRST (range) .. STOP (range) - 1) {
      t_value = seen[f * 8 + t_x];
      if
      :: t_value != 0 && (older[op] & (1 << ((t_value - 1) / 2))) ->
        WRONG (request_frozen_half_done)
      :: else
      fi
    }
  :: else
  fi;
  skip
}

/* Under the exclusive request lock.  One step (c): all that it looks at and
 * changes is looked at under the request lock by everybody else.
 */
inline freeze (f)
{
  frozen_root[f] = live;
  held[f] = true;
  nr_frozen++;
  generation++;
  newest = f + 1;
  for (t_root : 0 .. 7) {
    look_at_byte (live, t_root);
    expect (t_value, t_root, allowed[t_root]);
    seen[f * 8 + t_root] = t_value
  };
#ifdef WRITE_A
  expect_whole (f, OP_A, WRITE_A);
#endif
#ifdef WRITE_B
  expect_whole (f, OP_B, WRITE_B);
#endif
#ifdef WRITE_C
  expect_whole (f, OP_C, WRITE_C);
#endif
#ifdef ZERO
  expect_whole (f, OP_ZERO, ZERO);
#endif
}

/* Whoever reads a frozen map takes no lock; this may happen at any time while
 * it is held.  One step suffices to see any change that is ever there.
 */
inline read_frozen (f)
{
  for (t_root : 0 .. 7) {
    look_at_byte (frozen_root[f], t_root);
    if
    :: t_value == seen[f * 8 + t_root]
    :: else -> WRONG (frozen_map_changed)
    fi
  };
  skip
}

/* Unlink F; its older and newer neighbour's roots are left in old_root and
 * new_root.  Under the exclusive request lock, one step (c).
 */
inline unlink (f)
{
  held[f] = false;
  old_root = 0;
  newest = 0;
  t_x = 0;
  do
  :: t_x < NFREEZE ->
    if :: held[t_x] -> newest = t_x + 1 :: else fi;
    if :: t_x < f && held[t_x] -> old_root = frozen_root[t_x] :: else fi;
    t_x++
  :: else -> break
  od;
  new_root = live;
  is_live = true;
  t_x = NFREEZE;
  do
  :: t_x > f + 1 ->
    t_x--;
    if
    :: held[t_x] -> new_root = frozen_root[t_x]; is_live = false
    :: else
    fi
  :: else -> break
  od;
  my_root = frozen_root[f];
  frozen_root[f] = 0;
  for (t_x : 0 .. 7) { seen[f * 8 + t_x] = 0 }
#ifdef BREAK_F_ONE_NEIGHBOUR
  old_root = 0
#endif
}

#ifdef BREAK_F_LIVE_ROOT
#define NEW_ROOT (is_live -> live : new_root)
#else
#define NEW_ROOT new_root
#endif

/* The newer neighbour has the same place, and the older one has not: blocks of
 * it that the neighbour does not have allocated (they were zeroed when the place
 * was shared, and so not punched) are nobody's any more.  What rule 6 does,
 * but for the map that is now the next one, which may have been frozen since.
 */
inline punch_rest ()
{
  if
  :: rest != 0 ->
#ifndef BREAK_F_REST_NO_SLOT_LOCK
    atomic { !slot_lock[STRIPE_OF (s)] -> slot_lock[STRIPE_OF (s)] = true };
#endif
    d_step { MAY_SHARE -> sharers++ };
    d_step {
      /* Under both locks neither the list (d) nor the pair changes (c). */
      t_root = live;
      t_x = NFREEZE;
      do
      :: t_x > f + 1 -> t_x--; if :: held[t_x] -> t_root = frozen_root[t_x] :: else fi
      :: else -> break
      od;
      look_at_place (t_root, s);
      if
      :: t_y == leaf[my_leaf].place[s] ->
        p = t_y;
        rest = rest & ~ALLOCATED (leaf[t_leaf].state[s])
      :: else -> rest = 0
      fi
    };
    do
    :: rest != 0 ->
      d_step {
        t_x = (rest & 1 -> 0 : 2);
        file[AT (p, t_x)] = 0;
        file[AT (p, t_x + 1)] = 0;
        rest = rest & ~(1 << (t_x / 2))
      }
    :: else -> break
    od;
    skip;
    d_step {
      p = 0;
      sharers--;
#ifndef BREAK_F_REST_NO_SLOT_LOCK
      slot_lock[STRIPE_OF (s)] = false
#endif
    }
  :: else
  fi
}

/* Give back what neither neighbour has.  Holds the release lock, and no other.
 * The nodes of my_root that are in no neighbour, and all of old_root, do not
 * change any more (d).  Those of new_root may, if it was live: each look at
 * them is a step.
 */
inline walk ()
{
  if
  :: my_root == 0 || my_root == old_root -> goto walked
  :: else -> if :: my_root == NEW_ROOT -> goto walked :: else fi
  fi;
  l = 0;
  do
  :: l < LEAVES ->
    d_step {
      CHECK_ROOT (my_root);
      my_leaf = root[my_root].child[l];
      old_leaf = 0;
      if
      :: old_root != 0 -> CHECK_ROOT (old_root); old_leaf = root[old_root].child[l]
      :: else
      fi;
      new_leaf = 0;
      t_root = NEW_ROOT;
      if
      :: t_root != 0 -> CHECK_ROOT (t_root); new_leaf = root[t_root].child[l]
      :: else
      fi
    };
    if
    :: my_leaf == 0 || my_leaf == old_leaf || my_leaf == new_leaf
    :: else ->
      s = l;
      do
      :: s < 2 ->
        d_step {
          CHECK_LEAF (my_leaf);
          p = leaf[my_leaf].place[s];
          if
          :: old_leaf != 0 ->
            CHECK_LEAF (old_leaf);
            if :: leaf[old_leaf].place[s] == p -> p = 0 :: else fi
          :: else
          fi;
          rest = 0;
#ifdef BREAK_F_LIVE_ROOT_FOR_PLACES
          if
          :: is_live -> CHECK_ROOT (live); new_leaf = root[live].child[l]
          :: else
          fi;
#endif
          if
          :: new_leaf != 0 ->
            CHECK_LEAF (new_leaf);
            if
            :: leaf[new_leaf].place[s] == p ->
#ifdef PUNCH_REST
              if
              :: p != 0 ->
                rest = ALLOCATED (leaf[my_leaf].state[s]) &
                       ~ALLOCATED (leaf[new_leaf].state[s])
              :: else
              fi;
#endif
              p = 0
            :: else
            fi
          :: else
          fi
        };
        if
        :: p != 0 ->
#ifdef BREAK_F_NOT_PUNCHED
          d_step { give_back_place (p) };
#elif defined BREAK_F_PUNCHED_LATE
          d_step { give_back_place (p) };
          d_step { punch_place (p) };
#else
          d_step { punch_place (p) };
          d_step { give_back_place (p) };
#endif
          p = 0
        :: else
        fi;
#ifdef PUNCH_REST
        punch_rest ();
#endif
        s = s + LEAVES
      :: else -> s = 0; break
      od;
      skip;
      d_step { free_leaf (my_leaf) }
    fi;
    d_step { my_leaf = 0; old_leaf = 0; new_leaf = 0 };
    l++
  :: else -> break
  od;
  skip;
  d_step { free_root (my_root) };
walked:
  skip;
  d_step { my_root = 0; old_root = 0; new_root = 0; is_live = false; l = 0 };
  skip
}

/* A view.  They are all alike, so the one with the lower NR may freeze first. */
proctype view (byte nr)
{
  byte f;
  byte my_root, old_root, new_root, my_leaf, old_leaf, new_leaf, l, s, p, rest;
  bool is_live;

  d_step { nr_views == nr -> waiting++ };
  d_step { MAY_FREEZE -> waiting--; nr_views++; f = nr_frozen; freeze (f) };

  d_step { read_frozen (f) };

#ifndef BREAK_F_NO_RELEASE_LOCK
  atomic { !release_lock -> release_lock = true };
#endif
  waiting++;
  d_step { MAY_UNLINK -> waiting--; unlink (f) };
  walk ();
#ifndef BREAK_F_NO_RELEASE_LOCK
  release_lock = false
#endif
}

#ifdef END
/* The final save: freezes, and closes the overlay in the same hold.  Its frozen
 * map is held until the model's end.
 */
proctype ender ()
{
  byte f;

  waiting++;
  d_step {
    MAY_FREEZE ->
    waiting--;
    f = nr_frozen;
    freeze (f);
#ifndef BREAK_7_CLOSED_LATER
    closed = true
#endif
  };
#ifdef BREAK_7_CLOSED_LATER
  waiting++;
  d_step { MAY_EXCLUDE -> waiting--; closed = true };
#endif
  d_step { read_frozen (f) }
}
#endif
#endif

/*----------------------------------------------------------------------
 * Start and end
 */

inline begin_slot (s, initial)
{
  leaf[1 + LEAF_OF (s)].state[s] = initial;
  if
  :: ALLOCATED (initial) ->
    leaf[1 + LEAF_OF (s)].place[s] = s + 1;
    taken[s + 1] = true
  :: else
  fi;
  for (t_x : 4 * (s) .. 4 * (s) + 3) {
    allowed[t_x] = 1 << OP_BASE;
    if
    :: ALLOCATED (initial) & BLOCK_OF (t_x) ->
      allowed[t_x] = 1 << OP_BEFORE;
      file[AT (s + 1, t_x)] = VALUE (OP_BEFORE, s)
    :: else ->
      if
      :: ZERO_BLOCKS (initial) & BLOCK_OF (t_x) -> allowed[t_x] = 1 << OP_ZERO_BEFORE
      :: else
      fi
    fi
  };
  skip
}

/* Mark what the map of root R has. */
inline mark (r)
{
  if
  :: r != 0 && !(marked_roots & 1 << r) ->
    marked_roots = marked_roots | 1 << r;
    for (t_x : 0 .. LEAVES - 1) {
      t_leaf = root[r].child[t_x];
      if
      :: t_leaf != 0 ->
        marked_leaves = marked_leaves | 1 << t_leaf;
        for (t_y : 0 .. 1) {
          marked_places = marked_places | 1 << leaf[t_leaf].place[t_y]
        }
      :: else
      fi
    }
  :: else
  fi;
  skip
}

hidden short marked_roots, marked_leaves, marked_places;

inline final_checks ()
{
  for (t_root : 0 .. 7) {
    look_at_byte (live, t_root);
    expect (t_value, t_root, allowed[t_root])
  };
  if
  :: sharers || waiting || release_lock || slot_lock[0] || slot_lock[STRIPES - 1] ->
    WRONG (lock_left_held)
  :: else
  fi;

  marked_roots = 0; marked_leaves = 0; marked_places = 0;
  mark (live);
#ifdef END
  t_bits = 0;
  do
  :: t_bits < NFREEZE ->
    if
    :: held[t_bits] ->
      read_frozen (t_bits);
      /* The image has all that was acknowledged. */
      for (t_root : 0 .. 7) {
        t_value = seen[t_bits * 8 + t_root];
        if
        :: t_value == 0 && !(allowed[t_root] & ZEROES) -> WRONG (not_in_the_final_image)
        :: t_value != 0 && !(allowed[t_root] & 1 << ((t_value - 1) / 2)) ->
          WRONG (not_in_the_final_image)
        :: else
        fi
      };
      mark (frozen_root[t_bits])
    :: else
    fi;
    t_bits++
  :: else -> break
  od;
#endif

  for (t_x : 1 .. NROOT) {
    if
    :: root[t_x].used != (marked_roots >> t_x & 1) -> WRONG (node_leaked)
    :: else
    fi
  };
  for (t_x : 1 .. NLEAF) {
    if
    :: leaf[t_x].used != (marked_leaves >> t_x & 1) -> WRONG (node_leaked)
    :: else
    fi
  };
  for (t_x : 1 .. NPLACE) {
    if
    :: taken[t_x] && !(marked_places >> t_x & 1) -> WRONG (place_leaked)
    :: !taken[t_x] && (marked_places >> t_x & 1) -> WRONG (place_given_back_in_use)
    :: else
    fi
  };
#ifdef SPACE
  for (t_root : 0 .. 7) {
    look_at_place (live, SLOT_OF (t_root));
    if
    :: t_y != 0 && !(ALLOCATED (leaf[t_leaf].state[SLOT_OF (t_root)]) & BLOCK_OF (t_root)) ->
      if
      :: file[AT (t_y, t_root)] == 0 || file[AT (t_y, t_root)] == JUNK
      :: else -> WRONG (punched_bytes_leaked)
      fi
    :: else
    fi
  };
#endif
  skip
}

init {
  atomic {
    d_step {
      if
      :: INIT0 != 0 || INIT1 != 0 ->
        live = 1;
        root[1].used = true;
        root[1].generation = 1;
        for (t_x : 0 .. LEAVES - 1) {
          root[1].child[t_x] = 1 + t_x;
          leaf[1 + t_x].used = true;
          leaf[1 + t_x].generation = 1
        }
      :: else
      fi;
      begin_slot (0, INIT0);
      begin_slot (1, INIT1);
      done = 1 << OP_BASE | 1 << OP_BEFORE | 1 << OP_ZERO_BEFORE
    };
#ifdef WRITE_A
    run request (OP_A, WRITES, FIRST (WRITE_A), STOP (WRITE_A));
#endif
#ifdef WRITE_B
    run request (OP_B, WRITES, FIRST (WRITE_B), STOP (WRITE_B));
#endif
#ifdef WRITE_C
    run request (OP_C, WRITES, FIRST (WRITE_C), STOP (WRITE_C));
#endif
#ifdef ZERO
    run request (OP_ZERO, ZEROES_BLOCKS, FIRST (ZERO), STOP (ZERO));
#endif
#ifdef KEEP
    run request (OP_BASE, KEEPS, FIRST (KEEP), STOP (KEEP));
#endif
#ifdef READ
    run reader (FIRST (READ), STOP (READ));
#endif
#if VIEWS > 0
    run view (0);
#endif
#if VIEWS > 1
    run view (1);
#endif
#if VIEWS > 2
    run view (2);
#endif
#ifdef END
    run ender ();
#endif
  };
  _nr_pr == 1 ->
  d_step { final_checks () }
}
