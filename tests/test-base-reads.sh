#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The base is read only where it must be, and once: what a request covers wholly is
# not read, nor what is in the overlay, and what is needed in one piece is asked for
# in one piece.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter log
requires_plugin pattern

for args in cow-block-size=4K cow-block-size=64K; do
    rm -f "$tmp/log"
    # A disk whose last block is not whole.
    start_nbdkit --filter=log pattern $((8 * 1048576 + 1000)) \
        logfile="$tmp/log" $args
    py "$args" <<'END'
block = 64 * K if "64K" in sys.argv[1] else 4 * K
size = 8 * M + 1000
h = connect()
log = Log()

def asked(want, what, call, *args):
    """The call must make a request to the base for each of these (offset, count),
    which may be for less where the rest of a block is not needed.
    """
    log.mark()
    call(*args)
    got = sorted((o, c) for k, o, c in log.requests())
    want.sort()
    if (len(got) != len(want) or
            any(g[0] < w[0] or g[0] + g[1] > w[0] + w[1]
                for g, w in zip(got, want))):
        fail("%s: the base was asked for %r, expected %r" % (what, got, want))

def whole(at, n=1):
    return (at * block, n * block)

# Whole blocks need nothing.
b = 0
for call, arg in [(h.pwrite, b"w" * block), (h.zero, block), (h.trim, block),
                  (h.pwrite, b"w" * 8 * block), (h.zero, 8 * block),
                  (h.trim, 8 * block)]:
    n = len(arg) if isinstance(arg, bytes) else arg
    asked([], "%s of %d" % (call.__name__, n), call, arg, b * block)
    b += n // block
end = b

# So does the end of the disk, though its block is not whole.
asked([], "write of the last block", h.pwrite, b"e" * 1000, 8 * M)
h2 = connect("zero")
asked([], "zero of the last block", h2.zero, 1000, 8 * M)
h2 = connect("trim")
asked([], "trim of the last block", h2.trim, 1000, 8 * M)
h2 = connect("more")
asked([], "write of the last two blocks", h2.pwrite,
      b"e" * (block + 1000), 8 * M - block)
# In part: not past the end.
h2 = connect("part")
asked([(8 * M, 1000)], "write in the last block", h2.pwrite, b"e" * 10, 8 * M)

# What is in the overlay or zero needs nothing, whatever part of it is wanted.
asked([], "read of the overlay", h.pread, end * block, 0)
for at in range(0, end):
    for call, arg in (h.pwrite, b"p" * 100), (h.zero, 100), (h.trim, 100):
        asked([], "%s in block %d" % (call.__name__, at), call, arg,
              at * block + 50 + at)
asked([], "write over the border of two", h.pwrite, b"x" * 100, block - 50)
asked([], "extents", h.block_status, end * block, 0, lambda *a: 0)
asked([], "prefetch", h.cache, end * block, 0)
asked([], "flush", h.flush)

# Reads of holes.
at = 64
asked([whole(at, 64 * K // block)], "64 KiB of holes", h.pread, 64 * K,
      at * block)
asked([(end * block, 2 * M)], "2 MiB of holes", h.pread,
      2 * M, end * block)
asked([(8 * M - 100, 100)], "holes and then the overlay", h.pread, 1100,
      8 * M - 100)
h.pwrite(b"i" * block, (at + 4) * block)
asked([whole(at, 4), whole(at + 5, 4)], "holes around a block", h.pread,
      9 * block, at * block)

# Blocks in part: those, each once, neighbours together.
at += 16
asked([whole(at)], "write in a block", h.pwrite, b"x" * 100, at * block + 5)
asked([], "and again", h.pwrite, b"y" * 100, at * block + 500)
at += 1
asked([whole(at, 2)], "write over a border", h.pwrite, b"x" * 100,
      (at + 1) * block - 50)
at += 2
asked([whole(at), whole(at + 3)], "write with two ends", h.pwrite,
      b"x" * 3 * block, at * block + 100)
at += 4
asked([whole(at)], "write with a front", h.pwrite, b"x" * (3 * block - 100),
      at * block + 100)
at += 3
asked([whole(at + 2)], "write with a back", h.pwrite, b"x" * (2 * block + 100),
      at * block)
at += 3
for call in h.zero, h.trim:
    asked([whole(at)], call.__name__ + " in a block", call, 100,
          at * block + 5)
    at += 1
    asked([whole(at), whole(at + 3)], call.__name__ + " with two ends", call,
          3 * block, at * block + 100)
    at += 4
    asked([], call.__name__ + " once more", call, 3 * block,
          (at - 4) * block + 100)

# One end in the overlay.
h.pwrite(b"x" * block, at * block)
asked([whole(at + 1)], "write from the overlay on", h.pwrite, b"x" * block,
      at * block + 9)
END
    stop_nbdkit
done

# What cow-on-read kept, and cow-on-cache, is not asked for again.
rm -f "$tmp/log"
start_nbdkit --filter=log pattern 8M logfile="$tmp/log" cow-on-read=true \
    cow-on-cache=true
py <<'END'
h = connect()
log = Log()
same(h.pread(64 * K, 0), base(0, 64 * K), "read")
expect(log.requests(), [("Read", 0, 64 * K)], "first read")
log.mark()
h.cache(M, M)
expect(log.requests(), [("Read", M, M)], "first prefetch")
log.mark()
h.pread(100, 4 * M + 5000)
expect(log.requests(), [("Read", 4 * M + 4096, 4096)], "read in a block")
log.mark()
same(h.pread(64 * K, 0), base(0, 64 * K), "second read")
same(h.pread(M, M), base(M, M), "read of what was prefetched")
h.cache(64 * K, 0)
h.cache(M, M)
h.pread(4096, 4 * M + 4096)
h.pwrite(b"x", 5000)
expect(log.requests(), [], "what is in the overlay")
END
