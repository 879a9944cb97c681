#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A server that is killed leaves the older diff as it was, and no other file.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
mkdir "$tmp/t"
# Only where files need no name.
py <<'END' || skip "this file system has no O_TMPFILE"
os.close(os.open(tmp + "/t", os.O_TMPFILE | os.O_RDWR, 0o600))
END

write ()
{
    echo "connect().pwrite(b'$1' * 99999, 12345)" | py
}

start_nbdkit pattern 1M cow-save="$tmp/t/diff"
write old
stop_nbdkit
fingerprint "$tmp/t/diff" >"$tmp/before"

for load in no yes; do
    args=()
    [ $load = no ] || args=(cow-load="$tmp/t/diff")
    start_nbdkit pattern 1M cow-save="$tmp/t/diff" ${args[@]+"${args[@]}"}
    write new
    child=${_servers[$server]}
    unset "_servers[$server]"
    kill -KILL "$pid"
    wait "$child" 2>/dev/null || :
    only_files "$tmp/t" diff
    fingerprint "$tmp/t/diff" | cmp - "$tmp/before" || die "the old diff has changed"
done
