#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual's recipe for a diff of each day: each holds what was written on its day, and
# on top of those before it is the disk of that evening.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires qemu-nbd --version
requires nbdcopy --version
requires_plugin nbd

# a_day NAME: something is written, and the disk of the evening is kept in NAME.img.
a_day ()
{
    sock=disk.sock py "$1" <<'END'
h = connect()
name = sys.argv[1].encode()
h.pwrite(name * 10000, 500000 if name == b"monday" else 530000)
END
    nbdcopy 'nbd+unix:///?socket=disk.sock' "$1.img"
    stop_server
    rm disk.sock
}

fresh
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img \
    cow-save=monday.qcow2 cow-save-backing=disk.img
END
a_day monday
run <<'END'
nbdkit -U disk.sock --filter=cow \
    nbd command=qemu-nbd arg=--read-only arg=--format=qcow2 arg=$PWD/monday.qcow2 \
    cow-save=tuesday.qcow2 cow-save-backing=monday.qcow2 cow-save-backing-format=qcow2
END
a_day tuesday

run <<'END'
qemu-img info --backing-chain tuesday.qcow2
END
for day in monday tuesday; do
    qemu-img compare -q -f qcow2 -F raw $day.qcow2 $day.img || die "not the disk of $day"
done
[ "$(qemu-img map --output=json tuesday.qcow2 | grep -o '"length": [0-9]*, "depth": 0' |
     tr -dc '0-9 \n' | awk '{ n += $1 } END { print n }')" -lt 100000 ] ||
    die "the diff of Tuesday has more than was written then"

run <<'END'
qemu-img rebase -f qcow2 -b disk.img -F raw tuesday.qcow2
END
rm monday.qcow2
qemu-img compare -q -f qcow2 -F raw tuesday.qcow2 tuesday.img ||
    die "without Monday's diff it is not the disk of Tuesday"
