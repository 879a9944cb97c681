#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# To give space back takes long on some disks: 20 ms here for each piece.  A view is held of
# many scattered blocks that were trimmed since, and the server is told to end.  The diff is
# not held up by them: giving all of them back would take 80 seconds.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
requires qemu-img --version
preload save-faults
no_leak_check
mkdir "$tmp/t"

for args in "" cow-save-format=extended; do
    rm -f "$tmp/t/diff"
    export COW_SLOW_PUNCH=$tmp/slow
    # shellcheck disable=SC2086
    start_nbdkit pattern 512M cow-views=true cow-save="$tmp/t/diff" $args
    py "$pid" <<'END'
h = connect()
for at in range(0, 512 * M, 128 * K):
    h.pwrite(b"dead" * K, at)
h.pwrite(b"live" * K, 64 * K)
h.pwrite(b"live" * K, 511 * M + 64 * K)
view = connect("@snapshot")
for at in range(0, 512 * M, 128 * K):
    h.trim(4 * K, at)
open(tmp + "/slow", "w").close()
os.kill(int(sys.argv[1]), 15)
limit = time.monotonic() + 40
while not os.path.exists(tmp + "/t/diff"):
    if time.monotonic() > limit:
        fail("the diff is not there after 40 seconds")
    time.sleep(0.05)
END
    nbdkit_ended
    log_lacks error
    rm "$tmp/slow"
    unset COW_SLOW_PUNCH
    sound_diff "$tmp/t/diff"
    start_nbdkit pattern 512M cow-load="$tmp/t/diff"
    py <<'END'
h = connect()
for at in range(0, 512 * M, 128 * K):
    live = b"live" * K if at in (0, 511 * M) else base(at + 64 * K, 4 * K)
    same(h.pread(4 * K, at), bytes(4 * K), "what was trimmed at %d" % at)
    same(h.pread(4 * K, at + 64 * K), live, "what was not, at %d" % at)
END
    stop_nbdkit
done
