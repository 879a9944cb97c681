#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A child that a plugin has forked has the handlers of signals that the filter has put in
# front of nbdkit's.  When it dies by a signal, that is not the end of the server: nothing
# is saved, and the disk can be written.

. "${srcdir:-$(dirname "$0")}/functions.sh"
plugin=$abs_top_builddir/tests/.libs/forking-plugin.so
[ -e "$plugin" ] || skip "tests/forking-plugin was not built"
requires qemu-img --version
# (No sanitizer is to take the signal of the child for its own.)
export ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}handle_abort=0"

start_nbdkit "$plugin" cow-save="$tmp/diff"
py <<'END'
h = connect()
# Written in parts, so that the base is read, and a child dies, for each.
h.pwrite(b"one", 100)
h.pwrite(b"two", 200000)
h.pwrite(b"all" * 4096, 65536)
same(h.pread(3, 100), b"one", "what was written first")
same(h.pread(5, 199999), b"btwob", "what was written then")
if os.path.exists(tmp + "/diff"):
    fail("it was saved before the end of the server")
with open(tmp + "/wanted", "wb") as f:
    f.write(h.pread(M, 0))
h.shutdown()
END
end_nbdkit TERM
log_lacks error
head -c 1048576 /dev/zero | tr '\0' b >"$tmp/base"
diff_is "$tmp/diff" "$tmp/base" "$tmp/wanted"
