#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# cow-max-bytes: an overlay takes no more of its file, with its moments.  What needs more
# fails with "no space"; all else goes on, and other exports do not notice.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file pattern

for block in 4K 64K; do
    start_nbdkit pattern 64M cow-max-bytes=8M cow-views=true cow-control="$tmp/control" \
        cow-block-size=$block
    py <<'END'
h, other, control = connect(), connect("other"), Control()
h.pwrite(b"1" * 6 * M, 0)
# Not a part of what does not fit.
raises(errno.ENOSPC, h.pwrite, b"2" * 3 * M, 20 * M)
same(h.pread(3 * M, 20 * M), base(20 * M, 3 * M), "what did not fit")
until(lambda: "cow-max-bytes" in server_log(), "the reason")
h.pwrite(b"3" * 2 * M, 6 * M)
raises(errno.ENOSPC, h.pwrite, b"4", 30 * M)
raises(errno.ENOSPC, h.zero, 100, 30 * M)  # a part of a block

# All else goes on.
h.pwrite(b"5" * 8 * M, 0)
same(h.pread(8 * M, 0), b"5" * 8 * M, "overwritten")
h.flush()
h.zero(8 * M, 40 * M)
same(h.pread(8 * M, 40 * M), bytes(8 * M), "zeroed")
other.pwrite(b"6" * 8 * M, 0)
raises(errno.ENOSPC, other.pwrite, b"6" * 64 * K, 8 * M)

# Room is made: at once, as often as one likes.
for i in range(20):
    h.trim(M, i % 8 * M)
    h.pwrite(b"%02d" % i * (M // 2), (20 + i) * M)
    h.zero(M, (20 + i) * M)
    h.pwrite(b"7" * M, i % 8 * M)
same(h.pread(8 * M, 0), b"7" * 8 * M, "after room was made")

# What a moment holds counts too.
control("moment", "m", "default")
raises(errno.ENOSPC, h.pwrite, b"8" * M, 0)
same(h.pread(8 * M, 0), b"7" * 8 * M, "while a moment holds all")
h.trim(4 * M, 0)
raises(errno.ENOSPC, h.pwrite, b"8" * M, 0)
same(connect("@m").pread(8 * M, 0), b"7" * 8 * M, "the moment")
leave(connect("@snapshot"))
until(lambda: dict(control("list", "default"))["connections"] == "1", "the end of a view")
control("forget", "m", "default")
h.pwrite(b"9" * 4 * M, 0)
raises(errno.ENOSPC, h.pwrite, b"9" * M, 20 * M)
leave(h, other)
END
    stop_nbdkit
done

# What is full can be saved.
base_file "$tmp/base" 67108864
start_nbdkit file "$tmp/base" cow-max-bytes=1M cow-save="$tmp/diff.qcow2"
py <<'END'
h = connect()
for at in range(0, 64 * M, 64 * K):
    try:
        h.pwrite(b"x" * 4096, at)
    except nbd.Error as e:
        expect(e.errnum, errno.ENOSPC, "error")
leave(h)
END
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
diff_is "$tmp/diff.qcow2" "$tmp/base" "$tmp/shown"

for value in 0 -1 x '' 1Q; do
    nbdkit_refuses cow-max-bytes --filter="$FILTER" null 1M cow-max-bytes="$value"
done
