#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A limit on the size of files (ulimit -f): the write that goes beyond it fails, and the
# signal that comes with it does not kill the server.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires prlimit --version
requires_plugin pattern

under=(prlimit --fsize=$((4 * 1048576)))
start_nbdkit pattern 64M
py <<'END'
h = connect()
end = 0
while True:
    if end > 60 * M:
        fail("60 MiB went into a file of 4 MiB")
    try:
        h.pwrite(b"x" * 64 * K, end)
    except nbd.Error as e:
        if e.errnum not in (errno.ENOSPC, errno.EFBIG):
            fail("error of the write: %s" % e)
        break
    end += 64 * K
if end < M:
    fail("only %d bytes were written" % end)
same(h.pread(end, 0), b"x" * end, "what was written before")
same(h.pread(M, end), base(end, M), "what was not")
h.pwrite(b"again", 5)
h.zero(M, 32 * M)
same(connect().pread(10, 0), b"xxxxxagain", "written again")
END
