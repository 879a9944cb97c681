#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# nbdcopy, with several connections and holes, onto the disk and back.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires nbdcopy --version
requires_plugin pattern

size=$((20 * 1048576 + 512))
py $size <<'END'
rand = random.Random(7)
with open(tmp + "/in", "wb") as f:
    f.truncate(int(sys.argv[1]))
    for i in range(40):
        f.seek(rand.randrange(int(sys.argv[1]) - 100000))
        f.write(rand.randbytes(rand.randrange(1, 100000)))
END

for args in cow-block-size=4K cow-block-size=64K cow-on-read=true; do
    start_nbdkit pattern $size $args
    # The base.
    nbdcopy "$uri" "$tmp/out"
    base_file "$tmp/base" $size
    cmp "$tmp/out" "$tmp/base" || die "the base was read wrongly"
    # Four connections, all of the disk.
    nbdcopy --connections=4 --requests=16 "$tmp/in" "$uri"
    rm "$tmp/out"
    nbdcopy --connections=4 "$uri" "$tmp/out"
    cmp "$tmp/in" "$tmp/out" || die "another file came back"
    # Without extents.
    rm "$tmp/out"
    nbdcopy --no-extents --synchronous "$uri" "$tmp/out"
    cmp "$tmp/in" "$tmp/out" || die "another file came back, without extents"
    stop_nbdkit
done

# From one disk of the filter to another.
start_nbdkit pattern $size
nbdcopy "$tmp/in" "$uri"
first=$server from=$uri
start_nbdkit null $size
nbdcopy "$from" "$uri"
rm "$tmp/out"
nbdcopy "$uri" "$tmp/out"
cmp "$tmp/in" "$tmp/out" || die "another file came out of the second disk"
stop_nbdkit
stop_nbdkit "$first"
