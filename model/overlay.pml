/* SPDX-License-Identifier: BSD-3-Clause */

/* The protocol of an overlay: what requests, freezes, releases and the cleaner do
 * to the map, to the addresses of the log and to its bytes, and which locks they
 * hold meanwhile.
 *
 * Checked exhaustively by spin, see README for what is modelled and how it is
 * run.  The rules are those of HACKING ("What makes it correct", "Freezing");
 * comments call them by number, and F stands for "Freezing".
 *
 * The disk has SLOTS slots of BLOCKS blocks of BYTES bytes.  The log has NADDR
 * addresses, each of which takes one block.  The tree is a root, LEAVES leaves, and
 * below them address nodes, one for each slot that is spread.
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
 * digits, first and end: 13 is bytes 1 and 2.
 *
 *   WRITE_A, WRITE_B, WRITE_C=range   a client writes
 *   ZERO=range                        a client zeroes or trims
 *   SPACE=range                       instead of that: a client zeroes, and the
 *                                     space is kept
 *   READ=range                        a client reads
 *   KEEP=range                        cow-on-read or a prefetch keeps holes
 *   VIEWS=n                           freeze and release, n times
 *   END                               the final freeze, which closes
 *   DROP                              the live map is thrown away when all
 *                                     requests have ended
 *   CLEAN=n                           the cleaner goes round, n times, and
 *                                     whenever a request waits for it.  If there
 *                                     is none, a request that gets no address
 *                                     fails at once
 *   SCRIPT                            one client writes and zeroes by turns
 *
 * and how it starts:
 *
 *   INIT0, INIT1    state words of the slots: bit b: block b is allocated; bit
 *                   b + BLOCKS: it is zero
 *   SPREAD          the slots that are allocated at the start are spread
 *   STRIPES         slot locks: 1 (both slots have the same) or 2
 *   LEAVES          leaves: 1 (both slots are in the same) or 2
 *   ZERO_LEAF       a leaf that becomes zero before it was ever touched becomes
 *                   the constant leaf (each leaf has one slot then)
 *   NADDR           addresses of the log
 *   ANY_ADDRESS     a request may get any free address, or none, at its first
 *                   try; else the first one
 *   WINDOW          the cleaner punches free addresses with the others
 *   NEVER_FULL      a request that fails for want of space is a mistake
 *   NODE_REUSE      a freed node is given out again at once.  Else it never
 *                   is, so that any use of it is noticed
 *
 * BREAK_... breaks one rule each; see check.
 */

#ifndef SLOTS
#define SLOTS 1
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
#ifndef BYTES
#define BYTES 2
#endif
#ifndef STRIPES
#define STRIPES 1
#endif
#ifndef LEAVES
#define LEAVES 1
#endif
#ifndef NADDR
#define NADDR 5
#endif
#ifndef INIT0
#define INIT0 3
#endif
#ifndef INIT1
#define INIT1 0
#endif
#ifndef VIEWS
#define VIEWS 0
#endif
#ifndef CLEAN
#define CLEAN 0
#endif
#ifdef END
#define NFREEZE (VIEWS + 1)
#else
#define NFREEZE VIEWS
#endif

#define NBLOCK (SLOTS * BLOCKS)
#define NBYTE (NBLOCK * BYTES)
#define SLOT_BYTES (BLOCKS * BYTES)

/* A node is copied at most once for each freeze, an address node made once more.
 * (One more, so that the model does not come to its end where a broken rule
 * copies twice.)
 */
#define NROOT (NFREEZE + 2)
#define NLEAF (LEAVES * (NFREEZE + 1) + 1)
#define NSPREAD (SLOTS * (NFREEZE + 2) + 1)
#define CONSTANT (NLEAF + 1) /* the leaf all of whose blocks are zero */

/* What the scripted client sends again and again. */
#ifdef SCRIPT
#define SCRIPTED (1 << OP_A | 1 << OP_ZERO)
#else
#define SCRIPTED 0
#endif

#define FIRST(range) ((range) / 10)
#define STOP(range) ((range) % 10)

/* Who wrote a byte. */
#define OP_BASE 0   /* it is the base's */
#define OP_BEFORE 1 /* it was written before the model starts */
#define OP_A 2
#define OP_B 3
#define OP_C 4
#define OP_ZERO 5
#define OP_ZERO_BEFORE 6
#define ZEROES (1 << OP_ZERO | 1 << OP_ZERO_BEFORE)

/* The value of a byte of the file tells who wrote it and for which block. */
#define VALUE(op, block) (1 + NBLOCK * (op) + (block))
#define OP_OF(value) (((value) - 1) / NBLOCK)
#define BLOCK_IN(value) (((value) - 1) % NBLOCK)
#define JUNK 255 /* never written, punched, or given out and not yet written to */

#define ALL ((1 << BLOCKS) - 1)
#define ALLOCATED(state) ((state) & ALL)
#define ZERO_BLOCKS(state) ((state) >> BLOCKS)
#define HOLES(state) (ALL & ~(ALLOCATED (state) | ZERO_BLOCKS (state)))
#define SLOT_OF(x) ((x) / SLOT_BYTES)
#define BLOCK_OF(x) ((x) / BYTES)                /* of the disk */
#define IN_SLOT(x) (((x) % SLOT_BYTES) / BYTES)  /* which block of its slot */
#define BIT_OF(x) (1 << IN_SLOT (x))
#define AT(address, x) ((address) * BYTES + (x) % BYTES)
#define LEAF_OF(s) ((s) % LEAVES)
#define STRIPE_OF(s) ((s) % STRIPES)

/*----------------------------------------------------------------------
 * The overlay
 */

/* The second word of a slot.  0: no block was ever allocated.  1 .. 15: it is
 * spread, this is its node.  Else a run: block b lies at base + b; the base of a
 * slot whose block 0 is not allocated may lie in front of the log's first address.
 */
#ifdef BREAK_1_NO_CHANGE_COUNT
#define RUN(base, count) (16 + BLOCKS + (base))
#else
#define RUN(base, count) (16 + BLOCKS + (base) + ((count) % 7) * 32)
#endif
#define IS_SPREAD(w) ((w) > 0 && (w) < 16)
#define IS_RUN(w) ((w) >= 16)
#define COUNT_OF(w) (((w) - 16) / 32)
#define BIASED_BASE(w) (((w) - 16) % 32)
/* May wrap below 0; adding a block's number makes it right again. */
#define BASE_OF(w) (BIASED_BASE (w) - BLOCKS)

typedef root_node {
  bool used;           /* neither free nor never made */
  byte generation;
  byte child[LEAVES];  /* 0: none */
};

typedef leaf_node {
  bool used;
  byte generation;
  byte where[SLOTS]; /* if LEAVES is 2, each has one of them unused */
  byte state[SLOTS];
};

typedef spread_node {
  bool used;
  byte generation;
  byte address[BLOCKS];
};

root_node root[NROOT + 1]; /* [0] is not used */
leaf_node leaf[NLEAF + 2];
spread_node spread[NSPREAD + 1];
byte live;                 /* root of the live map; 0: none yet */
byte generation = 1;
bool dropped;              /* the live map is gone */

byte file[(NADDR + 1) * BYTES];

/* The states of an address.  The allocator's lock guards them. */
#define FREE 0
#define OWNED 1
#define WAITING 2
#define TAKEN 3
byte address_is[NADDR + 1];

short dead; /* the live map's dead list: a bit for each address.  Its own lock */

#if NFREEZE > 0
byte nr_frozen;            /* how often was frozen; frozen map i is of
                            * generation i + 1 */
byte nr_views;             /* ghost: how many of those were views */
bool held[NFREEZE];        /* is the frozen map still held? */
byte frozen_root[NFREEZE];
short frozen_dead[NFREEZE];
byte seen[NFREEZE * NBYTE]; /* ghost: the disk as it was when it was frozen */
#endif
byte newest;               /* generation of the newest frozen map that is
                            * held; 0: there is none */
bool closed;

/*----------------------------------------------------------------------
 * Locks and grace
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

/* Grace (rule 6).  A request counts itself in the phase that it found, from before
 * its first look at the map until it uses no address any more.
 */
bit phase;
byte under_way[2];

inline count_in (p)
{
#if CLEAN > 0
  d_step { p = phase };
  d_step { under_way[p]++ }
#else
  skip
#endif
}

/* With the step that lets the request lock go (e). */
inline count_out (p)
{
#if CLEAN > 0
  under_way[p]--
#else
  skip
#endif
}

/* The cleaner's own lock guards these. */
byte rounds_begun, rounds_done;
bool round_asked;
bool busy; /* a round is under way */
bool left; /* no other one begins */
bool cut;  /* the end of the server has waited for that: the file is not ours any more */

/* The view lock.  Who holds it shared knows whether the file is still ours, and uses it
 * without the request lock.
 */
byte file_users;

inline use_file ()
{
#if defined END && !defined BREAK_7_FILE_IN_USE_AFTER_END
  d_step {
    ours = !cut;
    if :: ours -> file_users++ :: else fi
  }
#else
  ours = true
#endif
}

inline let_file_go ()
{
#if defined END && !defined BREAK_7_FILE_IN_USE_AFTER_END
  d_step {
    if :: ours -> file_users-- :: else fi;
    ours = false
  }
#else
  ours = false
#endif
}

/* Wait for a round that begins after this (rule 10).  Holds no lock, and is not counted. */
inline wait_for_round ()
{
#ifdef BREAK_10_ANY_ROUND
  d_step { wanted = rounds_done + 1; round_asked = true };
#else
  d_step { wanted = rounds_begun + 1; round_asked = true };
#endif
#ifdef BREAK_10_WAITS_FOR_EVER
  d_step { rounds_done >= wanted -> wanted = 0 }
#else
  d_step { (rounds_done >= wanted || left) -> wanted = 0 }
#endif
}

/*----------------------------------------------------------------------
 * Ghosts: what NBD allows to be read
 *
 * allowed[x] has a bit for each operation whose byte X may be what a read sees
 * that starts now: those that are under way, and those that are done, unless
 * another one began after them and is done too.
 */

byte allowed[NBYTE];
byte done;     /* operations that were acknowledged */
byte invoked;  /* operations that were sent */
byte older[7]; /* for each, those that were done when it was sent */
byte running;  /* requests that have not ended */

/* Names for what goes wrong, as spin prints the text of an assertion.  They
 * are never set.
 */
hidden byte acknowledged_write_lost, foreign_byte, unwritten_byte,
  frozen_map_changed, request_frozen_half_done, node_used_after_free,
  node_freed_twice, address_freed_twice, address_leaked, address_freed_in_use,
  node_leaked, lock_left_held, address_out_of_the_log,
  not_in_the_final_image, end_of_the_model, dead_twice, no_space_though_freed,
  punched_after_the_end;
#define WRONG(what) assert (what)

/* Scratch, good within one step. */
hidden byte t_x, t_y, t_root, t_leaf, t_state, t_value, t_where, t_mask, t_s, t_at;
hidden short t_owned;

/* VALUE is what somebody sees of byte X: is that one of the operations OPS? */
inline expect (value, x, ops)
{
  if
  :: value == 0 -> if :: (ops) & ZEROES :: else -> WRONG (acknowledged_write_lost) fi
  :: value == JUNK -> WRONG (unwritten_byte)
  :: else ->
    if :: BLOCK_IN (value) == BLOCK_OF (x) :: else -> WRONG (foreign_byte) fi;
    if :: (ops) & (1 << OP_OF (value)) :: else -> WRONG (acknowledged_write_lost) fi
  fi;
  skip
}

#define CHECK_ROOT(r) if :: root[r].used :: else -> WRONG (node_used_after_free) fi
#define CHECK_LEAF(l) if :: leaf[l].used :: else -> WRONG (node_used_after_free) fi
#define CHECK_SPREAD(n) if :: spread[n].used :: else -> WRONG (node_used_after_free) fi

/* The address of block B of a slot whose second word is W, in t_y.  Within one
 * step.
 */
inline look_at_address (w, b)
{
  if
  :: IS_SPREAD (w) -> CHECK_SPREAD (w); t_y = spread[w].address[b]
  :: IS_RUN (w) -> t_y = BASE_OF (w) + (b)
  :: else -> t_y = 0
  fi;
  if :: t_y <= NADDR :: else -> WRONG (address_out_of_the_log) fi;
  skip
}

/* The leaf of slot S by the map of root R, or 0, in t_leaf.  Within one step. */
inline look_at_leaf (r, s)
{
  t_leaf = 0;
  if
  :: r != 0 ->
    CHECK_ROOT (r);
    t_leaf = root[r].child[LEAF_OF (s)];
    if :: t_leaf != 0 -> CHECK_LEAF (t_leaf) :: else fi
  :: else
  fi;
  skip
}

/* Byte X of the disk by the map of root R, in t_value.  Within one step. */
inline look_at_byte (r, x)
{
  t_value = VALUE (OP_BASE, BLOCK_OF (x));
  look_at_leaf (r, SLOT_OF (x));
  if
  :: t_leaf != 0 ->
    t_state = leaf[t_leaf].state[SLOT_OF (x)];
    t_where = leaf[t_leaf].where[SLOT_OF (x)];
    if
    :: ALLOCATED (t_state) & BIT_OF (x) ->
      look_at_address (t_where, IN_SLOT (x));
      t_value = file[AT (t_y, x)]
    :: else ->
      if :: ZERO_BLOCKS (t_state) & BIT_OF (x) -> t_value = 0 :: else fi
    fi
  :: else
  fi;
  skip
}

/* The address that the map of root R owns for block B of slot S, in t_y; 0: none.
 * Within one step.
 */
inline look_at_owned (r, s, b)
{
  t_y = 0;
  look_at_leaf (r, s);
  if
  :: t_leaf != 0 && leaf[t_leaf].state[s] & 1 << (b) ->
    t_where = leaf[t_leaf].where[s];
    look_at_address (t_where, b)
  :: else
  fi;
  skip
}

/* All addresses that the map of root R owns, in t_owned.  Within one step. */
inline look_at_all_owned (r)
{
  t_owned = 0;
  for (t_s : 0 .. SLOTS - 1) {
    for (t_x : 0 .. BLOCKS - 1) {
      look_at_owned (r, t_s, t_x);
      if :: t_y != 0 -> t_owned = t_owned | 1 << t_y :: else fi
    }
  };
  skip
}

/* Is block B of slot S, at ADDRESS, shared?  In t_y.  Within one step (d); the
 * caller holds the request lock.
 */
inline is_shared (s, b, address)
{
#if NFREEZE > 0
  if
  :: newest != 0 && (address) != 0 ->
    look_at_owned (frozen_root[newest - 1], s, b);
    t_y = (t_y == (address))
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
  older[op] = done & ~(1 << op);
  for (t_x : from .. to - 1) { allowed[t_x] = allowed[t_x] | 1 << op };
  skip
}

inline acknowledged ()
{
  for (t_x : from .. to - 1) { allowed[t_x] = allowed[t_x] & ~older[op] };
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
 * Nodes and addresses
 */

/* Make a node, t_y.  (Spin's inlines cannot be given an array, so it is a macro.)  A
 * node that was never used has no generation.
 */
#ifdef NODE_REUSE
#define IS_NO_NODE(node) (!node[t_y].used)
#else
#define IS_NO_NODE(node) (node[t_y].generation == 0)
#endif
#define FIND_NODE(node, last) \
  t_y = 1; \
  do \
  :: t_y > last -> WRONG (end_of_the_model) \
  :: t_y <= last && !IS_NO_NODE (node) -> t_y++ \
  :: else -> break \
  od; \
  node[t_y].used = true; \
  node[t_y].generation = generation

#define COPY_ROOT(from) \
  FIND_NODE (root, NROOT); \
  for (t_x : 0 .. LEAVES - 1) { root[t_y].child[t_x] = root[from].child[t_x] }

#define COPY_LEAF(from) \
  FIND_NODE (leaf, NLEAF); \
  for (t_x : 0 .. SLOTS - 1) { \
    leaf[t_y].where[t_x] = leaf[from].where[t_x]; \
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
  for (t_x : 0 .. SLOTS - 1) { leaf[l].where[t_x] = 0; leaf[l].state[t_x] = 0 };
  skip
}

inline free_spread (n)
{
  if :: spread[n].used :: else -> WRONG (node_freed_twice) fi;
  spread[n].used = false;
  for (t_x : 0 .. BLOCKS - 1) { spread[n].address[t_x] = 0 };
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
#ifdef BREAK_F_ZERO_LEAF_IN_PLACE
#define LEAF_IS_FROZEN(n) ((n) != CONSTANT && IS_FROZEN (leaf, n))
#else
#define LEAF_IS_FROZEN(n) ((n) == CONSTANT || IS_FROZEN (leaf, n))
#endif
#ifdef BREAK_F_SPREAD_IN_PLACE
#define SPREAD_IS_FROZEN(n) false
#else
#define SPREAD_IS_FROZEN(n) IS_FROZEN (spread, n)
#endif

/* Under the lock of the node above: look at the pointer again. */
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
inline touch_root ()
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
  od
}

inline touch (s)
{
  touch_root ();
  do
  :: d_step {
      CHECK_ROOT (n_root);
      n_leaf = root[n_root].child[LEAF_OF (s)];
      if :: n_leaf != 0 -> CHECK_LEAF (n_leaf) :: else fi
    };
    if
    :: !LEAF_IS_FROZEN (n_leaf) -> break
    :: else ->
      d_step {
        CHECK_ROOT (n_root);
        if
        :: LOOK_AGAIN (root[n_root].child[LEAF_OF (s)], n_leaf) ->
          COPY_LEAF (n_leaf);
          root[n_root].child[LEAF_OF (s)] = t_y;
#ifdef BREAK_F_NODE_FREED_BY_COPIER
          if :: n_leaf != 0 && n_leaf != CONSTANT -> free_leaf (n_leaf) :: else fi
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

/* Both words of slot S as one consistent pair, in `where' and `state', holding no
 * slot lock (rule 1).
 */
inline load_pair (s)
{
  find (s);
  where = 0;
  state = 0;
  if
  :: n_leaf != 0 ->
    d_step { CHECK_LEAF (n_leaf); state = leaf[n_leaf].state[s] };
    d_step { CHECK_LEAF (n_leaf); where = leaf[n_leaf].where[s] };
#ifndef BREAK_1_SINGLE_LOOK
    do
    :: d_step { CHECK_LEAF (n_leaf); again_state = leaf[n_leaf].state[s] };
      d_step {
        CHECK_LEAF (n_leaf);
        again_where = leaf[n_leaf].where[s];
        t_y = (again_state == state && again_where == where);
        state = again_state;
        where = again_where;
        again_state = t_y; /* is it consistent? */
        again_where = 0
      };
      if
      :: again_state -> again_state = 0; break
      :: else
      fi
    od
#endif
  :: else
  fi;
  n_leaf = 0
}

#ifdef BREAK_6_GIVES_OUT_WAITING
#define MAY_BE_TAKEN(a) (address_is[a] == FREE || address_is[a] == WAITING)
#else
#define MAY_BE_TAKEN(a) (address_is[a] == FREE)
#endif

/* Address t_y, which is free, is given out.  Within one step (allocator's lock). */
inline give_out ()
{
  address_is[t_y] = OWNED;
  for (t_x : 0 .. BYTES - 1) {
    file[t_y * BYTES + t_x] = JUNK /* rule 5: nothing relies on what it holds */
  };
  skip
}

/* Take an address: 0 if there is none. */
inline take_address (result)
{
#ifdef ANY_ADDRESS
  choice = 1;
  do
  :: choice < NADDR && !second_try -> choice++
  :: break
  od;
  skip;
  if
  :: !second_try ->
    d_step {
      if
      :: MAY_BE_TAKEN (choice) -> t_y = choice; result = t_y; give_out ()
      :: else -> result = 0
      fi;
      choice = 0
    }
  :: else -> choice = 0; take_first_address (result)
  fi
#else
  take_first_address (result)
#endif
}

inline take_first_address (result)
{
  d_step {
    t_y = 1;
    do
    :: t_y <= NADDR && !MAY_BE_TAKEN (t_y) -> t_y++
    :: else -> break
    od;
    if
    :: t_y <= NADDR -> result = t_y; give_out ()
    :: else -> result = 0
    fi
  }
}

/* From owned to waiting, under the allocator's lock.  Within one step. */
inline let_wait (a)
{
  if :: address_is[a] == OWNED :: else -> WRONG (address_freed_twice) fi;
#ifdef BREAK_6_NO_WAIT
  address_is[a] = FREE
#else
  address_is[a] = WAITING
#endif
}

/*----------------------------------------------------------------------
 * Requests that change something
 */

#define WRITES 0
#define ZEROES_BLOCKS 1
#define KEEPS 2
#define PROVIDES 3 /* zeroes, and keeps the space */

#define COVERS(x) (from <= (x) && (x) < to)
#define COVERS_SLOT(s) (from <= (s) * SLOT_BYTES && to >= ((s) + 1) * SLOT_BYTES)

/* Blocks of slot S that the request FROM .. TO-1 touches, and that it covers
 * wholly, in `touched' and `whole'.  Only this process's variables.
 */
inline find_blocks (s)
{
  touched = 0;
  whole = 0;
  for (t_x : 0 .. BLOCKS - 1) {
    t_y = (s) * SLOT_BYTES + t_x * BYTES;
    if :: from < t_y + BYTES && to > t_y -> touched = touched | 1 << t_x :: else fi;
    if :: from <= t_y && to >= t_y + BYTES -> whole = whole | 1 << t_x :: else fi
  };
  skip
}

/* Which blocks of slot S, whose pair is in `where' and `state', are shared?  Sets
 * `unlocked' to false if one is.  The addresses are looked at one by one: those of a
 * spread slot may be newer than the state.
 */
inline look_for_shared (s)
{
  b = 0;
  do
  :: b < BLOCKS ->
    if
    :: unlocked && (touched & ALLOCATED (state) & 1 << b) ->
      d_step {
        look_at_address (where, b);
        t_mask = t_y;
        is_shared (s, b, t_mask);
        if :: t_y -> unlocked = false :: else fi
      }
    :: else
    fi;
    b++
  :: else -> b = 0; break
  od;
  skip
}

/* The first look of a write, and if all its blocks are allocated and not shared,
 * the write itself (rule 4).  Sets `over' then.  Each slot is looked at three times: are
 * its blocks allocated, are some shared, and where do they lie?
 */
inline first_look ()
{
  d_step {
    MAY_SHARE ->
    if :: !second_try -> sent () :: else fi;
    if
    :: closed || dropped -> over = true; failed ()
    :: else -> sharers++
    fi
  };
  if
  :: !over ->
    count_in (my_phase);
#ifdef BREAK_F_SHARED_LOOKED_AT_BEFORE
    d_step {
      for (t_s : 0 .. NBLOCK - 1) {
        look_at_owned (live, t_s / BLOCKS, t_s % BLOCKS);
        t_mask = t_y;
        is_shared (t_s / BLOCKS, t_s % BLOCKS, t_mask);
        was_shared[t_s] = t_y
      }
    };
#endif
    unlocked = true;
#ifndef BREAK_4_NO_CHECK_OF_ALL
    s = SLOT_OF (from);
    do
    :: s <= last && unlocked ->
      load_pair (s);
      d_step {
        find_blocks (s);
        unlocked = ((touched & ~ALLOCATED (state)) == 0);
#ifdef BREAK_3_NO_SECOND_LOOK
        looked[s] = state;
#endif
        state = 0; where = 0; touched = 0; whole = 0;
        s++
      }
    :: else -> break
    od;
#ifndef BREAK_4_OVERWRITES_SHARED
    s = SLOT_OF (from);
    do
    :: s <= last && unlocked && newest != 0 ->
      load_pair (s);
      d_step { find_blocks (s) };
      look_for_shared (s);
      d_step { state = 0; where = 0; touched = 0; whole = 0; s++ }
    :: else -> break
    od;
#endif
#endif
    if :: unlocked -> overwrite () :: else fi;
    skip;
#ifdef BREAK_4_WAITS_HOLDING
    if
    :: unlocked ->
      d_step { sharers--; count_out (my_phase); acknowledged (); over = true; s = 0 }
    :: else -> d_step { count_out (my_phase); s = 0 }
    fi;
    unlocked = false
#else
    d_step {
      sharers--;
      count_out (my_phase);
      s = 0;
      if :: unlocked -> acknowledged (); over = true :: else fi;
      unlocked = false
    }
#endif
  :: else
  fi;
  skip
}

#ifdef BREAK_4_NO_CHECK_OF_ALL
#define UNLOCKED_STILL false
#else
#define UNLOCKED_STILL unlocked
#endif

/* Write the request's own bytes, one by one, to those of its blocks that are allocated
 * still.  Somebody may have made a block zero, or may do so meanwhile: then the bytes
 * count for nothing, and whoever allocates it again writes it whole, to another address,
 * as this one waits until this request has ended (rule 6).
 */
inline overwrite ()
{
#ifdef BREAK_6_COUNTS_OUT_EARLY
  under_way[my_phase]--;
#endif
  x = from;
  s = SLOT_OF (from);
  do
  :: x < to ->
    load_pair (s);
    do
    :: x < to && SLOT_OF (x) == s ->
      if
      :: ALLOCATED (state) & BIT_OF (x) ->
        d_step {
          look_at_address (where, IN_SLOT (x));
          address = t_y;
#ifdef BREAK_4_NO_CHECK_OF_ALL
          is_shared (s, IN_SLOT (x), address);
          if :: t_y -> unlocked = false :: else fi
#endif
        }
      :: else -> d_step { address = 0; unlocked = UNLOCKED_STILL }
      fi;
      if :: !unlocked -> break :: else fi;
#ifdef BREAK_4_LETS_GO_EARLY
      sharers--;
#endif
      do
      :: d_step {
          if :: address != 0 -> file[AT (address, x)] = VALUE (op, BLOCK_OF (x)) :: else fi;
          x++
        };
        if :: x >= to || x % BYTES == 0 -> break :: else fi
      od;
#ifdef BREAK_4_LETS_GO_EARLY
      MAY_SHARE -> sharers++;
#endif
      address = 0
    :: else -> break
    od;
    skip;
    d_step { where = 0; state = 0; s++ };
    if :: !unlocked -> break :: else fi
  :: else -> break
  od;
  skip;
  d_step { x = 0; address = 0; s = 0 };
#ifdef BREAK_6_COUNTS_OUT_EARLY
  under_way[my_phase]++;
#endif
}
inline lock_slots ()
{
#ifndef BREAK_2_UNLOCKED
#ifdef BREAK_2_DESCENDING
  if
  :: op == OP_B && SLOT_OF (from) == 0 && last == 1 ->
    atomic { !slot_lock[1] -> slot_lock[1] = true };
    atomic { !slot_lock[0] -> slot_lock[0] = true }
  :: else ->
#endif
  if
  :: STRIPES == 1 || SLOT_OF (from) == 0 ->
    atomic { !slot_lock[0] -> slot_lock[0] = true }
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
#ifndef BREAK_2_UNLOCKED
  if :: STRIPES == 1 || SLOT_OF (from) == 0 -> slot_lock[0] = false :: else fi;
#if STRIPES == 2
  if :: last == 1 -> slot_lock[1] = false :: else fi;
#endif
#endif
  skip
}

/* Decide what happens to slot S, whose pair was found under its lock.  Only
 * this process's variables, and what is constant in this hold (d).
 *
 *   write[s]      blocks of which bytes are written
 *   fresh[s]      those of them that get a fresh address
 *   bring[s]      blocks whose other bytes are brought along (rule 5)
 *   dies[s]       blocks whose old address the live map stops owning
 *   new_state[s]  the new state word
 */
inline decide (s)
{
  find_blocks (s);
  if
  :: kind == WRITES ->
    write[s] = touched;
    t_mask = 0
  :: kind == ZEROES_BLOCKS ->
    /* At its ends, what it does not cover wholly: written whole if it is a hole,
     * just the request's bytes if it is allocated.
     */
    t_mask = whole;
    write[s] = touched & ~t_mask & ~ZERO_BLOCKS (found[s])
  :: kind == PROVIDES ->
    write[s] = touched;
    t_mask = 0
  :: else ->
    t_mask = 0;
    write[s] = touched & HOLES (found[s])
  fi;
  new_state[s] = ((ALLOCATED (found[s]) & ~t_mask) | write[s]) |
                 ((ZERO_BLOCKS (found[s]) & ~write[s]) | t_mask) << BLOCKS;
  fresh[s] = 0;
  bring[s] = 0;
  dies[s] = 0;
  for (t_s : 0 .. BLOCKS - 1) {
    old[s * BLOCKS + t_s] = 0;
    is_dead_shared[s * BLOCKS + t_s] = false;
    if
    :: ALLOCATED (found[s]) & 1 << t_s ->
      t_where = found_where[s];
      look_at_address (t_where, t_s);
      old[s * BLOCKS + t_s] = t_y;
      is_shared (s, t_s, old[s * BLOCKS + t_s]);
#ifdef BREAK_F_SHARED_LOOKED_AT_BEFORE
      t_y = was_shared[s * BLOCKS + t_s];
#endif
      is_dead_shared[s * BLOCKS + t_s] = t_y
    :: else
    fi;
    if
    :: has_space[s] & 1 << t_s
    :: else -> new[s * BLOCKS + t_s] = old[s * BLOCKS + t_s]
    fi;
    if
    :: (write[s] & 1 << t_s) &&
         (!(ALLOCATED (found[s]) & 1 << t_s) || is_dead_shared[s * BLOCKS + t_s] ||
          (has_space[s] & 1 << t_s)) ->
#ifdef BREAK_F_OVERWRITES_SHARED
      if :: old[s * BLOCKS + t_s] == 0 -> fresh[s] = fresh[s] | 1 << t_s :: else fi
#elif defined BREAK_F_ZERO_OVERWRITES_SHARED
      if
      :: kind == ZEROES_BLOCKS && old[s * BLOCKS + t_s] != 0
      :: else -> fresh[s] = fresh[s] | 1 << t_s
      fi
#else
      fresh[s] = fresh[s] | 1 << t_s
#endif
    :: else
    fi;
    if
    :: old[s * BLOCKS + t_s] != 0 && ((fresh[s] | t_mask) & 1 << t_s) ->
      dies[s] = dies[s] | 1 << t_s
    :: else
    fi;
    if
    :: old[s * BLOCKS + t_s] != 0 && (fresh[s] & 1 << t_s) && !(whole & 1 << t_s) ->
#ifndef BREAK_5_BRINGS_NOTHING
      bring[s] = bring[s] | 1 << t_s
#endif
    :: else
    fi
  };
  touched = 0;
  whole = 0
}

/* What byte X of the disk gets at its new address, in t_value; t_y: does it get
 * something?
 */
inline byte_to_write (x)
{
  t_y = 1;
  t_mask = BIT_OF (x);
  if
  :: has_space[SLOT_OF (x)] & t_mask -> t_y = 0 /* its zeroes are there */
  :: !(has_space[SLOT_OF (x)] & t_mask) && (write[SLOT_OF (x)] & t_mask) && kind != KEEPS && COVERS (x) ->
    t_value = (kind == WRITES -> VALUE (op, BLOCK_OF (x)) : 0)
#ifdef BREAK_5_MERGED_COPY
  :: (write[SLOT_OF (x)] & ALLOCATED (found[SLOT_OF (x)]) & t_mask) && !COVERS (x) &&
       !(has_space[SLOT_OF (x)] & t_mask) ->
    t_value = merged[x]
#endif
  :: else ->
    if
    :: (bring[SLOT_OF (x)] & t_mask) ->
      t_value = file[AT (old[BLOCK_OF (x)], x)]
    :: !(bring[SLOT_OF (x)] & t_mask) &&
         (write[SLOT_OF (x)] & ~ALLOCATED (found[SLOT_OF (x)]) & t_mask) ->
      /* Rule 5: the rest of a block that becomes allocated. */
#ifdef BREAK_5_PARTIAL
      t_y = 0
#else
      t_value = (ZERO_BLOCKS (found[SLOT_OF (x)]) & t_mask -> 0 :
                 VALUE (OP_BASE, BLOCK_OF (x)))
#endif
    :: else -> t_y = 0
    fi
  fi;
  skip
}

inline write_all ()
{
  x = low * SLOT_BYTES;
  do
  :: x < (high + 1) * SLOT_BYTES ->
    d_step {
      byte_to_write (x);
      if
      :: t_y -> file[AT (new[BLOCK_OF (x)], x)] = t_value
      :: else
      fi;
      /* Up to the next one: only this process's variables. */
      do
      :: x++;
        if
        :: x >= (high + 1) * SLOT_BYTES -> break
        :: else -> byte_to_write (x); if :: t_y -> break :: else fi
        fi
      od
    }
  :: else -> break
  od;
  x = 0
}

/* Find what the second word of slot S becomes, in new_where[s]; new_where[s] ==
 * found_where[s]: it does not change.  A slot stays a run as long as what is
 * allocated in it fits base + i.  A spread node is made, or copied where a frozen map
 * may have it, and filled while nobody else sees it; one that is the live map's alone
 * is changed in place (in_place[s]), address by address.  Nothing fails any more.
 * One step: only this process's variables, and nodes that nobody else changes (c).
 */
inline find_where (s)
{
  in_place[s] = false;
  new_where[s] = found_where[s];
  if
  :: fresh[s] == 0
  :: fresh[s] != 0 && IS_SPREAD (found_where[s]) && !SPREAD_IS_FROZEN (found_where[s]) ->
    in_place[s] = true
  :: fresh[s] != 0 && !(IS_SPREAD (found_where[s]) && !SPREAD_IS_FROZEN (found_where[s])) ->
    /* Does a run do? */
    t_mask = 255;
    t_value = !IS_SPREAD (found_where[s]);
    for (t_x : 0 .. BLOCKS - 1) {
      if
      :: new_state[s] & 1 << t_x ->
        if
        :: t_mask == 255 -> t_mask = new[s * BLOCKS + t_x] + BLOCKS - t_x
        :: t_mask != 255 && t_mask != new[s * BLOCKS + t_x] + BLOCKS - t_x -> t_value = 0
        :: else
        fi
      :: else
      fi
    };
    if
    :: t_value && IS_RUN (found_where[s]) && BIASED_BASE (found_where[s]) == t_mask
    :: t_value && !(IS_RUN (found_where[s]) && BIASED_BASE (found_where[s]) == t_mask) ->
      new_where[s] = RUN (t_mask - BLOCKS, (IS_RUN (found_where[s]) ->
                                            COUNT_OF (found_where[s]) + 1 : 0))
    :: else ->
      FIND_NODE (spread, NSPREAD);
      for (t_x : 0 .. BLOCKS - 1) { spread[t_y].address[t_x] = new[s * BLOCKS + t_x] };
      new_where[s] = t_y
    fi
  fi;
  skip
}

/* Store what changed of slot S, in the order of rule 1: bits that stop being
 * allocated, addresses in the node, second word, bits that become allocated.  Only the
 * holder of the slot lock stores, but others load at any time.
 */
#define LATER(s) (ALLOCATED (new_state[s]) & ~ALLOCATED (found[s]))
#define BOTH(s) (LATER (s) | LATER (s) << BLOCKS)
#define BETWEEN(s) ((new_state[s] & ~BOTH (s)) | (found[s] & BOTH (s)))

inline store_state (s, value)
{
  if
  :: leaf[node[s]].state[s] != (value) ->
    d_step { CHECK_LEAF (node[s]); leaf[node[s]].state[s] = (value) }
  :: else
  fi
}

inline store_slot (s)
{
#ifdef ZERO_LEAF
  if
  :: zero_leaf[s] ->
    /* One store makes all of the leaf zero.  The root is the one that was touched. */
    d_step { CHECK_ROOT (live); root[live].child[LEAF_OF (s)] = CONSTANT };
    goto stored
  :: else
  fi;
#endif
#ifdef BREAK_1_STATE_FIRST
  store_state (s, new_state[s]);
#elif defined BREAK_1_CLEARS_LAST
  skip;
#else
  store_state (s, BETWEEN (s));
#endif
  if
  :: in_place[s] ->
    b = 0;
    do
    :: b < BLOCKS ->
      if
      :: fresh[s] & 1 << b ->
        d_step {
          CHECK_SPREAD (found_where[s]);
          spread[found_where[s]].address[b] = new[s * BLOCKS + b]
        }
      :: else
      fi;
      b++
    :: else -> b = 0; break
    od
  :: else
  fi;
  if
  :: new_where[s] != found_where[s] ->
    d_step { CHECK_LEAF (node[s]); leaf[node[s]].where[s] = new_where[s] }
  :: else
  fi;
  store_state (s, new_state[s]);
stored:
  skip
}

/* What the live map stopped owning: to the dead list if it was shared, else it
 * waits (rule 6).  Each is a step, under the lock of the list or of the allocator.
 */
inline bury (s)
{
  b = 0;
  do
  :: b < BLOCKS ->
    if
    :: dies[s] & 1 << b ->
      d_step {
#ifdef BREAK_6_FREES_SHARED
        if
        :: kind == ZEROES_BLOCKS -> is_dead_shared[s * BLOCKS + b] = false
        :: else
        fi;
#endif
        if
        :: is_dead_shared[s * BLOCKS + b] ->
          if
          :: dead & 1 << old[s * BLOCKS + b] -> WRONG (dead_twice)
          :: else -> dead = dead | 1 << old[s * BLOCKS + b]
          fi
        :: else -> let_wait (old[s * BLOCKS + b])
        fi
      }
    :: else
    fi;
    b++
  :: else -> b = 0; break
  od
}

/* What a try took is given back, when it has let go.  Nobody else knows these
 * addresses: one step.  They stay taken when the file is not ours any more.
 */
inline give_back ()
{
  use_file ();
  d_step {
    if :: ours && cut -> WRONG (punched_after_the_end) :: else fi;
    for (t_s : 0 .. NBLOCK - 1) {
      if
      :: ((fresh[t_s / BLOCKS] | has_space[t_s / BLOCKS]) & 1 << (t_s % BLOCKS)) &&
           new[t_s] != 0 && new[t_s] != old[t_s] ->
#ifndef BREAK_7_KEEPS_ADDRESS
        if
        :: ours ->
          for (t_x : 0 .. BYTES - 1) { file[new[t_s] * BYTES + t_x] = JUNK };
          address_is[new[t_s]] = FREE
        :: else -> address_is[new[t_s]] = TAKEN
        fi
#else
        skip
#endif
      :: else
      fi
    };
    skip
  };
#ifdef BREAK_7_FREED_BEFORE_PUNCHED
  d_step {
    for (t_s : 0 .. NBLOCK - 1) {
      if
      :: ((fresh[t_s / BLOCKS] | has_space[t_s / BLOCKS]) & 1 << (t_s % BLOCKS)) &&
           new[t_s] != 0 && new[t_s] != old[t_s] ->
        for (t_x : 0 .. BYTES - 1) { file[new[t_s] * BYTES + t_x] = JUNK }
      :: else
      fi
    };
    skip
  };
#endif
  let_file_go ()
}

/* The whole blocks of a zero that keeps its space get their addresses, and their zeroes,
 * before any lock is taken: nobody else knows of them.
 */
inline provide ()
{
  use_file ();
  if
  :: !ours -> d_step { failed (); over = true } /* ESHUTDOWN */
  :: else
  fi;
  s = SLOT_OF (from);
  do
  :: s <= last && !no_space && !over ->
    d_step { find_blocks (s); has_space[s] = whole; touched = 0; whole = 0 };
    b = 0;
    do
    :: b < BLOCKS && !no_space ->
      if
      :: has_space[s] & 1 << b ->
        take_address (new[s * BLOCKS + b]);
        d_step {
          if
          :: new[s * BLOCKS + b] == 0 -> no_space = true
          :: else ->
            if :: cut -> WRONG (punched_after_the_end) :: else fi;
            for (t_x : 0 .. BYTES - 1) { file[new[s * BLOCKS + b] * BYTES + t_x] = 0 }
          fi
        }
      :: else
      fi;
      b++
    :: else -> b = 0; break
    od;
    s++
  :: else -> s = 0; break
  od;
  let_file_go ()
}

/* Forget all of a try. */
inline forget ()
{
  d_step {
    for (t_x : 0 .. NBLOCK - 1) { old[t_x] = 0; new[t_x] = 0; is_dead_shared[t_x] = false };
    for (t_x : 0 .. SLOTS - 1) {
      found[t_x] = 0; found_where[t_x] = 0; new_state[t_x] = 0; new_where[t_x] = 0;
      write[t_x] = 0; fresh[t_x] = 0; bring[t_x] = 0; dies[t_x] = 0; in_place[t_x] = false;
      node[t_x] = 0; has_space[t_x] = 0; zero_leaf[t_x] = false
    };
    s = 0; low = 0; high = 0; my_phase = 0
  }
}

#ifdef BREAK_7_KEEPS_PROVIDED
#define GIVE_BACK_PROVIDED skip
#else
#define GIVE_BACK_PROVIDED give_back ()
#endif
#if CLEAN > 0 && !defined BREAK_10_NO_SECOND_TRY
#define MAY_TRY_AGAIN (!second_try)
#else
#define MAY_TRY_AGAIN false
#endif

/* One request, from its sending to its end. */
inline one_request ()
{
  last = SLOT_OF (to - 1);
try:
  if
  :: kind == WRITES -> first_look ()
#ifdef BREAK_3_NO_SECOND_LOOK
  :: kind == KEEPS ->
    d_step { MAY_SHARE -> sharers++ };
    load_pair (last);
    d_step { sharers--; looked[last] = state; state = 0; where = 0 }
#endif
  :: else
  fi;
  if :: over -> goto end :: else fi;

  /* Here the base is read, with no lock held (rule 3).  Its bytes are
   * always VALUE (OP_BASE, block), so there is nothing to do for it.
   */

#ifdef SPACE
  if :: kind == PROVIDES -> provide () :: else fi;
  if :: over -> goto end :: else fi;
  if :: no_space -> goto no_room :: else fi;
#endif
  lock_slots ();
#ifdef BREAK_4_WAITS_HOLDING
  if :: kind == WRITES -> sharers-- :: else fi;
#endif
  d_step {
    MAY_SHARE ->
    if
    :: kind == ZEROES_BLOCKS && !second_try -> sent ()
    :: kind == PROVIDES && !(invoked & 1 << op) -> sent ()
    :: else
    fi;
    if
#ifndef BREAK_7_CLOSED_LOOKED_AT_ONCE
    :: closed || dropped -> /* ESHUTDOWN */
      unlock_slots ();
      if :: kind != KEEPS -> failed () :: else fi;
      over = true
#endif
    :: else -> sharers++
    fi;
    low = SLOT_OF (from);
    high = last
  };
#ifdef SPACE
  if :: over -> GIVE_BACK_PROVIDED; goto end :: else fi;
#else
  if :: over -> goto end :: else fi;
#endif
  count_in (my_phase);

#ifdef BREAK_7_TWO_HOLDS
  high = low;
next_hold:
#endif
  /* The second look, at all slots. */
  s = low;
  do
#ifdef ZERO_LEAF
  :: s <= high && kind == ZEROES_BLOCKS && !looked_for_zero && COVERS_SLOT (s) ->
    /* Nobody else makes or changes this leaf: we have the locks of all its slots. */
    find (s);
    if
    :: n_leaf == 0 || n_leaf == CONSTANT ->
      touch_root ();
      skip;
      d_step { zero_leaf[s] = true; n_root = 0; n_leaf = 0; s++ }
    :: else -> looked_for_zero = true
    fi
  :: s <= high && !(kind == ZEROES_BLOCKS && !looked_for_zero && COVERS_SLOT (s)) ->
    looked_for_zero = false;
#else
  :: s <= high ->
#endif
    if :: s == low || LEAVES > 1 -> touch (s) :: else fi;
    d_step {
      /* Its words change under the slot lock only, which we hold (c). */
      CHECK_LEAF (n_leaf);
      node[s] = n_leaf;
      found[s] = leaf[n_leaf].state[s];
      found_where[s] = leaf[n_leaf].where[s];
#ifdef BREAK_3_NO_SECOND_LOOK
      if :: kind != ZEROES_BLOCKS -> found[s] = looked[s] :: else fi;
#endif
      decide (s)
    };
    s++
  :: else -> break
  od;
  skip;
  d_step { n_root = 0; n_leaf = 0 };

  /* Fresh addresses. */
  s = low;
  do
  :: s <= high && !no_space ->
    b = 0;
    do
    :: b < BLOCKS && !no_space ->
      if
      :: fresh[s] & ~has_space[s] & 1 << b ->
        take_address (new[s * BLOCKS + b]);
        if :: new[s * BLOCKS + b] == 0 -> no_space = true :: else fi
      :: else
      fi;
      b++
    :: else -> b = 0; break
    od;
    s++
  :: else -> break
  od;

  if
  :: no_space ->
    /* Rule 7: nothing has happened. */
#ifdef BREAK_10_WAITS_COUNTED_IN
    if :: MAY_TRY_AGAIN -> wait_for_round () :: else fi;
#endif
    d_step {
      sharers--;
      count_out (my_phase);
      unlock_slots ()
    };
    goto no_room
  :: else
  fi;

#ifdef BREAK_5_MERGED_COPY
  d_step {
    for (t_x : 0 .. NBYTE - 1) {
      merged[t_x] = file[AT (old[BLOCK_OF (t_x)], t_x)]
    }
  };
#endif
#ifdef BREAK_1_STATE_BEFORE_BYTES
  s = low;
  do
  :: s <= high -> d_step { find_where (s) }; store_slot (s); s++
  :: else -> break
  od;
  write_all ();
  s = low;
  do
  :: s <= high -> bury (s); s++
  :: else -> break
  od;
#else
  write_all ();
  s = low;
  do
  :: s <= high ->
#ifdef BREAK_6_BURIES_FIRST
    bury (s);
    skip;
#endif
    d_step { find_where (s) };
    store_slot (s);
#ifndef BREAK_6_BURIES_FIRST
    bury (s);
#endif
    s++
  :: else -> break
  od;
#endif
  skip;
#ifdef BREAK_7_TWO_HOLDS
  if
  :: high < last ->
    d_step { sharers--; count_out (my_phase) };
    d_step { MAY_SHARE -> sharers++; low++; high++ };
    count_in (my_phase);
    goto next_hold
  :: else
  fi;
#endif
  d_step {
    sharers--;
    count_out (my_phase);
    unlock_slots ();
    if :: kind != KEEPS -> acknowledged () :: else fi
  };
  goto end;
no_room:
  skip;
  d_step {
    no_space = false;
    if
    :: !MAY_TRY_AGAIN ->
#ifdef NEVER_FULL
      WRONG (no_space_though_freed);
#endif
      if :: kind != KEEPS -> failed () :: else fi
    :: else
    fi
  };
  give_back ();
  if
  :: MAY_TRY_AGAIN ->
    /* Once more (rule 10). */
#ifndef BREAK_10_WAITS_COUNTED_IN
    wait_for_round ();
#endif
    forget ();
    second_try = true;
    goto try
  :: else
  fi;
end:
  skip;
  forget ();
  d_step { over = false; second_try = false }
}

#define REQUEST_VARIABLES \
  byte s, b, x, n_root, n_leaf, where, state, again_state, again_where, choice; \
  byte touched, whole, address, last, low, high, wanted; \
  byte node[SLOTS]; \
  byte found[SLOTS], found_where[SLOTS], new_state[SLOTS], new_where[SLOTS]; \
  byte write[SLOTS], fresh[SLOTS], bring[SLOTS], dies[SLOTS], has_space[SLOTS]; \
  byte old[NBLOCK], new[NBLOCK]; \
  bool is_dead_shared[NBLOCK], in_place[SLOTS], zero_leaf[SLOTS]; \
  bool over, unlocked, no_space, second_try, looked_for_zero, ours; \
  bit my_phase

proctype request (byte op; byte kind; byte from; byte to)
{
  REQUEST_VARIABLES;
#ifdef BREAK_3_NO_SECOND_LOOK
  byte looked[SLOTS];
#endif
#ifdef BREAK_F_SHARED_LOOKED_AT_BEFORE
  bool was_shared[NBLOCK];
#endif
#ifdef BREAK_5_MERGED_COPY
  byte merged[NBYTE];
#endif

  one_request ();
  running--
}

#ifdef SCRIPT
/* One client that sends one request after the other: it zeroes block 0, writes
 * block 1, zeroes that, writes block 0, zeroes it, and writes block 2.  So the slot
 * is a run of one block again and again, and two of these can have the same base.
 * What it writes cannot be told from what it wrote before, so an old byte that is read
 * for a new one is not noticed; a foreign or an unwritten one is.
 */
#define SCRIPTED_BLOCK(step) \
  ((step) == 1 || (step) == 2 -> 1 : ((step) == 5 -> 2 : 0))

proctype scripted ()
{
  byte op, kind, from, to, step;
  REQUEST_VARIABLES;

  do
  :: step < 6 ->
    d_step {
      kind = (step % 2 == 0 -> ZEROES_BLOCKS : WRITES);
      op = (kind == WRITES -> OP_A : OP_ZERO);
      from = SCRIPTED_BLOCK (step) * BYTES;
      to = from + BYTES
    };
    one_request ();
    step++
  :: else -> break
  od;
  running--
}
#endif

/*----------------------------------------------------------------------
 * Reading
 */

proctype reader (byte from; byte to)
{
  byte s, b, x, n_root, n_leaf, where, state, again_state, again_where, address;
  byte may[NBYTE];
  byte sent_before;
  bit my_phase;

  d_step {
    MAY_SHARE ->
    sharers++;
    for (t_x : from .. to - 1) { may[t_x] = allowed[t_x] };
    sent_before = invoked;
    x = from;
    s = SLOT_OF (from)
  };
  do
  :: x < to ->
    count_in (my_phase);
    load_pair (s);
#ifdef BREAK_2_POINTER_OUTLIVES_HOLD
    sharers--;
    d_step { MAY_SHARE -> sharers++ };
#endif
    do
    :: x < to && SLOT_OF (x) == s ->
      /* The address is loaded once for the bytes of a block. */
      if
      :: ALLOCATED (state) & BIT_OF (x) ->
        d_step { look_at_address (where, IN_SLOT (x)); address = t_y }
      :: else
      fi;
#ifdef BREAK_4_READS_UNLOCKED
      skip;
      d_step { sharers--; count_out (my_phase) };
#endif
      do
      :: d_step {
          t_value = VALUE (OP_BASE, BLOCK_OF (x));
          if
          :: ALLOCATED (state) & BIT_OF (x) -> t_value = file[AT (address, x)]
          :: else ->
            if :: ZERO_BLOCKS (state) & BIT_OF (x) -> t_value = 0 :: else fi
          fi;
          /* Whatever was allowed when it began, or was sent since. */
          expect (t_value, x, may[x] | (invoked & ~sent_before) | SCRIPTED);
          may[x] = 0;
          x++
        };
        if :: x >= to || x % BYTES == 0 -> break :: else fi
      od;
#ifdef BREAK_4_READS_UNLOCKED
      skip;
      d_step { MAY_SHARE -> sharers++ };
      count_in (my_phase);
#endif
      address = 0
    :: else -> break
    od;
    skip;
    /* Another run: the lock is let go, and taken again. */
    d_step { sharers--; count_out (my_phase); my_phase = 0; where = 0; state = 0 };
    if
    :: x < to -> d_step { MAY_SHARE -> sharers++; s++ }
    :: else
    fi
  :: else -> break
  od;
  running--
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
    :: seen[f * NBYTE + t_x] == (op == OP_ZERO -> 0 : VALUE (op, BLOCK_OF (t_x))) &&
         !(op == OP_ZERO && (allowed[t_x] & 1 << OP_ZERO_BEFORE)) ->
      t_y = 1
    :: else
    fi
  };
  if
  :: t_y && (invoked & 1 << op) ->
    for (t_x : FIRST (range) .. STOP (range) - 1) {
      t_value = seen[f * NBYTE + t_x];
      if
      :: t_value != 0 && (older[op] & (1 << OP_OF (t_value))) ->
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
  frozen_dead[f] = dead;
  dead = 0;
  held[f] = true;
  nr_frozen++;
  generation++;
  newest = f + 1;
  for (t_at : 0 .. NBYTE - 1) {
    look_at_byte (live, t_at);
    expect (t_value, t_at, allowed[t_at] | SCRIPTED);
    seen[f * NBYTE + t_at] = t_value
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
#ifdef SPACE
  expect_whole (f, OP_ZERO, SPACE);
#endif
  skip
}

/* Whoever reads a frozen map takes no lock; this may happen at any time while
 * it is held.  One step suffices to see any change that is ever there.
 */
inline read_frozen (f)
{
  for (t_at : 0 .. NBYTE - 1) {
    look_at_byte (frozen_root[f], t_at);
    if
    :: t_value == seen[f * NBYTE + t_at]
    :: else -> WRONG (frozen_map_changed)
    fi
  };
  skip
}

/* Unlink F, in one exclusive hold of the request lock: one step (c).  Its older and newer
 * neighbour's roots are left in old_root and new_root.  `entries' is what it owns and its newer neighbour does not: that neighbour's list, which gets
 * F's own list in its place.  `nobody_newer': there is no neighbour.
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
  t_y = NFREEZE; /* which is the next newer one */
  t_x = NFREEZE;
  do
  :: t_x > f + 1 ->
    t_x--;
    if
    :: held[t_x] -> new_root = frozen_root[t_x]; t_y = t_x
    :: else
    fi
  :: else -> break
  od;
  my_root = frozen_root[f];
  frozen_root[f] = 0;
#ifdef BREAK_F_LIVE_ROOT
  is_live = (t_y == NFREEZE);
#endif
  nobody_newer = (t_y == NFREEZE && dropped);
  if
  :: nobody_newer ->
    entries = 0
#ifndef BREAK_F_DROPPED_BY_LIST
    ;
    look_at_all_owned (my_root);
    entries = t_owned;
    look_at_all_owned (old_root);
    entries = entries & ~t_owned
#endif
  :: !nobody_newer && t_y == NFREEZE -> entries = dead; dead = frozen_dead[f]
  :: else -> entries = frozen_dead[t_y]; frozen_dead[t_y] = frozen_dead[f]
  fi;
  frozen_dead[f] = 0;
#ifdef BREAK_F_NOTED_NEWER
  noted = t_y;
#endif
  for (t_x : 0 .. NBYTE - 1) { seen[f * NBYTE + t_x] = 0 };
  skip
}

/* What becomes of the entries that were taken: where the next older map, which does
 * not change, owns it, it goes on the list of whatever map is next newer now; else it
 * waits.
 */
inline pass_on (f)
{
  a = 1;
  do
  :: a <= NADDR && !(entries & 1 << a) -> a++
  :: a <= NADDR && (entries & 1 << a) ->
    d_step {
      MAY_SHARE ->
      sharers++
    };
    d_step {
      /* Under the shared request lock the list of maps does not change (d), and a
       * list of dead is changed under its own lock (b).
       */
      look_at_all_owned (old_root);
      if
#ifdef BREAK_F_FREES_OLDER
      :: false -> skip
#else
      :: t_owned & 1 << a ->
        t_y = NFREEZE;
        t_x = NFREEZE;
        do
        :: t_x > f + 1 -> t_x--; if :: held[t_x] -> t_y = t_x :: else fi
        :: else -> break
        od;
#ifdef BREAK_F_NOTED_NEWER
        t_y = noted;
#endif
        if
        :: t_y == NFREEZE && !dropped -> dead = dead | 1 << a
        :: t_y == NFREEZE && dropped /* the next release finds it by its walk */
        :: else -> frozen_dead[t_y] = frozen_dead[t_y] | 1 << a
        fi
#endif
      :: else -> let_wait (a)
      fi
    };
    sharers--;
    a++
  :: else -> a = 0; break
  od
}

#ifdef BREAK_F_LIVE_ROOT
#define NEW_ROOT (is_live -> live : new_root)
#else
#define NEW_ROOT new_root
#endif

/* Free the address nodes of my_leaf that are neither in old_leaf nor in new_leaf. */
inline free_spread_nodes (l)
{
  s = l;
  do
  :: s < SLOTS ->
    d_step {
      CHECK_LEAF (my_leaf);
      p = leaf[my_leaf].where[s];
      if :: IS_SPREAD (p) :: else -> p = 0 fi;
      if
      :: old_leaf != 0 ->
        CHECK_LEAF (old_leaf);
        if :: leaf[old_leaf].where[s] == p -> p = 0 :: else fi
      :: else
      fi;
      if
      :: new_leaf != 0 ->
        CHECK_LEAF (new_leaf);
        if :: leaf[new_leaf].where[s] == p -> p = 0 :: else fi
      :: else
      fi
    };
#ifdef BREAK_F_SPREAD_NOT_FREED
    p = 0;
#endif
    if :: p != 0 -> d_step { free_spread (p); p = 0 } :: else fi;
    s = s + LEAVES
  :: else -> s = 0; break
  od
}

/* Free the nodes that neither neighbour has.  Holds the release lock, and no other.
 * The nodes of my_root that are in no neighbour, and all of old_root, do not change any
 * more (d).  Those of new_root may, if it was live: each look at them is a step.
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
    :: my_leaf == 0 || my_leaf == old_leaf || my_leaf == new_leaf || my_leaf == CONSTANT
    :: else ->
      free_spread_nodes (l);
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
  d_step { my_root = 0; old_root = 0; new_root = 0; l = 0 }
}

/* A view.  They are all alike, so the one with the lower NR may freeze first. */
proctype view (byte nr)
{
  byte f, my_root, old_root, new_root, my_leaf, old_leaf, new_leaf, l, s, p, a;
  bool nobody_newer;
#ifdef BREAK_F_LIVE_ROOT
  bool is_live;
#endif
  short entries;
#ifdef BREAK_F_NOTED_NEWER
  byte noted;
#endif

  d_step { nr_views == nr -> waiting++ };
  d_step {
    MAY_FREEZE ->
    waiting--;
    nr_views++;
    if
    :: !dropped -> f = nr_frozen; freeze (f)
    :: else -> f = 255
    fi
  };
  if :: f == 255 -> goto end :: else fi;

  d_step { read_frozen (f) };

#ifndef BREAK_F_NO_RELEASE_LOCK
  atomic { !release_lock -> release_lock = true };
#endif
  waiting++;
  d_step { MAY_UNLINK -> waiting--; unlink (f) };
  pass_on (f);
#ifdef BREAK_F_ONE_NEIGHBOUR
  old_root = 0;
#endif
  walk ();
#ifndef BREAK_F_NO_RELEASE_LOCK
  release_lock = false;
#endif
end:
  skip
}

#ifdef END
/* The final save: freezes, and closes the overlay in the same hold, then ends the
 * cleaner.  Its frozen map is held until the model's end.
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
  left = true;
#ifdef BREAK_6_LEAVES_AT_ONCE
  d_step { file_users == 0 -> cut = true }
#else
  d_step { !busy && file_users == 0 -> cut = true }
#endif
}
#endif
#endif

/*----------------------------------------------------------------------
 * The cleaner
 */

#if CLEAN > 0

#define WAIT_FOR(p) atomic { under_way[p] == 0 -> skip }

/* Let all requests end that were under way when this was called.  One that has read
 * the phase but not counted yet counts itself in the old phase after that was
 * seen empty: it looks at the map only then, so it may not have what waits now; but
 * the next grace must not pass it over, and so begins by waiting for that phase.
 */
inline grace ()
{
#ifdef BREAK_6_NO_GRACE
  skip
#else
#ifndef BREAK_6_ONE_WAIT
  WAIT_FOR (1 - phase);
#endif
  phase = 1 - phase;
  WAIT_FOR (1 - phase)
#endif
}

/* Goes round CLEAN times whenever it likes, and whenever somebody waits for it. */
proctype cleaner ()
{
  byte a, round;
  short mine;

  do
  :: d_step {
      (!left && (round < CLEAN || round_asked)) ->
      busy = true;
      round_asked = false;
      rounds_begun++;
      if :: round < CLEAN -> round++ :: else fi
    };
    d_step {
      mine = 0;
      for (t_x : 1 .. NADDR) {
        if
        :: address_is[t_x] == WAITING -> address_is[t_x] = TAKEN; mine = mine | 1 << t_x
        :: else
        fi
      }
    };
    if :: mine == 0 -> goto next :: else fi;
    grace ();
#ifdef WINDOW
    /* What is free between is punched with the rest, and nobody's meanwhile. */
    d_step {
      for (t_x : 1 .. NADDR) {
        if
        :: address_is[t_x] == FREE ->
#ifndef BREAK_6_PUNCHES_FREE
          address_is[t_x] = TAKEN;
#endif
          mine = mine | 1 << t_x
        :: else
        fi
      }
    };
#endif
    a = 1;
    do
    :: a <= NADDR && !(mine & 1 << a) -> a++
    :: a <= NADDR && (mine & 1 << a) ->
      if :: left -> a = 0; break :: else fi;
#ifdef BREAK_6_FREED_BEFORE_PUNCHED
      d_step { address_is[a] = FREE };
#endif
      d_step {
        if :: cut -> WRONG (punched_after_the_end) :: else fi;
        for (t_x : 0 .. BYTES - 1) { file[a * BYTES + t_x] = JUNK };
        skip
      };
#if !defined BREAK_6_FREED_BEFORE_PUNCHED && !defined BREAK_6_PUNCHES_FREE
      d_step {
        if :: address_is[a] == TAKEN :: else -> WRONG (address_freed_twice) fi;
        address_is[a] = FREE
      };
#endif
#ifdef BREAK_6_PUNCHES_FREE
      d_step { if :: address_is[a] == TAKEN -> address_is[a] = FREE :: else fi };
#endif
      a++
    :: else -> a = 0; break
    od;
next:
    skip;
    d_step { mine = 0; rounds_done = rounds_begun; busy = false }
  :: left || (round >= CLEAN && !round_asked && running == 0) -> break
  od
}
#endif

/*----------------------------------------------------------------------
 * Throwing the live map away
 */

#ifdef DROP
/* When the last request has ended: what the live map owns and the newest frozen
 * map does not waits, nodes that are newer than it are freed, and the dead list is
 * forgotten: it has what the newest frozen map owns, which its release will find.
 */
proctype dropper ()
{
  byte my_root, old_root, my_leaf, old_leaf, l, s, p, a;
  short entries;

  running == 0;
  atomic { !release_lock -> release_lock = true };
  waiting++;
  d_step {
    MAY_EXCLUDE ->
    waiting--;
    dropped = true;
    my_root = live;
    live = 0;
    dead = 0;
    old_root = 0;
#if NFREEZE > 0
    if :: newest != 0 -> old_root = frozen_root[newest - 1] :: else fi;
#endif
    look_at_all_owned (my_root);
    entries = t_owned;
    look_at_all_owned (old_root);
    entries = entries & ~t_owned
  };
  a = 1;
  do
  :: a <= NADDR && !(entries & 1 << a) -> a++
  :: a <= NADDR && (entries & 1 << a) -> d_step { let_wait (a) }; a++
  :: else -> a = 0; break
  od;
  if
  :: my_root == 0 || my_root == old_root -> goto dropped_all
  :: else
  fi;
  l = 0;
  do
  :: l < LEAVES ->
    d_step {
      my_leaf = root[my_root].child[l];
      old_leaf = 0;
      if
      :: old_root != 0 -> CHECK_ROOT (old_root); old_leaf = root[old_root].child[l]
      :: else
      fi
    };
    if
    :: my_leaf == 0 || my_leaf == old_leaf || my_leaf == CONSTANT
    :: else ->
      s = l;
      do
      :: s < SLOTS ->
        d_step {
          CHECK_LEAF (my_leaf);
          p = leaf[my_leaf].where[s];
          if :: IS_SPREAD (p) :: else -> p = 0 fi;
          if
          :: old_leaf != 0 && leaf[old_leaf].where[s] == p -> p = 0
          :: else
          fi;
          if :: p != 0 -> free_spread (p) :: else fi;
          p = 0
        };
        s = s + LEAVES
      :: else -> s = 0; break
      od;
      skip;
      d_step { free_leaf (my_leaf) }
    fi;
    l++
  :: else -> break
  od;
  skip;
  d_step { free_root (my_root) };
dropped_all:
  release_lock = false
}
#endif

/*----------------------------------------------------------------------
 * Start and end
 */

#define INIT(s) (s == 0 -> INIT0 : INIT1)

hidden byte t_next;

inline begin_slot (s, initial)
{
  t_leaf = 1 + LEAF_OF (s);
  leaf[t_leaf].state[s] = initial;
  if
  :: ALLOCATED (initial) == 0
  :: else ->
#ifdef SPREAD
    leaf[t_leaf].where[s] = s + 1;
    spread[s + 1].used = true;
    spread[s + 1].generation = 1;
    t_x = BLOCKS;
    do
    :: t_x > 0 ->
      t_x--;
      if
      :: initial & 1 << t_x ->
        t_next++;
        spread[s + 1].address[t_x] = t_next;
        address_is[t_next] = OWNED
      :: else
      fi
    :: else -> break
    od
#else
    leaf[t_leaf].where[s] = RUN (t_next + 1, 0);
    for (t_x : 0 .. BLOCKS - 1) {
      t_next++;
      if :: initial & 1 << t_x -> address_is[t_next] = OWNED :: else fi
    }
#endif
  fi;
  for (t_x : s * SLOT_BYTES .. (s + 1) * SLOT_BYTES - 1) {
    allowed[t_x] = 1 << OP_BASE;
    if
    :: ALLOCATED (initial) & BIT_OF (t_x) ->
      allowed[t_x] = 1 << OP_BEFORE;
      t_where = leaf[t_leaf].where[s];
      look_at_address (t_where, IN_SLOT (t_x));
      file[AT (t_y, t_x)] = VALUE (OP_BEFORE, BLOCK_OF (t_x))
    :: else ->
      if
      :: ZERO_BLOCKS (initial) & BIT_OF (t_x) -> allowed[t_x] = 1 << OP_ZERO_BEFORE
      :: else
      fi
    fi
  };
  skip
}

hidden short marked_roots, marked_leaves, marked_spread, marked;

/* Mark what the map of root R has. */
inline mark (r)
{
  if
  :: r != 0 ->
    marked_roots = marked_roots | 1 << r;
    look_at_all_owned (r);
    marked = marked | t_owned;
    for (t_x : 0 .. SLOTS - 1) {
      look_at_leaf (r, t_x);
      if
      :: t_leaf != 0 ->
        marked_leaves = marked_leaves | 1 << t_leaf;
        t_where = leaf[t_leaf].where[t_x];
        if :: IS_SPREAD (t_where) -> marked_spread = marked_spread | 1 << t_where :: else fi
      :: else
      fi
    }
  :: else
  fi;
  skip
}

inline final_checks ()
{
  if
  :: !dropped ->
    for (t_at : 0 .. NBYTE - 1) {
      look_at_byte (live, t_at);
      expect (t_value, t_at, allowed[t_at] | SCRIPTED)
    }
  :: else
  fi;
  if
  :: sharers || waiting || release_lock || slot_lock[0] || slot_lock[STRIPES - 1] ||
       under_way[0] || under_way[1] ->
    WRONG (lock_left_held)
  :: else
  fi;

  marked_roots = 0; marked_leaves = 0; marked_spread = 0; marked = 0;
  mark (live);
#ifdef END
  t_s = 0;
  do
  :: t_s < NFREEZE && held[t_s] ->
    t_root = frozen_root[t_s];
    read_frozen (t_s);
    /* The image has all that was acknowledged. */
    for (t_at : 0 .. NBYTE - 1) {
      t_value = seen[t_s * NBYTE + t_at];
      if
      :: t_value == 0 && !(allowed[t_at] & ZEROES) -> WRONG (not_in_the_final_image)
      :: t_value != 0 && !(allowed[t_at] & 1 << OP_OF (t_value)) ->
        WRONG (not_in_the_final_image)
      :: else
      fi
    };
    break
  :: t_s < NFREEZE && !held[t_s] -> t_s++
  :: else -> t_root = 0; break
  od;
  mark (t_root);
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
  for (t_x : 1 .. NSPREAD) {
    if
    :: spread[t_x].used != (marked_spread >> t_x & 1) -> WRONG (node_leaked)
    :: else
    fi
  };
  /* Every address is owned, waiting or free, exactly once; and a list of dead has
   * what an older map owns.
   */
  for (t_x : 1 .. NADDR) {
    if
    :: address_is[t_x] == OWNED && !(marked >> t_x & 1) -> WRONG (address_leaked)
    :: address_is[t_x] != OWNED && (marked >> t_x & 1) -> WRONG (address_freed_in_use)
    :: address_is[t_x] == TAKEN && !left -> WRONG (address_leaked)
    :: else
    fi
  };
  skip
}

init {
  atomic {
    d_step {
      for (t_x : 0 .. (NADDR + 1) * BYTES - 1) { file[t_x] = JUNK };
      t_next = 0;
      leaf[CONSTANT].used = true;
      for (t_x : 0 .. SLOTS - 1) { leaf[CONSTANT].state[t_x] = ALL << BLOCKS };
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
#if SLOTS > 1
      begin_slot (1, INIT1);
#endif
      done = 1 << OP_BASE | 1 << OP_BEFORE | 1 << OP_ZERO_BEFORE
    };
#ifdef WRITE_A
    running++;
    run request (OP_A, WRITES, FIRST (WRITE_A), STOP (WRITE_A));
#endif
#ifdef WRITE_B
    running++;
    run request (OP_B, WRITES, FIRST (WRITE_B), STOP (WRITE_B));
#endif
#ifdef WRITE_C
    running++;
    run request (OP_C, WRITES, FIRST (WRITE_C), STOP (WRITE_C));
#endif
#ifdef ZERO
    running++;
    run request (OP_ZERO, ZEROES_BLOCKS, FIRST (ZERO), STOP (ZERO));
#endif
#ifdef SPACE
    running++;
    run request (OP_ZERO, PROVIDES, FIRST (SPACE), STOP (SPACE));
#endif
#ifdef KEEP
    running++;
    run request (OP_BASE, KEEPS, FIRST (KEEP), STOP (KEEP));
#endif
#ifdef SCRIPT
    running++;
    run scripted ();
#endif
#ifdef READ
    running++;
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
#if CLEAN > 0
    run cleaner ();
#endif
#ifdef DROP
    run dropper ();
#endif
  };
  _nr_pr == 1 ->
  d_step { final_checks () }
}
