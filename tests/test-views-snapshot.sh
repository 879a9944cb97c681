#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# NAME@snapshot is the disk of the moment when the first client of this view connected,
# content and extents, whatever is written, zeroed and trimmed meanwhile.  Who comes while
# somebody has it sees the same moment; when the last one has left, the next one sees a new
# one.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file pattern

# Data, a hole, data, and an end that is no multiple of anything.
base_file "$tmp/base" 2097152
truncate -s 5M "$tmp/base"
base_file "$tmp/end" 1000777
cat "$tmp/end" >>"$tmp/base"
fingerprint "$tmp/base" >"$tmp/before"

for args in cow-block-size=4K cow-block-size=64K cow-on-read=true cow-detect-zeroes=true \
    cow-block-size=2M; do
    start_nbdkit file "$tmp/base" cow-views=true $args
    py "$args" <<'END'
print(sys.argv[1])
with open(tmp + "/base", "rb") as f:
    model = bytearray(f.read())
size = len(model)
h = connect()
rand = random.Random(4)


def change(count):
    for i in range(count):
        n = rand.choice((1, 100, 512, 4 * K, 5000, 64 * K, 128 * K, 300 * K + 1))
        at = rand.randrange(size)
        if rand.random() < 0.5:
            at -= at % (64 * K)
        if rand.random() < 0.1:
            at = size - n
        n = min(n, size - at)
        kind = rand.random()
        if kind < 0.6:
            data = bytes([rand.randrange(256)]) * n
            h.pwrite(data, at)
            model[at:at + n] = data
        else:
            (h.zero if kind < 0.8 else h.trim)(n, at)
            model[at:at + n] = bytes(n)


class Moment:
    """The disk as it is now: what any view of it has to show for ever."""

    def __init__(self):
        self.content = bytes(model)
        self.extents = extents(h)

    def check(self, s, what):
        same(s.pread(size, 0), self.content, what)
        expect(extents(s), self.extents, "extents of " + what)
        for i in range(20):
            at = rand.randrange(size)
            n = min(rand.randrange(1, 200 * K), size - at)
            same(s.pread(n, at), self.content[at:at + n], what)


# Of a disk that nobody has changed.
first = Moment()
s = connect("@snapshot")
expect(s.get_size(), size, "size")
first.check(s, "an unchanged disk")
change(40)
first.check(s, "the unchanged disk while the live one changes")
leave(s)

# Several times: two clients at once, a third one that comes later, and the first ones
# leave before it.
for i in range(4):
    moment = Moment()
    a = connect("@snapshot")
    change(1)
    b = connect("@snapshot")
    change(60)
    moment.check(a, "the first client")
    moment.check(b, "one that came later")
    c = connect("@snapshot")
    leave(a, b)
    change(30)
    # What the live disk is read for may be kept, and changes no snapshot.
    same(h.pread(size, 0), model, "the live disk")
    moment.check(c, "one that came much later, and stays")
    leave(c)
    same(connect().pread(size, 0), model, "the live disk for another client")

# The base is the base, at any time.
with open(tmp + "/base", "rb") as f:
    same(connect("@base").pread(size, 0), f.read(), "the base")
expect(extents(connect("@base")), first.extents, "extents of the base")

# All that could be written is zero: so is the snapshot, the base below or not.
h.zero(size, 0)
s = connect("@snapshot")
h.pwrite(b"x" * size, 0)
same(s.pread(size, 0), bytes(size), "of zeroes")
expect(extents(s), [(0, size, HOLE_ZERO)], "extents of zeroes")
leave(s, h)
END
    stop_nbdkit
    log_lacks error
    fingerprint "$tmp/base" | cmp - "$tmp/before" || die "the base has changed"
done

# Each export has moments of its own, and each kind of view.  One that nobody ever had
# open can be viewed, and later be written.
start_nbdkit pattern 1M cow-views=true
py <<'END'
b = connect("b@snapshot")
same(b.pread(M, 0), base(0, M), "an export that nobody had open")
live = {name: connect(name) for name in ("a", "b", "")}
a = connect("a@snapshot")
for name, h in live.items():
    h.pwrite(name.encode() * 1000 + b"!", 5000)
now = connect("@snapshot")
live[""].pwrite(b"later", 5000)
diff = connect("b@diff.qcow2")
expect(diff.get_size() >= 192 * K, True, "size of another view")
same(a.pread(M, 0), base(0, M), "a, frozen before")
same(b.pread(M, 0), base(0, M), "b, frozen before")
same(now.pread(5, 5000), b"!" + base(5001, 4), "the default, frozen after")
if b"b" * 1000 not in diff.pread(diff.get_size(), 0):
    fail("another view of b has the moment of the first one")
leave(a, b, now, diff, *live.values())
END
log_lacks error
