#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A snapshot cuts the writes of all connections at one moment: what was acknowledged before
# its client began to connect is in it, what was sent after it was connected is not, and no
# write is there by half.  The writes are numbered, span blocks and slots of the map,
# and never cease while one snapshot after the other is taken, and held, by several.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

for args in cow-block-size=4K cow-block-size=64K "cow-save=$tmp/diff"; do
    start_nbdkit pattern 8M cow-views=true "$args"
    py "$args" <<'END'
import multiprocessing
print(re.sub("=.*diff", "", sys.argv[1]))
WRITERS = 3
SIZE = 8 * M
# Each writer has cells of its own, which lie one behind the other, with no border of
# blocks between them.  It has one write at a time to a cell, and four in all.
CELLS = [5000] * 24 + [140000] * 6 + [9] * 24 + [300001] * 3
EACH = sum(CELLS)
context = multiprocessing.get_context("fork")


def cells(w):
    at = w * EACH
    for i, n in enumerate(CELLS):
        yield w * len(CELLS) + i, at, n
        at += n


def content(cell, version, n):
    """Every seventh version is zeroes: zeroed or trimmed."""
    if version == 0 or version % 7 == 0:
        return bytes(n)
    one = struct.pack(">II", cell, version) + b"!"
    return one * (n // len(one)) + one[:n % len(one)]


# The number of the last write of each cell that was sent, and that was acknowledged.
sent = context.RawArray("Q", WRITERS * len(CELLS))
acked = context.RawArray("Q", WRITERS * len(CELLS))
stop = context.RawValue("B", 0)


def writer(w):
    h = connect()
    rand = random.Random(w)
    mine = list(cells(w))
    flying = {}
    while not stop.value or flying:
        while not stop.value and len(flying) < 4:
            cell, at, n = rand.choice(mine)
            if sent[cell] != acked[cell]:
                continue
            version = sent[cell] + 1
            data = content(cell, version, n)
            sent[cell] = version
            if version % 7:
                buf = nbd.Buffer.from_bytearray(bytearray(data))
                flying[h.aio_pwrite(buf, at)] = (cell, buf)
            else:
                zero = h.aio_zero if version % 2 else h.aio_trim
                flying[zero(n, at)] = (cell, None)
        h.poll(1000)
        for cookie in list(flying):
            if h.aio_command_completed(cookie):
                cell, buf = flying.pop(cookie)
                acked[cell] = sent[cell]
    h.shutdown()


def started():
    """All cells are there at first as the writers' first version of them."""
    h = connect()
    h.zero(WRITERS * EACH, 0)
    leave(h)
    ps = [context.Process(target=writer, args=(w,), daemon=True) for w in range(WRITERS)]
    for p in ps:
        p.start()
    return ps


def check(image, low, high, what):
    for w in range(WRITERS):
        for cell, at, n in cells(w):
            got = image[at:at + n]
            for version in range(low[cell], high[cell] + 1):
                if got == content(cell, version, n):
                    break
            else:
                version = struct.unpack(">II", got[:8])[1]
                fail("%s: a cell of %d bytes has %sversion %d, not one of %d to %d"
                     % (what, n, "" if got == content(cell, version, n) else "parts of ",
                        version, low[cell], high[cell]))
    same(image[WRITERS * EACH:], base(WRITERS * EACH, SIZE - WRITERS * EACH), what)


ps = started()
total = 0
held = None
for i in range(16):
    # Every writer has gone on since the last one.
    for w in range(WRITERS):
        before = sum(acked[w * len(CELLS):(w + 1) * len(CELLS)])
        until(lambda: sum(acked[w * len(CELLS):(w + 1) * len(CELLS)]) > before + 4
              or not ps[w].is_alive(), "writes")
    low = list(acked)
    s = connect("@snapshot")
    high = list(sent)
    # Other moments come and go meanwhile.
    if i % 3 == 1:
        held = connect("@diff.qcow2")
    elif i % 3 == 2:
        leave(held)
    image = s.pread(SIZE, 0)
    check(image, low, high, "snapshot %d" % i)
    same(s.pread(SIZE, 0), image, "snapshot %d, read again" % i)
    leave(s)

stop.value = 1
for p in ps:
    p.join()
    expect(p.exitcode, 0, "status of a writer")
expect(list(acked), list(sent), "acknowledged")
h = connect()
check(h.pread(SIZE, 0), list(acked), list(acked), "the live disk")
held = connect("@snapshot")
check(held.pread(SIZE, 0), list(acked), list(acked), "the last snapshot")
leave(h, held)
END
    stop_nbdkit
    log_lacks error
done
