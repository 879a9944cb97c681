#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Zeroing and trimming what was never written makes no overlay file, or an empty one,
# and survives its client.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

mkdir "$tmp/o"
TMPDIR=$tmp/o start_nbdkit pattern 17T
py <<'END'
o = tmp + "/o"
h = connect()
for i in range(0, 17):
    h.zero(1 << 31, i << 40)
    h.trim(1 << 31, (i << 40) + (1 << 33))
expect(used(o), 0, "bytes in use")
h.shutdown()
h = connect()
for i in range(0, 17):
    same(h.pread(4096, (i << 40) + (1 << 30)), bytes(4096), "zeroed")
    same(h.pread(4096, (i << 40) + (1 << 33)), bytes(4096), "trimmed")
    same(h.pread(4096, (i << 40) + (1 << 31)),
         base((i << 40) + (1 << 31), 4096), "not zeroed")
expect(used(o), 0, "bytes in use")
END
