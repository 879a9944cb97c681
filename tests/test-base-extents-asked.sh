#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The base is asked for its extents (each question may make it search far) where blocks
# are not in the overlay: few times for many of them, of little where there are few, not
# at all where all blocks are there, nor past its end.  What it cannot say of blocks that
# are there does not matter.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter log
requires_plugin file
requires_plugin eval

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
expect(asked(size, 0),
       [(0, M), (M + 4096, 2 * (M + 4096)), (10 * M, size - 10 * M)],
       "three runs of holes: the first one, then twice as much")
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
for i in range(2, 16 * M // 8192, 2):
    h.pwrite(b"x" * 4096, i * 4096)
expect(len(asked(size, 0)) < 12, True, "2000 runs of holes: few questions")
h.pwrite(b"x" * (8 * M - 4096), 4096)
h.pwrite(b"x" * (size - 8 * M), 8 * M)
expect(asked(size, 0), [(0, 4096)], "one block that is not there")
END
stop_nbdkit

# The base fails behind its first MiB.
# shellcheck disable=SC2016
with_half_a_base=(
    start_nbdkit eval get_size='echo 4M' can_extents='exit 0'
    pread='[ $(($3 + $4)) -le 1048576 ] && head -c $3 /dev/zero'
    extents='[ $(($3 + $4)) -le 1048576 ] && echo $4 $3 hole,zero')
"${with_half_a_base[@]}"
py <<'END'
h = connect()
h.pwrite(b"x" * (4 * M - 4096), 4096)
expect(raw_extents(h, 4 * M, 0), [(4096, 3), (4 * M - 4096, 0)], "what it knows")
END
stop_nbdkit

# Twice what was walked over goes behind that MiB, and the hole does not.
"${with_half_a_base[@]}"
py <<'END'
h = connect()
h.pwrite(b"x" * (M // 2), 4096)
h.pwrite(b"x" * 3 * M, M)
expect(raw_extents(h, 4 * M, 0),
       [(4096, 3), (M // 2, 0), (M // 2 - 4096, 3), (3 * M, 0)], "both holes")
END
