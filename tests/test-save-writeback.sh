#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A large overlay that is going to be saved is written to its disk while it grows (seen
# with strace), what is added later too; one that is thrown away is not.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires strace -V
requires_plugin memory
requires qemu-img --version
requires jq --version
under=(strace -f -qq -o "$tmp/strace" -e trace=sync_file_range -e signal=none)

# write_and_wait NR FATE: writes 64 MiB NR times, each at another place; every time it waits
# until that has been asked for, if it is going to be.
write_and_wait ()
{
    py "$@" <<'END'
data = os.urandom(M)
h = connect()
for i in range(int(sys.argv[1])):
    for n in range(64):
        h.pwrite(data, (64 * i + n) * M)
    if sys.argv[2] == "saved":
        while open(tmp + "/strace").read().count("sync_file_range(") <= i:
            time.sleep(0.05)
    else:
        time.sleep(3)
END
}

start_nbdkit memory 1G
write_and_wait 1 thrown-away
stop_nbdkit
! grep sync_file_range "$tmp/strace" || die "an overlay was written back that is thrown away"

start_nbdkit memory 1G cow-save="$tmp/diff"
write_and_wait 2 saved
stop_nbdkit
! grep "sync_file_range.*= -1" "$tmp/strace" || die "not all of it went well"
sound_diff "$tmp/diff"
[ "$(qemu-img map --output=json "$tmp/diff" |
         jq '[.[] | select(.data) | .length] | add')" -eq $((128 << 20)) ] ||
    die "the diff is not all that was written"
