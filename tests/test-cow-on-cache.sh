#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A prefetch (NBD_CMD_CACHE) of what the base has: with cow-on-cache=true it is read and
# kept in the overlay.  Without, a base that can prefetch is asked to, one for which
# nbdkit emulates that is read, and one that cannot is left alone.  The client is
# offered the command in any case, and the data stays right.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter log nocache
requires_plugin pattern

# run KEEPS BASE ARGS...: what the prefetch makes of the base.
run ()
{
    echo "$*"
    rm -f "$tmp/log"
    start_nbdkit --filter=log --filter=nocache pattern 8M \
        logfile="$tmp/log" "${@:3}"
    py "$1" "$2" <<'END'
keeps, asks = sys.argv[1] == "keeps", sys.argv[2]
h = connect()
expect(h.can_cache(), True, "prefetch offered")
log = Log()

def asked(at, n):
    log.mark()
    h.cache(n, at)
    return log.requests()

def cover(requests, at, n):
    """The requests are in one piece these bytes, or the blocks they are in."""
    got = sorted((o, o + c) for k, o, c in requests)
    lo, hi = at // 65536 * 65536, -(-(at + n) // 65536) * 65536
    for a, b in zip(got, got[1:]):
        expect(b[0], a[1], "requests one behind the other")
    if not (lo <= got[0][0] <= at and at + n <= got[-1][1] <= hi):
        fail("prefetch of %d at %d: %r" % (n, at, requests))

for at, n in [(0, M), (2 * M + 5, 100), (3 * M + 70000, 300000), (8 * M - 1, 1)]:
    got = asked(at, n)
    if asks == "nothing":
        expect(got, [], "requests to the base")
    else:
        expect(set(k for k, o, c in got), {asks}, "kinds of requests")
        cover(got, at, n)
    if n == M:
        expect(len(got), asks != "nothing", "number of requests")
    if keeps:
        expect(asked(at, n), [], "requests for the second prefetch")
    log.mark()
    same(h.pread(n, at), base(at, n), "data")
    expect(log.requests() == [], keeps, "kept")

# What is in the overlay is not asked for, what is around it is.
h.pwrite(b"x" * 65536, 5 * M)
h.zero(65536, 5 * M + 65536)
expect(asked(5 * M, 131072), [], "prefetch of the overlay")
h.cache(262144, 5 * M - 65536)
same(h.pread(262144, 5 * M - 65536), base(5 * M - 65536, 65536) + b"x" * 65536
     + bytes(65536) + base(5 * M + 131072, 65536), "mixed data")
END
    stop_nbdkit
}

run passes nothing cachemode=none
run passes Cache cachemode=nop
run keeps Read cachemode=none cow-on-cache=true
run keeps Read cachemode=nop cow-on-cache=true
run keeps Read cachemode=emulate cow-on-cache=true
run keeps Read cachemode=none cow-on-cache=true cow-block-size=64K
run passes Cache cachemode=nop cow-on-cache=false cow-block-size=64K
# The log filter above has the emulation as a prefetch, so look below it.
rm -f "$tmp/log"
start_nbdkit --filter=nocache --filter=log pattern 8M logfile="$tmp/log" \
    cachemode=emulate
py <<'END'
h = connect()
log = Log()
h.cache(M, M)
got = log.requests("Read")
if not got or sum(c for k, o, c in got) != M:
    fail("emulated prefetch: %r" % got)
END
