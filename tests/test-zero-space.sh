#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Zero and trim give back the space that was taken in the overlay file, and take none
# where nothing was, however large the range.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
mkdir "$tmp/o"
truncate -s 1M "$tmp/o/probe"
requires fallocate -p -o 0 -l 4096 "$tmp/o/probe"
rm "$tmp/o/probe"

for block in 4K 64K 2M; do
    TMPDIR=$tmp/o start_nbdkit pattern 64G cow-block-size=$block
    py <<'END'
o = tmp + "/o"
h = connect()
n = 16 * M

# The file may be there or not, and may have a block of its own.
slack = 64 * K

def zero_all(what):
    """64 GiB, in requests as long as they can be."""
    at = 0
    while at < 64 * G:
        c = min(64 * G - at, 0xffe00000)
        getattr(h, what)(c, at)
        at += c

for what in "zero", "trim":
    h.pwrite(b"x" * n, G)
    h.pwrite(b"x" * n, 32 * G)
    if used(o) < 2 * n:
        fail("what was written takes %d bytes" % used(o))
    # One half, in one request and in small ones.
    getattr(h, what)(n, G)
    settles(o, 0, n + slack, "after one " + what)
    for at in range(0, n, 2 * M):
        getattr(h, what)(2 * M, 32 * G + at)
    settles(o, 0, slack, "after each " + what)
    # Written again: not somewhere else.
    for i in range(3):
        h.pwrite(b"x" * n, G)
    settles(o, n, n + slack, "written again")
    zero_all(what)
    settles(o, 0, slack, "after %s of all" % what)
    same(h.pread(M, 64 * G - M), bytes(M), "the end")
    same(h.pread(M, G), bytes(M), "the middle")

# Unaligned ends in what is zeroed write nothing.
for at in range(777, 64 * G, 4 * G):
    h.zero(9 * M, at)
    h.trim(5, at + G)
settles(o, 0, slack, "unaligned zeroes")
expect(extents(h), [(0, 64 * G, HOLE_ZERO)], "extents")
END
    stop_nbdkit
done
