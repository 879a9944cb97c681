#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The documented way to get at what has changed with qemu-img alone: an image whose
# backing file is the server, rebased onto the disk, has the same content as what the
# server shows, and no more than that differs from the disk.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires qemu-img --version
requires qemu-io --version
requires_plugin file

base_file "$tmp/disk.img" 8388608
fingerprint "$tmp/disk.img" >"$tmp/before"
start_nbdkit file "$tmp/disk.img"
qemu-io -f raw -t writeback "nbd:unix:$sock" -c 'write -P 1 0 64k' \
    -c 'write -P 2 1000000 12345' -c 'write -z 2M 1M' -c 'discard 4M 1M' \
    -c 'write -P 3 8388096 512' >"$tmp/qemu-io.out"

cd "$tmp"
qemu-img create -q -F raw -b "nbd:unix:$sock" -f qcow2 diff.qcow2
qemu-img rebase -F raw -b disk.img -f qcow2 diff.qcow2
qemu-img compare -f qcow2 -F raw diff.qcow2 "nbd:unix:$sock" ||
    die "the diff is not what the server shows"
if qemu-img compare -f qcow2 -F raw diff.qcow2 disk.img; then
    die "the diff has no differences"
fi
qemu-img check -q diff.qcow2
stop_nbdkit

# And it stands on its own.
qemu-io -f qcow2 diff.qcow2 -r -c 'read -P 1 0 64k' \
    -c 'read -P 2 1000000 12345' -c 'read -P 0 2M 1M' -c 'read -P 0 4M 1M' \
    -c 'read -P 3 8388096 512' >"$tmp/qemu-io.out" ||
    { cat "$tmp/qemu-io.out"; die "the diff has other data"; }
! grep 'Pattern verification failed' "$tmp/qemu-io.out" ||
    die "the diff has other data"
fingerprint "$tmp/disk.img" | cmp - "$tmp/before" || die "the base has changed"
