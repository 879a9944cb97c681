#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A base that fails with ENOTSUP or EOPNOTSUPP, which nbdkit takes for a broken
# promise when a zero returns it, and aborts: the client gets another error and the
# server stays.  So it does with a filter above that turns a zero into a read and a
# write (blocksize).

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin eval

for error in ENOTSUP EOPNOTSUPP; do
    for args in "" cow-on-read=true cow-on-cache=true; do
        # shellcheck disable=SC2086
        start_nbdkit eval get_size='echo 1M' can_extents='exit 0' \
            can_cache='echo emulate' \
            extents="echo $error no extents >&2; exit 1" \
            pread="echo $error no data >&2; exit 1" $args
        py <<'END'
h = connect()
for count in 100, 5000:
    for call, arg in [(h.zero, count), (h.trim, count), (h.pread, count),
                      (h.pwrite, b"x" * count), (h.cache, count)]:
        try:
            call(arg, 1000)
        except nbd.Error as e:
            expect(e.errnum, errno.EIO, call.__name__)
        else:
            fail("%s succeeded" % call.__name__)
# Refused because it would need the base, which is not an error of the base.
raises(errno.ENOTSUP, h.zero, 100, 1000, nbd.CMD_FLAG_FAST_ZERO)
try:
    h.block_status(4096, 0, lambda *a: 0)
except nbd.Error as e:
    expect(e.errnum, errno.EIO, "block_status")

# Still there, on this connection and on others.
h.zero(4096, 8192)
h.pwrite(b"y" * 4096, 4096)
same(connect().pread(8192, 4096), b"y" * 4096 + bytes(4096), "whole blocks")
END
        stop_nbdkit
    done

    start_server --filter=blocksize --filter="$FILTER" eval \
        get_size='echo 1M' pread="echo $error no data >&2; exit 1" minblock=512
    py <<'END'
h = connect()
raises(errno.EIO, h.zero, 100, 1000)
raises(errno.EIO, h.trim, 1000, 1000)
raises(errno.EIO, h.pwrite, b"x" * 100, 1000)
END
    stop_nbdkit
done
