#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# fuzz-corpus.sh DIR: makes small images of many kinds in DIR with qemu-img, for
# the fuzzer to begin with.
set -e -u -o pipefail

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 1; }
ulimit -c 0 # one command below aborts
mkdir -p "$1"
cd "$1"
rm -f ./*.qcow2

# image NAME SIZE OPTIONS [QEMU-IO COMMAND...]
image ()
{
    local name=$1 size=$2 options=$3 commands=() command
    shift 3
    qemu-img create -q -f qcow2 -o "$options" "$name.qcow2" "$size"
    for command; do commands+=(-c "$command"); done
    [ $# -eq 0 ] ||
        qemu-io -f qcow2 "${commands[@]}" "$name.qcow2" >/dev/null
}

# Data, zeroes with and without a cluster behind them, something trimmed, and
# the end of the disk.
mixed=("write -P 1 0 6k" "write -P 2 20k 1k" "write -z 8k 4k" "write -z -u 1k 1k"
    "discard 4k 2k" "write -P 3 40k 512")

for bits in 512 1k 2k 4k; do
    image "v2-$bits" 41472 "compat=0.10,cluster_size=$bits" \
          "write -P 1 0 6k" "write -P 2 20k 1k" "write -P 3 40k 512"
    image "v3-$bits" 41472 "cluster_size=$bits" "${mixed[@]}"
    image "refcounts-$bits" 41472 "cluster_size=$bits,refcount_bits=1" \
          "${mixed[@]}"
done
for type in zlib zstd; do
    for bits in 512 4k; do
        image "$type-$bits" 192k "cluster_size=$bits,compression_type=$type" \
              "write -c -P 5 0 64k" "write -c -P 6 128k 64k" "write -P 7 64k 512"
    done
    image "$type-extended" 192k \
          "cluster_size=16k,extended_l2=on,compression_type=$type" \
          "write -c -P 5 0 64k" "write -P 7 65k 512" "write -P 7 96k 512" \
          "write -z 97k 1k"
done
image extended 96k cluster_size=16k,extended_l2=on \
      "write -P 1 512 512" "write -z 1k 3k" "write -P 2 20k 2k" \
      "write -P 3 32k 16k" "discard 33k 1k" "write -z 48k 16k"
image empty-16k 1M cluster_size=16k
image size-0 0 cluster_size=512
image odd-size 3584 cluster_size=4k "write -P 1 3k 512"
image huge 1P cluster_size=2M
image prealloc 32k cluster_size=512,preallocation=metadata
image dirty 32k cluster_size=512,lazy_refcounts=on \
      "write -P 1 0 4k" "abort" 2>/dev/null || :
image snapshots 32k cluster_size=512 "write -P 1 0 4k"
qemu-img snapshot -c first snapshots.qcow2
qemu-io -f qcow2 -c "write -P 2 2k 4k" snapshots.qcow2 >/dev/null
image backing 32k cluster_size=512 "write -P 1 0 4k" "write -z 8k 1k"
qemu-img rebase -q -u -b 'json:{"driver":"raw","file":{"driver":"null-co","size":32768,"read-zeroes":true}}' -F raw backing.qcow2
# One of this filter, that says of its base all that there is to say.
image ours 32k cluster_size=4k "write -P 1 0 4k"
printf 'ncow\0\0\0\040cow 1\0\0\0\0\0\0\0\0\0\200\0\0\0\0\001\022\064\126\170\0\0\0\004base\0\0\0\0\0\0\0\0' |
    dd of=ours.qcow2 bs=1 seek=112 conv=notrunc status=none
image bitmaps 32k cluster_size=512
qemu-img bitmap --add bitmaps.qcow2 one
# Long ones are of no use: each byte of them costs time.
find . -name '*.qcow2' -size +160k -delete
