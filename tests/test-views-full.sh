#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# NAME@full.qcow2 is an image of the whole disk, with no backing file.  Holes of the base
# are not in it, by the base's extents; over a base that has none, all of it is.  What is
# zero in the overlay takes no data and is a zero cluster, whatever the base has there.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter noextents blocksize-policy
requires qemu-img --version
requires nbdcopy --version

# Data, a long hole, data, and an end that is no multiple of anything.
base_file "$tmp/base" 1048576
truncate -s 40M "$tmp/base"
base_file "$tmp/end" 500700
cat "$tmp/end" >>"$tmp/base"
size=$(stat -c %s "$tmp/base")

# full_is LEAST MOST: the full view is sound, has no backing file, is as the disk, and has
# from LEAST to MOST bytes of data.
full_is ()
{
    local bytes
    nbdcopy --connections=4 "$(view @full.qcow2)" "$tmp/full"
    sound_diff "$tmp/full"
    qemu-img info -f qcow2 "$tmp/full" >"$tmp/info"
    ! grep '^backing file' "$tmp/info" || die "a full image has a backing file"
    nbdcopy "$(view @snapshot)" "$tmp/shown"
    qemu-img compare -q -f qcow2 -F raw "$tmp/full" "$tmp/shown" ||
        die "the full image is not what the disk is"
    qemu-img compare -q -f qcow2 -F raw "$(view @full.qcow2)" "$tmp/shown" ||
        die "the full view is not what the disk is"
    bytes=$(stat -c %s "$tmp/full")
    [ "$bytes" -ge "$1" ] && [ "$bytes" -le "$2" ] ||
        die "the image has $bytes bytes, not $1 to $2"
}

# Over data and over holes; zeroes over both; the end.
write_some ()
{
    py <<'END'
h = connect()
size = h.get_size()
h.pwrite(b"w" * 100000, 300001)
h.pwrite(b"w" * 100000, 20 * M + 1)
h.zero(200000, 700001)
h.zero(M, 30 * M)
h.trim(100000, size - 300000)
h.pwrite(b"end", size - 3)
# The base is not read twice for what is there anyway, and the view has one moment.
before = connect("@full.qcow2")
h.pwrite(b"x" * M, 10 * M)
other = connect("@full.qcow2")
n = before.get_size()
image = before.pread(n, 0)
rand = random.Random(7)
expect(other.get_size(), n, "size while the disk changes")
for i in range(50):
    count = rand.randrange(1, 100 * K)
    at = rand.randrange(n - count)
    same((before, other)[i % 2].pread(count, at), image[at:at + count], "the view")
# Less than a block at a time, also behind the end of the disk in the last one.
for at in range(max(0, n - 150000), n, 509):
    count = min(509, n - at)
    same(other.pread(count, at), image[at:at + count], "509 bytes of the view")
h.zero(M, 10 * M)
leave(h, before, other)
END
}

# In 64 clusters of 64K and fewer, or 512 of 4K, are tables as well.
data=$((1048576 + 500700))
for args in cow-block-size=4K cow-block-size=64K cow-save-format=extended \
    cow-save-backing=ignored; do
    echo "$args"
    start_nbdkit file "$tmp/base" cow-views=true "$args"
    full_is $data $((data + 1200000))
    write_some
    full_is $((data - 300000)) $((data + 1500000))
    qemu-img map --output=json "$tmp/full" | grep -q '"present": true, "zero": true' ||
        die "zeroes would show what is below, if the image were rebased"
    stop_nbdkit
    log_lacks error
done

# No extents: everything is data, but what was zeroed.
echo no extents
start_nbdkit --filter=noextents file "$tmp/base" cow-views=true
full_is "$size" $((size + 1000000))
write_some
full_is $((size - 2500000)) $((size + 1000000))
stop_nbdkit
log_lacks error

# A base that takes blocks of a certain size only, of which it is a multiple, but not of
# those of the filter.
cp --sparse=always "$tmp/base" "$tmp/blocks"
for args in "4096 cow-block-size=4K" "4096 cow-block-size=64K" "65536 cow-block-size=4K"; do
    minimum=${args% *}
    echo "blocks of the base: $args"
    truncate -s $((size / minimum * minimum)) "$tmp/blocks"
    start_nbdkit --filter=blocksize-policy file "$tmp/blocks" cow-views=true "${args#* }" \
        blocksize-minimum="$minimum" blocksize-preferred="$minimum" \
        blocksize-maximum=128K blocksize-error-policy=error
    full_is $((data - minimum)) $((data + 1200000))
    write_some
    full_is $((data - 400000)) $((data + 1500000))
    stop_nbdkit
    log_lacks error
done

# Nothing at all, a disk of nothing but holes, and one that was all zeroed.
truncate -s 0 "$tmp/nothing"
truncate -s 1G "$tmp/holes"
for f in nothing holes; do
    start_nbdkit file "$tmp/$f" cow-views=true
    full_is 196608 400000
    stop_nbdkit
done
start_nbdkit file "$tmp/base" cow-views=true
py <<'END'
h = connect()
h.zero(h.get_size(), 0)
leave(h)
END
full_is 196608 196608
stop_nbdkit
log_lacks error
