#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual's recipe for a backup of a disk that is in use, with restic and with borg: what
# comes back is the disk, and what goes through the pipe has no holes in it.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires restic version
requires borg --version
requires nbdcopy --version

restic init -q
export BORG_REPO=$tmp/borg BORG_BASE_DIR=$tmp/borg-base
borg init -e none

# A disk that is mostly empty.
truncate -s 64M "$tmp/made/disk.img"
fresh
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img cow-views=true
END
run <<'END'
qemu-system-x86_64 -m 1G -drive file='nbd+unix:///?socket=disk.sock',format=raw,if=virtio &
END
wait $!
qemu-io -f raw -c 'write -P 0x6a 300000 200000' 'nbd+unix:///?socket=disk.sock'
cp --sparse=always disk.img seen.img
qemu-io -f raw -c 'write -P 0x6a 300000 200000' seen.img
run <<'END'
nbdcopy 'nbd+unix:///@full.qcow2?socket=disk.sock' - | restic backup --stdin --stdin-filename disk.qcow2
END
run <<'END'
nbdcopy 'nbd+unix:///@full.qcow2?socket=disk.sock' - | borg create --stdin-name disk.qcow2 ::disk-{now} -
END
stop_server

run <<'END'
restic dump latest disk.qcow2 >disk.qcow2
END
qemu-img compare -q -f qcow2 -F raw disk.qcow2 seen.img || die "not the disk, from restic"
[ "$(stat -c %s disk.qcow2)" -lt 4000000 ] || die "what is empty went through the pipe"
run <<'END'
qemu-img convert -f qcow2 -O raw disk.qcow2 restored.img
END
qemu-img compare -q -f raw -F raw restored.img seen.img || die "not the disk, converted"
rm disk.qcow2
run <<'END'
borg extract ::$(borg list --last 1 --short)
END
qemu-img compare -q -f qcow2 -F raw disk.qcow2 seen.img || die "not the disk, from borg"
