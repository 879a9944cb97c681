#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A diff that somebody else may write is not loaded, and one that somebody else uses is not
# replaced: what they write later would be lost.  Nor do qemu's programs and a second server
# get what this server has loaded or is going to replace.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
requires qemu-io --version
requires qemu-nbd --version
base_file "$tmp/base" 1048576
mkdir "$tmp/t"
diff=$tmp/t/diff

# hold ARGS...: qemu-nbd has an image open.
hold ()
{
    rm -f "$tmp/held"
    qemu-nbd -t -f qcow2 -k "$tmp/held" "$@" &
    holder=$!
    cleanup_fn let_go
    until [ -S "$tmp/held" ]; do
        kill -0 "$holder" 2>/dev/null || die "qemu-nbd did not start: $*"
        sleep 0.05
    done
}

let_go ()
{
    [ -n "${holder:-}" ] || return 0
    kill "$holder" 2>/dev/null || :
    wait "$holder" || :
    holder=
}

# refused ARGS...: with one line that says what is the matter, and what to do.
refused ()
{
    fingerprint "$diff" >"$tmp/before"
    nbdkit_refuses "is in use by another program" --filter="$FILTER" file "$tmp/base" "$@"
    grep -q "end that one first, or" "$tmp/refused" || die "no advice: $*"
    [ "$(wc -l <"$tmp/refused")" -eq 1 ] || { cat "$tmp/refused"; die "not one line: $*"; }
    fingerprint "$diff" | cmp - "$tmp/before" || die "the diff was changed"
}

write_byte ()
{
    echo "connect('${3:-}').pwrite(b'$1' * 1000, $2)" | py
}

start_nbdkit file "$tmp/base" cow-save="$diff"
write_byte a 0
stop_nbdkit

# Somebody writes it.
hold "$diff"
refused cow-load="$diff" cow-save="$diff"
refused cow-load="$diff"
refused cow-save="$diff"
refused cow-save="$diff" cow-save-compact=true
ln -s "$diff" "$tmp/link"
ln "$diff" "$tmp/hard"
refused cow-load="$tmp/link"
refused cow-load="$tmp/hard"
exec 9<"$diff"
refused cow-load=/dev/fd/9
exec 9<&-
rm "$tmp/hard"
exec 9<>"$diff"
refused cow-save=/dev/fd/9
exec 9<&-
qemu-io -f raw -c 'write -q -P 98 4k 1k' "nbd+unix:///?socket=$tmp/held"
let_go

# Somebody reads it.
hold -r "$diff"
refused cow-load="$diff" cow-save="$diff"
start_nbdkit file "$tmp/base" cow-load="$diff"
echo 'same(connect().pread(1000, 4096), b"b" * 1000, "what was written there")' | py
stop_nbdkit
let_go

# qemu_can_read, qemu_can_write YES|NO: the diff.
qemu_can_read ()
{
    local can=no
    ! qemu-io -r -f qcow2 -c 'read 0 1k' "$diff" >"$tmp/said" 2>&1 || can=yes
    [ $can = "$1" ] || { cat "$tmp/said"; die "qemu can read: $can"; }
    # Whoever takes what he gets can look at it in any case.
    qemu-img info -U "$diff" >/dev/null || die "qemu-img info -U"
}

qemu_can_write ()
{
    local can=no
    ! qemu-io -f qcow2 -c 'read 0 1k' "$diff" >"$tmp/said" 2>&1 || can=yes
    [ $can = "$1" ] || { cat "$tmp/said"; die "qemu can write: $can"; }
}

# The server's own locks: of a reader on what it loads,
start_nbdkit file "$tmp/base" cow-load="$diff"
first=$server
qemu_can_read yes
qemu_can_write no
# so that another one can load it as well, and not replace it,
start_nbdkit file "$tmp/base" cow-load="$diff"
stop_nbdkit
refused cow-load="$diff" cow-save="$diff"
refused cow-save="$diff"
stop_nbdkit $first
qemu_can_write yes

# of a writer on what it is going to replace, loaded or not, until it has.
for args in cow-load="$diff" cow-save-compact=true cow-load="$tmp/link"; do
    start_nbdkit file "$tmp/base" cow-save="$diff" "$args"
    write_byte c 8192
    nbdcopy "$uri" "$tmp/shown"
    qemu_can_read no
    qemu_can_write no
    refused cow-load="$diff" cow-save="$diff"
    refused cow-load="$diff"
    refused cow-save="$diff"
    stop_nbdkit
    diff_is "$diff" "$tmp/base" "$tmp/shown"
    qemu_can_write yes
done

# A stream that goes to a file has it for itself, too.
: >"$tmp/t/streamed"
exec 9<>"$tmp/t/streamed"
start_nbdkit file "$tmp/base" cow-save=/dev/fd/9
! qemu-io -f raw -c 'write 0 1k' "$tmp/t/streamed" >/dev/null 2>&1 || die "not locked"
stop_nbdkit
exec 9<&-
qemu-img check -q "$tmp/t/streamed"

# So it is for a server in the background, which is another process than the one that
# has locked it.
rm -f "$tmp/pid"
# shellcheck disable=SC2086
$TEST_WRAPPER "$NBDKIT" -U "$tmp/background" -P "$tmp/pid" --filter="$FILTER" \
    file "$tmp/base" cow-load="$diff" cow-save="$diff" </dev/null >"$tmp/background.log" 2>&1
until [ -s "$tmp/pid" ]; do sleep 0.05; done
pid=$(cat "$tmp/pid")
cleanup_fn eval 'kill $pid 2>/dev/null'
refused cow-load="$diff"
qemu_can_write no
kill "$pid"
process_ended "$pid"
pid=

# Who comes between the start and the end does not lose the diff: it is kept.  (That one
# has no locks of its own when it opens the file, so that it gets it.)
start_nbdkit file "$tmp/base" cow-save="$tmp/t/new"
write_byte d 0
nbdcopy "$uri" "$tmp/shown"
cp "$diff" "$tmp/t/new"
hold "$tmp/t/new"
end_nbdkit TERM 1
kept=$(kept_diff "$log")
let_go
diff_is "$kept" "$tmp/base" "$tmp/shown"
cmp "$diff" "$tmp/t/new" || die "a diff that was in use was replaced"
rm "$kept"

# A directory: each file is locked when its export gets an overlay, until that is gone.
mkdir "$tmp/d"
dir=$tmp/d
for name in one two; do cp "$diff" "$dir/$name.qcow2"; done
diff=$dir/one.qcow2
hold "$diff"
for args in cow-load="$dir/" cow-save="$dir/"; do
    start_nbdkit file dir="$tmp" cow-load="$dir/" "$args"
    stop_nbdkit
done
mkdir "$tmp/bases"
for name in one two; do cp "$tmp/base" "$tmp/bases/$name"; done
for args in "cow-load=$dir/" "cow-save=$dir/" "cow-load=$dir/ cow-save=$dir/"; do
    # shellcheck disable=SC2086
    start_nbdkit file dir="$tmp/bases" $args
    echo 'expect(refused("one"), True, "refused")' | py
    log_has "error: .*$diff:? is in use by another program"
    write_byte e 0 two
    stop_nbdkit
done
let_go
start_nbdkit file dir="$tmp/bases" cow-load="$dir/" cow-save="$dir/"
qemu_can_write yes
write_byte f 0 one
clients_have_gone
qemu_can_read no
diff=$dir/two.qcow2
qemu_can_write yes
# Without a change there is nothing to replace.
echo 'connect("two").pread(1, 0)' | py
clients_have_gone
stop_nbdkit
diff=$dir/one.qcow2
qemu_can_write yes
