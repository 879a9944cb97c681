#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# NAME@snapshot is the disk of the moment when the client connected, content and extents,
# whatever is written, zeroed and trimmed meanwhile.  All that was acknowledged before is
# in it.  Only a program that opens several connections before it reads gets the same
# moment with all of them.

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

def of_other_program():
    """What another program gets, which connects now."""
    subprocess.run(["nbdcopy", "nbd+unix:///@snapshot?socket=" + os.environ["sock"],
                    tmp + "/other"], check=True)
    with open(tmp + "/other", "rb") as f:
        return f.read()


# Several times: two connections at once, another program in between, a third connection
# after something was read, and the first ones leave before it.
for i in range(4):
    moment = Moment()
    start = time.monotonic()
    a = connect("@snapshot")
    change(1)
    b = connect("@snapshot")
    together = time.monotonic() - start < 0.9
    same(of_other_program(), model, "another program")
    change(60)
    moment.check(a, "the first connection")
    if together:
        moment.check(b, "one that came together with it")
    later = Moment()
    c = connect("@snapshot")
    change(30)
    # What the live disk is read for may be kept, and changes no snapshot.
    same(h.pread(size, 0), model, "the live disk")
    later.check(c, "one that came after something was read")
    leave(a, b)
    change(30)
    later.check(c, "the same, once the others have left")
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

# A program that waits for more than a second gets another moment, though it has read
# nothing; and one that asked for extents has read.  While nothing changes, there is one
# moment for all.
start_nbdkit -D cow.verbose=1 -v memory 1M cow-views=true
py <<'END'
def frozen():
    return server_log().count("frozen for")


h = connect()
h.pwrite(b"one", 0)
a = connect("@snapshot")
time.sleep(1.2)
h.pwrite(b"two", 0)
same(connect("@snapshot").pread(3, 0), b"two", "more than a second later")
b = connect("@snapshot")
extents(b)
h.pwrite(b"six", 0)
same(connect("@snapshot").pread(3, 0), b"six", "after extents")
h.zero(4096, 0)
same(connect("@snapshot").pread(3, 0), bytes(3), "after a zero")
same(a.pread(3, 0), b"one", "the first one")

# What one connection has read counts for all of the program, also when it has gone.
for gone in False, True:
    x, y = connect("@snapshot"), connect("@snapshot")
    x.pread(3, 0)
    if gone:
        leave(x)
    new = b"new" if gone else b"old"
    h.pwrite(new, 0)
    same(connect("@snapshot").pread(3, 0), new, "after another connection has read")
h.zero(4096, 0)

s = connect("@snapshot")
s.pread(3, 0)
before = frozen()
for i in range(3):
    same(connect("@snapshot").pread(3, 0), bytes(3), "nothing has changed")
expect(frozen(), before, "moments")
END
stop_nbdkit

# Whatever was acknowledged before a client connects is in its moment, however fast clients
# come and go: each a program of its own, or one that reads each time.
start_nbdkit memory 1M cow-views=true
py <<'END'
import mmap
acknowledged = mmap.mmap(-1, 8)
ended = mmap.mmap(-1, 1)


def seen():
    v = connect("@snapshot")
    n, = struct.unpack(">Q", v.pread(8, 0))
    v.shutdown()
    return n


def child(what):
    pid = os.fork()
    if pid == 0:
        try:
            what()
        except BaseException as e:
            print("%s: %s" % (what.__name__, e), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def write_on():
    h = connect()
    n = 0
    while not ended[0]:
        n += 1
        h.pwrite(struct.pack(">Q", n), 0)
        acknowledged[:] = struct.pack(">Q", n)
        if n % 16 == 0:
            time.sleep(0.002)  # nothing changes for a while
    h.shutdown()


def look():
    before, = struct.unpack(">Q", acknowledged[:])
    n = seen()
    if n < before:
        raise ValueError("%d was acknowledged, and %d seen" % (before, n))


def look_often():
    for i in range(500):
        look()


def look_by_programs():
    for i in range(150):
        if os.waitpid(child(look), 0)[1] != 0:
            raise ValueError("in a program of its own")


writer = child(write_on)
until(lambda: acknowledged[:] != bytes(8), "the first write")
lookers = [child(look_often), child(look_often), child(look_by_programs),
           child(look_by_programs)]
status = [os.waitpid(pid, 0)[1] for pid in lookers]
ended[0] = 1
expect(os.waitpid(writer, 0)[1], 0, "the writer's status")
expect(status, [0] * 4, "status of those who look")
END
stop_nbdkit

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
