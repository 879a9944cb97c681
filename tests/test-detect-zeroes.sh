#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# With cow-detect-zeroes=true, blocks of zeroes that are written take no space, neither in
# the overlay nor in the diff, and what they replace gives its space back.  Blocks that
# are zeroes in part are data.  By default, zeroes that are written are data.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
mkdir "$tmp/o"
export TMPDIR=$tmp/o
size=$((16 * 1024 * 1024))
base_file "$tmp/base" $size

# data DIFF: the bytes of the data clusters.
data ()
{
    qemu-img map --output=json -f qcow2 "$1" >"$tmp/map"
    py <<'END'
import json
with open(tmp + "/map") as f:
    print(sum(e["length"] for e in json.load(f)
              if e["data"] and e["depth"] == 0))
END
}

for detect in true false default; do
    parameter=()
    [ $detect = default ] || parameter=(cow-detect-zeroes="$detect")
    for block in 4K 64K; do
        [ $detect,$block != default,64K ] || continue
        start_nbdkit pattern $size cow-block-size=$block \
            cow-save=/dev/fd/9 ${parameter[@]+"${parameter[@]}"} 9>"$tmp/diff"
        py $detect $block <<'END'
detect, block = sys.argv[1] == "true", int(sys.argv[2][:-1]) * K
h = connect()
SIZE = 16 * M
model = bytearray(base(0, SIZE))


def write(data, at):
    h.pwrite(data, at)
    model[at:at + len(data)] = data


def check(zero, data, what):
    """Bytes of zero blocks and of data that were changed; the base is all data."""
    same(h.pread(SIZE, 0), model, what)
    found = sum(e[1] for e in extents(h) if e[2] & ZERO)
    expect(found, zero if detect else 0, "zeroes after " + what)
    limit = (data if detect else data + zero) + (data + zero) // 100 + 64 * K
    if used(tmp + "/o") > limit:
        fail("%s: %d bytes are used" % (what, used(tmp + "/o")))
    if not detect and used(tmp + "/o") < zero + data:
        fail("%s: only %d bytes are used" % (what, used(tmp + "/o")))


# Whole blocks, in one request and in several.
write(bytes(4 * M), 0)
check(4 * M, 0, "long zeroes")
for i in range(16):
    write(bytes(block), 5 * M + i * block)
check(4 * M + 16 * block, 0, "blocks of zeroes")

# In the middle of data, in one request: only the blocks are zero that are all zeroes.
write(b"a" * block + bytes(3 * block) + b"b" * block, 7 * M)
zero, data = 4 * M + 19 * block, 2 * block
check(zero, data, "zeroes between data")
write(b"c" * (block // 2) + bytes(2 * block) + b"d", 8 * M)
# The first block is data in its first half, the second one zero, the third one
# zeroes up to its half and then a byte and the base.
zero, data = zero + block, data + 2 * block
check(zero, data, "zeroes across blocks")

# A block that is zeroes but for its last byte.
write(bytes(block - 1) + b"e", 9 * M)
data += block
check(zero, data, "one byte in a block")
# A request that covers a block of the base in part makes no zero block.
write(bytes(block - 512), 10 * M + 512)
data += block
check(zero, data, "a part of a block")

# Over data: it gives its space back.
write(b"f" * 4 * M, 12 * M)
check(zero, data + 4 * M, "data")
write(bytes(4 * M), 12 * M)
zero += 4 * M
if detect:
    check(zero, data, "zeroes over data")
write(b"g", 13 * M + 5)
if detect:
    check(zero - block, data + block, "a byte in a zero block")
h.flush()
with open(tmp + "/shown", "wb") as f:
    f.write(model)
with open(tmp + "/data", "w") as f:
    f.write(str(data + block if detect else zero + data))
END
        stop_nbdkit
        diff_is "$tmp/diff" "$tmp/base" "$tmp/shown"
        [ "$(data "$tmp/diff")" -eq "$(cat "$tmp/data")" ] ||
            die "$detect, $block: $(data "$tmp/diff") bytes of data, not $(cat "$tmp/data")"
        [ $detect != true ] || [ "$(stat -c %s "$tmp/diff")" -lt 2000000 ] ||
            die "the diff has $(stat -c %s "$tmp/diff") bytes"
    done
done
