#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Disks of any size, no multiple of anything included, are read and written from
# their first byte to their last, and not beyond.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

for size in 0 1 511 512 513 4095 4096 4097 65537 131072 1048577; do
    start_nbdkit pattern $size
    py $size <<'END'
size = int(sys.argv[1])
print(size)
h = connect()
expect(h.get_size(), size, "size")
h.flush()
if size == 0:
    raises(errno.EINVAL, h.pread, 1, 0)
    raises(errno.ENOSPC, h.pwrite, b"x", 0)
    sys.exit()

model = bytearray(base(0, size))
same(h.pread(size, 0), model, "the base")
# A byte in the middle, the first and the last, a bit at the end, all of it.
for at, n in [(size // 2, 1), (0, 1), (size - 1, 1), (size - size // 3, size // 3),
              (0, size // 3), (0, size)]:
    if n == 0:
        continue
    for what in "write", "zero", "trim":
        if what == "write":
            h.pwrite(b"w" * n, at)
        else:
            getattr(h, what)(n, at)
        model[at:at + n] = (b"w" if what == "write" else bytes(1)) * n
        h.cache(n, at)
        same(h.pread(size, 0), model, "%s of %d at %d" % (what, n, at))
        expect(sum(e[1] for e in extents(h)), size, "length of the extents")
    h.pwrite(b"W" * n, at)
    model[at:at + n] = b"W" * n
same(connect().pread(size, 0), model, "the end result")

# Not beyond.
raises(errno.EINVAL, h.pread, 2, size - 1)
raises(errno.ENOSPC, h.pwrite, b"xx", size - 1)
raises(errno.ENOSPC, h.zero, 1, size)
END
    stop_nbdkit
done
