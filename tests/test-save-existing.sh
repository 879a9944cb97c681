#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Of the files that stand where the diff is to be, only older diffs of this filter's making,
# and what is also loaded, are replaced.  Everything else keeps the server from starting,
# above all the base, by whatever name.  What comes there while the server runs is kept,
# too.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file split
requires qemu-img --version
base_file "$tmp/base" 1048576
mkdir "$tmp/t"
t=$tmp/t/target

# refused WORD ARGS...: and the target is not touched.
refused ()
{
    local word=$1
    shift
    fingerprint "$tmp/base" >"$tmp/base.before"
    ls -li --time-style=full-iso "$tmp/t" >"$tmp/before"
    nbdkit_refuses "$word" --filter="$FILTER" "$@"
    [ "$(grep -c error: "$tmp/refused")" -eq 1 ] || die "more than one line: $*"
    ls -li --time-style=full-iso "$tmp/t" | cmp - "$tmp/before" ||
        die "something has changed: $*"
    fingerprint "$tmp/base" | cmp - "$tmp/base.before" || die "the base has changed"
}

# Other files.  The line says what to do.
for kind in empty raw short qcow2 qcow2-v2 text; do
    rm -f "$t"
    case $kind in
        empty) : >"$t" ;;
        raw) truncate -s 1M "$t" ;;
        short) printf 'QFI\373' >"$t" ;;
        qcow2) qemu-img create -q -f qcow2 "$t" 1M ;;
        qcow2-v2) qemu-img create -q -f qcow2 -o compat=0.10 "$t" 1M ;;
        text) echo "my only copy" >"$t" ;;
    esac
    for args in "" cow-save-compact=true; do
        # shellcheck disable=SC2086
        refused "move it away, or name another file" file "$tmp/base" cow-save="$t" $args
    done
done

# The base, by its name and by others.
ln "$tmp/base" "$tmp/t/hard"
ln -s ../base "$tmp/t/soft"
for name in "$tmp/base" "$tmp/t/../base" "$tmp/t/hard" "$tmp/t/soft"; do
    refused "is also that of the parameter file=$tmp/base" file "$tmp/base" \
        cow-save="$name"
    refused "is also that of the parameter file=$tmp/t/hard" file "$tmp/t/hard" \
        cow-save="$name"
    # What is loaded may be replaced, but not if it is the base as well.
    refused "" file "$tmp/base" cow-save="$name" cow-load="$name"
done
cp "$tmp/base" "$tmp/part2"
refused "is also that of the parameter file=$tmp/part2" split "$tmp/base" "$tmp/part2" \
    cow-save="$tmp/part2"
# Through a descriptor.
exec 9>>"$tmp/base"
refused "file=$tmp/base" file "$tmp/base" cow-save=/dev/fd/9
exec 9>&-
# A diff of ours as the base of another server.
rm -f "$tmp"/t/*
start_nbdkit file "$tmp/base" cow-save="$t"
echo 'connect().pwrite(b"ours" * 3000, 5000)' | py
stop_nbdkit
refused "is also that of the parameter file=$t" file "$t" cow-save="$t"

# Ours is replaced, in any of the formats, and so is what is loaded.
for args in "" cow-save-compact=true cow-save-format=extended cow-save-backing=none ""; do
    cp "$t" "$tmp/older"
    # shellcheck disable=SC2086
    start_nbdkit file "$tmp/base" cow-save="$t" $args
    echo "connect().pwrite(b'$args ' * 3000, 9000)" | py
    nbdcopy "$uri" "$tmp/shown"
    # Until the end, it is the older one.
    cmp "$t" "$tmp/older" || die "replaced too early"
    stop_nbdkit
    diff_is "$t" "$tmp/base" "$tmp/shown"
    only_files "$tmp/t" target
done
qemu-img create -q -f qcow2 "$tmp/foreign" 1M
qemu-io -f qcow2 -c 'write -q -P 7 0 64k' "$tmp/foreign"
cp "$tmp/foreign" "$t"
start_nbdkit file "$tmp/base" cow-load="$t" cow-save="$t"
echo 'same(connect().pread(64 * K, 0), b"\7" * 64 * K, "what is loaded")' | py
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
diff_is "$t" "$tmp/base" "$tmp/shown"

# What has come there meanwhile is not replaced either; the overlay is kept beside it, in
# its own file or as a copy.
mkdir "$tmp/kept"
for compact in false true; do
    rm -f "$tmp"/t/* "$tmp"/kept/*
    TMPDIR=$tmp/kept start_nbdkit file "$tmp/base" cow-save="$t" cow-save-compact=$compact
    echo 'connect().pwrite(b"late" * 3000, 7000)' | py
    nbdcopy "$uri" "$tmp/shown"
    cp "$tmp/foreign" "$t"
    end_nbdkit TERM 1
    cmp "$t" "$tmp/foreign" || die "a foreign file was replaced"
    kept=$(kept_diff "$log")
    diff_is "$kept" "$tmp/base" "$tmp/shown"
    only_files "$tmp/t" "${kept##*/}" target
    only_files "$tmp/kept" ""
done
