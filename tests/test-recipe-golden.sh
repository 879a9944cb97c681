#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual's recipe for a golden image in qcow2: what qemu-nbd serves is the base.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires qemu-nbd --version
requires_plugin nbd

fresh
qemu-img convert -f raw -O qcow2 disk.img golden.qcow2
fingerprint golden.qcow2 >golden.before
run <<'END'
nbdkit -U golden.sock --filter=cow \
    nbd command=qemu-nbd arg=--read-only arg=--format=qcow2 arg=$PWD/golden.qcow2 \
    cow-save=diffs/ cow-save-backing=$PWD/golden.qcow2 cow-save-backing-format=qcow2
END
for name in web1 web2; do
    sock=golden.sock py $name <<'END'
h = connect(sys.argv[1])
same(h.pread(2 * M, 0), base(0, 2 * M), "the disk in the image")
h.pwrite(sys.argv[1].encode() * 10000, 12345)
END
done
stop_server
for name in web1 web2; do
    py $name <<'END'
with open(tmp + "/wanted", "wb") as f:
    f.write(base(0, 12345))
    f.write(sys.argv[1].encode() * 10000)
    f.write(base(52345, 2 * M - 52345))
END
    qemu-img compare -q -f qcow2 -F raw diffs/$name.qcow2 "$tmp/wanted" ||
        die "the diff of $name over the golden image is not its disk"
done
fingerprint golden.qcow2 | diff golden.before - || die "the golden image has changed"
