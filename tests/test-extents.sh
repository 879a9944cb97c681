#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Extents: written blocks are data, zeroed and trimmed ones are holes that read as
# zeroes, all others are what the base says of them; exact to the block, neighbours
# of one kind merged, up to the last byte.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter noextents

# Data in the first and the fourth MiB; the end is not that of a block.
size=$((6 * 1048576 + 1000))
truncate -s $size "$tmp/base"
for at in 0 3; do
    dd if=/dev/urandom of="$tmp/base" bs=1M count=1 seek=$at conv=notrunc status=none
done

# What is done to the disk, in blocks of 4K.  512 blocks are 2 MiB.
changes ()
{
    py <<'END'
h = connect()
B = 4096
h.pwrite(b"x" * B, 512 * B)                 # in the hole of the base
h.pwrite(b"x" * 10, 520 * B + 5)            # a part of a block
h.pwrite(b"x" * 2 * B, 530 * B - 1)         # three blocks
h.pwrite(b"x" * B, 600 * B)
h.pwrite(b"x" * B, 601 * B)                 # one behind the other
h.zero(2 * B, 601 * B)                      # and one of them gone
h.trim(4 * B, 800 * B)                      # in the data of the base
h.zero(2 * B + 10, 810 * B - 5)             # the same, unaligned
h.pwrite(b"x" * 3 * B, 1280 * B)            # in the hole at the end
h.pwrite(b"x" * 10, 6 * M + 990)            # the last block
END
}

# expect_map <<EOF: the output of nbdinfo --map, in bytes.
expect_map ()
{
    sed 's/^ *//; s/  */ /g' >"$tmp/expected"
    nbdinfo --map "$uri" | sed 's/^ *//; s/  */ /g' >"$tmp/map"
    diff -u "$tmp/expected" "$tmp/map" || die "another map than expected"
}

# nbdkit counts an extent at a time here: with data there is no difference between
# the base's and the overlay's.
start_nbdkit file "$tmp/base"
expect_map <<'END'
0 1048576 0 data
1048576 2097152 3 hole,zero
3145728 1048576 0 data
4194304 2098152 3 hole,zero
END
changes
expect_map <<END
0 1048576 0 data
1048576 1048576 3 hole,zero
$((512 * 4096)) 4096 0 data
$((513 * 4096)) $((7 * 4096)) 3 hole,zero
$((520 * 4096)) 4096 0 data
$((521 * 4096)) $((8 * 4096)) 3 hole,zero
$((529 * 4096)) $((3 * 4096)) 0 data
$((532 * 4096)) $((68 * 4096)) 3 hole,zero
$((600 * 4096)) 4096 0 data
$((601 * 4096)) $((167 * 4096)) 3 hole,zero
$((768 * 4096)) $((32 * 4096)) 0 data
$((800 * 4096)) $((4 * 4096)) 3 hole,zero
$((804 * 4096)) $((6 * 4096)) 0 data
$((810 * 4096)) $((2 * 4096)) 3 hole,zero
$((812 * 4096)) $((212 * 4096)) 0 data
$((1024 * 4096)) $((256 * 4096)) 3 hole,zero
$((1280 * 4096)) $((3 * 4096)) 0 data
$((1283 * 4096)) $((253 * 4096)) 3 hole,zero
$((1536 * 4096)) 1000 0 data
END

# What qemu makes of it, which is to be the same disk.
py <<'END'
h = connect()
size = h.get_size()
all_of_it = extents(h)

# From any place to any other the answer is a part of the whole.
def part(at, n):
    return [(max(o, at), min(o + l, at + n) - max(o, at), k)
            for o, l, k in all_of_it if o < at + n and o + l > at]

rand = random.Random(1)
for i in range(200):
    at = rand.randrange(size)
    n = rand.randrange(1, size - at + 1)
    if i % 2:
        n = min(n, 20000)
    expect(extents(h, at, n), part(at, n), "%d bytes at %d" % (n, at))
    # One answer is merged already, starts at the right place, and does not stop
    # before the request is answered by one extent at least.
    raw = raw_extents(h, n, at)
    for a, b in zip(raw, raw[1:]):
        if a[1] == b[1]:
            fail("two extents of one kind, side by side: %r" % raw)
    one = raw_extents(h, n, at, nbd.CMD_FLAG_REQ_ONE)
    expect(len(one), 1, "extents with REQ_ONE")
    expect(one[0][1], part(at, n)[0][2], "kind with REQ_ONE")
    if not 0 < one[0][0] <= part(at, n)[0][1]:
        fail("REQ_ONE: %r, expected %r at the most" % (one, part(at, n)[0]))
# By REQ_ONE alone.
expect(extents(h, flags=nbd.CMD_FLAG_REQ_ONE), all_of_it, "all by REQ_ONE")
END
stop_nbdkit

# A base that has no extents is data, but for what was zeroed.
start_nbdkit --filter=noextents file "$tmp/base"
changes
expect_map <<END
0 $((601 * 4096)) 0 data
$((601 * 4096)) $((2 * 4096)) 3 hole,zero
$((603 * 4096)) $((197 * 4096)) 0 data
$((800 * 4096)) $((4 * 4096)) 3 hole,zero
$((804 * 4096)) $((6 * 4096)) 0 data
$((810 * 4096)) $((2 * 4096)) 3 hole,zero
$((812 * 4096)) $((size - 812 * 4096)) 0 data
END
stop_nbdkit

# Larger blocks.
start_nbdkit file "$tmp/base" cow-block-size=64K
py <<'END'
h = connect()
h.pwrite(b"x", 2 * M)
h.zero(65536, 3 * M)
h.trim(65536 * 2 - 1, 3 * M + 65536 * 2)
h.pwrite(b"x", 6 * M)
END
expect_map <<END
0 1048576 0 data
1048576 1048576 3 hole,zero
2097152 65536 0 data
$((2097152 + 65536)) $((1048576 - 65536 + 65536)) 3 hole,zero
$((3145728 + 65536)) 65536 0 data
$((3145728 + 131072)) 65536 3 hole,zero
$((3145728 + 196608)) $((1048576 - 196608)) 0 data
4194304 2097152 3 hole,zero
$((6 * 1048576)) 1000 0 data
END
