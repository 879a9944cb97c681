#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Several images, files and directories: later ones lie on top.  And a base that wants
# aligned requests, under an image of other clusters.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter blocksize-policy
requires qemu-img --version
size=$((4 * 1024 * 1024 + 4096))
base_file "$tmp/base" $size
mkdir "$tmp/dir"

# layer NAME SIZE-OF-CLUSTER COMMAND...
layer ()
{
    qemu-img create -q -f qcow2 -o cluster_size="$2" "$tmp/$1" $size
    local c commands=()
    for c in "${@:3}"; do
        commands+=(-c "$c")
    done
    qemu-io -f qcow2 "${commands[@]}" "$tmp/$1" >/dev/null
}
# The clusters are as large as what is written, so the images leave out the rest.
layer one 64k 'write -q -P 1 0 2M'
layer two 4k 'write -q -P 2 64k 128k' 'write -q -z 1M 64k' 'write -q -P 2 3M 4k'
layer dir/default.qcow2 512 'write -q -P 3 100k 512' 'write -q -P 3 1040k 1k' \
    'write -q -z 3M 512'

shows ()
{
    local want=$1
    shift
    local picky="blocksize-minimum=4096 blocksize-error-policy=error"
    for filter in "" --filter=blocksize-policy; do
        for block in 4K 64K; do
            # shellcheck disable=SC2086
            start_nbdkit $filter file "$tmp/base" cow-block-size=$block "$@" \
                ${filter:+$picky}
            py "$want" "$size" <<'END'
want, size = sys.argv[1], int(sys.argv[2])
model = bytearray(base(0, size))


def put(start, count, value):
    model[start:start + count] = bytes([value]) * count


for layer in want:
    if layer == "1":
        put(0, 2 * M, 1)
    elif layer == "2":
        put(64 * K, 128 * K, 2)
        put(M, 64 * K, 0)
        put(3 * M, 4 * K, 2)
    elif layer == "3":
        put(100 * K, 512, 3)
        put(1040 * K, K, 3)
        put(3 * M, 512, 0)
same(connect().pread(size, 0), model, "layers " + want)
END
            stop_nbdkit
        done
    done
}

shows 1 cow-load="$tmp/one"
shows 3 cow-load="$tmp/dir"
shows 12 cow-load="$tmp/one" cow-load="$tmp/two"
shows 21 cow-load="$tmp/two" cow-load="$tmp/one"
shows 123 cow-load="$tmp/one" cow-load="$tmp/two" cow-load="$tmp/dir"
shows 312 cow-load="$tmp/dir/" cow-load="$tmp/one" cow-load="$tmp/two"
shows 11 cow-load="$tmp/one" cow-load="$tmp/one"

# All layers are in the diff.
start_nbdkit file "$tmp/base" cow-load="$tmp/one" cow-load="$tmp/two" cow-load="$tmp/dir" \
    cow-save="$tmp/diff"
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
diff_is "$tmp/diff" "$tmp/base" "$tmp/shown"
shows 123 cow-load="$tmp/diff"

# What is saved there is replaced, the others are not.
cp "$tmp/two" "$tmp/two.before"
cp "$tmp/one" "$tmp/one.before"
start_nbdkit file "$tmp/base" cow-load="$tmp/one" cow-load="$tmp/two" cow-save="$tmp/two"
stop_nbdkit
cmp "$tmp/one" "$tmp/one.before" || die "a lower layer has changed"
cp "$tmp/two.before" "$tmp/two2"
shows 12 cow-load="$tmp/two"
