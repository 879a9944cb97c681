#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# NAME@diff.qcow2 is, byte for byte, what saving that moment as a stream writes: copied by
# nbdcopy, read at random offsets through several connections, and whatever is written
# meanwhile.  qemu opens the export as the image that it is.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file pattern
requires qemu-img --version
requires nbdcopy --version

# Data, a hole, data, and an end that is no multiple of anything.
base_file "$tmp/base" 3145728
truncate -s 6M "$tmp/base"
base_file "$tmp/end" 500700
cat "$tmp/end" >>"$tmp/base"

# run ARGS...: a server whose stream goes to $tmp/streamed, and that ends when its view
# was copied to $tmp/viewed and looked at, and its disk to $tmp/shown.
run ()
{
    echo "$*"
    start_nbdkit "$@" cow-views=true cow-save=/dev/fd/9 9>"$tmp/streamed"
    py <<'END'
rand = random.Random(5)
live = connect()
size = live.get_size()


def change(count):
    """In several L2 tables, parts of blocks, zeroes over data and over the base."""
    for i in range(count):
        n = rand.choice((1, 512, 4 * K, 5000, 70 * K, 200 * K))
        at = rand.randrange(size - n)
        if i % 3 == 0:
            at -= at % (4 * K)
        if i % 5 < 3:
            live.pwrite(bytes([65 + i % 26]) * n, at)
        else:
            (live.zero if i % 2 else live.trim)(n, at)
    live.pwrite(b"the end", size - 7)


def whole(h):
    n = h.get_size()
    return b"".join(h.pread(min(M, n - at), at) for at in range(0, n, M))


def some_reads(clients, image):
    """All connections at once."""
    flying = []
    for i in range(100):
        n = rand.choice((1, 7, 512, 4 * K, 4 * K + 1, rand.randrange(1, 300 * K)))
        at = rand.randrange(len(image) - n + 1)
        flying.append((at, n, read(clients[i % 4], n, at)))
    for at, n, r in flying:
        r.wait()
        same(r.buf.to_bytearray(), image[at:at + n], "%d bytes at %d" % (n, at))


change(100)
clients = [connect("@diff.qcow2") for i in range(3)]
live.pwrite(b"since", 100)
clients.append(connect("@diff.qcow2"))
image = whole(clients[0])
change(100)
for c in clients:
    expect(c.get_size(), len(image), "size")
some_reads(clients, image)
same(whole(clients[3]), image, "the view while the disk changes")
leave(*clients)

clients = [connect("@diff.qcow2") for i in range(4)]
now = whole(clients[0])
if now == image:
    fail("a new view shows what the last one did")
some_reads(clients, now)
with open(tmp + "/now", "wb") as f:
    f.write(now)
leave(live, *clients)
END
    nbdcopy --connections=4 --requests=8 "$(view @diff.qcow2)" "$tmp/viewed"
    cmp "$tmp/viewed" "$tmp/now" || die "nbdcopy has copied something else"
    # (What is read of the live disk may be kept, and so change the image.)
    nbdcopy "$(view @snapshot)" "$tmp/shown"
    if [ "$look" ]; then $look; fi
    clients_have_gone
    stop_nbdkit
    log_lacks error
    cmp "$tmp/streamed" "$tmp/viewed" || die "the stream is not what the view was"
}

# qemu opens the export; the base is behind it by its name.
look_with_qemu ()
{
    local said
    said=$(qemu-img check -q -f qcow2 "$(view @diff.qcow2)" 2>&1) && [ -z "$said" ] ||
        die "qemu-img check: $said"
    qemu-img info -f qcow2 "$(view @diff.qcow2)" >"$tmp/info"
    grep -q "^backing file: $tmp/base" "$tmp/info" || { cat "$tmp/info"; die "backing file"; }
    grep -q "^backing file format: raw" "$tmp/info" || { cat "$tmp/info"; die "format"; }
    qemu-img map --output=json -f qcow2 "$(view @diff.qcow2)" >"$tmp/map"
    # (It looks for holes in the file as well.)
    cp --sparse=never "$tmp/viewed" "$tmp/whole"
    qemu-img map --output=json -f qcow2 "$tmp/whole" | cmp - "$tmp/map" ||
        die "qemu-img map"
    grep -q '"depth": 0' "$tmp/map" || die "qemu-img map says nothing of the image"
    qemu-img convert -f qcow2 -O raw "$(view @diff.qcow2)" "$tmp/converted"
    # qemu has zeroes from the disk's end to the end of its last sector.
    cmp -n "$(stat -c %s "$tmp/shown")" "$tmp/converted" "$tmp/shown" ||
        die "converted, it is not what the disk is"
}

look=
for format in portable extended; do
    for block in 4K 16K 64K; do
        run file "$tmp/base" cow-save-format=$format cow-block-size=$block
        diff_is "$tmp/viewed" "$tmp/base" "$tmp/shown"
    done
done
run file "$tmp/base" cow-block-size=2M
diff_is "$tmp/viewed" "$tmp/base" "$tmp/shown"
run file "$tmp/base" cow-save-backing=none
diff_is "$tmp/viewed" "$tmp/base" "$tmp/shown"
run file "$tmp/base" cow-on-read=true cow-detect-zeroes=true
diff_is "$tmp/viewed" "$tmp/base" "$tmp/shown"
look=look_with_qemu
run file "$tmp/base" cow-save-backing="$tmp/base" cow-save-backing-format=raw
run file "$tmp/base" cow-save-backing="$tmp/base" cow-save-format=extended

# A large disk, of which little was written: the image is as long as that.
look=
for format in portable extended; do
    start_nbdkit pattern 1T cow-views=true cow-save-format=$format \
        cow-save=/dev/fd/9 9>"$tmp/streamed"
    py <<'END'
h = connect()
for i in range(64):
    h.pwrite(b"%8d" % i * 512, i * (16 * G + 8 * K))
h.zero(4 * K, 0)
leave(h)
END
    nbdcopy "$(view @diff.qcow2)" "$tmp/viewed"
    clients_have_gone
    stop_nbdkit
    cmp "$tmp/streamed" "$tmp/viewed" || die "1 TiB: the stream is not what the view was"
    sound_diff "$tmp/viewed"
done

# The last block, of which the disk has 700 bytes, is written anew in a slot that a view
# has: in the image it is whole.
start_nbdkit pattern 1049276 cow-views=true cow-save=/dev/fd/9 9>"$tmp/streamed"
py <<'END'
h = connect()
h.pwrite(b"1" * 700, M)
first = connect("@diff.qcow2")
h.pwrite(b"2" * 700, M)
leave(h, first)
END
nbdcopy "$(view @diff.qcow2)" "$tmp/viewed"
nbdcopy "$uri" "$tmp/shown"
clients_have_gone
stop_nbdkit
cmp "$tmp/streamed" "$tmp/viewed" || die "the last block: the stream is not what the view was"
base_file "$tmp/base" 1049276
diff_is "$tmp/viewed" "$tmp/base" "$tmp/shown"

# Without cow-save as well, and there the parameters say what the view is like.
start_nbdkit pattern 1M cow-views=true cow-save-backing=golden.qcow2 \
    cow-save-backing-format=qcow2 cow-save-format=extended
qemu-img info -f qcow2 "$(view @diff.qcow2)" >"$tmp/info"
grep -q "^backing file: golden.qcow2" "$tmp/info" || { cat "$tmp/info"; die "backing"; }
grep -q "^backing file format: qcow2" "$tmp/info" || { cat "$tmp/info"; die "format"; }
grep -q "extended l2: true" "$tmp/info" || { cat "$tmp/info"; die "L2 entries"; }
