/* SPDX-License-Identifier: BSD-3-Clause */

/* The protocol of an overlay whose file is a log of blocks: what requests,
 * freezes, releases and the cleaner do to the map, to the addresses of the log
 * and to its bytes, and which locks they hold meanwhile.
 *
 * Checked exhaustively by spin, see README for what is modelled and how it is
 * run.  Comments call the rules by their numbers.
 *
 * The disk has SLOTS slots of BLOCKS blocks of BYTES bytes.  The log has NADDR
 * addresses, each of which takes one block.  The tree is one leaf, and below it
 * spread nodes; both are copied as nodes of the tree are.
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
 *   READ=range                        a client reads
 *   KEEP=range                        cow-on-read or a prefetch keeps holes
 *   VIEWS=n                           freeze and release, n times
 *   END                               the final freeze, which closes
 *   DROP                              the live map is thrown away when all
 *                                     requests have ended
 *   CLEAN=n                           the cleaner goes round, n times
 *   SCRIPT                            one client writes and zeroes by turns
 *
 * and how it starts:
 *
 *   INIT0, INIT1    state words of the slots: bit b: block b is allocated; bit
 *                   b + BLOCKS: it is zero
 *   SPREAD          the slots that are allocated at the start are spread
 *   STRIPES         slot locks: 1 (both slots have the same) or 2
 *   NADDR           addresses of the log; a request that gets none fails
 *   ANY_ADDRESS     a request may get any free address, else the first one
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

/* A node is copied at most once for each freeze, a spread node made once more.
 * (One more, so that the model does not come to its end where a broken rule
 * copies twice.)
 */
#define NLEAF (NFREEZE + 2)
#define NSPREAD (SLOTS * (NFREEZE + 2) + 1)

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
#define STRIPE_OF(s) ((s) % STRIPES)

/*----------------------------------------------------------------------
 * The overlay
 */

/* The second word of a slot.  0: no block was ever allocated.  1 .. 15: it is
 * spread, this is its node.  Else a run: block b lies at base + b; the base of a
 * slot whose block 0 is not allocated may lie in front of the log's first address.
 */
#ifdef BREAK_L2_NO_COUNT
#define RUN(base, count) (16 + BLOCKS + (base))
#else
#define RUN(base, count) (16 + BLOCKS + (base) + ((count) % 7) * 32)
#endif
#define IS_SPREAD(w) ((w) > 0 && (w) < 16)
#define IS_RUN(w) ((w) >= 16)
#define COUNT_OF(w) (((w) - 16) / 32)
/* May wrap below 0; adding a block's number makes it right again. */
#define BASE_OF(w) ((((w) - 16) % 32) - BLOCKS)

typedef leaf_node {
  bool used;
  byte generation;
  byte where[SLOTS];
  byte state[SLOTS];
};

typedef spread_node {
  bool used;
  byte generation;
  byte address[BLOCKS];
};

leaf_node leaf[NLEAF + 1]; /* [0] is not used */
spread_node spread[NSPREAD + 1];
byte live;                 /* leaf of the live map; 0: none yet */
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
byte frozen_leaf[NFREEZE];
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

/* Grace (L6).  A request counts itself in the phase that it found, from before
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
  not_in_the_final_image, end_of_the_model, dead_twice;
#define WRONG(what) assert (what)

/* Scratch, good within one step. */
hidden byte t_x, t_y, t_leaf, t_state, t_value, t_where, t_mask, t_s;
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

/* Byte X of the disk by the map whose leaf is L, in t_value.  Within one step. */
inline look_at_byte (l, x)
{
  t_value = VALUE (OP_BASE, BLOCK_OF (x));
  if
  :: l != 0 ->
    CHECK_LEAF (l);
    t_state = leaf[l].state[SLOT_OF (x)];
    t_where = leaf[l].where[SLOT_OF (x)];
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

/* The address that the map whose leaf is L owns for block B of slot S, in t_y;
 * 0: none.  Within one step.
 */
inline look_at_owned (l, s, b)
{
  t_y = 0;
  if
  :: l != 0 ->
    CHECK_LEAF (l);
    if
    :: leaf[l].state[s] & 1 << (b) ->
      t_where = leaf[l].where[s];
      look_at_address (t_where, b)
    :: else
    fi
  :: else
  fi;
  skip
}

/* All addresses that the map whose leaf is L owns, in t_owned.  Within one step. */
inline look_at_all_owned (l)
{
  t_owned = 0;
  for (t_s : 0 .. SLOTS - 1) {
    for (t_x : 0 .. BLOCKS - 1) {
      look_at_owned (l, t_s, t_x);
      if :: t_y != 0 -> t_owned = t_owned | 1 << t_y :: else fi
    }
  };
  skip
}

/* Is block B of slot S, at ADDRESS, shared (L4)?  In t_y.  Within one step (d); the
 * caller holds the request lock.
 */
inline is_shared (s, b, address)
{
#if NFREEZE > 0
  if
  :: newest != 0 && (address) != 0 ->
    look_at_owned (frozen_leaf[newest - 1], s, b);
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

/* Make a node, t_y.  A node that was never used has no generation. */
#define FIND_NODE(node, last) \
  t_y = 1; \
  do \
  :: t_y > last -> WRONG (end_of_the_model) \
  :: t_y <= last && node[t_y].generation != 0 -> t_y++ \
  :: else -> break \
  od; \
  node[t_y].used = true; \
  node[t_y].generation = generation

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
#define IS_FROZEN(array, n) ((n) == 0 || array[n].generation <= newest)
#ifdef BREAK_L2_SPREAD_IN_PLACE
#define SPREAD_IS_FROZEN(n) false
#else
#define SPREAD_IS_FROZEN(n) IS_FROZEN (spread, n)
#endif

/* Let n_leaf be a leaf that may be changed.  Copying is one step: it is done under
 * a lock, all who change that pointer do so under that lock, what is copied does
 * not change (it belongs to a frozen map) and others see nothing of it but the
 * store of the pointer.
 */
inline touch ()
{
  do
  :: d_step {
      n_leaf = live;
      if :: n_leaf != 0 -> CHECK_LEAF (n_leaf) :: else fi;
      t_mask = IS_FROZEN (leaf, n_leaf)
    };
    if
    :: !IS_FROZEN (leaf, n_leaf) -> break
    :: else ->
      d_step {
        if
        :: live == n_leaf ->
          FIND_NODE (leaf, NLEAF);
          for (t_x : 0 .. SLOTS - 1) {
            leaf[t_y].where[t_x] = leaf[n_leaf].where[t_x];
            leaf[t_y].state[t_x] = leaf[n_leaf].state[t_x]
          };
          live = t_y
        :: else
        fi
      }
    fi
  od;
  skip
}

/* Both words of slot S as one consistent pair, in `where' and `state', holding no
 * slot lock (rule 1).
 */
inline load_pair (s)
{
  where = 0;
  state = 0;
  d_step { n_leaf = live };
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

#ifdef BREAK_L6_GIVES_OUT_WAITING
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
  :: choice < NADDR -> choice++
  :: break
  od;
  skip;
  d_step {
    if
    :: MAY_BE_TAKEN (choice) -> t_y = choice; result = t_y; give_out ()
    :: else -> result = 0
    fi;
    choice = 0
  }
#else
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
#endif
}

/* From owned to waiting, under the allocator's lock.  Within one step. */
inline let_wait (a)
{
  if :: address_is[a] == OWNED :: else -> WRONG (address_freed_twice) fi;
#ifdef BREAK_L6_NO_WAIT
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

#define COVERS(x) (from <= (x) && (x) < to)

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

/* The first look of a write, and if all its blocks are allocated and not shared,
 * the write itself (rule 4).  Sets `over' then.
 */
inline first_look ()
{
  d_step {
    MAY_SHARE ->
    sent ();
    if
    :: closed || dropped -> over = true; failed ()
    :: else -> sharers++
    fi
  };
  if
  :: !over ->
    count_in (my_phase);
    s = SLOT_OF (from);
    unlocked = true;
    do
    :: s <= last && unlocked ->
      load_pair (s);
      d_step {
        find_blocks (s);
        unlocked = ((touched & ~ALLOCATED (state)) == 0);
        state = 0
      };
      /* The addresses, one by one: those of a spread slot may be newer. */
      b = 0;
      do
      :: b < BLOCKS ->
        if
        :: unlocked && (touched & 1 << b) ->
          d_step {
            look_at_address (where, b);
            old[s * BLOCKS + b] = t_y;
            is_shared (s, b, old[s * BLOCKS + b]);
#ifndef BREAK_4_OVERWRITES_SHARED
            if :: t_y -> unlocked = false :: else fi
#endif
          }
        :: else
        fi;
        b++
      :: else -> b = 0; break
      od;
      where = 0;
      s++
    :: else -> break
    od;
    if :: unlocked -> overwrite () :: else fi;
    d_step {
      sharers--;
      count_out (my_phase);
      for (t_x : 0 .. NBLOCK - 1) { old[t_x] = 0 };
      s = 0; touched = 0; whole = 0;
      if :: unlocked -> acknowledged (); over = true :: else fi;
      unlocked = false
    }
  :: else
  fi;
  skip
}

/* Write the request's own bytes, one by one, to the addresses in `old'.  Somebody
 * may make a block zero meanwhile: then the bytes count for nothing, and whoever
 * allocates it again writes it whole, to another address, as this one waits until
 * this request has ended (L6).
 */
inline overwrite ()
{
#ifdef BREAK_L6_COUNTS_OUT_EARLY
  under_way[my_phase]--;
#endif
  x = from;
  do
  :: x < to ->
    d_step { file[AT (old[BLOCK_OF (x)], x)] = VALUE (op, BLOCK_OF (x)); x++ }
  :: else -> break
  od;
  x = 0;
#ifdef BREAK_L6_COUNTS_OUT_EARLY
  under_way[my_phase]++;
#endif
}

inline lock_slots ()
{
#ifndef BREAK_2_UNLOCKED
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
 *   fresh[s]      those of them that get a fresh address (L1)
 *   bring[s]      blocks whose other bytes are brought along (L4)
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
      is_dead_shared[s * BLOCKS + t_s] = t_y
    :: else
    fi;
    new[s * BLOCKS + t_s] = old[s * BLOCKS + t_s];
    if
    :: (write[s] & 1 << t_s) &&
         (!(ALLOCATED (found[s]) & 1 << t_s) || is_dead_shared[s * BLOCKS + t_s]) ->
#ifdef BREAK_L4_OVERWRITES_SHARED
      if :: old[s * BLOCKS + t_s] == 0 -> fresh[s] = fresh[s] | 1 << t_s :: else fi
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
#ifndef BREAK_L4_BRINGS_NOTHING
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
  :: (write[SLOT_OF (x)] & t_mask) && kind != KEEPS && COVERS (x) ->
    t_value = (kind == WRITES -> VALUE (op, BLOCK_OF (x)) : 0)
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
    :: t_value ->
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

/* Store what changed of slot S, in the order of rule L3: bits that stop being
 * allocated, addresses in the node, second word, bits that become allocated.  Only the
 * holder of the slot lock stores, but others load at any time.
 */
#define LATER(s) (ALLOCATED (new_state[s]) & ~ALLOCATED (found[s]))
#define BOTH(s) (LATER (s) | LATER (s) << BLOCKS)
#define BETWEEN(s) ((new_state[s] & ~BOTH (s)) | (found[s] & BOTH (s)))

inline store_state (s, value)
{
  if
  :: leaf[node].state[s] != (value) ->
    d_step { CHECK_LEAF (node); leaf[node].state[s] = (value) }
  :: else
  fi
}

inline store_slot (s)
{
#ifdef BREAK_L3_STATE_FIRST
  store_state (s, new_state[s]);
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
    d_step { CHECK_LEAF (node); leaf[node].where[s] = new_where[s] }
  :: else
  fi;
  store_state (s, new_state[s])
}

/* What the live map stopped owning: to the dead list if it was shared, else it
 * waits (L7).  Each is a step, under the lock of the list or of the allocator.
 */
inline bury (s)
{
  b = 0;
  do
  :: b < BLOCKS ->
    if
    :: dies[s] & 1 << b ->
      d_step {
#ifdef BREAK_L5_FREES_SHARED
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

/* One request, from its sending to its end. */
inline one_request ()
{
  last = SLOT_OF (to - 1);
  over = false;
  if
  :: kind == WRITES -> first_look ()
  :: else
  fi;
  if :: over -> goto end :: else fi;

  /* Here the base is read, with no lock held (rule 3).  Its bytes are
   * always VALUE (OP_BASE, block), so there is nothing to do for it.
   */

  lock_slots ();
  d_step {
    MAY_SHARE ->
    if :: kind == ZEROES_BLOCKS -> sent () :: else fi;
    if
    :: closed || dropped -> /* ESHUTDOWN */
      unlock_slots ();
      if :: kind != KEEPS -> failed () :: else fi;
      over = true
    :: else -> sharers++
    fi;
    low = SLOT_OF (from);
    high = last
  };
  if :: over -> goto end :: else fi;
  count_in (my_phase);

  /* The second look, at all slots. */
  touch ();
  node = n_leaf;
  n_leaf = 0;
  s = low;
  do
  :: s <= high ->
    d_step {
      /* Its words change under the slot lock only, which we hold (c). */
      CHECK_LEAF (node);
      found[s] = leaf[node].state[s];
      found_where[s] = leaf[node].where[s];
      decide (s)
    };
    s++
  :: else -> break
  od;

  /* Fresh addresses. */
  s = low;
  do
  :: s <= high && !no_space ->
    b = 0;
    do
    :: b < BLOCKS && !no_space ->
      if
      :: fresh[s] & 1 << b ->
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
    /* Rule 7: what was taken is given back at once.  Nobody else knows these
     * addresses.
     */
    d_step {
      for (t_s : low .. high) {
        for (t_x : 0 .. BLOCKS - 1) {
          if
          :: (fresh[t_s] & 1 << t_x) && new[t_s * BLOCKS + t_x] != 0 &&
               new[t_s * BLOCKS + t_x] != old[t_s * BLOCKS + t_x] ->
#ifndef BREAK_7_KEEPS_ADDRESS
            address_is[new[t_s * BLOCKS + t_x]] = FREE
#else
            skip
#endif
          :: else
          fi
        }
      };
      sharers--;
      count_out (my_phase);
      unlock_slots ();
      no_space = false;
      if :: kind != KEEPS -> failed () :: else fi
    };
    goto end
  :: else
  fi;

#ifdef BREAK_1_STATE_BEFORE_BYTES
  s = low;
  do
  :: s <= high -> d_step { find_where (s) }; store_slot (s); s++
  :: else -> break
  od;
  write_all ();
#else
  write_all ();
  s = low;
  do
  :: s <= high ->
#ifdef BREAK_L7_BURIES_FIRST
    bury (s);
    skip;
#endif
    d_step { find_where (s) };
    store_slot (s);
    s++
  :: else -> break
  od;
#endif
#ifndef BREAK_L7_BURIES_FIRST
  s = low;
  do
  :: s <= high -> bury (s); s++
  :: else -> break
  od;
#endif
  skip;
  d_step {
    sharers--;
    count_out (my_phase);
    unlock_slots ();
    if :: kind != KEEPS -> acknowledged () :: else fi
  };
end:
  skip;
  d_step {
    for (t_x : 0 .. NBLOCK - 1) { old[t_x] = 0; new[t_x] = 0; is_dead_shared[t_x] = false };
    for (t_x : 0 .. SLOTS - 1) {
      found[t_x] = 0; found_where[t_x] = 0; new_state[t_x] = 0; new_where[t_x] = 0;
      write[t_x] = 0; fresh[t_x] = 0; bring[t_x] = 0; dies[t_x] = 0; in_place[t_x] = false
    };
    s = 0; node = 0; low = 0; high = 0; my_phase = 0; over = false
  }
}

#define REQUEST_VARIABLES \
  byte s, b, x, n_leaf, where, state, again_state, again_where, choice; \
  byte touched, whole, node, last, low, high; \
  byte found[SLOTS], found_where[SLOTS], new_state[SLOTS], new_where[SLOTS]; \
  byte write[SLOTS], fresh[SLOTS], bring[SLOTS], dies[SLOTS]; \
  byte old[NBLOCK], new[NBLOCK]; \
  bool is_dead_shared[NBLOCK], in_place[SLOTS]; \
  bool over, unlocked, no_space; \
  bit my_phase

proctype request (byte op; byte kind; byte from; byte to)
{
  REQUEST_VARIABLES;

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
  byte s, b, x, n_leaf, where, state, again_state, again_where, address;
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
    do
    :: x < to && SLOT_OF (x) == s ->
      /* The address is loaded once for the bytes of a block. */
      if
      :: ALLOCATED (state) & BIT_OF (x) ->
        d_step { look_at_address (where, IN_SLOT (x)); address = t_y }
      :: else
      fi;
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

hidden byte t_at;

/* Under the exclusive request lock.  One step (c): all that it looks at and
 * changes is looked at under the request lock by everybody else.
 */
inline freeze (f)
{
  frozen_leaf[f] = live;
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
  skip
}

/* Whoever reads a frozen map takes no lock; this may happen at any time while
 * it is held.  One step suffices to see any change that is ever there.
 */
inline read_frozen (f)
{
  for (t_at : 0 .. NBYTE - 1) {
    look_at_byte (frozen_leaf[f], t_at);
    if
    :: t_value == seen[f * NBYTE + t_at]
    :: else -> WRONG (frozen_map_changed)
    fi
  };
  skip
}

/* Unlink F, in one exclusive hold of the request lock: one step (c).  `entries' is
 * what it owns and its newer neighbour does not: that neighbour's list, which gets
 * F's own list in its place.  `nobody_newer': there is no neighbour.
 */
inline unlink (f)
{
  held[f] = false;
  old_leaf = 0;
  newest = 0;
  older_than = NFREEZE;
  t_x = 0;
  do
  :: t_x < NFREEZE ->
    if :: held[t_x] -> newest = t_x + 1 :: else fi;
    if :: t_x < f && held[t_x] -> old_leaf = frozen_leaf[t_x]; older_than = t_x :: else fi;
    t_x++
  :: else -> break
  od;
  new_leaf = live;
  t_y = NFREEZE; /* which is the next newer one */
  t_x = NFREEZE;
  do
  :: t_x > f + 1 ->
    t_x--;
    if
    :: held[t_x] -> new_leaf = frozen_leaf[t_x]; t_y = t_x
    :: else
    fi
  :: else -> break
  od;
  my_leaf = frozen_leaf[f];
  frozen_leaf[f] = 0;
  nobody_newer = (t_y == NFREEZE && dropped);
  if
  :: nobody_newer ->
    entries = 0
#ifndef BREAK_L7_DROPPED_BY_LIST
    ;
    look_at_all_owned (my_leaf);
    entries = t_owned;
    look_at_all_owned (old_leaf);
    entries = entries & ~t_owned
#endif
  :: !nobody_newer && t_y == NFREEZE -> entries = dead; dead = frozen_dead[f]
  :: else -> entries = frozen_dead[t_y]; frozen_dead[t_y] = frozen_dead[f]
  fi;
  frozen_dead[f] = 0;
#ifdef BREAK_L7_NOTED_NEWER
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
      look_at_all_owned (old_leaf);
      if
#ifdef BREAK_L7_FREES_OLDER
      :: false -> skip
#else
      :: t_owned & 1 << a ->
        t_y = NFREEZE;
        t_x = NFREEZE;
        do
        :: t_x > f + 1 -> t_x--; if :: held[t_x] -> t_y = t_x :: else fi
        :: else -> break
        od;
#ifdef BREAK_L7_NOTED_NEWER
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

/* Free the nodes that neither neighbour has.  Holds the release lock, and no other.
 * The nodes of my_leaf that are in no neighbour, and all of old_leaf, do not
 * change any more (d).  new_leaf may, if it was live: each look at it is a step.
 */
inline walk ()
{
  if
  :: my_leaf != 0 && my_leaf != old_leaf && my_leaf != new_leaf ->
    s = 0;
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
#ifdef BREAK_L2_SPREAD_NOT_FREED
      p = 0;
#endif
      if :: p != 0 -> d_step { free_spread (p); p = 0 } :: else fi;
      s++
    :: else -> s = 0; break
    od;
    skip;
    d_step { free_leaf (my_leaf) }
  :: else
  fi
}

/* A view.  They are all alike, so the one with the lower NR may freeze first. */
proctype view (byte nr)
{
  byte f, my_leaf, old_leaf, new_leaf, s, p, a, older_than;
  bool nobody_newer;
  short entries;
#ifdef BREAK_L7_NOTED_NEWER
  byte noted;
#endif

  d_step { nr_views == nr -> waiting++ };
  d_step {
    MAY_EXCLUDE ->
    waiting--;
    nr_views++;
    if
    :: !dropped -> f = nr_frozen; freeze (f)
    :: else -> f = 255
    fi
  };
  if :: f == 255 -> goto end :: else fi;

  d_step { read_frozen (f) };

#ifndef BREAK_L7_NO_RELEASE_LOCK
  atomic { !release_lock -> release_lock = true };
#endif
  waiting++;
  d_step { MAY_EXCLUDE -> waiting--; unlink (f) };
  pass_on (f);
  walk ();
#ifndef BREAK_L7_NO_RELEASE_LOCK
  release_lock = false;
#endif
end:
  skip
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
    MAY_EXCLUDE ->
    waiting--;
    f = nr_frozen;
    freeze (f);
    closed = true
  };
  d_step { read_frozen (f) }
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
#ifdef BREAK_L6_NO_GRACE
  skip
#else
#ifndef BREAK_L6_ONE_WAIT
  WAIT_FOR (1 - phase);
#endif
  phase = 1 - phase;
  WAIT_FOR (1 - phase)
#endif
}

proctype cleaner ()
{
  byte a, round;
  short mine;

  do
  :: round < CLEAN ->
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
    a = 1;
    do
    :: a <= NADDR && !(mine & 1 << a) -> a++
    :: a <= NADDR && (mine & 1 << a) ->
#ifdef BREAK_L6_FREED_BEFORE_PUNCHED
      d_step { address_is[a] = FREE };
#endif
      d_step { for (t_x : 0 .. BYTES - 1) { file[a * BYTES + t_x] = JUNK }; skip };
#ifndef BREAK_L6_FREED_BEFORE_PUNCHED
      d_step {
        if :: address_is[a] == TAKEN :: else -> WRONG (address_freed_twice) fi;
        address_is[a] = FREE
      };
#endif
      a++
    :: else -> a = 0; break
    od;
next:
    skip;
    d_step { mine = 0; round++ }
  :: else -> break
  od
}
#endif

/*----------------------------------------------------------------------
 * Throwing the live map away
 */

#ifdef DROP
/* When the last request has ended (M4): what the live map owns and the newest frozen
 * map does not waits, nodes that are newer than it are freed, and the dead list is
 * forgotten: it has what the newest frozen map owns, which its release will find.
 */
proctype dropper ()
{
  byte my_leaf, old_leaf, s, p, a;
  short entries;

  running == 0;
  atomic { !release_lock -> release_lock = true };
  waiting++;
  d_step {
    MAY_EXCLUDE ->
    waiting--;
    dropped = true;
    my_leaf = live;
    live = 0;
    dead = 0;
    old_leaf = 0;
#if NFREEZE > 0
    if :: newest != 0 -> old_leaf = frozen_leaf[newest - 1] :: else fi;
#endif
    look_at_all_owned (my_leaf);
    entries = t_owned;
    look_at_all_owned (old_leaf);
    entries = entries & ~t_owned
  };
  a = 1;
  do
  :: a <= NADDR && !(entries & 1 << a) -> a++
  :: a <= NADDR && (entries & 1 << a) -> d_step { let_wait (a) }; a++
  :: else -> a = 0; break
  od;
  if
  :: my_leaf != 0 && my_leaf != old_leaf ->
    s = 0;
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
      s++
    :: else -> s = 0; break
    od;
    skip;
    d_step { free_leaf (my_leaf) }
  :: else
  fi;
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
  leaf[1].state[s] = initial;
  if
  :: ALLOCATED (initial) == 0
  :: else ->
#ifdef SPREAD
    leaf[1].where[s] = s + 1;
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
    leaf[1].where[s] = RUN (t_next + 1, 0);
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
      t_where = leaf[1].where[s];
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

hidden short marked_leaves, marked_spread, marked;

/* Mark what the map of leaf L has. */
inline mark (l)
{
  if
  :: l != 0 ->
    marked_leaves = marked_leaves | 1 << l;
    look_at_all_owned (l);
    marked = marked | t_owned;
    for (t_x : 0 .. SLOTS - 1) {
      t_where = leaf[l].where[t_x];
      if :: IS_SPREAD (t_where) -> marked_spread = marked_spread | 1 << t_where :: else fi
    }
  :: else
  fi;
  skip
}

inline final_checks ()
{
  if
  :: !dropped ->
    for (t_leaf : 0 .. NBYTE - 1) {
      look_at_byte (live, t_leaf);
      expect (t_value, t_leaf, allowed[t_leaf] | SCRIPTED)
    }
  :: else
  fi;
  if
  :: sharers || waiting || release_lock || slot_lock[0] || slot_lock[STRIPES - 1] ||
       under_way[0] || under_way[1] ->
    WRONG (lock_left_held)
  :: else
  fi;

  marked_leaves = 0; marked_spread = 0; marked = 0;
  mark (live);
#ifdef END
  t_at = 0;
  do
  :: t_at < NFREEZE ->
    if
    :: held[t_at] ->
      /* The image has all that was acknowledged. */
      for (t_leaf : 0 .. NBYTE - 1) {
        look_at_byte (frozen_leaf[t_at], t_leaf);
        if :: t_value == seen[t_at * NBYTE + t_leaf] :: else -> WRONG (frozen_map_changed) fi;
        if
        :: t_value == 0 && !(allowed[t_leaf] & ZEROES) -> WRONG (not_in_the_final_image)
        :: t_value != 0 && !(allowed[t_leaf] & 1 << OP_OF (t_value)) ->
          WRONG (not_in_the_final_image)
        :: else
        fi
      };
      mark (frozen_leaf[t_at])
    :: else
    fi;
    t_at++
  :: else -> break
  od;
#endif

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
    :: address_is[t_x] == TAKEN -> WRONG (address_leaked)
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
      if
      :: INIT0 != 0 || INIT1 != 0 ->
        live = 1;
        leaf[1].used = true;
        leaf[1].generation = 1
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
