#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A diff for which there is no room is not loaded in part: the export is refused, the log says how
# much is wanted and where, and at the end the diff is what it was.  With room it is loaded.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
[ "$(id -u)" -eq 0 ] || skip "mounting a small file system needs root"
base_file "$tmp/base" 16777216
mkdir "$tmp/o"
mount -t tmpfs -o size=12M none "$tmp/o" 2>"$tmp/mount.err" ||
    skip "no tmpfs can be mounted: $(cat "$tmp/mount.err")"
cleanup_fn umount -l "$tmp/o"
diff=$tmp/o/diff

TMPDIR=$tmp start_nbdkit file "$tmp/base" cow-save="$tmp/diff"
echo 'connect().pwrite(b"8 bytes." * M, 8192)' | py
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
cp --sparse=always "$tmp/diff" "$diff"

for args in cow-save="$diff" "cow-save=$diff cow-save-compact=true" ""; do
    fingerprint "$diff" >"$tmp/before"
    # shellcheck disable=SC2086
    TMPDIR=$tmp/o start_nbdkit file "$tmp/base" cow-load="$diff" $args
    for _ in 1 2; do
        echo 'expect(refused(), True, "refused")' | py
        clients_have_gone
    done
    log_has "error: cow-load=$diff: could not be loaded: its data, up to 83[0-9]{5} bytes, has to go to $tmp/o: No space left on device; make room there"
    stop_nbdkit
    fingerprint "$diff" | cmp - "$tmp/before" || die "the diff was replaced: $args"
    only_files "$tmp/o" diff
done

# Where no client comes, the end of the server loads it for itself.
start_nbdkit file "$tmp/base" cow-load="$tmp/diff" cow-save="$tmp/o/new"
end_nbdkit TERM 1
log_has "could not be loaded: its data"
[ ! -e "$tmp/o/new" ] || die "a part of the diff was saved"
rm -f "$tmp/o/new"

# The same client comes again when there is room.
dd if=/dev/zero of="$tmp/o/other" bs=1M count=8 status=none 2>/dev/null || :
rm "$diff"
start_nbdkit file "$tmp/base" cow-load="$tmp/diff" cow-save="$diff"
echo 'expect(refused(), True, "refused")' | py
rm "$tmp/o/other"
qemu-img compare -q -f raw -F raw "$uri" "$tmp/shown" || die "the disk is another one"
stop_nbdkit
diff_is "$diff" "$tmp/base" "$tmp/shown"
