#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Nothing that an image names is ever opened: backing files that are there, that are not,
# and those that would block or do something when they are opened, and data files (seen
# with strace).  Whether a backing file is there, and which file it is, is all that is
# looked at.  The image itself is only opened to be read.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires strace -V
requires_plugin file
requires_plugin pattern
requires qemu-img --version
image=$tmp/image
mkfifo "$tmp/named-fifo"
base_file "$tmp/base" 1048576
base_file "$tmp/named-file" 1048576
qemu-img create -q -f qcow2 "$tmp/named-image" 1M
under=(strace -f -qq -o "$tmp/strace" -e "trace=file,desc")

for backing in "$tmp/named-file" "$tmp/named-image" "$tmp/named-missing" \
        "$tmp/named-fifo" "nbd+unix:///?socket=$tmp/named-socket" \
        "json:{\"driver\":\"file\",\"filename\":\"$tmp/named-file\"}"; do
    rm -f "$image"
    qemu-img create -q -f qcow2 -u -b "$backing" -F raw "$image" 1M
    qemu-io -f qcow2 -c 'write -q -P 5 64k 64k' \
        "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"$image\"},\"backing\":null}" \
        >/dev/null
    : >"$tmp/strace"
    start_nbdkit file "$tmp/base" cow-load="$image" cow-save="$tmp/diff"
    py <<'END'
want = bytearray(base(0, M))
want[64 * K:128 * K] = b"\5" * 64 * K
same(connect().pread(M, 0), want, "the disk")
END
    stop_nbdkit
    ! grep named- "$tmp/strace" | grep -vE '^[0-9]+ +(lstat|stat|newfstatat|readlink)\(' ||
        die "did more than look at the backing file $backing"
    grep -q "open.*\"$image\"" "$tmp/strace" || die "the tracer has seen nothing"
    ! grep "open.*\"$image\".*O_\(RDWR\|WRONLY\)" "$tmp/strace" ||
        die "the image was opened to be written"
    # Nor does the diff name it.
    ! qemu-img info "$tmp/diff" | grep named- || die "the name went into the diff"
done

rm -f "$image"
qemu-img create -q -f qcow2 -o data_file="$tmp/named-data" "$image" 1M
: >"$tmp/strace"
nbdkit_refuses "its data is in another file" --filter="$FILTER" pattern 1M cow-load="$image"
! grep named- "$tmp/strace" || die "looked at the data file"
