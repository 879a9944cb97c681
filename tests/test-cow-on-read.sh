#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# cow-on-read: what is read is kept in the overlay, and not read from the base again.
# Off by default; with a path it is on while that path exists, which may change while
# the server runs.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter log
requires_plugin pattern
mkdir "$tmp/o"

# run KEEPS ARGS...
run ()
{
    rm -f "$tmp/log" "$tmp/switch"
    echo "${*:2}"
    TMPDIR=$tmp/o start_nbdkit --filter=log pattern 8M logfile="$tmp/log" \
        "${@:2}"
    py "$1" <<'END'
keeps = sys.argv[1]
h, h2 = connect(), connect()
log = Log()
o, switch = tmp + "/o", tmp + "/switch"

def kept(at, n, want):
    """Whether the second of two reads is answered without the base."""
    same(h.pread(n, at), base(at, n), "first read")
    log.mark()
    same(h2.pread(n, at), base(at, n), "second read")
    expect(log.requests() == [], want, "kept at %d" % at)
    expect(extents(h, at, n), [(at, n, DATA)], "extents")

if keeps == "never":
    kept(0, M, False)
    expect(len(overlays(o)), 0, "overlay files")
elif keeps == "always":
    kept(0, M, True)
    kept(3 * M + 5, 77, True)
    expect(len(overlays(o)), 1, "overlay files")
    # What is around what was written and zeroed, and these too.
    h.pwrite(b"x" * 4096, 5 * M)
    h.zero(4096, 5 * M + 8192)
    want = (b"x" * 4096 + base(5 * M + 4096, 4096) + bytes(4096)
            + base(5 * M + 12288, 4096))
    same(h.pread(16384, 5 * M), want, "mixed")
    log.mark()
    same(h.pread(16384, 5 * M), want, "mixed, again")
    expect(log.requests(), [], "requests for what is in the overlay")
else:
    for i in range(3):
        kept(2 * i * M, 10000, False)
        open(switch, "w").close()
        kept((2 * i + 1) * M, 10000, True)
        kept(2 * i * M, 10000, True)
        os.unlink(switch)
        kept((2 * i + 1) * M, 10000, True)
END
    stop_nbdkit
}

run never
run never cow-on-read=false
run always cow-on-read=true
run always cow-on-read=true cow-block-size=64K
run switch cow-on-read="$tmp/switch"
