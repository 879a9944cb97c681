#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Programs that know qcow2 by other code than qemu's find the same content in a diff that
# names no backing file: libqcow (through its Python module and, where there is FUSE, its
# qcowmount), 7-Zip, and nbdkit's qcow2dec filter where nbdkit has it.  Of several block
# sizes, as it is saved in place and as a copy.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires qemu-img --version
requires nbdcopy --version
requires_plugin memory

# Each reader: has_NAME, whether it can be used; read_NAME, which prints the content of
# the image that it is given.

has_qemu () { :; }
read_qemu ()
{
    qemu-img convert -f qcow2 -O raw "$1" "$tmp/converted"
    cat "$tmp/converted"
}

# The module is there for the system's Python only.
has_libqcow () { /usr/bin/python3 -c 'import pyqcow'; }
read_libqcow ()
{
    timeout "$guard" /usr/bin/python3 - "$1" <<'END'
import sys
import pyqcow

image = pyqcow.file()
image.open(sys.argv[1])
left = image.get_media_size()
while left > 0:
    data = image.read_buffer(min(left, 1 << 20))
    if not data:
        sys.exit("libqcow: %d bytes are missing" % left)
    sys.stdout.buffer.write(data)
    left -= len(data)
END
}

# A container may have FUSE, and no right to mount.
has_qcowmount ()
{
    mountpoint -q /proc && qemu-img create -q -f qcow2 "$tmp/tried" 1M &&
        read_qcowmount "$tmp/tried"
}
read_qcowmount ()
{
    mkdir -p "$tmp/mounted"
    timeout "$guard" qcowmount "$1" "$tmp/mounted" >"$tmp/qcowmount.out" &&
        cat "$tmp/mounted/qcow1" && unmount
}
unmount ()
{
    ! mountpoint -q "$tmp/mounted" || fusermount -q -u "$tmp/mounted" ||
        umount -l "$tmp/mounted"
}
cleanup_fn unmount

# Its name differs from package to package.
has_7zip () { zip7=$(command -v 7zz || command -v 7z || command -v 7za); }
read_7zip () { timeout "$guard" "$zip7" x -tqcow -so "$1"; }

has_qcow2dec () { "$NBDKIT" --filter=qcow2dec null --version; }
read_qcow2dec ()
{
    start_server --filter=qcow2dec file "$1" >&2
    nbdcopy "$uri" -
    stop_nbdkit
}

readers=()
for reader in qemu libqcow qcowmount 7zip qcow2dec; do
    if "has_$reader" </dev/null >/dev/null 2>&1; then
        readers+=("$reader")
    else
        echo "$reader is not here"
    fi
done
[ ${#readers[@]} -gt 1 ] || skip "this needs libqcow or 7-Zip"

# libqcow (20201213) does not know that version 3 has zero clusters, whoever made them:
# it shows the start of the file in their place.
knows_zeroes () { case $1 in libqcow | qcowmount) return 1 ;; esac; }

# write_data, write_zeroes: in every relation to the blocks.
write_data ()
{
    py <<'END'
rand = random.Random(17)
h = connect()
size = h.get_size()
h.pwrite(rand.randbytes(3 * M), 2 * M)
for at, n in (0, 512), (70000, 1), (M - 5000, 10000), (size - 700, 700):
    h.pwrite(rand.randbytes(n), at)
for i in range(40):
    n = rand.randrange(1, 20000)
    h.pwrite(rand.randbytes(n), rand.randrange(7 * M, 11 * M - n))
h.shutdown()
END
}

write_zeroes ()
{
    py <<'END'
rand = random.Random(18)
h = connect()
# Where there is data and where nothing is.
h.zero(M + 1234, 2 * M + 100)
h.trim(M, 4 * M)
h.zero(2 * M, 5 * M + 4096)
h.trim(300000, 8 * M)
# Data again in what was zeroed, and zeroes that are written as data.
h.pwrite(rand.randbytes(5000), 2 * M + 300000)
h.pwrite(bytes(200000), 9 * M)
h.shutdown()
END
}

# check SIZE ARGS...: all readers see in the diff what the server shows.
check ()
{
    local size=$1 reader
    shift
    rm -f "$tmp"/*.qcow2
    start_nbdkit memory "$size" "$@" cow-save="$tmp/data.qcow2" cow-save-backing=none
    write_data
    nbdcopy "$uri" - | sha256sum >"$tmp/data.sum"
    stop_nbdkit
    start_nbdkit memory "$size" "$@" cow-load="$tmp/data.qcow2" \
        cow-save="$tmp/zeroes.qcow2" cow-save-backing=none
    write_zeroes
    nbdcopy "$uri" - | sha256sum >"$tmp/zeroes.sum"
    stop_nbdkit

    sound_diff "$tmp/data.qcow2"
    sound_diff "$tmp/zeroes.qcow2"
    for reader in "${readers[@]}"; do
        compare "$reader" data "$size" "$@"
        ! knows_zeroes "$reader" || compare "$reader" zeroes "$size" "$@"
    done
}

compare ()
{
    echo "reading: $*"
    "read_$1" "$tmp/$2.qcow2" >"$tmp/read"
    sha256sum <"$tmp/read" | cmp - "$tmp/$2.sum" ||
        die "this reads as something else: $*"
}

for block in 4K 64K 1M; do
    # One that ends with a whole block, and one that does not.
    check 16M cow-block-size=$block
    check $((13 * 1048576 + 4 * 512)) cow-block-size=$block cow-save-compact=true
done
