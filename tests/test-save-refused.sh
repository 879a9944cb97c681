#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A target that cannot be saved to keeps the server from starting, with one line that
# names the parameter and what is wrong, and nothing is left of the try.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file pattern
base_file "$tmp/base" 1048576
mkdir "$tmp/d"

# refused WORD ARGS...: one line, which begins with the last of ARGS.
refused ()
{
    local word=$1
    shift
    nbdkit_refuses "$word" --filter="$FILTER" file "$tmp/base" "$@"
    [ "$(grep -c error: "$tmp/refused")" -eq 1 ] ||
        { cat "$tmp/refused" >&2; die "more than one line: $*"; }
    grep -q 'cow-save' "$tmp/refused" || die "the parameter is not named: $*"
    only_files "$tmp/d" ""
}

# Parameters.
refused "add cow-save" cow-save-compact=true
refused "add cow-save" cow-save-format=portable
refused "add cow-save" cow-save-backing=none
refused "add cow-save" cow-save-backing-format=raw
refused cow-scope=connection cow-save="$tmp/d/x" cow-scope=connection
refused "only once" cow-save="$tmp/d/x" cow-save="$tmp/d/x"
refused "must be" cow-save=
for value in '' qcow2 Portable; do
    refused cow-save-format="$value" cow-save="$tmp/d/x" cow-save-format="$value"
done
for value in '' 2 maybe; do
    nbdkit_refuses cow-save-compact="$value" --filter="$FILTER" file "$tmp/base" \
        cow-save="$tmp/d/x" cow-save-compact="$value"
    nbdkit_refuses cow-detect-zeroes="$value" --filter="$FILTER" file "$tmp/base" \
        cow-detect-zeroes="$value"
done
refused cow-save-backing= cow-save="$tmp/d/x" cow-save-backing=
refused cow-save-backing= cow-save="$tmp/d/x" \
    cow-save-backing="$(printf 'x%.0s' {1..1024})"
refused cow-save-backing cow-save="$tmp/d/x" cow-save-backing-format=raw
refused cow-save-backing cow-save="$tmp/d/x" cow-save-backing=none \
    cow-save-backing-format=raw
refused cow-save-backing-format= cow-save="$tmp/d/x" cow-save-backing=b \
    cow-save-backing-format=
refused cow-save-backing-format= cow-save="$tmp/d/x" cow-save-backing=b \
    cow-save-backing-format=a-name-of-16-byt
refused cow-block-size cow-save="$tmp/d/x" cow-save-format=extended cow-block-size=128K

# Places.
refused "No such file" cow-save="$tmp/none/x"
refused "No such file" cow-save="$tmp/none/"
refused "Not a directory" cow-save="$tmp/base/x"
refused "" cow-save="$tmp/base/"
refused "File name too long" cow-save="$tmp/d/$(printf 'x%.0s' {1..256})"
ln -s "$tmp/d/there" "$tmp/loop1"
ln -sf "$tmp/loop1" "$tmp/loop2"
ln -sf "$tmp/loop2" "$tmp/loop1"
refused "symbolic links" cow-save="$tmp/loop1"

# Things that are no files.
py <<'END'
s = socket.socket(socket.AF_UNIX)
s.bind(tmp + "/socket")
END
refused "no regular file" cow-save="$tmp/socket"
if [ "$(id -u)" -eq 0 ] && mknod "$tmp/block" b 7 250 2>/dev/null; then
    refused "no regular file" cow-save="$tmp/block"
fi

# Who may not make a file there.
chmod 755 "$tmp"
mkdir -m 755 "$tmp/readonly"
if [ "$(id -u)" -eq 0 ]; then
    chmod 644 "$tmp/base"
    mkdir -m 777 "$tmp/run"
    if setpriv --version >/dev/null 2>&1; then
        as_nobody=(setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all)
        for_nobody
        for target in "$tmp/readonly/x" "$tmp/readonly/"; do
            status=0
            # shellcheck disable=SC2086
            timeout -k 5 60 "${as_nobody[@]}" $TEST_WRAPPER "$NBDKIT" -f \
                -U "$tmp/run/sock" --filter="$tmp/filter.so" pattern 1M \
                cow-save="$target" </dev/null >"$tmp/refused" 2>&1 || status=$?
            [ $status -eq 1 ] || die "nobody: status $status"
            grep -q "error: cow-save=$target: .*Permission denied" "$tmp/refused" ||
                { cat "$tmp/refused" >&2; die "nobody: another message"; }
        done
        # The server becomes another user only after it has looked.
        status=0
        # shellcheck disable=SC2086
        timeout -k 5 60 $TEST_WRAPPER "$NBDKIT" -f -u nobody -U "$tmp/run/sock2" \
            --filter="$tmp/filter.so" pattern 1M cow-save="$tmp/readonly/x" \
            </dev/null >"$tmp/refused" 2>&1 || status=$?
        [ $status -eq 1 ] || die "-u nobody: status $status"
        grep -q "error: cow-save=$tmp/readonly/x: .*Permission denied" "$tmp/refused" ||
            { cat "$tmp/refused" >&2; die "-u nobody: another message"; }
    else
        echo "no setpriv: not tried as another user"
    fi
    mkdir "$tmp/mount"
    if mount -t tmpfs -o ro none "$tmp/mount" 2>/dev/null; then
        cleanup_fn umount -l "$tmp/mount"
        refused "Read-only file system" cow-save="$tmp/mount/x"
        refused "Read-only file system" cow-save="$tmp/mount/"
    fi
else
    chmod 555 "$tmp/readonly"
    refused "Permission denied" cow-save="$tmp/readonly/x"
    refused "Permission denied" cow-save="$tmp/readonly/"
fi
