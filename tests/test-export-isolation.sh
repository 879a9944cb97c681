#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Each export has its own overlay: all connections to one name share it, no other
# name sees it, and it is still there when its clients have gone and come back.
#
# This broke in nbdkit's own cow filter, which has one overlay for the whole
# server: what was written to one export was read from the others.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file

mkdir "$tmp/d"
for f in a b c; do base_file "$tmp/d/$f" 1048576; done
truncate -s 300000 "$tmp/d/small"
for f in a b c small; do fingerprint "$tmp/d/$f" >"$tmp/$f.before"; done

start_nbdkit file dir="$tmp/d"
py <<'END'
a1, a2, b = connect("a"), connect("a"), connect("b")
a1.pwrite(b"a" * 65536, 0)
a1.pwrite(b"a" * 100, 200001)
a2.trim(131072, 65536)
b.pwrite(b"b" * 512, 0)

model = bytearray(base(0, M))
model[:65536] = b"a" * 65536
model[200001:200101] = b"a" * 100
model[65536:131072 + 65536] = bytes(131072)
same(a1.pread(M, 0), model, "a")
same(a2.pread(M, 0), model, "a on another connection")
same(b.pread(M, 0), b"b" * 512 + base(512, M - 512), "b")
same(connect("c").pread(M, 0), base(0, M), "c")
small = connect("small")
expect(small.get_size(), 300000, "size of another export")
same(small.pread(300000, 0), bytes(300000), "small")
small.pwrite(b"s", 299999)

# All clients go and others come.
for h in a1, a2, b, small:
    h.shutdown()
same(connect("a").pread(M, 0), model, "a after a reconnection")
same(connect("b").pread(512, 0), b"b" * 512, "b after a reconnection")
same(connect("small").pread(1, 299999), b"s", "small after a reconnection")
if not refused("nothing"):
    fail("an export that is not there was opened")
END
for f in a b c small; do
    fingerprint "$tmp/d/$f" | cmp - "$tmp/$f.before" || die "base $f has changed"
done
