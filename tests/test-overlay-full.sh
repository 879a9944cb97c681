#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A full file system: the write that does not fit fails with ENOSPC and changes nothing,
# what was there before can be read, reads that would like to keep what they read go
# on, and what is trimmed makes room.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
[ "$(id -u)" -eq 0 ] || skip "mounting a small file system needs root"
mkdir "$tmp/o"
mount -t tmpfs -o size=4M none "$tmp/o" 2>"$tmp/mount.err" ||
    skip "no tmpfs can be mounted: $(cat "$tmp/mount.err")"
cleanup_fn umount -l "$tmp/o"

for args in cow-on-read=false cow-on-read=true cow-block-size=64K; do
    TMPDIR=$tmp/o start_nbdkit pattern 24M cow-on-cache=true $args
    py <<'END'
h = connect()
model = bytearray(base(0, 24 * M))
end = 0

def fill(n):
    """Writes until there is no room.  Returns how much it wrote."""
    global end
    start = end
    while True:
        if end > 20 * M:
            fail("20 MiB went into 4 MiB")
        data = bytes([65 + (end // n) % 26]) * n
        try:
            h.pwrite(data, end)
        except nbd.Error as e:
            expect(errno.errorcode[e.errnum], "ENOSPC", "error of the write")
            return end - start
        model[end:end + n] = data
        end += n

wrote = fill(256 * K) + fill(64 * K)
if wrote < 2 * M:
    fail("only %d bytes fit into 4 MiB" % wrote)
full_at = end
# Nothing of it is there, and nothing else has changed.  (The first part of this is
# a read that may want to keep what it reads, and cannot.)
same(h.pread(8 * M, 16 * M), model[16 * M:], "the base")
same(h.pread(M, end), model[end:end + M], "where it did not fit")
same(h.pread(end, 0), model[:end], "what was written before")

# What needs no room works.
h.zero(M, 10 * M)
model[10 * M:11 * M] = bytes(M)
h.pwrite(b"again", 5)
model[5:10] = b"again"
same(h.pread(24 * M, 0), model, "all of it")

# Requests with ends in the base fail as well, wholly.
for what in h.zero, h.trim:
    try:
        what(2 * M + 1, 12 * M + 1)
        model[12 * M + 1:14 * M + 2] = bytes(2 * M + 1)
    except nbd.Error as e:
        expect(errno.errorcode[e.errnum], "ENOSPC", "error of " + what.__name__)
    same(h.pread(24 * M, 0), model, "all of it after " + what.__name__)
try:
    h.cache(M, 18 * M)
except nbd.Error as e:
    expect(errno.errorcode[e.errnum], "ENOSPC", "error of the prefetch")
same(h.pread(24 * M, 0), model, "all of it after a prefetch")

# Room again, as much as was given back.
h.trim(full_at, 0)
model[:full_at] = bytes(full_at)
h.pwrite(b"r" * M, 20 * M)
model[20 * M:21 * M] = b"r" * M
same(connect().pread(24 * M, 0), model, "all of it at the end")
END
    stop_nbdkit
    log_has "$tmp/o"
done
