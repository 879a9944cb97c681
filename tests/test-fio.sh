#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# fio writes random blocks from several jobs at once, each on a connection of its own,
# and reads them back with a checksum.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires fio --version
fio --enghelp=nbd >/dev/null 2>&1 || skip "this fio has no nbd engine"
requires_plugin pattern

cd "$tmp"
for block in 4K 64K; do
    start_nbdkit pattern 64M cow-block-size=$block
    # Sizes that are no multiple of a block, in parts of the disk that meet within
    # one.
    fio --name=verify --ioengine=nbd --uri="$uri" --rw=randwrite \
        --bsrange=512-40k --blockalign=512 --iodepth=16 \
        --numjobs=4 --size=2M --offset_increment=2097664 --verify=crc32c \
        --verify_fatal=1 --do_verify=1 --randseed=1 --group_reporting \
        >"$tmp/fio.out" 2>&1 || { cat "$tmp/fio.out"; die "fio"; }
    ! grep -E 'verify: bad|err= *[1-9]' "$tmp/fio.out" ||
        { cat "$tmp/fio.out"; die "fio found other data than it wrote"; }
    grep -E 'READ: .*io=|WRITE: .*io=' "$tmp/fio.out"
    stop_nbdkit
done
