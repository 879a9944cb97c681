#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# cow-scope=connection: each connection has its own overlay, over the same base,
# which is thrown away with its file when the connection ends.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

mkdir "$tmp/o"
TMPDIR=$tmp/o start_nbdkit pattern 1M cow-scope=connection
py <<'END'
o = tmp + "/o"
a, b = connect(), connect()
a.pwrite(b"a" * 100000, 0)
a.trim(100000, 200000)
same(b.pread(M, 0), base(0, M), "another connection")
b.pwrite(b"b" * 512, 512)
same(a.pread(400000, 0), b"a" * 100000 + base(100000, 100000) + bytes(100000)
     + base(300000, 100000), "the one that wrote")
same(b.pread(M, 0), base(0, 512) + b"b" * 512 + base(1024, M - 1024),
     "the other one that wrote")
expect(len(overlays(o)), 2, "overlay files of two connections")

a.shutdown()
until(lambda: len(overlays(o)) == 1, "the overlay file to be closed")
same(connect().pread(M, 0), base(0, M), "the next connection")
same(b.pread(1024, 0), base(0, 512) + b"b" * 512, "the connection that stayed")
# One that just vanishes, without a word.
del b
until(lambda: len(overlays(o)) == 0, "the overlay file to be closed")
END
