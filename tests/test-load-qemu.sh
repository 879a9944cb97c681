#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Images that qemu made, of all kinds, are loaded: what the server shows is what qemu shows
# with the same base behind the image, and the image is not changed.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
requires qemu-io --version
size=$((6 * 1024 * 1024 + 512))
base_file "$tmp/base" $size
image=$tmp/image

# fill: random writes, zeroes and discards, in what is there.
commands=()
while read -r line; do
    commands+=(-c "$line")
done < <(py <<'END'
rand = random.Random(4)
size = 6 * M + 512
for i in range(60):
    n = min(512 * rand.randrange(1, 2 ** rand.randrange(1, 10)), size)
    at = 512 * rand.randrange((size - n) // 512 + 1)
    kind = rand.choice(("write -q -P %d" % rand.randrange(1, 256),) * 3
                       + ("write -q -z", "write -q -z -u"))
    print("%s %d %d" % (kind, at, n))
# To the very end.
print("write -q -P 99 %d 512" % (size - 512))
END
)

# loads NAME [BLOCK]: compares.
loads ()
{
    fingerprint "$image" >"$tmp/before"
    start_nbdkit file "$tmp/base" cow-load="$image" cow-block-size="${2:-4K}"
    rm -f "$tmp/shown"
    nbdcopy "$uri" "$tmp/shown"
    stop_nbdkit
    log_lacks error
    qemu-img compare -q -F raw "$(over_base "$image" "$tmp/base")" "$tmp/shown" ||
        die "$1: not what qemu shows"
    fingerprint "$image" | cmp - "$tmp/before" || die "$1: the image has changed"
    nr=$((nr + 1))
}
nr=0

# make OPTIONS: an image with those options on top of the base, with the writes.
make ()
{
    rm -f "$image"
    qemu-img create -q -f qcow2 -o "$1" -b "$tmp/base" -F raw "$image" >/dev/null 2>&1 ||
        return 1
    qemu-io -f qcow2 "${commands[@]}" "$image" >/dev/null || die "qemu-io failed: $1"
}

for options in compat=0.10 compat=1.1 compat=0.10,cluster_size=4k \
        cluster_size={512,1k,4k,32k,128k,1M,2M} \
        extended_l2=on,cluster_size={16k,64k,128k,2M} \
        lazy_refcounts=on refcount_bits=1 refcount_bits=64; do
    make "$options" || { echo "this qemu-img does not know $options"; continue; }
    loads "$options"
done
make cluster_size=4k
loads "large blocks" 2M
make extended_l2=on,cluster_size=16k
loads "large blocks, extended" 64K

# Everything is allocated, metadata only, and in full (without a base of its own).
for options in preallocation=metadata preallocation=falloc; do
    make "$options,extended_l2=on" || continue
    loads "$options"
done

# Compressed clusters, with and without those that are not.
py "$size" <<'END'
rand = random.Random(5)
with open(tmp + "/source", "wb") as f:
    for i in range(int(sys.argv[1]) // 512):
        f.write((b"compressible %10d " % (i // 40) * 30)[:512] if i % 700 < 500
                else rand.randbytes(512))
END
for type in zlib zstd; do
    for cluster in 512 4k 64k 2M; do
        [ $type,$cluster != zstd,512 ] || continue
        rm -f "$image"
        qemu-img convert -c -f raw -O qcow2 \
            -o compression_type=$type,cluster_size=$cluster "$tmp/source" "$image" \
            2>"$tmp/err" || { echo "no $type: $(cat "$tmp/err")"; continue; }
        loads "$type, $cluster"
        qemu-io -f qcow2 "${commands[@]}" "$image" >/dev/null
        loads "$type, $cluster, changed"
    done
done
rm -f "$image"
qemu-img convert -c -f raw -O qcow2 -o compat=0.10 "$tmp/source" "$image"
loads "zlib, version 2"
rm -f "$image"
if qemu-img convert -c -f raw -O qcow2 -o extended_l2=on,cluster_size=64k \
        "$tmp/source" "$image"; then
    qemu-io -f qcow2 "${commands[@]}" "$image" >/dev/null
    loads "zlib, extended"
fi

# Internal snapshots are not looked at; one line says so.
make compat=1.1
qemu-img snapshot -c one "$image"
qemu-io -f qcow2 -c 'write -q -P 77 1M 300k' "$image" >/dev/null
loads "snapshot"
log_has 'warning: .*snapshot'
[ "$(wc -l <"$log")" -eq 1 ] || die "more than one line about a snapshot"

# Not closed: the dirty bit is set, and only the refcounts may be wrong.
rm -f "$image"
qemu-img create -q -f qcow2 -o lazy_refcounts=on -b "$tmp/base" -F raw "$image"
qemu-io -f qcow2 "${commands[@]}" -c flush -c abort "$image" >/dev/null 2>&1 || :
py <<'END'
with open(tmp + "/image", "rb") as f:
    expect(f.read(80)[79] & 1, 1, "the dirty bit")
END
cp "$image" "$tmp/copy"
start_nbdkit file "$tmp/base" cow-load="$image"
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
cmp "$image" "$tmp/copy" || die "the dirty image has changed"
# Qemu repairs it when it opens it.
qemu-img check -q -r all -f qcow2 "$tmp/copy" || :
qemu-img compare -q -F raw "$(over_base "$tmp/copy" "$tmp/base")" "$tmp/shown" ||
    die "dirty: not what qemu shows"
echo "$nr images"
