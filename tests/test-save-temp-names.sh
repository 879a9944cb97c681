#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A file system without O_TMPFILE (as save-faults.c says there is): the overlay has a name
# beside the target meanwhile, which is gone in every ending.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
preload save-faults
export COW_NO_TMPFILE=1
base_file "$tmp/base" 1048576
mkdir "$tmp/t" "$tmp/o"
export TMPDIR=$tmp/o

write_some ()
{
    echo "connect().pwrite(b'written' * 9999, 12345)" | py
    nbdcopy "$uri" "$tmp/shown"
}

for compact in false true; do
    rm -f "$tmp"/t/*
    # New, and replaced.
    for i in 1 2; do
        start_nbdkit pattern 1M cow-save="$tmp/t/diff" cow-save-compact=$compact
        write_some
        if [ $compact = false ]; then
            [ "$(find "$tmp/t" -name '.cow*' | wc -l)" -eq 1 ] || die "no name meanwhile"
        fi
        stop_nbdkit
        only_files "$tmp/t" diff
        only_files "$tmp/o" ""
        diff_is "$tmp/t/diff" "$tmp/base" "$tmp/shown"
    done

    # Nothing written; never connected.
    for i in 1 2; do
        rm -f "$tmp"/t/*
        start_nbdkit pattern 1M cow-save="$tmp/t/diff" cow-save-compact=$compact
        [ $i = 1 ] || nbdinfo --size "$uri" >/dev/null
        stop_nbdkit
        only_files "$tmp/t" diff
        sound_diff "$tmp/t/diff"
    done
done

# Refused at the start, by the target and by the plugin.
rm -f "$tmp"/t/*
echo foreign >"$tmp/t/diff"
nbdkit_refuses "$tmp/t/diff" --filter="$FILTER" pattern 1M cow-save="$tmp/t/diff"
nbdkit_refuses size --filter="$FILTER" pattern nonsense cow-save="$tmp/t/new"
only_files "$tmp/t" diff
rm "$tmp/t/diff"

# A directory, of which one export is written to and another only read.
mkdir "$tmp/exports"
truncate -s 1M "$tmp/exports/a" "$tmp/exports/b"
start_nbdkit file dir="$tmp/exports" cow-save="$tmp/t/"
py <<'END'
connect("a").pwrite(b"x", 0)
connect("b").pread(1, 0)
END
stop_nbdkit
only_files "$tmp/t" a.qcow2
rm "$tmp"/t/*

# The save fails: what is kept has the name that the message says, and no other.
start_nbdkit pattern 1M cow-save="$tmp/t/diff"
write_some
echo foreign >"$tmp/t/diff"
end_nbdkit TERM 1
kept=$(kept_diff "$log")
diff_is "$kept" "$tmp/base" "$tmp/shown"
only_files "$tmp/t" diff "${kept##*/}"
[ "$(cat "$tmp/t/diff")" = foreign ] || die "the foreign file was replaced"
rm "$tmp"/t/*

# No server was killed so far; then a name stays, but nothing under the target's.
start_nbdkit pattern 1M cow-save="$tmp/t/diff"
write_some
child=${_servers[$server]}
unset "_servers[$server]"
kill -KILL "$pid"
wait "$child" 2>/dev/null || :
[ ! -e "$tmp/t/diff" ] || die "a diff of a server that was killed"
