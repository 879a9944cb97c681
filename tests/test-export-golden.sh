#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Many disks from one image: a plugin that serves the same disk under every name
# gives each name its own overlay over that disk.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

start_nbdkit pattern 1M
py <<'END'
names = ["", "vm1", "vm2", "vm 3/\u00e4", "x" * 200]
handles = [connect(n) for n in names]
for i, h in enumerate(handles):
    h.pwrite(bytes([65 + i]) * 5000, 1000 * i)
for i, n in enumerate(names):
    model = bytearray(base(0, M))
    model[1000 * i:1000 * i + 5000] = bytes([65 + i]) * 5000
    same(handles[i].pread(M, 0), model, "export %r" % n)
    same(connect(n).pread(M, 0), model, "export %r, second connection" % n)
END
