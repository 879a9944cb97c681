#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Moments with names: what was on the disk then can be read as long as they are not
# forgotten, raw, as a diff and as a full image; an increment between any two of them, in
# any order, turns the one into the other and has only what differs; several exports can be
# frozen at one moment.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file memory pattern

base_file "$tmp/base" 2097152
truncate -s 5M "$tmp/base"
base_file "$tmp/end" 1000777
cat "$tmp/end" >>"$tmp/base"
fingerprint "$tmp/base" >"$tmp/before"

for args in cow-block-size=4K cow-block-size=64K cow-block-size=2M cow-save-format=extended \
    cow-detect-zeroes=true; do
    start_nbdkit file "$tmp/base" cow-views=true cow-control="$tmp/control" $args
    py "$args" <<'END'
print(sys.argv[1])
with open(tmp + "/base", "rb") as f:
    original = f.read()
model = bytearray(original)
size = len(model)
bs = {"cow-block-size=64K": 64 * K, "cow-block-size=2M": 2 * M}.get(sys.argv[1], 4 * K)
h = connect()
control = Control()
rand = random.Random(11)
touched = [set()]  # blocks, by each stretch of time between two moments
content = {"base": original}
names = []


def change(count):
    for i in range(count):
        n = rand.choice((1, 512, 4 * K, 5000, 64 * K, 128 * K, 300 * K + 1))
        at = rand.randrange(size)
        if rand.random() < 0.5:
            at -= at % (64 * K)
        if rand.random() < 0.2:
            at = max(0, size - n)
        n = min(n, size - at)
        if rand.random() < 0.6:
            data = bytes([rand.randrange(256)]) * n
            h.pwrite(data, at)
            model[at:at + n] = data
        else:
            rand.choice((h.zero, h.trim))(n, at)
            model[at:at + n] = bytes(n)
        touched[-1].update(range(at // bs, (at + n - 1) // bs + 1))


def moment(name):
    control("moment", name, "default")
    names.append(name)
    content[name] = bytes(model)
    touched.append(set())


def image(what):
    v = connect("@" + what)
    data = b"".join(v.pread(min(M, v.get_size() - at), at)
                    for at in range(0, v.get_size(), M))
    with open(tmp + "/image", "wb") as f:
        f.write(data)
    leave(v)


def over(name):
    """The disk that the image shows over this content."""
    with open(tmp + "/below", "wb") as f:
        f.write(content[name])
    below = {"driver": "raw", "file": {"driver": "file", "filename": tmp + "/below"}}
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": tmp + "/image"},
            "backing": below}
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", tmp + "/image"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(spec),
                    tmp + "/disk"], check=True)
    with open(tmp + "/disk", "rb") as f:
        return f.read()[:size]  # of whole sectors


def in_image():
    """The blocks that it has."""
    out = subprocess.run(["qemu-img", "map", "--output=json", "-f", "qcow2",
                          tmp + "/image"], check=True, capture_output=True).stdout
    return {b for e in json.loads(out) if e["present"]
            for b in range(e["start"] // bs, (e["start"] + e["length"] - 1) // bs + 1)}


import json
moment("untouched")
change(8)
moment("one")
change(30)
moment("two")
moment("the.same_as-2")
h.zero(size, 0)
model[:] = bytes(size)
touched[-1].update(range((size - 1) // bs + 1))
moment("empty")
change(10)
moment("last")
change(10)

for n in names:
    v = connect("@" + n)
    same(v.pread(size, 0), content[n], n)
    expect(v.is_read_only(), True, "read only")
    leave(v)
    image(n + "/diff.qcow2")
    same(over("base"), content[n], n + "/diff.qcow2")
    image(n + "/full.qcow2")
    same(over("base"), content[n], n + "/full.qcow2")

# Each pair, in both directions, and over nothing at all; of other sizes, neighbours.
for i, f in enumerate(names):
    for j, t in enumerate(names):
        if bs != 4 * K and abs(i - j) > 1:
            continue
        image("%s..%s/diff.qcow2" % (f, t))
        same(over(f), content[t], "from %s to %s" % (f, t))
        between = set().union(*touched[min(i, j) + 1:max(i, j) + 1], set())
        if not in_image() <= between:
            fail("from %s to %s: blocks that are the same" % (f, t))
    image(f + "..now/diff.qcow2")
    same(over(f), model, "from %s to now" % f)
    image(f + "..base/diff.qcow2")
    same(over(f), original, "from %s to the base" % f)
    image("base..%s/diff.qcow2" % f)
    same(over("base"), content[f], "from the base to %s" % f)

# Forgotten in any order, the others stay as they are.
order = names[:]
rand.shuffle(order)
for n in order:
    control("forget", n, "default")
    del content[n]
    expect(refused("@" + n), True, "refusal of what was forgotten")
    for m in content:
        if m != "base":
            v = connect("@" + m)
            same(v.pread(size, 0), content[m], m + " without " + n)
            leave(v)
expect([v for k, v in control("list") if k == "moment"], [], "moments in the end")
same(h.pread(size, 0), model, "the live disk")
leave(h)
END
    stop_nbdkit
    fingerprint "$tmp/base" | cmp - "$tmp/before" || die "the base has changed"
done

# An increment has exactly the blocks that differ; also across leaves of the map, where
# nothing was changed, and at the disk's end.
start_nbdkit memory 1T cow-views=true cow-control="$tmp/control"
py <<'END'
import json
h, control = connect(), Control()
places = [0, 4 * K, 32 * M - 4 * K, 32 * M, 17 * G, 1024 * G - 4 * K]
for at in places:
    h.pwrite(b"1" * 4 * K, at)
control("moment", "a", "default")
h.pwrite(b"2" * 10, 17 * G)
h.zero(4 * K, 4 * K)
h.pwrite(b"2" * 10, 500 * G)
h.pwrite(b"2" * 10, 1024 * G - 10)
h.zero(64 * M, 100 * G)
control("moment", "b", "default")
found = json.loads(subprocess.run(
    ["qemu-img", "map", "--output=json", "-f", "qcow2",
     "nbd+unix:///@a..b/diff.qcow2?socket=" + os.environ["sock"]],
    check=True, capture_output=True).stdout)
expect([(e["start"], e["length"], e["data"]) for e in found if e["present"]],
       [(4 * K, 4 * K, False), (17 * G, 4 * K, True), (100 * G, 64 * M, False),
        (500 * G, 4 * K, True), (1024 * G - 4 * K, 4 * K, True)], "the increment")
same(connect("@a").pread(10, 17 * G), b"1" * 10, "the moment a")
leave(h)
END
stop_nbdkit

# Back to what the base has costs nothing where that is empty, and zeroes cost no memory.
start_nbdkit memory 256G cow-views=true cow-control="$tmp/control"
py <<'END'
h, control = connect(), Control()
leave(connect("@snapshot"))
control("moment", "a", "default")
for at in range(0, 256 * G, 2 * G):
    h.zero(2 * G, at)
h.pwrite(b"x" * M, 0)
control("moment", "b", "default")


def memory():
    with open("/proc/%s/status" % os.environ["pid"]) as f:
        return next(int(l.split()[1]) * K for l in f if l.startswith("RssAnon:"))


before = memory()
v = connect("@a..b/diff.qcow2")
expect(v.get_size() < 16 * M, True, "a short image")
back = connect("@b..a/diff.qcow2")
expect(back.get_size() < 16 * M, True, "a short way back")
if "SAN_OPTIONS" not in " ".join(os.environ) and memory() - before > 16 * M:
    fail("much memory: %d" % (memory() - before))
leave(h, v, back)
END
stop_nbdkit

# An increment is no diff of the base: it is refused but behind what was there before.
start_nbdkit file "$tmp/base" cow-views=true cow-control="$tmp/control"
py <<'END'
h, control = connect(), Control()
h.pwrite(b"1" * 10000, 12345)
control("moment", "a", "default")
h.pwrite(b"2" * 10000, 3 * M)
h.zero(100000, 4 * M)
control("moment", "b", "default")
leave(h)
END
nbdcopy "$(view @a/diff.qcow2)" "$tmp/a.qcow2"
nbdcopy "$(view @a..b/diff.qcow2)" "$tmp/b.qcow2"
nbdcopy "$(view @b)" "$tmp/shown"
stop_nbdkit
start_nbdkit file "$tmp/base" cow-load="$tmp/b.qcow2"
py <<'END'
expect(refused(), True, "refusal of an increment by itself")
until(lambda: "only what changed between two moments" in server_log(), "the reason")
END
stop_nbdkit
start_nbdkit file "$tmp/base" cow-load="$tmp/a.qcow2" cow-load="$tmp/b.qcow2"
nbdcopy "$uri" - | cmp - "$tmp/shown" || die "a diff and an increment are not the disk"
stop_nbdkit
log_lacks error

# What a moment takes is what forgetting it gives back.  A reader keeps it.
mkdir "$tmp/o"
TMPDIR=$tmp/o start_nbdkit memory 1G cow-views=true cow-control="$tmp/control"
py <<'END'
h, control = connect(), Control()
o = tmp + "/o"
h.pwrite(b"1" * 8 * M, 0)
control("moment", "a", "default")
h.pwrite(b"2" * 4 * M, 0)
control("moment", "b", "default")
h.pwrite(b"3" * 2 * M, 0)
expect([(k, v) for k, v in control("list", "default") if k in ("moment", "taken")],
       [("moment", "b"), ("taken", str(2 * M)), ("moment", "a"), ("taken", str(4 * M))],
       "what they take")
settles(o, 14 * M, 14 * M + 256 * K, "all of them")
control("forget", "b", "default")
settles(o, 12 * M, 12 * M + 256 * K, "without b")
reader = connect("@a")
control("forget", "a", "default")
control.refuses('has no moment "a"', "forget", "a", "default")
same(reader.pread(8 * M, 0), b"1" * 8 * M, "what was forgotten, for who has it")
control("moment", "a", "default")
other = connect("@a")
same(other.pread(2 * M, 0), b"3" * 2 * M, "another one of that name")
same(reader.pread(2 * M, 0), b"1" * 2 * M, "the first one of that name")
leave(reader)
settles(o, 8 * M, 8 * M + 256 * K, "without the first a")
leave(other, h)
same(connect("@a").pread(2 * M, 0), b"3" * 2 * M, "when nobody has it")
END
stop_nbdkit

# Several exports at one moment: what is written to one and then to the other is not in
# the other alone.  While clients write, names come and go.
start_nbdkit pattern 1M cow-views=true cow-control="$tmp/control"
py <<'END'
import threading
control = Control()
a, b = connect("a"), connect("b")
ended = False


def count():
    n = 0
    while not ended:
        n += 1
        a.pwrite(struct.pack(">Q", n), 0)
        b.pwrite(struct.pack(">Q", n), 512 * K)


a.pwrite(bytes(8), 0)
b.pwrite(bytes(8), 512 * K)
counter = threading.Thread(target=count)
counter.start()
for i in range(200):
    name = "m%d" % i
    control("moment", name, *random.sample(["a", "b"], 2))
    x, y = connect("a@" + name), connect("b@" + name)
    n, = struct.unpack(">Q", x.pread(8, 0))
    m, = struct.unpack(">Q", y.pread(8, 512 * K))
    if not m <= n <= m + 1:
        fail("frozen at two moments: %d and %d" % (n, m))
    if i % 3:
        control("forget", name, "b", "a")
    leave(x, y)
ended = True
counter.join()
# All or nothing.
before = control("list")
control.refuses('"b" has a moment "m0" already', "moment", "m0", "b")
control("moment", "only-a", "a")
for words in (("moment", "only-a", "b", "a"), ("moment", "new", "a", "b", "c"),
              ("moment", "new", "a", "a"), ("forget", "only-a", "a", "b"),
              ("forget", "m0", "a", "c"), ("moment", "new", "a", "b", "nothing")):
    control.refuses("", *words)
control("forget", "only-a", "a")
expect([x for x in control("list") if x[0] != "taken"],
       [x for x in before if x[0] != "taken"], "after what was refused")
leave(a, b)
END
stop_nbdkit
log_lacks error

# A disk is thrown away with its moments, as long as nobody uses it; the next one is fresh.
# Others stay, and what was dropped is not saved.
mkdir "$tmp/diffs" "$tmp/fresh"
TMPDIR=$tmp/fresh start_nbdkit pattern 1M cow-views=true cow-control="$tmp/control" \
    cow-save="$tmp/diffs/" cow-max-overlays=2
py <<'END'
control = Control()
a, b = connect("a"), connect("b")
for h in a, b:
    h.pwrite(b"x" * 100000, 5000)
control("moment", "m", "a", "b")
control.refuses("in use", "drop", "a")
leave(a)
v = connect("a@m")
control.refuses("in use", "drop", "a")
leave(v)
control("drop", "a")
control.refuses("connect to it first", "drop", "a")
expect(refused("a@m"), True, "refusal of a moment that was dropped")
a = connect("a")
same(a.pread(M, 0), base(0, M), "a fresh disk")
same(connect("b@m").pread(100000, 5000), b"x" * 100000, "another disk")
leave(a)
# While clients come and go: nobody's writes are lost but those of a dropped disk.
import threading
ended = False


def drop():
    while not ended:
        try:
            control("drop", "a")
        except Refused:
            pass


dropper = threading.Thread(target=drop)
dropper.start()
for i in range(300):
    a = connect("a")
    a.pwrite(b"%8d" % i, 0)
    time.sleep(0.0005 * (i % 4))
    same(a.pread(8, 0), b"%8d" % i, "the disk of who is connected")
    if i % 2:
        same(connect("a").pread(8, 0), b"%8d" % i, "another connection to it")
    a.shutdown()
ended = True
dropper.join()
leave(b)
until(lambda: all(v == "0" for k, v in control("list") if k == "connections"),
      "the end of all")
try:
    control("drop", "a")
except Refused:
    pass
END
stop_nbdkit
only_files "$tmp/diffs" b.qcow2

# What was loaded is loaded again, and a file that holds it stays as it is, or gets all that
# a client would see.
start_nbdkit file "$tmp/base" cow-save="$tmp/first.qcow2"
py <<'END'
connect().pwrite(b"first" * 1000, 12345)
END
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
cp "$tmp/first.qcow2" "$tmp/kept.qcow2"
for save in first other; do
    start_nbdkit file "$tmp/base" cow-load="$tmp/first.qcow2" cow-save="$tmp/$save.qcow2" \
        cow-views=true cow-control="$tmp/control"
    py <<'END'
h, control = connect(), Control()
h.pwrite(b"second" * 1000, 100000)
leave(h)
control("drop", "default")
END
    if [ $save = other ]; then
        nbdcopy "$uri" - | cmp - "$tmp/shown" || die "another disk after it was dropped"
        py <<'END'
Control()("drop", "default")
END
    fi
    stop_nbdkit
    log_lacks error
    diff_is "$tmp/$save.qcow2" "$tmp/base" "$tmp/shown"
done
cmp "$tmp/first.qcow2" "$tmp/kept.qcow2" || die "the file that was loaded is another one"

# A limit.
start_nbdkit pattern 1M cow-views=true cow-control="$tmp/control" cow-max-moments=2
py <<'END'
h, other, control = connect(), connect("other"), Control()
control("moment", "a", "default", "other")
control("moment", "b", "default")
control.refuses("cow-max-moments=2", "moment", "c", "other", "default")
control("moment", "c", "other")
control("forget", "a", "default")
control("moment", "c", "default")
leave(h, other)
END
stop_nbdkit
nbdkit_refuses cow-max-moments --filter="$FILTER" null 1M cow-max-moments=-1

# So many cost a list.
start_nbdkit memory 64M cow-views=true cow-control="$tmp/control"
py <<'END'
h, control = connect(), Control()
for i in range(3000):
    h.pwrite(struct.pack(">Q", i) * 512, i % 1000 * 4 * K)
    control("moment", "m%d" % i, "default")
for i in 0, 1, 999, 1000, 1500, 2999:
    v = connect("@m%d" % i)
    same(v.pread(4 * K, i % 1000 * 4 * K), struct.pack(">Q", i) * 512, "moment %d" % i)
    leave(v)
order = list(range(3000))
random.shuffle(order)
for i in order[:2990]:
    control("forget", "m%d" % i, "default")
for i in order[2990:]:
    same(connect("@m%d" % i).pread(4 * K, i % 1000 * 4 * K), struct.pack(">Q", i) * 512,
         "moment %d, with few others" % i)
END
stop_nbdkit

# They are listed, with what they are; what there is not is refused by name.
start_nbdkit pattern 1M cow-views=true cow-control="$tmp/control"
py <<'END'
control = Control()
h = connect("vm 1")
h.pwrite(b"x" * 4096, 0)
control.refuses("connect to it first", "moment", "m", "other")
for name in ("", "base", "now", "snapshot", "diff.qcow2", "full.qcow2", ".x", "-x", "x.",
             "x..y", "x/y", "x@y", "x" * 65, "\u00e4"):
    if name:
        control.refuses("cannot be the name of a moment", "moment", name, "vm%201")
for name in ("m", "M.2_x-y", "0", "x" * 64):
    control("moment", name, "vm%201")
l = nbd.NBD()
l.set_opt_mode(True)
l.connect_unix(os.environ["sock"])
found = {}
l.opt_list(lambda name, description: found.update({name: description}))
l.opt_abort()
for name in ("m", "M.2_x-y", "0", "x" * 64):
    if not re.match(r"the disk as of 20..-..-..T..:..:..Z; forgetting it gives back 0 bytes$",
                    found.get("vm 1@" + name, "")):
        fail("the list: %r" % found)
for name, reason in (
        ("vm 1@nope", 'has no moment "nope"'), ("vm 1@m..nope/diff.qcow2", '"nope"'),
        ("vm 1@nope..m/diff.qcow2", '"nope"'), ("vm 1@", "names no moment"),
        ("vm 1@m/", "no such form"), ("vm 1@m/x.qcow2", "no such form"),
        ("vm 1@m..0", "put /diff.qcow2 behind it"),
        ("vm 1@m..0/full.qcow2", "put /diff.qcow2 behind it"),
        ("vm 1@..m/diff.qcow2", "does not begin"), ("vm 1@m../diff.qcow2", "names no moment"),
        ("vm 1@now..m/diff.qcow2", "give the moment a name"),
        ("vm 1@base/full.qcow2", "use @base"), ("vm 1@base..base/diff.qcow2", "use @base"),
        ("vm 1@a@m", "no views of a view"), ("other@m", 'has no moment "m"'),
        ("vm 1@" + "x" * 65, "names no moment"), ("user@host", '"user" has no moment')):
    before = server_log()
    expect(refused(name), True, "refusal of " + name)
    until(lambda: reason in server_log()[len(before):], "the reason: " + reason)
for name in "vm 1@now", "vm 1@now/diff.qcow2", "vm 1@now/full.qcow2", "vm 1@base":
    leave(connect(name))
leave(h)
END
stop_nbdkit

# A save in place is not held up by moments, and they are not in it.
start_nbdkit file "$tmp/base" cow-views=true cow-control="$tmp/control" \
    cow-save="$tmp/diff.qcow2"
py <<'END'
h, control = connect(), Control()
for i in range(5):
    h.pwrite(bytes([65 + i]) * M, i * 300 * K)
    control("moment", "m%d" % i, "default")
leave(h)
END
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
log_lacks error
diff_is "$tmp/diff.qcow2" "$tmp/base" "$tmp/shown"
[ ! -e "$tmp/control" ] || die "the control socket was left behind"
