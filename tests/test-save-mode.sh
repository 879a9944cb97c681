#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The diff has the mode of the file that it replaces, otherwise 0666 less the umask; a link
# stays a link, and what it points to is the diff, be it there before or not.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
mkdir "$tmp/t" "$tmp/real"

save ()
{
    start_nbdkit pattern 1M "$@"
    echo 'connect().pwrite(b"x" * 9999, 9999)' | py
    mask=$(sed -n 's/^Umask:[[:space:]]*//p' "/proc/$pid/status")
    stop_nbdkit
    log_lacks error
}
mode_is ()
{
    [ "$(stat -c %a "$2")" = "$1" ] || die "mode $(stat -c %a "$2"), not $1: $3"
}

for compact in false true; do
    # The server's own umask counts, which nbdkit sets.
    rm -f "$tmp/t/diff"
    save cow-save="$tmp/t/diff" cow-save-compact=$compact
    mode_is "$(printf %o $((0666 & ~mask)))" "$tmp/t/diff" "umask $mask"
    for mode in 600 640 666 400 755; do
        chmod $mode "$tmp/t/diff"
        inode=$(stat -c %i "$tmp/t/diff")
        save cow-save="$tmp/t/diff" cow-save-compact=$compact
        mode_is $mode "$tmp/t/diff" "replaced"
        [ "$(stat -c %i "$tmp/t/diff")" != "$inode" ] || die "written to in place"
    done

    # A hard link to the older diff keeps the older content.
    rm -f "$tmp/t/other"
    ln "$tmp/t/diff" "$tmp/t/other"
    cp "$tmp/t/other" "$tmp/older"
    save cow-save="$tmp/t/diff" cow-save-compact=$compact cow-save-backing=none
    cmp "$tmp/t/other" "$tmp/older" || die "the other name has changed"
    rm "$tmp/t/other"

    # Links: to nothing yet, to that diff, relative and through another link.
    rm -f "$tmp"/real/* "$tmp"/t/*
    ln -s ../real/diff "$tmp/t/link"
    ln -s "$tmp/t/link" "$tmp/t/link2"
    for name in link link2 link; do
        save cow-save="$tmp/t/$name" cow-save-compact=$compact
        [ "$(readlink "$tmp/t/link")" = ../real/diff ] || die "the link has changed"
        [ "$(readlink "$tmp/t/link2")" = "$tmp/t/link" ] || die "link2 has changed"
        only_files "$tmp/real" diff
        sound_diff "$tmp/real/diff"
        only_files "$tmp/t" link link2
    done
    rm -f "$tmp"/t/*
done

# A link to a directory, and one to a file in a directory that is not there.
ln -s ../real "$tmp/t/dir"
rm "$tmp/real/diff"
save cow-save="$tmp/t/dir"
only_files "$tmp/real" default.qcow2
ln -s nowhere/diff "$tmp/t/nowhere"
nbdkit_refuses "cow-save=$tmp/t/nowhere" --filter="$FILTER" pattern 1M \
    cow-save="$tmp/t/nowhere"
