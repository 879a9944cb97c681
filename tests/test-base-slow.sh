#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# While a request waits for the base, others that do not need it are answered: reads
# of the overlay, writes, zeroes and trims of whole blocks, parts of blocks that are
# in the overlay already, in the same slot of the map and elsewhere, on the same
# connection and on others.  New clients connect, old ones leave.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter pause log
requires_plugin pattern

for args in "" cow-on-read=true cow-on-cache=true; do
    rm -f "$tmp/pause" "$tmp/log"
    # shellcheck disable=SC2086
    start_nbdkit --filter=log --filter=pause pattern 16M \
        pause-control="$tmp/pause" logfile="$tmp/log" $args
    py "$args" <<'END'
print(sys.argv[1])
block = 4 * K
a, b = connect(), connect()
p, log = Pause(), Log()
model = bytearray(base(0, 16 * M))

a.pwrite(b"1" * block * 4, 8 * block)
model[8 * block:12 * block] = b"1" * block * 4
log.mark()
p.pause()

# These need the base.
slow = [read(a, 2 * block, 0), read(b, M, M),
        write(a, b"2" * 100, 20 * block + 5),
        write(b, b"3" * 3 * block, 24 * block + 7),
        zero(a, 100, 30 * block + 5), trim(b, 100, 31 * block + 5)]
if "cow-on-cache" in sys.argv[1]:
    slow.append(cache(b, 4 * block, 4 * M))
model[20 * block + 5:20 * block + 105] = b"2" * 100
model[24 * block + 7:27 * block + 7] = b"3" * 3 * block
model[30 * block + 5:30 * block + 105] = bytes(100)
model[31 * block + 5:31 * block + 105] = bytes(100)
# The pause lets nothing through; what waits for it has begun.
log.wait(len(slow))

# These do not.
def fast(command, what):
    command.wait(what + ", while the base is slow")
    return command

for h in a, b, connect():
    r = fast(read(h, 4 * block, 8 * block), "read of the overlay")
    same(r.buf.to_bytearray(), model[8 * block:12 * block], "overlay")
    for at in 0, 40 * block, 3 * M:
        # (Block 0 is being read.)
        fast(write(h, b"w" * block, at), "write of a whole block")
        model[at:at + block] = b"w" * block
    fast(write(h, b"p" * 77, 9 * block + 3), "part of a block in the overlay")
    model[9 * block + 3:9 * block + 80] = b"p" * 77
    fast(zero(h, 2 * block, 50 * block), "zero of whole blocks")
    model[50 * block:52 * block] = bytes(2 * block)
    fast(trim(h, 2 * block, 60 * block), "trim of whole blocks")
    model[60 * block:62 * block] = bytes(2 * block)
    fast(zero(h, 99, 10 * block + 1), "zero in a block in the overlay")
    model[10 * block + 1:10 * block + 100] = bytes(99)
    fast(write(h, b"q" * 100, 51 * block + 5), "part of a zeroed block")
    model[51 * block + 5:51 * block + 105] = b"q" * 100
    h.flush()
    expect(extents(h, 8 * block, 4 * block), [(8 * block, 4 * block, DATA)],
           "extents of the overlay")

for s in slow:
    expect(s.completed(), False, "a request that needs the base has ended")
p.resume()
for s in slow:
    s.wait()
same(slow[1].buf.to_bytearray(), base(M, M), "what was read of the base")
same(a.pread(16 * M, 0), model, "all of it")
END
    stop_nbdkit
done
