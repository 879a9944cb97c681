#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A view with no name in front, as "@snapshot", is one of the plugin's default export, which
# has a name of its own.  That is known when a client has used or listed it.  Until then
# what is written to it by its name would be missed, so the view is refused.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin eval

start ()
{
    start_nbdkit eval cow-views=true \
        list_exports='echo NAMES; echo one; echo two' default_export='echo two' \
        open='case "$3" in one|two) echo "$3" ;; *) echo "no such export" >&2; exit 1 ;; esac' \
        get_size='echo 64K' can_multi_conn='exit 0' thread_model='echo parallel' \
        pread='yes "$2" | head -c "$3"'
}

start
py <<'END'
two = connect("two")
two.pwrite(b"written", 100)
expect(refused("@snapshot"), True, "refusal of what may be another one")
expect(refused("@diff.qcow2"), True, "refusal of its image")
same(connect("@base").pread(4, 0), b"two\n", "the base of the default")
END
log_has 'the name of the default export is not known yet'
nbdinfo --list "nbd+unix://?socket=$sock" >/dev/null
py <<'END'
same(connect("@snapshot").pread(7, 100), b"written", "the snapshot, once it was listed")
END
stop_nbdkit

start
py <<'END'
def base_of(name):
    return (name.encode() + b"\n") * (64 * K // 4)


h = connect("")
one = connect("one")
for b, name in ("", "two"), ("one", "one"), ("two", "two"):
    same(connect(b + "@base").pread(64 * K, 0), base_of(name), "the base of %r" % b)
h.pwrite(b"written", 100)
one.pwrite(b"ONE", 100)
same(connect("two").pread(7, 100), b"written", "the default by its name")

# Both names are the same export: a program gets one moment with both.
a = connect("two@snapshot")
h.pwrite(b"changed", 100)
b = connect("@snapshot")
want = bytearray(base_of("two"))
want[100:107] = b"written"
same(a.pread(64 * K, 0), want, "two@snapshot")
same(b.pread(64 * K, 0), want, "@snapshot")
leave(a, b)
image = connect("@diff.qcow2")
if b"changed" not in image.pread(image.get_size(), 0):
    fail("@diff.qcow2 is not of the default export")
want = bytearray(base_of("one"))
want[100:103] = b"ONE"
same(connect("one@snapshot").pread(64 * K, 0), want, "one@snapshot")
END
nbdinfo --list --json "$uri" >"$tmp/list"
[ "$(grep -c '"export-name": "\(one\|two\)' "$tmp/list")" -eq 10 ] ||
    { cat "$tmp/list"; die "the list"; }
stop_nbdkit
log_lacks error
