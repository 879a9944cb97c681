#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A qcow2 image below the filter is a mistake most of the time: clients see the bytes of its
# file.  One warning says so when the first of them are read, and the command that it names
# serves the disk.  An image that a client has written itself is none.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_plugin nbd
requires qemu-img --version
requires qemu-io --version
requires qemu-nbd --version
qemu-img create -q -f qcow2 "$tmp/golden.qcow2" 4M
qemu-io -f qcow2 -c 'write -q -P 7 0 1M' "$tmp/golden.qcow2" >/dev/null
qemu-img convert -O raw "$tmp/golden.qcow2" "$tmp/golden.raw"

# warnings N: there were so many.
warnings ()
{
    local n
    n=$(grep -c 'warning: export ".*": the base is a qcow2 image' "$log") || :
    [ "$n" -eq "$1" ] || die "$n warnings, not $1"
}

start_nbdkit file "$tmp/golden.qcow2" cow-views=true
py <<'END'
connect().pread(512, 65536)
END
warnings 0
py <<'END'
for export in "", "", "other", "@base", "@snapshot":
    h = connect(export)
    for _ in range(3):
        h.pread(512, 0)
END
warnings 1
command=$(sed -n 's/.*to serve that: nbdkit --filter=cow //p' "$log")
stop_nbdkit
start_nbdkit file "$tmp/golden.qcow2" cow-views=true
py <<'END'
connect("@base").pread(4096, 0)
END
warnings 1
stop_nbdkit

# What it says to do.
# shellcheck disable=SC2086
start_nbdkit ${command/"/PATH/TO/FILE"/"$tmp/golden.qcow2"} cow-save="$tmp/diff" \
    cow-save-backing=golden.qcow2 cow-save-backing-format=qcow2
nbdcopy "$uri" - | cmp - "$tmp/golden.raw" || die "not the disk in the image"
py <<'END'
connect().pwrite(b"x" * 5000, 5000)
END
nbdcopy "$uri" "$tmp/shown"
warnings 0
stop_nbdkit
sound_diff "$tmp/diff"
qemu-img compare -q -F raw "$tmp/diff" "$tmp/shown" || die "the diff is not ready to use"

# An image on the disk, and images of views.
start_nbdkit file "$tmp/golden.raw" cow-views=true
py <<'END'
with open(tmp + "/golden.qcow2", "rb") as f:
    connect().pwrite(f.read(65536), 0)
for export in "", "@snapshot", "@diff.qcow2", "@full.qcow2", "@base":
    h = connect(export)
    for _ in range(2):
        h.pread(512, 0)
END
warnings 0
stop_nbdkit
