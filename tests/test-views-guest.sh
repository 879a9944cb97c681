#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A guest is booted with a disk that is the diff of a moment, and behind it the base: the
# file system is that of the moment, with what had been written to the disk, while the live
# disk goes on and is another one soon.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/guest.sh"
PATH=$PATH:/usr/sbin:/sbin
requires mke2fs -V
requires debugfs -V
requires e2fsck -V
requires qemu-img --version
requires nbdcopy --version
requires_plugin file
guest_ready

base=$tmp/base.img
py <<'END'
rand = random.Random(3)
os.mkdir(tmp + "/base.d")
for name, n in ("kept", 300000), ("removed", 500000):
    with open(tmp + "/base.d/" + name, "wb") as f:
        f.write(rand.randbytes(n))
END
truncate -s 64M "$base"
mke2fs -q -t ext4 -d "$tmp/base.d" "$base"
seq 1 3000 >"$tmp/added"

# What the disk is to be like at the moment, made with debugfs.
cp --sparse=always "$base" "$tmp/moment.img"
debugfs -w -R "write $tmp/added added" "$tmp/moment.img" >"$tmp/debugfs.log" 2>&1
debugfs -w -R 'rm removed' "$tmp/moment.img" >>"$tmp/debugfs.log" 2>&1
e2fsck -fn "$tmp/moment.img" >>"$tmp/debugfs.log" 2>&1 ||
    { cat "$tmp/debugfs.log" >&2; die "debugfs has made a damaged file system"; }

start_nbdkit file "$base" cow-views=true cow-control="$tmp/control"
py <<'END'
h = connect()
with open(tmp + "/moment.img", "rb") as f, open(tmp + "/base.img", "rb") as b:
    for at in range(0, 64 * M, 4 * K):
        new, old = f.read(4 * K), b.read(4 * K)
        if new != old:
            h.pwrite(new, at) if any(new) else h.zero(4 * K, at)
Control()("moment", "boot", "default")
h.pwrite(b"?" * (8 * M), 0)
h.trim(8 * M, 24 * M)
leave(h)
END

# The export is read only; what the guest writes goes to a file that qemu throws away.
disk='json:{"driver":"raw","file":{"driver":"qcow2",
    "file":{"driver":"nbd","server":{"type":"unix","path":"'$sock'"},"export":"@boot/diff.qcow2"},
    "backing":{"driver":"raw","file":{"driver":"file","filename":"'$base'"}}}}'
TMPDIR=$tmp run_guest "${disk//,/,,},snapshot=on" <<'END'
mount -t ext4 /dev/vda /mnt
sha256sum /mnt/kept /mnt/added
test ! -e /mnt/removed
seq 1 100 >/mnt/written
sync
umount /mnt
END
for f in kept added; do
    file=$tmp/base.d/$f
    [ $f = kept ] || file=$tmp/added
    sum=$(sha256sum <"$file")
    grep -qxF "${sum%-}/mnt/$f" "$guest_log" ||
        { cat "$guest_log" >&2; die "the guest has read something else in $f"; }
done
clients_have_gone
stop_nbdkit
log_lacks error
