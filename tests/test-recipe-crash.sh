#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual on a crash: the disk goes back to what was saved last, and a client that
# connects anew by itself, here qemu's, sees another disk than before, without an error.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires qemu-io --version

fresh
nbdkit -U - --filter=cow file disk.img cow-save=diff.qcow2 \
    --run 'qemu-io -f raw -c "write -P 1 0 64k" "$uri"' >/dev/null
nbdkit -U disk.sock -P disk.pid --filter=cow file disk.img \
    cow-load=diff.qcow2 cow-save=diff.qcow2

coproc client {
    exec qemu-io 'json:{"driver":"raw","file":{"driver":"nbd","reconnect-delay":60,
        "server":{"type":"unix","path":"disk.sock"}}}' 2>&1
}
# hears PATTERN: what the client says now has it.
hears ()
{
    local line
    while read -r -t 60 -u "${client[0]}" line; do
        [[ ! $line =~ $1 ]] || return 0
    done
    die "the client did not say '$1'"
}
# ask COMMAND PATTERN: what it says then has PATTERN.
ask ()
{
    echo "$1" >&"${client[1]}"
    hears "$2"
}
ask 'read -P 1 0 64k' 'read 65536/65536'
ask 'write -P 2 0 64k' 'wrote 65536/65536'
ask 'read -P 2 0 64k' 'read 65536/65536'

server=$(cat disk.pid)
kill -9 "$server"
process_ended "$server"
run <<'END'
rm -f disk.sock
END
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img \
    cow-load=diff.qcow2 cow-save=diff.qcow2
END
ask 'read -P 2 0 64k' 'Pattern verification failed'
# To the end of this answer: qemu-io may take two commands that wait for it for one.
hears 'read 65536/65536'
ask 'read -P 1 0 64k' 'read 65536/65536'
echo quit >&"${client[1]}"
stop_server
qemu-io -c 'read -P 1 0 64k' diff.qcow2 | grep 'read 65536/65536' >/dev/null ||
    die "the diff is not the one that was saved last"
