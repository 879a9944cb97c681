#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A diff is loaded over the base that it was made over, and refused over another one of
# the same size: the size and a checksum of the first 64 KiB tell.  Diffs that were saved
# to a file, to a stream, and read from a view all say so; those of qemu, and of filters
# that did not say so yet, are loaded as ever.  cow-base-check=false loads all of them.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter truncate
requires qemu-img --version
requires qemu-io --version
base_file "$tmp/base" 1000000
# One byte makes another disk, the last one that is looked at too.
cp "$tmp/base" "$tmp/other"
printf x | dd of="$tmp/other" bs=1 seek=65535 conv=notrunc status=none
cp "$tmp/base" "$tmp/longer"
truncate -s 1000400 "$tmp/longer" # the same in blocks of 512 bytes

# write_something: a client does.
write_something ()
{
    py <<'END'
connect().pwrite(b"written" * 1000, 100000)
END
}

# loads BASE ARGS...: an export with this base is served, and its bytes are right.
loads ()
{
    start_nbdkit file "$tmp/$1" "${@:2}"
    py "$1" <<'END'
with open(tmp + "/" + sys.argv[1], "rb") as f:
    want = bytearray(f.read())
want[100000:107000] = b"written" * 1000
same(connect().pread(len(want), 0), want, "the disk")
END
    log_lacks error
    stop_nbdkit
}

# refuses WHAT ARGS...: the export is not served, and the one line says how to insist.
refuses ()
{
    start_nbdkit "${@:2}"
    py <<'END'
expect(refused(""), True, "refused")
END
    [ "$(grep -c error: "$log")" -eq 1 ] || die "not one error"
    log_has "error: cow-load=$tmp/.*: it was made over .*$1.*cow-base-check=false"
    stop_nbdkit
}
first="the first 65536 bytes"

# Made in each way.
start_nbdkit file "$tmp/base" cow-save="$tmp/file" cow-views=true
write_something
nbdcopy "$(view @diff.qcow2)" "$tmp/view-while-saving"
stop_nbdkit
start_nbdkit file "$tmp/base" cow-load="$tmp/file" cow-save="$tmp/compact" \
    cow-save-compact=true
stop_nbdkit
start_nbdkit file "$tmp/base" cow-load="$tmp/file" cow-save=/dev/fd/7 7>"$tmp/stream"
stop_nbdkit
mkdir "$tmp/dir"
start_nbdkit file "$tmp/base" cow-save="$tmp/dir/"
write_something
stop_nbdkit
start_nbdkit file "$tmp/base" cow-views=true
write_something
nbdcopy "$(view @diff.qcow2)" "$tmp/view"
stop_nbdkit

for diff in file compact stream view view-while-saving dir/default.qcow2; do
    sound_diff "$tmp/$diff"
    loads base cow-load="$tmp/$diff"
    refuses "$first" file "$tmp/other" cow-load="$tmp/$diff"
done
refuses "1000000 .*1000400" file "$tmp/longer" cow-load="$tmp/file"
loads other cow-load="$tmp/file" cow-base-check=false
loads longer cow-load="$tmp/file" cow-base-check=false
loads base cow-load="$tmp/dir/"
refuses "$first" file "$tmp/other" cow-load="$tmp/dir/"

# An empty diff says it too, whether its client has left or never came.
for clients in 1 0; do
    start_nbdkit file "$tmp/base" cow-save="$tmp/empty"
    [ $clients -eq 0 ] || nbdinfo --size "$uri" >"$tmp/size"
    stop_nbdkit
    refuses "$first" file "$tmp/other" cow-load="$tmp/empty"
    rm "$tmp/empty"
done

# After insisting, the diff belongs to the base that was served then.
start_nbdkit file "$tmp/other" cow-load="$tmp/file" cow-save="$tmp/moved" \
    cow-base-check=false
nbdinfo --size "$uri" >"$tmp/size"
stop_nbdkit
loads other cow-load="$tmp/moved"
refuses "$first" file "$tmp/base" cow-load="$tmp/moved"

# Behind 64 KiB nobody looks.
cp "$tmp/base" "$tmp/later"
printf x | dd of="$tmp/later" bs=1 seek=65536 conv=notrunc status=none
loads later cow-load="$tmp/file"

# Images of qemu, and of filters that said no more than "cow 1".
py <<'END'
with open(tmp + "/fill", "wb") as f:
    f.write(b"written" * 1000)
with open(tmp + "/file", "rb") as f:
    image = bytearray(f.read())
at = image.index(b"ncow")
expect(bytes(image[at + 4:at + 8]), b"\0\0\0\x1c", "the length of the extension")
image[at + 4:at + 8] = b"\0\0\0\x08"
image[at + 16:at + 36] = bytes(20)
with open(tmp + "/old", "wb") as f:
    f.write(image)
END
qemu-img create -q -f qcow2 -o cluster_size=512 "$tmp/qemu" 1000448
qemu-io -f qcow2 -c "write -q -s $tmp/fill 100000 7000" "$tmp/qemu" >/dev/null
start_nbdkit file "$tmp/other" cow-load="$tmp/qemu"
nbdinfo --size "$uri" >"$tmp/size" || die "an image of qemu is refused"
stop_nbdkit
loads other cow-load="$tmp/old"

# qemu keeps it.  A disk that was made larger, and its base too, still go together.
cp "$tmp/file" "$tmp/grown"
qemu-img resize -q "$tmp/grown" 2M
start_nbdkit --filter=truncate file "$tmp/base" truncate=2M cow-load="$tmp/grown"
nbdinfo --size "$uri" >"$tmp/size" || die "a larger disk is refused"
stop_nbdkit
refuses "$first" --filter=truncate file "$tmp/other" truncate=2M cow-load="$tmp/grown"

# A base smaller than 64 KiB, and one of no bytes.
base_file "$tmp/base" 1536
tr '\1' '\2' <"$tmp/base" >"$tmp/other"
start_nbdkit file "$tmp/base" cow-save="$tmp/small"
nbdinfo --size "$uri" >"$tmp/size"
stop_nbdkit
refuses "the first 1536 bytes" file "$tmp/other" cow-load="$tmp/small"
: >"$tmp/base"
for what in cow-save cow-load; do
    start_nbdkit file "$tmp/base" $what="$tmp/none"
    nbdinfo --size "$uri" >"$tmp/size"
    log_lacks error
    stop_nbdkit
done
