#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A real guest changes the disk: Linux mounts it, writes, removes and trims, and turns
# itself off.  The diff that is saved then, rebased onto the base, is a sound file system
# with those changes.  A second guest, on a server that loads the diff, finds them, and what
# it adds is in the diff too.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/guest.sh"
PATH=$PATH:/usr/sbin:/sbin
requires mke2fs -V
requires debugfs -V
requires e2fsck -V
requires qemu-img --version
requires_plugin file
guest_ready

base=$tmp/base.img
diff=$tmp/diff.qcow2

py <<'END'
rand = random.Random(3)
os.mkdir(tmp + "/base.d")
for name, n in ("kept", 300000), ("removed", 5000000):
    with open(tmp + "/base.d/" + name, "wb") as f:
        f.write(rand.randbytes(n))
END
truncate -s 64M "$base"
mke2fs -q -t ext4 -d "$tmp/base.d" "$base"
fingerprint "$base" >"$tmp/before"

# How to make what the guests add, there and here.
small='seq 1 3000'
large='seq 100001 249796'
late='seq 7 7 70000'
mkdir "$tmp/new"
$small >"$tmp/new/small"
$large >"$tmp/new/large"
$late >"$tmp/new/late"

# guest_read NAME FILE: the guest has read in NAME what is in FILE, by the checksum that
# it printed.
guest_read ()
{
    local sum
    sum=$(sha256sum <"$2")
    grep -qxF "${sum%-}$1" "$guest_log" ||
        { cat "$guest_log" >&2; die "the guest has read something else in $1"; }
}

# check_diff NAME...: the diff is sound, as a qcow2 image and, with the base behind it,
# as a file system; it has the files NAME, and kept and removed what it should.
check_diff ()
{
    local name
    sound_diff "$diff"
    qemu-img rebase -q -u -b "$base" -F raw -f qcow2 "$diff"
    qemu-img convert -f qcow2 -O raw "$diff" "$tmp/whole.img"
    e2fsck -fn "$tmp/whole.img" || die "the file system is damaged"
    check_file /kept "$tmp/base.d/kept"
    for name; do
        check_file "/new/$name" "$tmp/new/$name"
    done
    debugfs -R 'stat /removed' "$tmp/whole.img" 2>&1 | grep -q 'File not found' ||
        die "the removed file is still there"
    fingerprint "$base" | cmp - "$tmp/before" || die "the base has changed"
}

# check_file NAME FILE: NAME in the file system has the content of FILE.
check_file ()
{
    rm -f "$tmp/dumped"
    debugfs -R "dump $1 $tmp/dumped" "$tmp/whole.img" 2>"$tmp/debugfs.err"
    cmp "$tmp/dumped" "$2" || die "the diff has something else in $1"
}

start_nbdkit file "$base" cow-save="$diff"
run_guest "$uri" <<END
mount -t ext4 /dev/vda /mnt
sha256sum /mnt/kept
mkdir /mnt/new
$small >/mnt/new/small
$large >/mnt/new/large
rm /mnt/removed
sync
fstrim /mnt
umount /mnt
END
guest_read /mnt/kept "$tmp/base.d/kept"
stop_nbdkit
check_diff small large

start_nbdkit file "$base" cow-load="$diff" cow-save="$diff"
run_guest "$uri" <<END
mount -t ext4 /dev/vda /mnt
sha256sum /mnt/kept /mnt/new/small /mnt/new/large
test ! -e /mnt/removed
$late >/mnt/new/late
umount /mnt
END
guest_read /mnt/kept "$tmp/base.d/kept"
guest_read /mnt/new/small "$tmp/new/small"
guest_read /mnt/new/large "$tmp/new/large"
stop_nbdkit
check_diff small large late
