#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Requests that fail on a full file system leave nothing behind that is missing later:
# written blocks can still be trimmed, a small write finds the room that large ones did
# not, and the save in place succeeds, with no other place to keep the overlay in.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin memory
requires qemu-img --version
[ "$(id -u)" -eq 0 ] || skip "mounting a small file system needs root"
mkdir "$tmp/t"
mount -t tmpfs -o size=16M none "$tmp/t" 2>"$tmp/mount.err" ||
    skip "no tmpfs can be mounted: $(cat "$tmp/mount.err")"
cleanup_fn umount "$tmp/t"

for kind in full room; do
    rm -f "$tmp/t/diff"
    TMPDIR=$tmp/t start_nbdkit memory 1G cow-save="$tmp/t/diff"
    py "$kind" <<'END'
kind = sys.argv[1]
h = connect()
at = 0
try:
    while kind == "full" or at < 15 * M:
        h.pwrite(b"x" * 64 * K, at)
        at += 64 * K
except nbd.Error as e:
    expect(e.errnum, errno.ENOSPC, "a full file system")
if kind == "full":
    zeroed = 100 * M
    try:
        while True:
            h.zero(4 * K, zeroed)
            zeroed += 2 * M
    except nbd.Error as e:
        expect(e.errnum, errno.ENOSPC, "no room for tables")

# Each has other L2 tables.
for i in range(40):
    raises(errno.ENOSPC, h.pwrite, b"y" * 32 * M, 200 * M + 16 * M * i)
if kind == "full":
    for i in range(64):
        h.trim(64 * K, 128 * K * i)
h.pwrite(b"z" * 4 * K, 900 * M)
with open(tmp + "/shown", "wb") as f:
    f.truncate(h.get_size())
    for o in range(0, h.get_size(), M):
        piece = h.pread(M, o)
        if any(piece):
            f.seek(o)
            f.write(piece)
END
    end_nbdkit TERM
    truncate -s 1G "$tmp/zeroes"
    diff_is "$tmp/t/diff" "$tmp/zeroes" "$tmp/shown"
done
