#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# cow-block-size takes the powers of two from 4K up; what is above 2M means 2M.  The
# client is offered blocks of that size, or larger ones if the base prefers them.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires_filter blocksize-policy log

# offered EXPECTED ARGS...: the preferred block size, the minimum being 1.
offered ()
{
    start_nbdkit "${@:2}"
    nbdinfo "$uri" >"$tmp/info"
    grep -q "block_size_minimum: 1\$" "$tmp/info" &&
        grep -q "block_size_preferred: $1\( (.*)\)*\$" "$tmp/info" &&
        grep -q "block_size_maximum: 4294967295\$" "$tmp/info" ||
        { cat "$tmp/info"; die "another block size than $1: ${*:2}"; }
    stop_nbdkit
}

offered 4096 pattern 1M
for size in 4K:4096 4096:4096 8K:8192 64K:65536 1M:1048576 2M:2097152 \
    2097152:2097152 4M:2097152 1G:2097152 2G:2097152 4G:2097152 1E:2097152; do
    offered ${size#*:} pattern 16M cow-block-size=${size%:*}
done
offered 65536 --filter=blocksize-policy pattern 1M \
    blocksize-preferred=64K blocksize-minimum=512
offered 1048576 --filter=blocksize-policy pattern 16M \
    blocksize-preferred=64K blocksize-minimum=4K cow-block-size=1M

# It is the unit of copying: a byte written costs the base so much.
for size in 4K:4096 16K:16384 2M:2097152 2G:2097152; do
    rm -f "$tmp/log"
    start_nbdkit --filter=log pattern 16M logfile="$tmp/log" \
        cow-on-read=true cow-block-size=${size%:*}
    py ${size#*:} <<'END'
block = int(sys.argv[1])
h = connect()
log = Log()
h.pread(1, 4 * M + 9)
expect(log.requests(), [("Read", 4 * M, block)], "what is kept of the base")
END
    stop_nbdkit
done
