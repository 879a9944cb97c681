#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The overlay's file is in $TMPDIR, else in /var/tmp.  It is made at the first write, has
# no name, is nobody else's to read and not passed on to other programs.  A directory
# in which no file can be made keeps the server from starting, and is named.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

# (Tools that run the server may have files of their own in there.)
check_overlay='
def names():
    return [n for n in os.listdir(o) if not n.startswith("vgdb")]

if o != "/var/tmp":
    expect(names(), [], "names in the directory")
expect(len(overlays(o)), 0, "overlay files before the first write")
h = connect()
h.pread(4096, 0)
h.flush()
expect(len(overlays(o)), 0, "overlay files after a read")
h.pwrite(b"x", 5000)
files = overlays(o)
expect(len(files), 1, "overlay files after a write")
expect(files[0].st_mode & 0o7777, 0o600, "mode")
expect(files[0].st_nlink, 0, "links")
fds = "/proc/%s/fd" % os.environ["pid"]
for fd in os.listdir(fds):
    try:
        to = os.readlink(fds + "/" + fd)
    except FileNotFoundError:
        continue
    if (to.startswith(o + "/") and to.endswith(" (deleted)")
            and not to.startswith(o + "/valgrind_")):
        with open(fds + "info/" + fd) as f:
            flags = int(re.search(r"flags:\s*(\d+)", f.read()).group(1), 8)
        if not flags & os.O_CLOEXEC:
            fail("the overlay file is open without O_CLOEXEC")
if o != "/var/tmp":
    expect(names(), [], "names in the directory")
same(h.pread(3, 4999), base(4999, 1) + b"x" + base(5001, 1), "data")
'

mkdir "$tmp/o"
TMPDIR=$tmp/o start_nbdkit pattern 1M
{ echo 'o = tmp + "/o"'; echo "$check_overlay"; } | py
stop_nbdkit
[ -z "$(find "$tmp/o" -mindepth 1)" ] || die "something was left behind"

start_nbdkit pattern 1M
{ echo 'o = "/var/tmp"'; echo "$check_overlay"; } | py
stop_nbdkit

# A relative one is relative to where the server was started, and not to / where a
# server in the background goes.
cd "$tmp"
sock=$tmp/background
# shellcheck disable=SC2086
TMPDIR=o $TEST_WRAPPER "$NBDKIT" -U "$sock" -P "$sock.pid" \
    --filter="$FILTER" pattern 1M >"$tmp/background.log" 2>&1 </dev/null ||
    { cat "$tmp/background.log"; die "no server in the background"; }
until [ -s "$sock.pid" ]; do sleep 0.05; done
pid=$(cat "$sock.pid")
cleanup_fn kill "$pid"
{ echo 'o = tmp + "/o"'; echo "$check_overlay"; } | py

# What cannot be used.  (Valgrind could not use it either.)
case $TEST_WRAPPER in *valgrind*) TEST_WRAPPER= ;; esac
touch "$tmp/file"
directories=("$tmp/nowhere" "$tmp/file" /proc nowhere)
if [ "$(id -u)" -ne 0 ]; then
    mkdir -m 500 "$tmp/locked"
    directories+=("$tmp/locked")
fi
for dir in "${directories[@]}"; do
    TMPDIR=$dir nbdkit_refuses "$dir" --filter="$FILTER" pattern 1M
    TMPDIR=$dir nbdkit_refuses TMPDIR --filter="$FILTER" pattern 1M
done

# One that root can use, but not the user that the server becomes.
if [ "$(id -u)" -eq 0 ] && id nobody >/dev/null 2>&1; then
    mkdir -m 700 "$tmp/of-root"
    TMPDIR=$tmp/of-root nbdkit_refuses "$tmp/of-root" -u nobody \
        --filter="$FILTER" pattern 1M
fi
