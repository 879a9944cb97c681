#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What was zeroed or trimmed reads as zeroes, to the byte, over every kind of base and
# for any alignment, whatever the blocks were before; all of it that is whole blocks
# is shown as a hole.  All of it can be written again.
#
# nbdkit's own cow filter offers no zero over a base that has none, a read-only
# plugin for one, and writes out the zeroes where it does.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

size=$((2 * 1048576 + 777))
base_file "$tmp/base" $size

# run ARGS...
run ()
{
    echo "$*"
    start_nbdkit "$@"
    py "$*" <<'END'
block = 64 * K if "64K" in sys.argv[1] else 4 * K
size = 2 * M + 777
rand = random.Random(1)
for what in "zero", "trim":
    h = connect(what)       # an overlay each
    model = bytearray(base(0, size))
    shown = bytearray(size // block + 1)    # blocks that must be a hole
    call = getattr(h, what)

    # Before: a third of the blocks written, some zeroed already.
    for at in range(0, size, 9 * block):
        n = min(3 * block, size - at)
        h.pwrite(b"d" * n, at)
        model[at:at + n] = b"d" * n
        n = min(block, size - at)
        h.trim(n, at)
        model[at:at + n] = bytes(n)

    # Ends in every kind of block, aligned and not, and the end of the disk.
    ranges = [(0, 1), (0, block), (1, block), (block - 1, 2),
              (10 * block, 30 * block), (20 * block + 1, 33 * block),
              (size - 1, 1), (size - 777, 777), (size - 776, 776),
              (size - 5000, 4900), (size - block * 3 - 5, block * 3 + 5)]
    ranges += [(a, rand.randrange(1, min(size - a, 5 * block) + 1))
               for a in (rand.randrange(size) for i in range(40))]
    for at, n in ranges:
        n = min(n, size - at)
        call(n, at)
        model[at:at + n] = bytes(n)
        a, z = max(0, at - block), min(size, at + n + block)
        same(h.pread(z - a, a), model[a:z], "%s of %d at %d" % (what, n, at))
        for b in range((at + block - 1) // block, (at + n) // block):
            shown[b] = 1
        if at + n == size and at <= size - 777:
            shown[-1] = 1
    same(h.pread(size, 0), model, "all after " + what)

    for at, n, kind in extents(h):
        if kind == HOLE_ZERO:
            for b in range((at + block - 1) // block, (at + n + block - 1) // block):
                shown[b] = 0
            same(h.pread(n, at), bytes(n), "a hole at %d" % at)
    if any(shown):
        fail("%s: block %d is not shown as a hole" % (what, shown.index(1)))

    # Without a hole, and then with data.
    h.zero(block, 4 * block, nbd.CMD_FLAG_NO_HOLE)
    model[4 * block:5 * block] = bytes(block)
    h.pwrite(b"n" * 3 * block, 10 * block + 5)
    model[10 * block + 5:13 * block + 5] = b"n" * 3 * block
    same(h.pread(size, 0), model, "all after a write")
END
    stop_nbdkit
}

run pattern $size
run pattern $size cow-block-size=64K
run pattern $size cow-on-read=true
run --filter=nozero file "$tmp/base"
run file "$tmp/base"
if xz --version >/dev/null 2>&1; then
    xz -k --block-size=65536 "$tmp/base"
    run --filter=xz file "$tmp/base.xz"
fi
