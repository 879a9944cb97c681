#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Each signal that tells the server to stop saves, whether or not clients are connected,
# and so do two of them one after the other.  A normal end prints no error.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin pattern
requires qemu-img --version

# leaves_diff SIGNAL...
leaves_diff ()
{
    rm -f "$tmp/diff"
    start_nbdkit pattern 1M cow-save="$tmp/diff"
    echo "connect().pwrite(b'written' * 999, 12345)" | py
    nbdcopy "$uri" "$tmp/shown"
    end_nbdkit "$@"
    log_lacks error
    diff_is "$tmp/diff" "$tmp/base" "$tmp/shown"
}

base_file "$tmp/base" 1048576
for signal in INT TERM HUP QUIT; do
    leaves_diff $signal
done
leaves_diff TERM TERM
leaves_diff INT TERM HUP QUIT INT

# With a client that is connected, the second signal comes while nbdkit waits for it.
rm -f "$tmp/diff"
start_nbdkit pattern 1M cow-save="$tmp/diff"
py <<'END'
import signal
h = connect()
h.pwrite(b"connected" * 999, 2345)
with open(tmp + "/shown", "wb") as f:
    f.write(h.pread(M, 0))
pid = int(os.environ["pid"])
os.kill(pid, signal.SIGTERM)
until(lambda: os.path.exists(tmp + "/diff"), "the diff")
before = os.stat(tmp + "/diff")
for s in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
    os.kill(pid, s)
    time.sleep(0.05)
after = os.stat(tmp + "/diff")
expect((after.st_ino, after.st_mtime), (before.st_ino, before.st_mtime), "the diff")
h = None                # which disconnects
END
nbdkit_ended
log_lacks error
diff_is "$tmp/diff" "$tmp/base" "$tmp/shown"
