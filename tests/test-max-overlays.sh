#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# cow-max-overlays: a server full of overlays refuses the connection that would need
# another one, says why in its log, and goes on serving the others.  An overlay in
# which nothing was written gives its place back with its last client.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

start_nbdkit pattern 1M cow-max-overlays=2
py <<'END'
a, b = connect("a"), connect("b")
a.pwrite(b"a" * 512, 0)
b.pread(512, 0)
if not refused("c"):
    fail("a third overlay was made")
if "cow-max-overlays" not in server_log():
    fail("the log does not name cow-max-overlays")

# The exports that are there take more connections, and work.
a2 = connect("a")
same(a2.pread(1024, 0), b"a" * 512 + base(512, 512), "a")
a2.pwrite(b"A" * 512, 512)
same(b.pread(M, 0), base(0, M), "b")

# The server may take a moment to see that a client has gone.
def arrive(name):
    handles = []

    def accepted():
        try:
            handles.append(connect(name))
            return True
        except nbd.Error:
            return False
    until(accepted, "the place of an unwritten overlay, for " + name)
    return handles[0]

# The place of b is free again, that of a is not.
a.shutdown(); a2.shutdown(); b.shutdown()
for i in range(5):
    arrive("n%d" % i).shutdown()
c = arrive("c")
same(c.pread(M, 0), base(0, M), "c")
c.trim(4096, 0)
c.shutdown()
same(connect("a").pread(1024, 0), b"a" * 512 + b"A" * 512, "a at the end")
same(connect("c").pread(4096, 0), bytes(4096), "c at the end")
if not refused("b"):
    fail("a third overlay was made, after two were written")
END
stop_nbdkit

# A connection of its own each: the place is free when the connection ends.
start_nbdkit pattern 1M cow-max-overlays=2 cow-scope=connection
py <<'END'
a, b = connect(), connect()
a.pwrite(b"a", 0)
b.pwrite(b"b", 0)
if not refused():
    fail("a third overlay was made")
same(a.pread(4096, 0), b"a" + base(1, 4095), "a")
a.shutdown()
until(lambda: not refused(), "the place of a connection that has ended")
END
log_has 'cow-max-overlays'
