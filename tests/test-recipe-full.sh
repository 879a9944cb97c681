#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual on a full disk: what was written before can be copied elsewhere while the
# server runs, and saved in its place without any more room; moved to a larger file system,
# it goes on from there.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires nbdcopy --version
requires_plugin memory
[ "$(id -u)" -eq 0 ] || skip "mounting a small file system needs root"
mount -t tmpfs -o size=8M none "$tmp/work" 2>"$tmp/mount.err" ||
    skip "no tmpfs can be mounted: $(cat "$tmp/mount.err")"
cd "$tmp/work" || die "it cannot be entered"
cleanup_fn umount -l "$tmp/work"

fresh
rm -f ./*.img
truncate -s 64M disk.img
before=$(fingerprint disk.img)
mkdir "$tmp/larger"
ln -s "$tmp/larger" .

run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img cow-views=true cow-save=diff.qcow2
END
# A disk that is written to until it does not go on, and what is in it then.
sock=disk.sock py <<'END'
h = connect()
at = 0
try:
    while True:
        h.pwrite(b"full" * 16384, at)
        at += 65536
except nbd.Error as e:
    expect(errno.errorcode[e.errnum], "ENOSPC", "error of the write")
if not 2 * M < at < 8 * M:
    fail("%d bytes were written" % at)
same(h.pread(at, 0), b"full" * (at // 4), "what was written before")
with open(tmp + "/seen", "wb") as f:
    f.write(h.pread(at, 0))
    f.truncate(64 * M)
END
run <<'END'
df -h .
END
run <<'END'
nbdcopy 'nbd+unix:///@diff.qcow2?socket=disk.sock' - | ssh backup 'cat >diff.qcow2'
END
stop_server
for diff in diff.qcow2 "$tmp/backup/diff.qcow2"; do
    diff_is "$diff" "$tmp/work/disk.img" "$tmp/seen"
done
rm disk.sock
run <<'END'
mv diff.qcow2 larger/
END
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img \
    cow-load=larger/diff.qcow2 cow-save=larger/diff.qcow2
END
qemu-io -f raw -c 'write -P 9 60M 4M' 'nbd+unix:///?socket=disk.sock'
stop_server
py <<'END'
with open(tmp + "/seen", "r+b") as f:
    f.seek(60 * M)
    f.write(b"\x09" * (4 * M))
END
diff_is "$tmp/larger/diff.qcow2" "$tmp/work/disk.img" "$tmp/seen"
