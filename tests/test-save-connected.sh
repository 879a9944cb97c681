#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The server is told to stop while clients are connected and do nothing: the diff is there,
# complete, though the server waits for them, and is not touched any more when they
# go.  Neither does the save wait for requests that wait for the base.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin file
requires_filter pause delay
requires qemu-img --version
base_file "$tmp/base" 8388608
cp "$tmp/base" "$tmp/wanted"
printf 'idle' | dd of="$tmp/wanted" bs=4 seek=100000 conv=notrunc status=none

for signal in TERM INT; do
    rm -f "$tmp/diff"
    start_nbdkit file "$tmp/base" cow-save="$tmp/diff"
    SIGNAL=$signal py <<'END'
import signal
clients = [connect() for i in range(5)]
clients[0].pwrite(b"idle", 400000)
pid = int(os.environ["pid"])
os.kill(pid, getattr(signal, "SIG" + os.environ["SIGNAL"]))
until(lambda: os.path.exists(tmp + "/diff"), "the diff")
os.kill(pid, 0)         # it waits for us
subprocess.run(["cp", "--sparse=always", tmp + "/diff", tmp + "/copy"], check=True)
before = os.stat(tmp + "/diff")
clients.clear()         # which disconnects
with open(tmp + "/before", "w") as f:
    f.write("%d %d" % (before.st_ino, before.st_mtime_ns))
END
    nbdkit_ended
    log_lacks error
    # Complete while they were still there, and the same file now.
    diff_is "$tmp/copy" "$tmp/base" "$tmp/wanted"
    cmp "$tmp/copy" "$tmp/diff" || die "the diff has changed since"
    py <<'END'
with open(tmp + "/before") as f:
    now = os.stat(tmp + "/diff")
    expect("%d %d" % (now.st_ino, now.st_mtime_ns), f.read(), "the file")
END
done

# The base does not answer: a read of it and a write that needs it are under way.
rm -f "$tmp/diff"
start_nbdkit --filter=pause file "$tmp/base" cow-save="$tmp/diff" \
    pause-control="$tmp/pause"
py <<'END'
import signal
h = connect()
h.pwrite(b"idle", 400000)
p = Pause()
p.pause()
r = read(h, 4096, 800000)
w = write(h, b"never", 1200001)
time.sleep(0.1)
os.kill(int(os.environ["pid"]), signal.SIGTERM)
until(lambda: os.path.exists(tmp + "/diff"), "the diff")
p.resume()
try:
    w.wait()
    fail("a write was acknowledged after the diff was complete")
except nbd.Error as e:
    expect(errno.errorcode[e.errnum], "ESHUTDOWN", "the write")
# A client that goes while an answer is on its way resets the connection, which the
# server calls an error.
until(r.answered, "the read")
END
nbdkit_ended
log_lacks error
diff_is "$tmp/diff" "$tmp/base" "$tmp/wanted"
