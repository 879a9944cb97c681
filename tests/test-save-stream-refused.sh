#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Streams that cannot be written, or must not be, keep the server from starting: a
# terminal, the standard output that option -s gives to the client, a descriptor that is
# closed or only to be read, a FIFO without permission.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

# is_refused WORD: in $tmp/refused, with the status $1.
is_refused ()
{
    local word=$1 status=$2
    [ "$status" -eq 1 ] && [ "$(grep -c error: "$tmp/refused")" -eq 1 ] &&
        grep -q "error: cow-save=.*$word" "$tmp/refused" ||
        { cat "$tmp/refused" >&2; die "status $status, no '$word'"; }
}

# try PARAMETER ARGS...: standard output is what it is; the status is in $status.
try ()
{
    status=0
    # shellcheck disable=SC2086
    timeout -k 5 60 $TEST_WRAPPER "$NBDKIT" "${@:2}" --filter="$FILTER" pattern 1M "$1" \
        </dev/null 2>"$tmp/refused" || status=$?
}

# Descriptors.
exec 9</dev/null
try cow-save=/dev/fd/9 -f -U "$tmp/x"
is_refused "not open for writing" $status
exec 9<&-
try cow-save=/dev/fd/9 -f -U "$tmp/x"
is_refused "" $status
try cow-save=/dev/fd/12345 -f -U "$tmp/x"
is_refused "" $status

# -s takes standard output.
try cow-save=- -s >"$tmp/out"
is_refused "option -s" $status
[ ! -s "$tmp/out" ] || die "something was written to standard output"
# With -s, other streams are fine.
timeout -k 5 60 "$NBDKIT" -s --filter="$FILTER" pattern 1M cow-save="$tmp/diff" \
    </dev/null >"$tmp/out" 2>"$tmp/err" || :
! grep -q "error:.*cow-save" "$tmp/err" || die "-s refused with a file"

# A FIFO that one may not write to, as another user.
if [ "$(id -u)" -eq 0 ] && setpriv --version >/dev/null 2>&1; then
    mkfifo -m 600 "$tmp/fifo"
    for_nobody
    mkdir -m 777 "$tmp/run"
    status=0
    # shellcheck disable=SC2086
    timeout -k 5 60 setpriv --reuid=65534 --regid=65534 --clear-groups \
        $TEST_WRAPPER "$NBDKIT" -f -U "$tmp/run/s" --filter="$tmp/filter.so" pattern 1M \
        cow-save="$tmp/fifo" </dev/null >"$tmp/refused" 2>&1 || status=$?
    is_refused "Permission denied" $status
fi

# A terminal.
if script --version >/dev/null 2>&1; then
    for target in - /dev/fd/1 /dev/tty; do
        # shellcheck disable=SC2086
        timeout -k 5 60 script -qec "$TEST_WRAPPER $NBDKIT -f -U $tmp/x \
            --filter=$FILTER pattern 1M cow-save=$target; echo status \$?" /dev/null \
            </dev/null >"$tmp/refused" 2>&1 || :
        grep -q "error: cow-save=$target: .*terminal" "$tmp/refused" &&
            grep -q "status 1" "$tmp/refused" ||
            { cat "$tmp/refused" >&2; die "$target, a terminal, is not refused"; }
    done
else
    echo "no script: no terminal was tried"
fi
