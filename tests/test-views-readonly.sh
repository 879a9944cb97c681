#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Views can be read and nothing else.  A client is told so, and one that does not listen is
# refused whatever it sends, and has changed neither the view nor the disk.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter nozero noextents nocache

base_file "$tmp/base" 1048576
fingerprint "$tmp/base" >"$tmp/before"

# run ARGS...
run ()
{
    start_nbdkit "$@" cow-views=true
    py <<'END'
live = connect()
live.pwrite(b"x" * 5000, 100)
live.zero(8 * K, 64 * K)
shown = live.pread(M, 0)
for name in "@base", "@snapshot", "@diff.qcow2", "@full.qcow2":
    print(name)
    h, other = connect(name), connect(name)
    size = h.get_size()
    before = h.pread(size, 0)
    expect(h.is_read_only(), True, "read only")
    expect(h.can_multi_conn(), True, "multi-conn")
    for can in h.can_zero, h.can_trim, h.can_fast_zero, h.can_fua, h.can_cache:
        expect(can(), False, can.__name__)
    expect(h.get_block_size(nbd.SIZE_MINIMUM), 1, "minimum block size")

    for at in 0, 1, 4 * K, size - 512:
        for flags in 0, nbd.CMD_FLAG_FUA:
            raises(errno.EPERM, h.pwrite, b"w" * 512, at, flags)
            raises(errno.EPERM, h.zero, 512, at, flags)
            raises(errno.EPERM, h.trim, 512, at, flags)
        raises(errno.EPERM, h.zero, 512, at, nbd.CMD_FLAG_NO_HOLE)
        raises(errno.EPERM, h.pwrite, b"w", at)
    raises(errno.EPERM, h.pwrite, b"w" * M if size >= M else b"w" * size, 0)
    # What changes nothing.
    h.flush()
    if name in ("@base", "@snapshot"):
        extents(h)

    for v in h, other:
        same(v.pread(size, 0), before, name)
    same(live.pread(M, 0), shown, "the live disk")
    leave(h, other)
live.pwrite(b"y", 100)
same(live.pread(2, 100), b"yx", "the live disk can be written")
leave(live)
END
    stop_nbdkit
    ! grep error "$log" | grep -v 'invalid request\|read-only' ||
        die "the server's log has other errors than those of the requests"
    fingerprint "$tmp/base" | cmp - "$tmp/before" || die "the base has changed"
}

run file "$tmp/base"
run --filter=nozero --filter=noextents --filter=nocache file "$tmp/base"
# A server that is read only has views, too.
start_nbdkit -r file "$tmp/base" cow-views=true
py <<'END'
for name in "", "@base", "@snapshot":
    h = connect(name)
    expect(h.is_read_only(), True, "read only")
    same(h.pread(M, 0), base(0, M), name)
    raises(errno.EPERM, h.pwrite, b"w" * 512, 0)
    leave(h)
END
