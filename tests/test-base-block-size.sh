#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A base that takes requests of certain sizes only is asked in these, whatever the
# client asks and whatever the block size of the filter is.  The client may ask
# anything: its minimum is 1 byte.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter blocksize-policy log
requires_plugin file

size=2097152
base_file "$tmp/base" $size
truncate -s 3M "$tmp/base"
truncate -s 4M "$tmp/base"

# run MINIMUM MAXIMUM ARGS...
run ()
{
    local min=$1 max=$2
    shift 2
    rm -f "$tmp/log"
    start_nbdkit --filter=log --filter=blocksize-policy file "$tmp/base" \
        logfile="$tmp/log" blocksize-minimum="$min" \
        blocksize-preferred="$min" blocksize-maximum="$max" \
        blocksize-error-policy=error "$@"
    py "$min" "$max" "$*" <<'END'
minimum, maximum, args = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("minimum %d, maximum %d, %s" % (minimum, maximum, args))
size = 4 * M
model = bytearray(base(0, 2 * M) + bytes(2 * M))
h = connect()
log = Log()
expect(h.get_block_size(nbd.SIZE_MINIMUM), 1, "minimum of the filter")
expect(h.get_block_size(nbd.SIZE_MAXIMUM), 0xffffffff, "maximum of the filter")

# Reads of holes, near the borders of what the base takes.
for at, n in [(0, 1), (1, 1), (511, 2), (minimum - 1, 2), (minimum, 1),
              (4095, 4098), (size - 1, 1), (size - 4097, 4097),
              (maximum - 1, maximum + 2), (5, 1000003), (0, size)]:
    n = min(n, size - at)
    same(h.pread(n, at), model[at:at + n], "read of %d at %d" % (n, at))

# Each request on blocks that nobody touched before.
at = minimum + 77
step = max(3 * minimum, 2 * 65536) + 4096 + 1
for n in 1, 512, 4095, 4096, 4097, 65536 + 9:
    for what in "write", "zero", "trim", "cache":
        if at + n > size:
            at = at % minimum + 3
        if what == "write":
            h.pwrite(b"w" * n, at)
            model[at:at + n] = b"w" * n
        elif what == "cache":
            h.cache(n, at)
        else:
            getattr(h, what)(n, at)
            model[at:at + n] = bytes(n)
        a, z = max(0, at - 70000), min(size, at + n + 70000)
        same(h.pread(z - a, a), model[a:z], "%s of %d at %d" % (what, n, at))
        extents(h, at, n)
        at += step
        if at + n > size:
            at = 11 + n
# The very end.
h.pwrite(b"end", size - 3)
model[size - 3:] = b"end"
h.zero(5, size - 9)
model[size - 9:size - 4] = bytes(5)
same(h.pread(size, 0), model, "all")

# And the extents are a whole.
expect(sum(e[1] for e in extents(h)), size, "length of all extents")
for e in extents(h):
    if e[2] == HOLE_ZERO:
        same(model[e[0]:e[0] + e[1]], bytes(e[1]), "a hole at %d" % e[0])

# The policy refuses what is not so; this is to see that it was there at all.
for kind, offset, count in log.requests():
    if offset % minimum or (count % minimum and offset + count != size):
        fail("%s of %d at %d" % (kind, count, offset))
    if kind == "Read" and count > maximum:
        fail("%s of %d" % (kind, count))
END
    stop_nbdkit
}

run 4096 65536
run 65536 131072
run 4096 4096 cow-on-read=true
run 65536 65536 cow-on-read=true
run 65536 1048576 cow-on-cache=true
run 512 512 cow-block-size=64K
run 65536 65536 cow-block-size=1M cow-on-cache=true

# What is kept of the base is kept in blocks of the base, or the next read would
# read them again.
rm -f "$tmp/log"
start_nbdkit --filter=log --filter=blocksize-policy pattern 1M \
    logfile="$tmp/log" blocksize-minimum=64K blocksize-preferred=64K \
    blocksize-error-policy=error \
    cow-on-read=true
py <<'END'
h = connect()
log = Log()
for offset in range(0, 256 * K, 4 * K):
    h.pread(4 * K, offset)
expect(log.requests("Read"), [("Read", o, 64 * K)
                              for o in range(0, 256 * K, 64 * K)], "reads")
END
stop_nbdkit
