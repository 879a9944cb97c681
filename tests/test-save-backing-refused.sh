#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A backing file that cannot be meant is refused: a qcow2 image whose format is not said
# (it would be read as raw), and the diff itself.  One that is not there gets a warning, if
# it is known where it would have to be.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
base_file "$tmp/base" 1048576
mkdir "$tmp/dir"
qemu-img create -q -f qcow2 "$tmp/dir/golden" 1M
diff=$tmp/dir/diff

refused ()
{
    nbdkit_refuses "$1" --filter="$FILTER" file "$tmp/base" "${@:2}"
    [ "$(wc -l <"$tmp/refused")" -eq 1 ] || die "not one line"
}

# accepted WARNINGS ARGS...: the server starts, with so many warnings.
accepted ()
{
    local n
    start_nbdkit file "$tmp/base" "${@:2}"
    n=$(grep -c "warning: cow-save-backing=" "$log") || :
    [ "$n" -eq "$1" ] || { cat "$log" >&2; die "$n warnings, not $1"; }
    nbdinfo --size "$uri" >"$tmp/size"
    stop_nbdkit
    rm -f "$diff"
}

# Relative names are relative to the diff.
for name in golden "$tmp/dir/golden" ../dir/golden; do
    refused "say cow-save-backing-format=qcow2" cow-save="$diff" cow-save-backing=$name
    accepted 0 cow-save="$diff" cow-save-backing=$name cow-save-backing-format=qcow2
    accepted 0 cow-save="$diff" cow-save-backing=$name cow-save-backing-format=raw
done
refused "say cow-save-backing-format=qcow2" cow-save="$tmp/dir/" cow-save-backing=golden
refused "say cow-save-backing-format=qcow2" cow-views=true \
    cow-save-backing="$tmp/dir/golden"
(
    cd "$tmp/dir"
    refused "say cow-save-backing-format=qcow2" cow-save=/dev/fd/7 \
        cow-save-backing=golden 7>"$tmp/stream"
)
accepted 0 cow-save="$diff" cow-save-backing="$tmp/base"
accepted 0 cow-save="$diff" cow-save-backing=../base
# It is not opened if it is no file, or might block.
mkfifo "$tmp/dir/fifo"
accepted 0 cow-save="$diff" cow-save-backing=fifo
accepted 0 cow-save="$diff" cow-save-backing=..

# Not there.
accepted 1 cow-save="$diff" cow-save-backing=base
accepted 1 cow-save="$diff" cow-save-backing="$tmp/nowhere"
accepted 1 cow-views=true cow-save-backing="$tmp/nowhere"
accepted 0 cow-views=true cow-save-backing=nowhere
accepted 0 cow-save="$diff" cow-save-backing=nbd:unix:/nowhere
accepted 0 cow-save="$diff" cow-save-backing='json:{"driver":"null-co"}'
accepted 0 cow-save="$diff" cow-save-backing=none

# The diff itself, under any name, whether it is there yet or not.
itself="that is the diff itself"
for _ in 1 2; do
    for name in diff ./diff ../dir/diff "$diff"; do
        refused "$itself" cow-save="$diff" cow-save-backing=$name
        refused "$itself" cow-save="$diff" cow-save-backing=$name \
            cow-save-backing-format=qcow2
    done
    start_nbdkit file "$tmp/base" cow-save="$diff"
    stop_nbdkit
done
ln "$diff" "$tmp/hard"
refused "$itself" cow-save="$diff" cow-save-backing=../hard cow-save-backing-format=qcow2
ln -s dir/diff "$tmp/soft"
refused "$itself" cow-save="$tmp/soft" cow-save-backing="$diff" \
    cow-save-backing-format=qcow2
accepted 0 cow-load="$diff" cow-save="$tmp/dir/next" cow-save-backing=diff \
    cow-save-backing-format=qcow2

# In a directory that is known when the client comes.
start_nbdkit file "$tmp/base" cow-save="$tmp/dir/" cow-save-backing=web.qcow2
py <<'END'
expect(refused("web"), True, "refused")
connect("other")
END
log_has "error: cow-save-backing=web.qcow2: $itself, $tmp/dir/web.qcow2"
stop_nbdkit
