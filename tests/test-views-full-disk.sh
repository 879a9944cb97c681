#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The file system gets full while a snapshot is held: a write to a block that it shows fails
# with ENOSPC and has changed neither the live disk nor the snapshot, nor kept the room that
# there was.  When the snapshot has gone, it succeeds.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
[ "$(id -u)" -eq 0 ] || skip "mounting a small file system needs root"
mkdir "$tmp/o"
mount -t tmpfs -o size=4M none "$tmp/o" 2>"$tmp/mount.err" ||
    skip "no tmpfs can be mounted: $(cat "$tmp/mount.err")"
cleanup_fn umount -l "$tmp/o"

for args in cow-block-size=4K cow-block-size=64K "cow-save=$tmp/o/diff"; do
    TMPDIR=$tmp/o start_nbdkit pattern 8M cow-views=true "$args"
    py "$args" <<'END'
print(re.sub("=.*diff", "", sys.argv[1]))
block = 64 * K if "64K" in sys.argv[1] else 4 * K
slot = 32 * block
h = connect()
model = bytearray(base(0, 8 * M))


def put(data, at):
    h.pwrite(data, at)
    model[at:at + len(data)] = data


def does_not_fit(what, *args):
    raises(errno.ENOSPC, what, *args)
    same(h.pread(8 * M, 0), model, "the live disk after ENOSPC")
    same(s.pread(8 * M, 0), moment, "the snapshot after ENOSPC")


def room():
    fs = os.statvfs(tmp + "/o")
    return fs.f_bavail * fs.f_bsize


# Slots that are full, that have a few blocks, and one zero block among others.
put(bytes(range(65, 81)) * (slot // 16), 0)
if block == 4 * K:
    put(b"more" * slot, slot)
put(b"few" * block, 7 * M)
h.zero(block, block)
model[block:2 * block] = bytes(block)
s = connect("@snapshot")
moment = bytes(model)
diff = connect("@diff.qcow2")
image = diff.pread(diff.get_size(), 0)

# Fill it up, but for less than a block needs.
at = 3 * M
n = M
while n >= block:
    try:
        put(b"f" * n, at)
        at += n
    except nbd.Error as e:
        expect(e.errnum, errno.ENOSPC, "a full file system")
        n //= 2
left = room()
for i in range(3):
    # A part of a block, a whole one, several slots; and zeroes with ends in blocks.
    does_not_fit(h.pwrite, b"new", 5)
    does_not_fit(h.pwrite, b"n" * block, 3 * block)
    does_not_fit(h.zero, block, 5 * block + 1)
    does_not_fit(h.pwrite, b"n" * (3 * M), 1)
# Each try has given back what it took.
if room() < left - block:
    fail("%d bytes were left, now %d" % (left, room()))
# Zero and trim of whole blocks need no room.
h.trim(block, 4 * block)
model[4 * block:5 * block] = bytes(block)
same(h.pread(8 * M, 0), model, "the live disk")
same(s.pread(8 * M, 0), moment, "the snapshot")
same(diff.pread(len(image), 0), image, "the diff view")
leave(diff)
does_not_fit(h.pwrite, b"new", 5)

# The snapshot goes, and the same writes succeed: nothing has to move.
leave(s)
put(b"new", 5)
put(b"n" * block, 3 * block)
h.zero(block, 5 * block + 1)
model[5 * block + 1:6 * block + 1] = bytes(block)
same(h.pread(8 * M, 0), model, "the live disk at the end")
s = connect("@snapshot")
same(s.pread(8 * M, 0), model, "a new snapshot")
leave(h, s)
END
    stop_nbdkit
    log_has "$tmp/o"
    rm -f "$tmp/o/diff"
done
