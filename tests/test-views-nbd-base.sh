#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The base is an export of another server, in place of distributed storage: views of it
# show what they should, the other server is asked for its own names only, and its holes are
# left out of a full image.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file nbd
requires_filter log
requires qemu-img --version
requires nbdcopy --version

mkdir "$tmp/d"
for f in a b; do
    base_file "$tmp/d/$f" 1048576
    truncate -s 20M "$tmp/d/$f"
    base_file "$tmp/end" 500000
    cat "$tmp/end" >>"$tmp/d/$f"
    fingerprint "$tmp/d/$f" >"$tmp/$f.before"
done
start_server --filter=log file dir="$tmp/d" logfile="$tmp/log"
storage=$sock
storage_server=$server

start_nbdkit nbd socket="$storage" dynamic-export=true cow-views=true \
    cow-save-backing="nbd+unix:///b?socket=$storage"
py <<'END'
SIZE = 20 * M + 500000
live = {name: connect(name) for name in "ab"}
with open(tmp + "/d/a", "rb") as f:
    base_bytes = f.read()
for name, h in live.items():
    h.pwrite(name.encode() * 100000, 900001)
    h.zero(700000, 20 * M - 300000)
moment = bytearray(base_bytes)
moment[900001:1000001] = b"a" * 100000
moment[20 * M - 300000:20 * M + 400000] = bytes(700000)
s = [connect("a@snapshot") for i in range(3)]
ex = extents(live["a"])
for i in range(50):
    live["a"].pwrite(b"%d" % i * 1000, i * 400000)
    live["b"].pwrite(b"%d" % i * 1000, i * 300000)
for v in s:
    same(v.pread(SIZE, 0), moment, "the snapshot")
expect(extents(s[0]), ex, "its extents")
for name in "ab":
    same(connect(name + "@base").pread(SIZE, 0), base_bytes, "the base")
expect(refused("c@snapshot"), True, "refusal of what is not there")
# Reads of many connections to all views at once.
images = [connect(n) for n in ("a@diff.qcow2", "b@full.qcow2", "a@full.qcow2")]
flying = [read(v, 128 * K, i * 128 * K) for i in range(8) for v in s + images[1:]]
for r in flying:
    r.wait()
for v in s:
    same(v.pread(SIZE, 0), moment, "the snapshot, read again")
with open(tmp + "/wanted", "wb") as f:
    f.write(live["b"].pread(SIZE, 0))
leave(*s, *images, *live.values())
END
nbdcopy "$(view b@diff.qcow2)" "$tmp/diff"
diff_is "$tmp/diff" "$tmp/d/b" "$tmp/wanted"
nbdcopy "$(view b@full.qcow2)" "$tmp/full"
sound_diff "$tmp/full"
qemu-img compare -q -f qcow2 -F raw "$tmp/full" "$tmp/wanted" ||
    die "the full image is not what the disk is"
[ "$(stat -c %s "$tmp/full")" -le 2800000 ] || die "the full image has holes of the base"
# qemu reads the image from here, and what is behind it from the storage.
qemu-img compare -q -f qcow2 -F raw "$(view b@diff.qcow2)" "$tmp/wanted" ||
    die "the diff view over the storage is not what the disk is"
stop_nbdkit
! grep error: "$log" | grep -v "no export named 'c'" || die "other errors than that"
stop_nbdkit "$storage_server"
! grep 'Connect export=".*@' "$tmp/log" || die "the storage was asked for a view"
! grep -E 'Write|Zero|Trim' "$tmp/log" || die "the storage was written to"
for f in a b; do
    fingerprint "$tmp/d/$f" | cmp - "$tmp/$f.before" || die "base $f has changed"
done
