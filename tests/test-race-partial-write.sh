#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A request that covers a block in part has to read the rest of it from the base.
# It must not undo what another connection wrote to that block, zeroed or trimmed,
# and was told is done, while the base was being read.
#
# This broke in nbdkit's own cow filter: the whole block, merged from the base and
# the request, was stored without another look at its state, so everything of the
# acknowledged write beyond those few bytes went back to the base's data.
#
# The pause filter holds up the base, so the order of things does not depend on
# how fast they are.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter pause log
requires_plugin pattern

for block in 4096 65536; do
    rm -f "$tmp/pause" "$tmp/log"
    start_nbdkit --filter=log --filter=pause pattern 64M \
        pause-control="$tmp/pause" logfile="$tmp/log" cow-block-size=$block
    py $block <<'END'
block = int(sys.argv[1])
a, b = connect(), connect()
p, log = Pause(), Log()
start = M

def issue(h, what, byte, count, at):
    """The request, and the bytes that it leaves."""
    if what == "write":
        return write(h, byte * count, at), byte * count
    if what == "zero":
        return zero(h, count, at), bytes(count)
    return trim(h, count, at), bytes(count)

# The slow request, from the start of the first of four blocks: its first byte and
# its length.  The fast request, of whole blocks: the first block, and how many.
for first, count in [(0, 512), (block - 512, 1024), (512, 3 * block),
                     (1, 2 * block - 2)]:
    for at, nr in [(0, 1), (1, 1), (0, 4)]:
        for slow_what, fast_what in [("write", "write"), ("write", "zero"),
                                     ("write", "trim"), ("zero", "write"),
                                     ("trim", "write")]:
            name = ("%s of blocks %d+%d during a %s of %d+%d"
                    % (fast_what, at, nr, slow_what, first, count))
            log.mark()
            p.pause()
            slow, slow_bytes = issue(a, slow_what, b"s", count, start + first)
            log.wait(1)
            fast, fast_bytes = issue(b, fast_what, b"f", nr * block,
                                     start + at * block)
            fast.wait(name + ", while the base is slow")
            expect(slow.completed(), False, name + ": the slow one has ended")
            p.resume()
            slow.wait()

            # Where both wrote, either may have been the last.
            got = bytearray(b.pread(4 * block, start))
            model = bytearray(base(start, 4 * block))
            model[first:first + count] = slow_bytes
            model[at * block:(at + nr) * block] = fast_bytes
            for i in range(max(first, at * block),
                           min(first + count, (at + nr) * block)):
                if got[i] == slow_bytes[i - first]:
                    got[i] = model[i]
            same(got, model, name)
            start += 512 * K

# Requests for different parts of one block, all waiting for the base at once.
log.mark()
p.pause()
handles = [connect() for i in range(8)]
slow = [write(h, bytes([i + 65]) * 512, start + 512 * i)
        for i, h in enumerate(handles)]
log.wait(1)
p.resume()
for s in slow:
    s.wait()
same(a.pread(4096, start), b"".join(bytes([i + 65]) * 512 for i in range(8)),
     "parts of one block")
END
    stop_nbdkit
done
