#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Whoever reads the stream goes away, or a FIFO has no reader: the changes are kept as a
# complete diff in $TMPDIR, one line says where, and the status is 1.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
size=$((4 * 1024 * 1024))
base_file "$tmp/base" $size
mkdir "$tmp/kept"
export TMPDIR=$tmp/kept

# fails ARGS...: a server with descriptor 9 for its stream.
fails ()
{
    local kept
    start_nbdkit pattern $size "$@"
    exec 9>&-
    py <<'END'
h = connect()
h.pwrite(b"pipe" * 300 * K, 12345)
h.zero(M, 2 * M)
with open(tmp + "/shown", "wb") as f:
    f.write(h.pread(4 * M, 0))
END
    $ready
    end_nbdkit TERM 1
    kept=$(kept_diff "$log")
    log_has "error: $1: "
    [ "$(dirname "$kept")" = "$tmp/kept" ] || die "kept in $kept"
    [ "$(stat -c %a "$kept")" = 600 ] || die "others may read it"
    diff_is "$kept" "$tmp/base" "$tmp/shown"
    rm "$kept"
    only_files "$tmp/kept" ""
}

# The reader has gone before the first byte, and in the middle.
ready=true
mkfifo "$tmp/fifo"
exec 8<>"$tmp/fifo" 9>"$tmp/fifo" 8>&-
fails cow-save=/dev/fd/9

exec 9> >(head -c 300000 >/dev/null)
fails cow-save=/dev/fd/9

# A FIFO with a reader that goes.
(exec 7<"$tmp/fifo"; dd bs=1000 count=3 <&7 of=/dev/null status=none) &
reader=$!
fails cow-save="$tmp/fifo"
wait $reader

# A device that is full.
fails cow-save=/dev/full
# A name that is removed meanwhile.
mkfifo "$tmp/fifo2"
ready=remove_fifo
remove_fifo () { rm "$tmp/fifo2"; }
fails cow-save="$tmp/fifo2"
