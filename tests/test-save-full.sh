#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The file system of the target is full: of the overlay, which has grown until a write got
# ENOSPC, be it by scattered blocks, by long writes, or by zeroes everywhere.  The save in
# place succeeds all the same, for the space of its tables was set aside.  A copy does
# not fit, so the overlay itself is kept as a complete diff.

. "${srcdir:-$(dirname "$0")}/functions.sh"
PATH=$PATH:/usr/sbin:/sbin
requires_plugin pattern
requires qemu-img --version
requires mkfs.ext4 -V
[ "$(id -u)" -eq 0 ] || skip "mounting a small file system needs root"
mkdir "$tmp/t"

mount_fs ()
{
    case $1 in
        tmpfs) mount -t tmpfs -o size=8M none "$tmp/t" ;;
        ext4)
            rm -f "$tmp/fs"
            truncate -s 24M "$tmp/fs"
            mkfs.ext4 -q -F -m 0 "$tmp/fs"
            mount -o loop "$tmp/fs" "$tmp/t" ;;
    esac 2>"$tmp/mount.err" || skip "no $1 can be mounted: $(cat "$tmp/mount.err")"
    mounted=yes
}
unmount_fs () { [ "$mounted" = no ] || umount "$tmp/t"; mounted=no; }
mounted=no
cleanup_fn unmount_fs

# fill KIND: writes until there is no room, and some more; $tmp/model has what
# the disk holds, as a list of (offset, data).
fill ()
{
    py "$1" "$size" <<'END'
import pickle
kind, size = sys.argv[1], int(sys.argv[2])
rand = random.Random(7)
h = connect()
nr = size // (4 * K)
want = {}          # block of 4K -> bytes; only of those that were changed
refused = 0


def get(b):
    return want.get(b) or base(b * 4 * K, 4 * K)


def do(call, at, data, *args):
    """Makes the request, and notes what it did."""
    global refused
    try:
        call(*args)
        failed = False
    except nbd.Error as e:
        expect(errno.errorcode[e.errnum], "ENOSPC", "the error")
        refused += 1
        failed = True
    pos = at
    while pos < at + len(data):
        b, o = divmod(pos, 4 * K)
        n = min(4 * K - o, at + len(data) - pos)
        block = bytearray(get(b))
        block[o:o + n] = data[pos - at:pos - at + n]
        if not failed:
            want[b] = bytes(block)
        else:
            # What had space before may have been written.
            there = bytes(h.pread(4 * K, b * 4 * K))
            if there != get(b):
                same(there, block, "a block of what was refused")
                want[b] = there
        pos += n


tries = 0
while refused < 30 and tries < 200000:
    tries += 1
    if kind == "random":
        at = rand.randrange(nr) * 4 * K
        data = rand.randbytes(4 * K)
        do(h.pwrite, at, data, data, at)
    elif kind == "long":
        n = rand.randrange(1, 256) * K
        at = rand.randrange(size - n)
        data = rand.randbytes(n)
        do(h.pwrite, at, data, data, at)
    elif kind == "zero":
        # One L2 table each, and no data.
        at = tries * 2 * M + 4 * K
        do(h.zero, at, bytes(4 * K), 4 * K, at)
    elif kind == "mixed":
        at = rand.randrange(nr) * 4 * K
        if rand.random() < 0.3:
            do(h.trim, at, bytes(4 * K), 4 * K, at)
        else:
            data = rand.randbytes(4 * K)
            do(h.pwrite, at + 100, data[:2000], data[:2000], at + 100)
# What is left somebody else takes.
expect(refused, 30, "refused")
filler = bytes(M)
fd = os.open(tmp + "/t/filler", os.O_WRONLY | os.O_CREAT, 0o600)
while filler:
    try:
        os.write(fd, filler)
    except OSError as e:
        expect(e.errno, errno.ENOSPC, "filler")
        filler = filler[:len(filler) // 2]
os.close(fd)
for b in list(want)[::17]:
    same(h.pread(4 * K, b * 4 * K), want[b], "block %d" % b)
with open(tmp + "/model", "wb") as f:
    pickle.dump(want, f)
print(kind, len(want), "blocks", refused, "refused")
END
}

# holds DIFF: it has the blocks of the model, and nothing else.
holds ()
{
    sound_diff "$1"
    start_nbdkit pattern $size cow-load="$1"
    py "$size" <<'END'
import pickle
size = int(sys.argv[1])
with open(tmp + "/model", "rb") as f:
    want = pickle.load(f)
h = connect()
for at in range(0, min(size, 64 * M), 8 * M):
    part = bytearray(base(at, 8 * M))
    for b in range(at // (4 * K), (at + 8 * M) // (4 * K)):
        if b in want:
            part[b * 4 * K - at:(b + 1) * 4 * K - at] = want[b]
    same(h.pread(8 * M, at), part, "8 MiB at %d" % at)
if size > 64 * M:
    for b in want:
        same(h.pread(12 * K, b * 4 * K - 4 * K * (b > 0)),
             b"".join(want.get(i) or base(i * 4 * K, 4 * K)
                      for i in range(b - (b > 0), b - (b > 0) + 3)),
             "around block %d" % b)
END
    stop_nbdkit
}

# fills FS KIND ARGS...
fills ()
{
    local fs=$1 kind=$2
    shift 2
    size=$((64 * 1024 * 1024))
    # Each L2 table of 2 MiB takes 4 KiB.
    [ "$kind" != zero ] || size=$((24 * 1024 * 1024 * 1024))
    mount_fs "$fs"
    start_nbdkit pattern $size cow-save="$tmp/t/diff" "$@"
    fill "$kind"
    stop_nbdkit
    log_lacks 'error: cow-save'
    rm -f "$tmp/t/filler"
    holds "$tmp/t/diff"
    unmount_fs
}

fills tmpfs random
fills tmpfs zero
fills ext4 random
fills ext4 long cow-block-size=16K
fills ext4 zero
fills ext4 mixed cow-save-format=extended

# A copy finds no room: the overlay, which is elsewhere, is kept there.
size=$((64 * 1024 * 1024))
mount_fs tmpfs
TMPDIR=$tmp start_nbdkit pattern $size cow-save="$tmp/t/diff" cow-save-compact=true
py <<'END'
import pickle
h = connect()
h.pwrite(b"x" * 10 * M, M)
with open(tmp + "/model", "wb") as f:
    pickle.dump({i: b"x" * 4 * K for i in range(256, 11 * 256)}, f)
END
end_nbdkit TERM 1
[ -z "$(ls -A "$tmp/t")" ] || die "half a copy is left"
kept=$(kept_diff "$log")
[ "$(dirname "$kept")" = "$tmp" ] || die "kept in $kept"
holds "$kept"
