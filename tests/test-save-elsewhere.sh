#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The overlay's own file cannot be made into an image, as that would be longer than a file
# may be: a copy, which is shorter, is saved in its place.  Where the target must not be
# replaced either, the copy is kept beside it, though $TMPDIR has no room.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
requires prlimit --version
base_file "$tmp/base" $((64 * 1024 * 1024))
mkdir "$tmp/t"
export TMPDIR=$tmp/temporary

for changed in no yes; do
    rm -rf "$tmp/t/"* "$TMPDIR"
    mkdir "$TMPDIR"
    start_nbdkit pattern 64M cow-save="$tmp/t/diff"
    py <<'END'
h = connect()
for at in range(0, 64 * M, 128 * K):
    h.pwrite(b"few" * 1000, at)
END
    nbdcopy "$uri" "$tmp/shown"
    prlimit --pid "$pid" --fsize=$((8 * 1024 * 1024))
    rmdir "$TMPDIR"
    if [ $changed = no ]; then
        stop_nbdkit
        log_lacks error
        kept=$tmp/t/diff
        only_files "$tmp/t" diff
    else
        echo foreign >"$tmp/t/diff"
        end_nbdkit TERM 1
        kept=$(kept_diff "$log")
        only_files "$tmp/t" "${kept##*/}" diff
        [ "$(cat "$tmp/t/diff")" = foreign ] || die "a foreign file was replaced"
    fi
    diff_is "$kept" "$tmp/base" "$tmp/shown"
done
