#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A thousand disks from one image, each with its own overlay: one block is written to each,
# and the diff view of each has that block and no other.  It costs each of them no more than
# that.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
limit=$(ulimit -Hn)
[ "$limit" = unlimited ] || [ "$limit" -ge 1200 ] || skip "this needs 1200 open files"

mkdir "$tmp/o"
# (Threads for each of so many connections would be most of the work.)
TMPDIR=$tmp/o start_nbdkit --threads=2 pattern 10G cow-views=true
py <<'END'
NR = 1000
o = tmp + "/o"


def block(i):
    return b"%8d" % i * 512


def at(i):
    return i * (8 * M + 4 * K)


for i in range(NR):
    h = connect("disk%d" % i)
    h.pwrite(block(i), at(i))
    h.shutdown()

images = []
for i in range(0, NR, 20):
    views = [connect("disk%d@diff.qcow2" % j) for j in range(i, i + 20)]
    images += [bytes(v.pread(v.get_size(), 0)) for v in views]
    for v in views:
        v.shutdown()
sample = images[0]
if sample.count(block(0)) != 1:
    fail("the first diff has not what was written")
for i, image in enumerate(images):
    expect(len(image), len(sample), "size of the diff of disk%d" % i)
    expect(image.count(block(i)), 1, "what was written to disk%d in its diff" % i)
    # Header, refcounts, L1 table, L2 table, data, and what fills the file up.
    data = image.find(block(i)) // (4 * K)
    clusters = [image[c:c + 4 * K] for c in range(0, len(image), 4 * K)]
    expect([c for c in clusters[data + 1:] if c != bytes(4 * K)], [], "more clusters")

for i in 0, 1, 500, NR - 1:
    with open(tmp + "/diff%d" % i, "wb") as f:
        f.write(images[i])
    s = connect("disk%d@snapshot" % i)
    same(s.pread(12 * K, at(i)), block(i) + base(at(i) + 4 * K, 8 * K), "disk%d" % i)

# Each file has the block, and may have one of its own.
expect(len(overlays(o)), NR, "overlays")
if used(o) > NR * 8 * K:
    fail("the overlays take %d bytes" % used(o))
with open("/proc/%s/status" % os.environ["pid"]) as f:
    resident = int(re.search(r"VmRSS:\s*(\d+) kB", f.read()).group(1))
print("%d KiB for %d disks" % (resident, NR))
with open("/proc/%s/maps" % os.environ["pid"]) as f:
    sanitized = re.search("/lib[at]san", f.read())
if resident > 256 * K and not sanitized:
    fail("the server takes %d KiB" % resident)
END
for i in 0 1 500 999; do
    sound_diff "$tmp/diff$i"
    qemu-img map --output=json -f qcow2 "$tmp/diff$i" >"$tmp/map"
    [ "$(grep -c '"depth": 0.*"data": true' "$tmp/map")" -eq 1 ] ||
        die "diff$i has not one block"
done
stop_nbdkit
log_lacks error
