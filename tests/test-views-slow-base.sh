#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# While the base answers nothing, and requests wait for it, snapshots and diff views are
# opened, read where the overlay has the bytes, and left, and the live disk is written,
# also where a view has the same slot.  Who reads a view, or opens a full image, and waits
# for the base holds up nobody.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter pause log
requires_plugin file
base_file "$tmp/base" 16777216

for args in cow-block-size=4K cow-on-read=true; do
    rm -f "$tmp/pause" "$tmp/log"
    start_nbdkit --filter=log --filter=pause file "$tmp/base" pause-control="$tmp/pause" \
        logfile="$tmp/log" cow-views=true "$args"
    py "$args" <<'END'
print(sys.argv[1])
block, slot = 4 * K, 128 * K
h, other = connect(), connect()
p, log = Pause(), Log()
model = bytearray(base(0, 16 * M))


def put(at, data):
    """A write that does not need the base must be answered."""
    write(h, data, at).wait("a write at %d" % at)
    model[at:at + len(data)] = data


def wipe(what, at, n):
    what(h, n, at).wait("a zero or trim at %d" % at)
    model[at:at + n] = bytes(n)


def shows(v, moment, at, n, what):
    """A read that does not need the base must be answered."""
    r = read(v, n, at)
    r.wait("a read of " + what)
    same(r.buf.to_bytearray(), moment[at:at + n], what)


put(0, b"1" * slot)
put(4 * slot, b"2" * slot)
put(8 * slot, b"3" * block)
held = connect("@snapshot")
held_moment = bytes(model)
log.mark()
p.pause()

# These wait for the base: a read and a write of the live disk, in one slot with what the
# snapshot has too, and elsewhere, and readers of two views; and one opens a full image.
slow = [read(other, 2 * block, 8 * slot + 4 * block), read(other, M, 2 * M),
        write(other, b"4" * 100, 8 * slot + 5 * block + 5),
        read(held, M, 8 * M), read(held, 3 * block, 9 * slot - block)]
slow_views = [connect("@base")]
slow.append(read(slow_views[0], block, 0))
log.wait(len(slow))
opening = nbd.NBD()
opening.set_export_name("@full.qcow2")
opening.aio_connect_unix(os.environ["sock"])
until(lambda: turn(opening) or log.requests("Extents"), "the start of a full image")

# These do not, again and again.
for i in range(5):
    put(0, bytes([65 + i]) * slot)
    put(4 * slot + 3 * block, b"5%d" % i * 100)
    put(8 * slot + 7 * block, b"6" * 2 * block)
    before = bytes(model)
    image = connect("@diff.qcow2")
    size = image.get_size()
    put(4 * slot + block, b"7" * (i + 1))
    wipe(zero, 4 * slot + 9 * block, 2 * block)
    wipe(trim, 8 * slot, block)
    r = read(image, size, 0)
    r.wait("a read of the diff view")
    if before[:slot] not in r.buf.to_bytearray():
        fail("the diff view has not what was written before it")
    shows(held, held_moment, 0, slot, "the snapshot that was there before")
    shows(held, held_moment, 4 * slot, slot, "the snapshot that was there before")
    shows(held, held_moment, 8 * slot, block, "the snapshot that was there before")
    shows(h, model, 4 * slot, slot, "the live disk")
    expect(extents(held, 4 * slot, slot), [(4 * slot, slot, DATA)], "its extents")
    leave(image)
    put(12 * slot + i * block, b"8" * block)

expect([s.completed() for s in slow], [False] * len(slow), "ends of what needs the base")
expect(opening.aio_is_connecting(), True, "opening of the full image")
p.resume()
for s in slow:
    s.wait()
model[8 * slot + 5 * block + 5:8 * slot + 5 * block + 105] = b"4" * 100
same(slow[3].buf.to_bytearray(), held_moment[8 * M:9 * M], "what waited for the base")
until(lambda: turn(opening) or opening.aio_is_ready(), "the full image")
same(held.pread(16 * M, 0), held_moment, "all of the snapshot")
same(h.pread(16 * M, 0), model, "all of the live disk")
leave(h, other, held, opening, *slow_views)
END
    # (At its end, the pause filter may complain of its own socket.)
    log_lacks error
    stop_nbdkit
done
