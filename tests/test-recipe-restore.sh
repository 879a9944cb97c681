#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual's recipe for backup and restore, from a machine that writes to its disk to a
# machine that boots from what was in restic.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/guest.sh"
PATH=$PATH:/usr/sbin:/sbin
guest_ready
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires mke2fs -V
requires restic version
requires nbdcopy --version

truncate -s 64M "$tmp/made/disk.img"
mkdir "$tmp/files"
seq 1 50000 >"$tmp/files/kept"
mke2fs -q -F -t ext4 -d "$tmp/files" "$tmp/made/disk.img"
restic init -q

# The machine writes.
fresh
run <<'END'
restic backup --tag base disk.img
END
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img cow-views=true \
    cow-load=diff.qcow2 cow-save=diff.qcow2
END
PATH=${PATH#"$tmp/bin:"} run_guest 'nbd+unix:///?socket=disk.sock' <<'END'
mount -t ext4 /dev/vda /mnt
seq 7 7 70000 >/mnt/new
sync
umount /mnt
END
run <<'END'
nbdcopy 'nbd+unix:///@diff.qcow2?socket=disk.sock' - | restic backup --tag diff --stdin --stdin-filename diff.qcow2
END

# All is lost, and restored.
before=
stop_server
rm -f ./*.img ./*.qcow2
run <<'END'
restic dump --tag base latest disk.img >disk.img
END
run <<'END'
restic dump --tag diff latest diff.qcow2 >diff.qcow2
END
before=$(fingerprint disk.img)
run <<'END'
qemu-img check diff.qcow2
END

# The machine boots from it.  Its disk has no boot loader: a kernel comes from outside.
guest_prepare <<'END'
mount -t ext4 /dev/vda /mnt
sha256sum /mnt/kept /mnt/new
umount /mnt
END
{
    echo '#!/usr/bin/env bash'
    echo "unset LD_PRELOAD; exec $_real_qemu \"\$@\" ${guest_options[*]@Q} >$tmp/guest.qemu 2>&1"
} >"$tmp/bin/qemu-system-x86_64"
run <<'END'
nbdkit -U - --filter=cow file disk.img \
    cow-load=diff.qcow2 cow-save=diff.qcow2 \
    --run 'qemu-system-x86_64 -m 1G -drive file="$uri",format=raw,if=virtio'
END
guest_succeeded
seq 1 50000 >kept
seq 7 7 70000 >new
for file in kept new; do
    sum=$(sha256sum <$file)
    grep -qxF "${sum%-}/mnt/$file" "$guest_log" ||
        { cat "$guest_log" >&2; die "the restored machine has something else in $file"; }
done
