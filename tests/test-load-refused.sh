#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What cannot be loaded is refused: at the start, with one line that says what is wrong
# with which file (and where in it), or, if the size does not fit, when the export is
# opened.  The file is not changed.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
requires qemu-io --version
base_file "$tmp/base" 4194304
image=$tmp/image

# refused WORD [ARGS...]: $image is.
refused ()
{
    local word=$1
    shift
    [ ! -f "$image" ] || fingerprint "$image" >"$tmp/before"
    nbdkit_refuses "$word" --filter="$FILTER" file "$tmp/base" cow-load="$image" "$@"
    [ "$(wc -l <"$tmp/refused")" -eq 1 ] ||
        { cat "$tmp/refused" >&2; die "more than one line: $word"; }
    grep -qF "error: cow-load=$image" "$tmp/refused" ||
        { cat "$tmp/refused" >&2; die "the file is not named: $word"; }
    [ ! -f "$image" ] || fingerprint "$image" | cmp - "$tmp/before" ||
        die "the image has changed"
}

# Files that are no images.
refused "no such file"
refused "no such file" cow-save="$tmp/another"
mkdir "$tmp/d"
image=$tmp/none/x
refused "cow-load="
image=$tmp/image
: >"$image"
refused offset
echo "no image at all" >"$image"
refused offset
cp "$tmp/base" "$image"
refused offset
rm "$image"
py <<'END'
socket.socket(socket.AF_UNIX).bind(tmp + "/image")
END
refused "is a socket; name a qcow2 image"
rm "$image"
image=/dev/null
refused "is a character device; name a qcow2 image"
image=$tmp/image
image=
refused ""
image=$tmp/image
# A loaded file may be missing where it is saved, and only there.
ln -s nowhere "$image"
refused "no such file"
rm "$image"
if [ "$(id -u)" -ne 0 ]; then
    qemu-img create -q -f qcow2 "$image" 4M
    chmod 0 "$image"
    nbdkit_refuses "Permission denied" --filter="$FILTER" file "$tmp/base" \
        cow-load="$image"
    rm -f "$image"
fi
# One of several.
qemu-img create -q -f qcow2 "$tmp/good" 4M
refused "no such file" cow-load="$tmp/good"

# Images, with something of it spoilt.  (tests/test-load has more, made by hand.)
make ()
{
    rm -f "$image"
    qemu-img create -q -f qcow2 "$image" 4M
    qemu-io -f qcow2 -c 'write -q -P 1 0 1M' "$image" >/dev/null
}
poke ()
{
    printf '%b' "$2" | dd of="$image" bs=1 seek="$1" conv=notrunc status=none
}
make
truncate -s 300000 "$image"
refused offset
make
truncate -s 60 "$image"
refused offset
make
poke 79 '\002'
refused corrupt
make
poke 79 '\200'
refused offset
make
poke 7 '\004'
refused version
make
# The L1 table is beyond the end of the file.
poke 40 '\000\000\100\000'
refused offset
make
# L2 entries 0 and 1 name one cluster.
l1=$(od -An -j 40 -N 8 -t u8 --endian=big "$image" | tr -d ' ')
l2=$(($(od -An -j "$l1" -N 8 -t u8 --endian=big "$image" | tr -d ' ') & 0x00ffffffffffffff))
dd if="$image" of="$image" bs=8 count=1 skip=$((l2 / 8)) seek=$((l2 / 8 + 1)) \
    conv=notrunc status=none
refused offset

# Features that need more than the file.  (The header says that it is encrypted with
# LUKS.  To make a real one, qemu-img has to time how long a key takes, which does not
# work on each virtual machine.)
make
poke 35 '\002'
refused encrypt
rm -f "$image"
qemu-img create -q -f qcow2 -o data_file="$tmp/data",data_file_raw=on "$image" 4M
refused "its data is in another file"

# In a directory, the line names the file in it.
rm -f "$image"
mkdir "$image"
echo broken >"$image/a.qcow2"
echo "not looked at" >"$image/b.img"
echo "nor this" >"$image/.qcow2"
refused "$image/a.qcow2"
rm "$image/a.qcow2"
mkfifo "$image/a.qcow2"
refused "is a FIFO; name a qcow2 image"
rm "$image/a.qcow2"
mkdir "$image/a.qcow2"
refused "is a directory; name a qcow2 image"
rm -r "$image"

# Sizes that do not fit: the server starts, the export is refused.
for size in 0 512 4193792 4194816 8388608; do
    rm -f "$image"
    qemu-img create -q -f qcow2 "$image" $size
    start_nbdkit file "$tmp/base" cow-load="$image"
    echo 'expect(refused(), True, "refused")' | py
    stop_nbdkit
    log_has "error: cow-load=$image: .* $size .*4194304"
done
# Only the rounding up to 512 is allowed.
truncate -s 4194000 "$tmp/odd"
for size in 4194304 4193792 4194816; do
    rm -f "$image"
    qemu-img create -q -f qcow2 "$image" $size
    start_nbdkit file "$tmp/odd" cow-load="$image"
    if [ $size -eq 4194304 ]; then
        nbdinfo --size "$uri" >/dev/null
    else
        echo 'expect(refused(), True, "refused")' | py
    fi
    stop_nbdkit
done
