#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A fast zero is honoured wherever no byte of the base is needed.  Where it is refused
# (ENOTSUP: a part of a block, the rest of which is still the base's) nothing of it
# was done.
#
# nbdkit's own cow filter refuses every one.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

for block in 4096 65536; do
    start_nbdkit pattern $((4 * 1048576 + 1000)) cow-block-size=$block
    py $block <<'END'
block = int(sys.argv[1])
size = 4 * M + 1000
h = connect()
expect(h.can_fast_zero(), True, "fast zero offered")
model = bytearray(base(0, size))

def done(at, n):
    h.zero(n, at, nbd.CMD_FLAG_FAST_ZERO)
    model[at:at + n] = bytes(n)
    same(h.pread(size, 0), model, "%d at %d" % (n, at))

def not_done(at, n):
    raises(errno.ENOTSUP, h.zero, n, at, nbd.CMD_FLAG_FAST_ZERO)
    same(h.pread(size, 0), model, "refused %d at %d" % (n, at))

# Whole blocks: of the base, written, zeroed.
done(0, block)
done(3 * block, 5 * block)
h.pwrite(b"x" * 4 * block, 10 * block)
model[10 * block:14 * block] = b"x" * 4 * block
done(12 * block, 4 * block)
done(12 * block, 4 * block)
# Parts of what is written or zeroed.
done(10 * block + 1, 100)
done(10 * block + 100, block)
done(11 * block + 5, 2 * block)
done(3 * block + 1, 3 * block)
# The end of the disk, but not a part of its last block.
not_done(size - 1, 1)
not_done(4 * M, 999)
done(4 * M, 1000)
done(size - 1, 1)
# Parts of the base's blocks, at the front, the back, and both.
not_done(20 * block, 1)
not_done(20 * block + 1, block - 1)
not_done(20 * block + 1, 3 * block - 1)
not_done(20 * block, 3 * block - 1)
not_done(20 * block + 1, 5 * block)
not_done(9 * block + 1, 2 * block)      # from the base's into a written one
not_done(11 * block, 9 * block + 1)
# Where it was refused, one that need not be fast is done.
h.zero(3 * block - 1, 20 * block + 1)
model[20 * block + 1:23 * block] = bytes(3 * block - 1)
done(20 * block + 5, 100)
END
    stop_nbdkit
done
