#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The random requests of test-model.c, with snapshots held and released meanwhile, and the
# overlay on a file system that fills up and empties: on each kind that treats the holes
# of a file in its own way.
#
# From the environment: MODEL_SEED and MODEL_FACTOR, as in test-model.sh.

. "${srcdir:-$(dirname "$0")}/functions.sh"
model=$abs_top_builddir/tests/model
[ -x "$model" ] || skip "tests/model was not built: it needs the headers of libnbd"
requires_plugin file
PATH=$PATH:/usr/sbin:/sbin
requires test "$(id -u)" -eq 0
requires mkfs.xfs -V
requires mkfs.btrfs --version
requires mkfs.ext4 -V

: "${MODEL_SEED:=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}"
: "${MODEL_FACTOR:=1}"
echo "MODEL_SEED=$MODEL_SEED"
requests=$(awk "BEGIN { n = int(2400 * $MODEL_FACTOR); print n < 120 ? 120 : n }")

size=$((33 * 1024 * 1024 + 777))
truncate -s $size "$tmp/base"
py "$tmp/base" "$MODEL_SEED" <<'END'
rand = random.Random(int(sys.argv[2]))
with open(sys.argv[1], "rb+") as f:
    for _ in range(40):
        f.seek(rand.randrange(os.stat(sys.argv[1]).st_size - M))
        f.write(rand.randbytes(rand.randrange(M)))
END

mkdir "$tmp/fs"
unmount ()
{
    ! mountpoint -q "$tmp/fs" || umount "$tmp/fs"
}
cleanup_fn unmount

# file_system KIND: mounts one of this kind, with less room than the overlay and its
# snapshots want.
file_system ()
{
    local options=loop avail
    if [ "$1" = tmpfs ]; then
        mount -t tmpfs -o size=16m tmpfs "$tmp/fs"
        return
    fi
    truncate -s 400M "$tmp/image"
    case $1 in
        ext4-discard) mkfs.ext4 -q -m 0 "$tmp/image"; options=loop,discard ;;
        ext4) mkfs.ext4 -q -m 0 "$tmp/image" ;;
        *) "mkfs.$1" -q "$tmp/image" >/dev/null ;;
    esac
    mount -o "$options" "$tmp/image" "$tmp/fs" || skip "this needs loop devices"
    avail=$(df --output=avail -B 1M "$tmp/fs" | tail -n 1)
    fallocate -l $((avail - 16))M "$tmp/fs/ballast"
}

for kind in xfs btrfs ext4 ext4-discard tmpfs; do
    file_system $kind
    for block in 4K 64K; do
        TMPDIR=$tmp/fs start_nbdkit file "$tmp/base" cow-views=true \
            cow-block-size=$block
        timeout "$guard" "$model" --seed="$MODEL_SEED" --views=3 --full \
            --block-size=$((${block%K} * 1024)) --requests="$requests" --rounds=12 \
            "$sock" "$tmp/base" >"$tmp/out" 2>&1 || {
                cat "$tmp/out" >&2
                die "on $kind, blocks of $block; MODEL_SEED=$MODEL_SEED"
            }
        stop_nbdkit
        echo "$kind $block: $(tr '\n' ';' <"$tmp/out")"
        n=$(sed -n 's/^model: \([0-9]*\) found no space left/\1/p' "$tmp/out")
        [ "$n" -gt 0 ] || die "$kind was never full"
    done
    unmount
    rm -f "$tmp/image"
done
