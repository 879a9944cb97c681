#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A server that aborts saves what was acknowledged.  nbdkit 1.32 does that (a failed
# assertion, "sock >= 0") when a client is killed that waits for several answers.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin file
requires qemu-img --version
base_file "$tmp/base" 8388608
cp "$tmp/base" "$tmp/wanted"
printf 'written' | dd of="$tmp/wanted" bs=1 seek=400000 conv=notrunc status=none

# No core file is needed, and no sanitizer is to take the signal for its own.
ulimit -c 0
export ASAN_OPTIONS="$ASAN_OPTIONS:handle_abort=0"

start_nbdkit file "$tmp/base" cow-save="$tmp/diff"
echo 'connect().pwrite(b"written", 400000)' | py
end_nbdkit ABRT 134
diff_is "$tmp/diff" "$tmp/base" "$tmp/wanted"

# Clients that are killed.  The server may survive them.
rm "$tmp/diff"
start_nbdkit file "$tmp/base" cow-save="$tmp/diff"
echo 'connect().pwrite(b"written", 400000)' | py
for ((i = 0; i < 10; i++)); do
    kill -0 "$pid" 2>/dev/null || break
    py <<'END' 2>/dev/null || :
import signal
h = connect()
for i in range(16):
    h.aio_pread(nbd.Buffer(8 * M), 0)
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
    h.poll(-1)
os.kill(os.getpid(), signal.SIGKILL)
END
done
kill -TERM "$pid" 2>/dev/null || :
nbdkit_ended 0 134
diff_is "$tmp/diff" "$tmp/base" "$tmp/wanted"
