#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A server started with -r offers no writes of any kind, refuses those that come all the
# same, and can be read, also when reads are kept.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

for args in cow-on-read=false cow-on-read=true; do
    start_nbdkit -r pattern 1M $args cow-on-cache=true
    py <<'END'
h = connect()
expect(h.is_read_only(), True, "read only")
expect(h.can_zero(), False, "zero offered")
expect(h.can_trim(), False, "trim offered")
raises(errno.EPERM, h.pwrite, b"x", 0)
for call in h.zero, h.trim:
    try:
        call(4096, 0)
    except nbd.Error:
        continue
    fail(call.__name__ + " succeeded")
h.cache(4096, 8192)
h.flush()
for i in range(2):
    same(h.pread(M, 0), base(0, M), "data")
    expect(extents(h), [(0, M, DATA)], "extents")
END
    stop_nbdkit
done
