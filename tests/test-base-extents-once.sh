#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The base is asked for its extents once, from the first block that is not in the
# overlay on (each question may make it search far), not at all where all blocks are
# there, nor past its end.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter log
requires_plugin file

base_file "$tmp/base" 65536
truncate -s $((16 * 1048576 + 100)) "$tmp/base"
start_nbdkit --filter=log file "$tmp/base" logfile="$tmp/log"
py <<'END'
h = connect()
log = Log()
size = 16 * M + 100

def asked(count, offset, flags=0):
    log.mark()
    raw_extents(h, count, offset, flags)
    return [(o, c) for k, o, c in log.requests("Extents")]

expect(asked(size, 0), [(0, size)], "all of the disk")
expect(asked(4096, 0), [(0, 4096)], "one block")
h.pwrite(b"x" * 4096, M)
h.zero(8 * M, 2 * M)
expect(asked(size, 0), [(0, size)], "three runs of holes")
expect(asked(size - M, M), [(M + 4096, size - M - 4096)], "two runs of holes")
expect(asked(8 * M, 2 * M), [], "what is zeroed")
expect(asked(4096, M), [], "what is written")
expect(asked(8 * M, 2 * M, nbd.CMD_FLAG_REQ_ONE), [], "one extent of zeroes")
expect(len(asked(size, 0, nbd.CMD_FLAG_REQ_ONE)), 1, "one extent")
expect(asked(size - M, M, nbd.CMD_FLAG_REQ_ONE), [],
       "one extent that begins with written data")
# The last block, where only a part of it is asked about.
got = asked(50, size - 50)
expect(len(got), 1, "requests for the end")
if got[0][0] + got[0][1] > size:
    fail("asked past the end: %r" % got)
END
