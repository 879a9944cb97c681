#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A program that knows the file system changes an ext4 disk: an image, and one that is
# compressed with xz and so can only be read.  The file system is sound then, what was
# written is there, and the base has the content and the times that it had.
#
# The disk is made a file by nbdfuse, on which debugfs works.  Where there is no FUSE,
# it is copied out, changed, and copied in.

. "${srcdir:-$(dirname "$0")}/functions.sh"
PATH=$PATH:/usr/sbin:/sbin
requires mkfs.ext4 -V
requires debugfs -V
requires e2fsck -V
requires xz --version
requires_plugin file
requires_filter xz

# A file system with something on it, and two files to put on it.
mkdir "$tmp/root"
py <<'END'
rand = random.Random(11)
for name, n in (("root/kept", 300000), ("root/removed", 900000),
                ("new", 1234567), ("small", 10)):
    with open(tmp + "/" + name, "wb") as f:
        f.write(rand.randbytes(n))
END
truncate -s 32M "$tmp/disk"
mkfs.ext4 -q -F -d "$tmp/root" "$tmp/disk"
xz -k --block-size=1MiB "$tmp/disk"

# mount_disk: makes the disk $tmp/view, by FUSE or as a copy.
mount_disk ()
{
    : >"$tmp/view"
    by_fuse=no
    if [ -w /dev/fuse ] && command -v nbdfuse >/dev/null; then
        nbdfuse -P "$tmp/nbdfuse.pid" "$tmp/view" "$uri" \
            2>"$tmp/nbdfuse.err" &
        fuse=$!
        while [ ! -s "$tmp/nbdfuse.pid" ] && kill -0 $fuse 2>/dev/null; do
            sleep 0.05
        done
        if [ -s "$tmp/nbdfuse.pid" ]; then
            by_fuse=yes
            cleanup_fn unmount_quietly
        fi
    fi
    if [ $by_fuse = no ]; then
        echo "no FUSE here: by way of a copy ($(cat "$tmp/nbdfuse.err" 2>/dev/null || :))"
        rm -f "$tmp/view"
        nbdcopy "$uri" "$tmp/view"
    fi
}

unmount_quietly ()
{
    ! mountpoint -q "$tmp/view" || umount "$tmp/view" 2>/dev/null ||
        fusermount3 -u "$tmp/view" 2>/dev/null || umount -l "$tmp/view"
}

unmount_disk ()
{
    if [ $by_fuse = yes ]; then
        unmount_quietly
        wait $fuse
        rm -f "$tmp/nbdfuse.pid"
    else
        nbdcopy "$tmp/view" "$uri"
    fi
    rm -f "$tmp/view"
}

# check NAME FILE: the file NAME on the disk has the content of FILE.
check ()
{
    debugfs -R "dump /$1 $tmp/dumped" "$tmp/view" 2>"$tmp/debugfs.err"
    cmp "$tmp/dumped" "$2" || die "another $1 than was written"
}

# run FILE ARGS...: FILE is the base, of which the server with ARGS makes the disk.
run ()
{
    local file=$1
    shift
    fingerprint "$file" >"$tmp/before"
    start_nbdkit "$@"
    mount_disk
    cat >"$tmp/commands" <<END
mkdir /dir
write $tmp/new /dir/new
write $tmp/small /dir/small
rm /removed
symlink /dir/link /kept
ln /kept /dir/kept
END
    debugfs -w -f "$tmp/commands" "$tmp/view" >"$tmp/debugfs.out" 2>&1
    # A link that debugfs makes is not counted, which e2fsck would say.
    debugfs -w -R 'sif /kept links_count 2' "$tmp/view" \
        >>"$tmp/debugfs.out" 2>&1
    unmount_disk

    # With another client.
    mount_disk
    e2fsck -fn "$tmp/view" ||
        { cat "$tmp/debugfs.out"; die "the file system is damaged"; }
    check kept "$tmp/root/kept"
    check dir/kept "$tmp/root/kept"
    check dir/new "$tmp/new"
    check dir/small "$tmp/small"
    debugfs -R 'stat /removed' "$tmp/view" 2>&1 | grep -q 'File not found' ||
        die "the removed file is still there"
    unmount_disk
    stop_nbdkit
    fingerprint "$file" | cmp - "$tmp/before" || die "the base has changed"

    # All of it has gone with the server.
    start_nbdkit "$@"
    rm -f "$tmp/copy"
    nbdcopy "$uri" "$tmp/copy"
    cmp "$tmp/copy" "$tmp/disk" || die "the disk is not as it was"
    stop_nbdkit
}

run "$tmp/disk" file "$tmp/disk"
run "$tmp/disk.xz" --filter=xz file "$tmp/disk.xz"
run "$tmp/disk.xz" --filter=xz file "$tmp/disk.xz" cow-on-read=true
