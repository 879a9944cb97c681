#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# When the base returns an error, the request that needed it gets that error and
# leaves nothing behind; requests that do not need the base go on, and all is well
# when the base is.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_filter error
requires_plugin file

base_file "$tmp/base" 1048576

for args in "" cow-on-read=true cow-on-cache=true cow-block-size=64K; do
    rm -f "$tmp/fail"
    # shellcheck disable=SC2086
    start_nbdkit --filter=error file "$tmp/base" error=EIO error-rate=100% \
        error-file="$tmp/fail" $args
    py "$args" <<'END'
print(sys.argv[1])
block = 64 * K if "64K" in sys.argv[1] else 4 * K
trigger = tmp + "/fail"
model = bytearray(base(0, M))
h = connect()

def put(what, at, n, works):
    if what == "write":
        call, args = h.pwrite, (b"w" * n, at)
    else:
        call, args = getattr(h, what), (n, at)
    if not works:
        raises(errno.EIO, call, *args)
        return
    call(*args)
    if what != "cache":
        model[at:at + n] = b"w" * n if what == "write" else bytes(n)

# Before anything fails.
put("write", 8 * block, 2 * block, True)
put("zero", 12 * block, 2 * block, True)
open(trigger, "w").close()

raises(errno.EIO, h.pread, 512, 0)
raises(errno.EIO, h.pread, 8 * block, 4 * block)   # in part in the overlay
for what in "write", "zero", "trim":
    put(what, 0, 512, False)                  # a block, in part
    put(what, 5, 4 * block, False)            # whole blocks, and both ends
    put(what, 3 * block + 1, block - 1, False)
    put(what, block, block, True)             # one whole block
    put(what, 8 * block + 5, 100, True)       # a block that was written
    put(what, 13 * block + 5, 100, True)      # a block that was zeroed
    put(what, M - block, block, True)
    # From what is in the overlay into what is not: the base is needed.
    put(what, 9 * block, block + 100, False)
if "cow-on-cache" in sys.argv[1]:
    put("cache", 0, 512, False)
same(h.pread(2 * block, 8 * block), model[8 * block:10 * block], "written")
same(h.pread(2 * block, 12 * block), model[12 * block:14 * block], "zeroed")
raises(errno.EIO, h.block_status, block, 4 * block, lambda *a: 0)
os.unlink(trigger)

# Nothing of what failed is there.
same(h.pread(M, 0), model, "all of it")
END
    stop_nbdkit
done

# Only what the base has no extents for fails.
start_nbdkit --filter=error file "$tmp/base" error-extents=ENOMEM \
    error-extents-rate=100%
py <<'END'
h = connect()
h.pwrite(b"x" * 4096, 4096)
expect(extents(h, 4096, 4096), [(4096, 4096, DATA)], "a written block")
raises(errno.ENOMEM, h.block_status, 4096, 0, lambda *a: 0)
same(h.pread(8192, 0), base(0, 4096) + b"x" * 4096, "data")
END
