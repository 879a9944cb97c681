#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A base that has changed its size no longer fits the overlay: the next connection is
# refused, with the reason in the log.  Without an overlay, the new size is served.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file

base_file "$tmp/base" 1048576
start_nbdkit file "$tmp/base"
py <<'END'
path = tmp + "/base"
h = connect()
h.shutdown()

# Nothing was written: there is nothing that would not fit.
def new_size(n):
    os.truncate(path, n)
    def there():
        try:
            return connect().get_size() == n
        except nbd.Error:
            return False        # the last client is still leaving
    until(there, "the new size of the disk")
new_size(2 * M)
new_size(M)

h = connect()
os.truncate(path, 2 * M)
if not refused():
    fail("another size was accepted while a client is there")
os.truncate(path, M)
h.pwrite(b"x" * 512, 0)
for n in M + 512, M - 512, 0:
    os.truncate(path, n)
    if not refused():
        fail("a base of %d bytes was accepted" % n)
    if n > M:
        same(h.pread(1024, 0), b"x" * 512 + base(512, 512), "the first client")
h.shutdown()
if not refused():
    fail("another size was accepted after the first client has left")
os.truncate(path, M)
same(connect().pread(512, 0), b"x" * 512, "with the old size")
END
log_has 'error: .*size.*1048576.*1049088'
