#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What only a view has takes space as long as somebody has the view.  Then the overlay takes
# what the live disk needs again: in whatever order views go, also for what was zeroed
# meanwhile, and the log is used again, so that the file does not grow for ever.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin memory
mkdir "$tmp/o"
truncate -s 1M "$tmp/o/probe"
requires fallocate -p -o 0 -l 4096 "$tmp/o/probe"
rm "$tmp/o/probe"

for block in 4K 64K; do
    TMPDIR=$tmp/o start_nbdkit memory 1G cow-views=true cow-block-size=$block
    py $block <<'END'
print(sys.argv[1])
block = int(sys.argv[1][:-1]) * K
o = tmp + "/o"
h = connect()
rand = random.Random(9)
# The file system may have some blocks of its own.
slack = 64 * K
model = {}  # block -> byte; what is not there is zero


def put(first, count):
    c = rand.randrange(1, 256)
    h.pwrite(bytes([c]) * (count * block), first * block)
    model.update((i, c) for i in range(first, first + count))


def wipe(what, first, count):
    what(count * block, first * block)
    for i in range(first, first + count):
        model.pop(i, None)


def needed():
    """What the live disk takes: the base has nothing, so all data are its own."""
    return sum(e[1] for e in extents(h) if e[2] == DATA)


def takes(n, what):
    """A few small ranges that are free may not have been given back."""
    settles(o, n, n + n // 8 + slack, what)


def check(v, content, what):
    for i in sorted(content):
        same(v.pread(block, i * block), bytes([content[i]]) * block, what)


put(0, 512)
put(1024, 512)
n = 1024 * block
takes(n, "what was written")

# All is written again, and a view has what was there.
s, moment = connect("@snapshot"), dict(model)
takes(n, "a snapshot of which nothing was changed")
put(0, 512)
takes(n + 512 * block, "a half that was written again")
for i in range(3):
    put(0, 512)
takes(n + 512 * block, "a half that was written again, several times")
put(1024, 512)
takes(2 * n, "all of it")
check(s, moment, "the snapshot")
leave(s)
takes(n, "after the snapshot")
check(h, model, "the live disk")

# One block of each slot, and no more.
s = connect("@snapshot")
for i in range(0, 512, 32):
    put(i + 5, 1)
takes(n + 16 * block, "a block of each slot")
leave(s)
takes(n, "after a block of each slot")

# What is zeroed stays as long as a view has it; what is also written again takes no more.
s, moment = connect("@snapshot"), dict(model)
wipe(h.zero, 0, 256)
wipe(h.trim, 1024, 256)
takes(n, "zeroed, and there for the snapshot")
put(64, 32)
check(s, moment, "the snapshot of what was zeroed")
leave(s)
takes(n - (512 - 32) * block, "zeroed, after the snapshot")
expect(needed(), n - (512 - 32) * block, "the data of the live disk")
wipe(h.zero, 0, 2048)
takes(0, "nothing")

# Two views, of which the one or the other goes first, with changes between them.  What
# the other one shows stays, also when addresses are used again.
def whole(v):
    return v.pread(min(v.get_size(), 16 * M), 0)


for names in ("@snapshot", "@diff.qcow2"), ("@diff.qcow2", "@snapshot"):
    for goes, stays in (0, 1), (1, 0):
        views = []
        put(0, 256)
        views.append(connect(names[0]))
        put(0, 128)
        wipe(h.zero, 224, 16)
        views.append(connect(names[1]))
        put(64, 128)
        wipe(h.trim, 208, 16)
        shown = whole(views[stays])
        before = used(o)
        leave(views[goes])
        until(lambda: used(o) < before, names[goes] + " has gone first")
        put(32, 16)
        put(256, 256)
        same(whole(views[stays]), shown, "what stays, " + names[stays])
        leave(views[stays])
        expect(needed(), (512 - 32) * block, "the data of the live disk")
        takes(needed(), "after both views, %s first" % names[goes])
        check(h, model, "the live disk after both")
        wipe(h.zero, 0, 2048)
        takes(0, "nothing again")

# Views come and go, and so do changes: the file does not get longer all the time.
ends = []
for i in range(24):
    s = connect("@snapshot")
    put(rand.randrange(8) * 32, 64)
    wipe(h.zero, rand.randrange(256), 32)
    leave(s)
    takes(needed(), "round %d" % i)
    ends.append(max(f.st_size for f in overlays(o)))
if ends[-1] > ends[7] + 64 * block:
    fail("the file gets longer and longer: %r" % ends)
check(h, model, "the live disk at the end")

# And all of it is gone when nothing is left.
wipe(h.trim, 0, 2048)
takes(0, "nothing at the end")
leave(h)
END
    stop_nbdkit
    log_lacks error
done
