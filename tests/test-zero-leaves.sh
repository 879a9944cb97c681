#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What mkfs and blkdiscard do with a large new disk: they trim or zero all of it.  That
# takes no memory for what was never touched, though each request goes over the bounds
# of nodes of the map; and it is zero then, for reads, extents, snapshots and diffs.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
requires jq --version

# 1 TiB and its last slot in part.  As blocks the map would take 128 MiB.
start_nbdkit pattern $(((1 << 40) + 777)) cow-views=true
py <<'END'
h = connect()
size = h.get_size()
before = connect("@snapshot")


def resident():
    with open("/proc/%s/status" % os.environ["pid"]) as f:
        return int(re.search(r"VmRSS:\s*(\d+) kB", f.read()).group(1))


def all_of_it(request):
    for at in range(1000, size, G):
        request(min(G, size - at), at)


at_first = resident()
all_of_it(h.trim)
all_of_it(h.zero)       # again, as some tools do
grown = resident() - at_first
print("%d KiB" % grown)
# A sanitizer or the like needs memory of its own.
if not os.environ.get("TEST_WRAPPER") and grown > 8 * K:
    fail("it took %d KiB of memory" % grown)

rand = random.Random(9)
places = [0, 1000, G - K, 32 * M, size - K] + [rand.randrange(size - K) for i in range(50)]


def shown(v, at):
    got = v.pread(K, at)
    # The first 1000 bytes are still there.
    kept = max(0, 1000 - at)
    same(got, base(at, kept) + bytes(K - kept), "at %d" % at)


same(before.pread(K, 5 * G), base(5 * G, K), "the disk before")
expect(extents(before, 5 * G, G), [(5 * G, G, DATA)], "extents before")
leave(before)
after = connect("@snapshot")
for v in h, after:
    for at in places:
        shown(v, at)
# (There is a block where two requests meet.)
expect(extents(h, 2 * G + 4 * K, G - 4 * K), [(2 * G + 4 * K, G - 4 * K, HOLE_ZERO)], "extents")

at = 500 * G + 40 * M
h.pwrite(b"w" * K, at + 100)
same(h.pread(2 * K, at), bytes(100) + b"w" * K + bytes(K - 100), "written")
same(after.pread(2 * K, at), bytes(2 * K), "but not in the snapshot")
expect(extents(h, at - 32 * M, 64 * M),
       [(at - 32 * M, 32 * M, HOLE_ZERO), (at, 4 * K, DATA),
        (at + 4 * K, 32 * M - 4 * K, HOLE_ZERO)], "extents around it")
END
stop_nbdkit

# The diff, in place (its tables need space that nobody else may take), and streamed.
size=$((200 * 1048576 + 777))
base_file "$tmp/base" $size
cp "$tmp/base" "$tmp/wanted"
for how in place stream extended; do
    args=(cow-save="$tmp/diff")
    [ $how != extended ] || args+=(cow-save-format=extended)
    if [ $how = stream ]; then
        mkfifo "$tmp/fifo"
        cat "$tmp/fifo" >"$tmp/diff" &
        args=(cow-save="$tmp/fifo")
    fi
    start_nbdkit pattern $size "${args[@]}"
    py <<'END'
h = connect()
size = h.get_size()
h.pwrite(b"w" * 5 * K, 70 * M)
h.zero(size - 5000, 3000)
h.pwrite(b"v" * 5 * K, 130 * M)
h.trim(60 * M, 100 * M)
with open(tmp + "/wanted", "r+b") as f:
    f.seek(3000)
    f.write(bytes(size - 5000))
END
    stop_nbdkit
    wait
    diff_is "$tmp/diff" "$tmp/base" "$tmp/wanted"
    rm -f "$tmp/diff"
done

# On a full disk: whoever zeroed something had the space for its tables set aside, so that
# the save finds it; and what is refused for want of that changes nothing.
[ "$(id -u)" -eq 0 ] || skip "mounting a small file system needs root"
mkdir "$tmp/full"
mount -t tmpfs -o size=1500k none "$tmp/full" 2>"$tmp/mount.err" ||
    skip "no tmpfs can be mounted: $(cat "$tmp/mount.err")"
cleanup_fn umount "$tmp/full"
for args in "" cow-save-format=extended; do
    rm -f "$tmp/full/diff"
    # shellcheck disable=SC2086
    TMPDIR=$tmp/full start_nbdkit pattern 16G cow-save="$tmp/full/diff" $args
    py <<'END'
h = connect()
LEAF = 32 * M
zeroed = [(0, 3 * LEAF), (4 * G + LEAF, LEAF), (8 * G, 6 * LEAF)]
for at, count in zeroed:
    h.zero(count, at)
try:
    for at in range(15 * G, 16 * G, M):
        h.pwrite(b"w" * 4 * K, at)
    fail("it is not full")
except nbd.Error as e:
    expect(e.errnum, errno.ENOSPC, "a full file system")
# An L2 table of its own is needed, or a page of the L1 table.
raises(errno.ENOSPC, h.trim, 4 * K, 12 * G)
zero = [(at, count) for at, count, kind in extents(h) if kind == HOLE_ZERO]
expect(zero, zeroed, "what is zero")
with open(tmp + "/zeroed", "w") as f:
    for at, count in zeroed:
        f.write("%d %d\n" % (at, count))
END
    stop_nbdkit
    # There is no room for a copy, which the extended form takes.
    log_lacks 'error: cow-save'
    [ -z "$args" ] || log_has 'warning: cow-save=.*without cow-save-format=extended'
    sound_diff "$tmp/full/diff"
    qemu-img map -f qcow2 --output=json "$tmp/full/diff" |
        jq -r '.[] | select(.zero and .depth == 0) | "\(.start) \(.length)"' |
        diff "$tmp/zeroed" - || die "something else is zero in the diff"
done
