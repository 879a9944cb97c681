#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# qemu-img and qemu-io as clients: a qcow2 image converted into the disk and compared,
# patterns written, zeroed and discarded, the map of what is where.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires qemu-img --version
requires qemu-io --version
requires_plugin file

truncate -s 16M "$tmp/base"
qemu-io -f raw "$tmp/base" -c 'write -q -P 9 1M 2M' -c 'write -q -P 8 15M 1M'
fingerprint "$tmp/base" >"$tmp/before"
start_nbdkit file "$tmp/base"

qemu-img compare -f raw -F raw "$uri" "$tmp/base" || die "not the base"

qemu-img create -q -f qcow2 "$tmp/in.qcow2" 16M
qemu-io -f qcow2 "$tmp/in.qcow2" -c 'write -q -P 1 0 1M' \
    -c 'write -q -P 2 3333333 444444' -c 'write -q -P 3 15M 512k'
qemu-img convert -n -f qcow2 -O raw "$tmp/in.qcow2" "$uri"
qemu-img compare -f raw -F qcow2 "$uri" "$tmp/in.qcow2" ||
    die "another image than was converted"

qemu-io -f raw "$uri" -c 'write -P 5 5M 1M' -c 'write -P 6 5500000 777' \
    -c 'write -z 6M 1M' -c 'write -z -u 7M 1M' -c 'write -z -n 8M 64k' \
    -c 'discard 0 128k' -c flush \
    -c 'aio_write -P 7 9M 1M' -c 'aio_write -P 8 10M 1M' \
    -c 'aio_write -P 9 11M 1M' -c aio_flush \
    -c 'read -P 5 5M 256000' -c 'read -P 6 5500000 777' -c 'read -P 0 6M 2M' \
    -c 'read -P 0 8M 64k' -c 'read -P 0 0 128k' -c 'read -P 1 128k 896k' \
    -c 'read -P 2 3333333 444444' -c 'read -P 7 9M 1M' -c 'read -P 8 10M 1M' \
    -c 'read -P 9 11M 1M' >"$tmp/out" 2>&1 || { cat "$tmp/out"; die "qemu-io"; }
! grep -iE 'fail|error' "$tmp/out" || die "qemu-io complains"

# A second client sees the same.
qemu-io -r -f raw "$uri" -c 'read -P 7 9M 1M' -c 'read -P 0 6M 2M' \
    >"$tmp/out" 2>&1 || die "qemu-io on a second connection"
! grep -iE 'fail|error' "$tmp/out" || die "qemu-io complains"
qemu-img map -f raw --output=json "$uri" >"$tmp/map"
py <<'END'
import json
with open(tmp + "/map") as f:
    m = json.load(f)
def at(offset):
    e = next(e for e in m if e["start"] <= offset < e["start"] + e["length"])
    return e["data"], e["zero"]
for offset in 0, 7 * M, 12 * M:
    expect(at(offset), (False, True), "map at %d" % offset)
# Zeroes that leave no hole (write -z without -u) are data.
for offset in 128 * K, 5 * M, 6 * M, 9 * M, 15 * M:
    expect(at(offset), (True, False), "map at %d" % offset)
END
fingerprint "$tmp/base" | cmp - "$tmp/before" || die "the base has changed"
