#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# restic keeps the changes as a stream, and gives back a file with their content: a first
# time from an empty overlay, a second time going on from what it gave back.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires restic version
requires qemu-img --version
requires qemu-io --version
requires nbdcopy --version
requires_plugin file

# The server is stopped as soon as the command has ended, and nbdkit does not free a
# connection that has not quite ended then.
export ASAN_OPTIONS="${ASAN_OPTIONS:-}:detect_leaks=0"

export RESTIC_REPOSITORY=$tmp/repository RESTIC_PASSWORD=secret
export RESTIC_CACHE_DIR=$tmp/cache
restic -q init

cd "$tmp"
base_file disk.img 8388608
fingerprint disk.img >before

# backup COMMANDS ARGS...: what COMMANDS, for qemu-io, write goes to restic, and what the
# disk has then to shown.img.  What --run prints must not get between.
backup ()
{
    local commands=$1
    shift
    printf '%s\n' "$commands" >commands
    # shellcheck disable=SC2016,SC2086
    timeout "$guard" $TEST_WRAPPER "$NBDKIT" -f -U - --filter="$FILTER" \
        file disk.img cow-save=- "$@" \
        --run 'qemu-io -f raw "$uri" <commands >&2 && nbdcopy "$uri" shown.img' \
        2>server.log |
        timeout "$guard" restic -q backup --stdin --stdin-filename diff.qcow2 ||
        { cat server.log >&2; die "the backup failed"; }
    no_sanitizer_report server.log
}

# restore FILE BACKUP: what restic gives back has the content that the disk had last.
restore ()
{
    timeout "$guard" restic -q dump "$2" /diff.qcow2 >"$1"
    diff_is "$1" disk.img shown.img
}

backup 'write -P 1 0 64k
write -P 2 1000000 12345
write -z 2M 1M
discard 4M 1M
write -P 3 8388096 512'
restore first.qcow2 latest
! cmp -s shown.img disk.img || die "nothing was written"

backup 'write -P 4 32k 64k
write -P 5 2500000 100000
write -z 1000000 4096' cow-load=first.qcow2
restore second.qcow2 latest

# The first backup is still there, unharmed.
restic -q check --read-data >check.log || { cat check.log >&2; die "restic check"; }
oldest=$(restic snapshots --json | grep -o '"short_id":"[^"]*"' | head -n 1 | cut -d '"' -f 4)
restic -q dump "$oldest" /diff.qcow2 | cmp - first.qcow2 ||
    die "the first backup has changed"

# The way that the manual has it.
qemu-img rebase -q -u -b disk.img -F raw second.qcow2
qemu-img compare -q second.qcow2 -F raw shown.img || die "rebased, it differs"
fingerprint disk.img | cmp - before || die "the base has changed"
