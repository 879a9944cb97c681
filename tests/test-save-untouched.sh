#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Nobody ever connected, or nobody wrote.  The diff is valid and empty where the size of
# the disk can be had; where it cannot (the plugin chooses the disk by the client's
# export name), nothing is written and one line says so.  A directory gets nothing.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file pattern memory eval
requires qemu-img --version
base_file "$tmp/base" 1000003
mkdir "$tmp/exports" "$tmp/t" "$tmp/save"
cp "$tmp/base" "$tmp/exports/a"

is_empty_diff ()
{
    diff_is "$1" "$tmp/base" "$tmp/base"
    # No block is in it.
    [ "$(qemu-img map -f qcow2 --output=json "$1" | grep -c '"data": true')" -eq 0 ] ||
        die "there are blocks in it"
    qemu-img info -f qcow2 "$1" | grep -q '^virtual size:.*(1000448 bytes)' ||
        die "another size"
}

for kind in in-place compact stream; do
    for client in none reads; do
        rm -f "$tmp"/t/*
        case $kind in
            in-place) start_nbdkit file "$tmp/base" cow-save="$tmp/t/diff" ;;
            compact) start_nbdkit file "$tmp/base" cow-save="$tmp/t/diff" \
                         cow-save-compact=true ;;
            stream) start_nbdkit file "$tmp/base" cow-save=/dev/fd/9 9>"$tmp/t/diff" ;;
        esac
        [ $client = none ] || nbdcopy "$uri" null:
        stop_nbdkit
        log_lacks 'error|warning'
        only_files "$tmp/t" diff
        is_empty_diff "$tmp/t/diff"
    done
done

# The export name chooses: the plugin cannot say, and opening it so can crash it.
for args in "file dir=$tmp/exports" "--filter=exportname file $tmp/base exportname=x exportname-strict=true"; do
    rm -f "$tmp"/t/*
    # shellcheck disable=SC2086
    start_nbdkit $args cow-save="$tmp/t/diff"
    stop_nbdkit
    log_lacks error
    [ "$(wc -l <"$log")" -eq 1 ] || die "not one line"
    log_has "warning: cow-save=$tmp/t/diff: nothing was saved"
    only_files "$tmp/t" ""
done

# A plugin that needs a client in another way.
start_nbdkit eval get_size='exit 1' pread='exit 1' cow-save="$tmp/t/diff"
stop_nbdkit
log_has "warning: cow-save=$tmp/t/diff: nothing was saved"
only_files "$tmp/t" ""

# A base that opens, and does not answer when its first bytes are read for the diff.
touch "$tmp/hangs"
start_nbdkit eval get_size='echo 1M' can_extents='exit 3' \
    pread="while [ -e '$tmp/hangs' ]; do sleep 0.2; done; exit 1" cow-save="$tmp/t/diff"
guard=60 stop_nbdkit
rm "$tmp/hangs"
log_has "warning: cow-save=$tmp/t/diff: nothing was saved"
only_files "$tmp/t" ""

# One export of those was looked at: its size is known.
start_nbdkit file dir="$tmp/exports" cow-save="$tmp/t/diff"
echo 'expect(connect("a").get_size(), 1000003, "size")' | py
stop_nbdkit
log_lacks error
is_empty_diff "$tmp/t/diff"

# Directories.
for client in none reads; do
    start_nbdkit file dir="$tmp/exports" cow-save="$tmp/save/"
    [ $client = none ] || echo 'connect("a").pread(4096, 0)' | py
    stop_nbdkit
    [ ! -s "$log" ] || die "a line was printed"
    only_files "$tmp/save" ""
done

# What is loaded is saved again, with no client and with one that only looks.
start_nbdkit file "$tmp/base" cow-save="$tmp/first"
echo 'connect().pwrite(b"first" * 3000, 345678)' | py
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
for client in none reads; do
    rm -f "$tmp"/t/*
    start_nbdkit file "$tmp/base" cow-load="$tmp/first" cow-save="$tmp/t/diff"
    [ $client = none ] || nbdcopy "$uri" null:
    stop_nbdkit
    log_lacks error
    diff_is "$tmp/t/diff" "$tmp/base" "$tmp/shown"
done
