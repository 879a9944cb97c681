#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A prefetch that keeps what it reads (cow-on-cache=true) must not undo a write, a
# zero or a trim that was acknowledged while the base was being read, nor make it
# wait for the base.
#
# nbdkit's own cow filter held its only lock while it read the base here: nothing
# was lost, but every other request waited.  (Those that do not take the lock for
# their data could be lost all the same.)

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter pause log
requires_plugin pattern

for block in 4096 65536; do
    rm -f "$tmp/pause" "$tmp/log"
    start_nbdkit --filter=log --filter=pause pattern 16M \
        pause-control="$tmp/pause" logfile="$tmp/log" \
        cow-block-size=$block cow-on-cache=true
    py $block <<'END'
block = int(sys.argv[1])
a, b = connect(), connect()
p, log = Pause(), Log()
start = M

for count, where in [(block, 0), (8 * block, 3 * block), (512, 0)]:
    for what in "write", "zero", "trim":
        name = "%s at %d of a prefetch of %d" % (what, where, count)
        at = start + where
        log.mark()
        p.pause()
        slow = cache(a, count, start)
        log.wait(1)
        if what == "write":
            fast, want = write(b, b"x" * block, at), b"x" * block
        elif what == "zero":
            fast, want = zero(b, block, at), bytes(block)
        else:
            fast, want = trim(b, block, at), bytes(block)
        fast.wait(name + ", while the base is slow")
        expect(slow.completed(), False, name + ": the prefetch has ended")
        p.resume()
        slow.wait()

        model = bytearray(base(start, 8 * block))
        model[where:where + block] = want
        same(b.pread(8 * block, start), model, name)
        start += M
END
    stop_nbdkit
done
