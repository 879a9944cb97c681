#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What a client may do does not depend on the base: all of it is offered over bases that
# can do little, and works.
#
# nbdkit's own cow filter offers no zero over a plugin that cannot be written.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter nozero noextents nocache fua

truncate -s 1M "$tmp/base"

# run ARGS...
run ()
{
    echo "$*"
    start_nbdkit "$@"
    py <<'END'
h = connect()
size = h.get_size()
for can in (h.can_cache, h.can_df, h.can_fast_zero, h.can_flush, h.can_fua,
            h.can_multi_conn, h.can_trim, h.can_zero):
    expect(can(), True, can.__name__)
expect(h.can_meta_context("base:allocation"), True, "extents")
expect(h.is_read_only(), False, "read only")
expect(h.get_block_size(nbd.SIZE_MINIMUM), 1, "minimum block size")

h.pwrite(b"x" * 5000, 1, nbd.CMD_FLAG_FUA)
h.flush()
h.zero(100, 11, nbd.CMD_FLAG_FUA)
h.zero(4096, 4096, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_FAST_ZERO)
h.trim(100, 211, nbd.CMD_FLAG_FUA)
h.cache(10000, 0)
h.flush()
want = bytearray(b"x" * 8191)
want[10:110] = bytes(100)
want[210:310] = bytes(100)
want[4095:] = bytes(4096)
same(h.pread(8191, 1), want, "data")
expect(extents(h, 0, 8192), [(0, 4096, DATA), (4096, 4096, HOLE_ZERO)],
       "extents")
END
    stop_nbdkit
}

run file "$tmp/base"
run memory 1M
run null 1M
run pattern 1M
run full 1M
run random 1M
run data '@0x10000 1' size=1M
run eval get_size='echo 1M' pread='head -c "$3" /dev/zero' \
    can_multi_conn='exit 3'
run --filter=nozero --filter=noextents --filter=nocache file "$tmp/base"
run --filter=nozero --filter=fua memory 1M zeromode=none fuamode=discard
if xz --version >/dev/null 2>&1; then
    xz -k "$tmp/base"
    run --filter=xz file "$tmp/base.xz"
fi
