#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Each overlay keeps a file open: the soft limit on open files is raised to the hard one
# at start, and where that cannot hold cow-max-overlays a warning says so.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires prlimit --version
case $TEST_WRAPPER in
    *valgrind*) skip "valgrind has limits on open files of its own" ;;
esac
requires_plugin pattern

limits ()
{
    awk '/^Max open files/ { print $4, $5 }' "/proc/$pid/limits"
}

under=(prlimit --nofile=100:1000)
start_nbdkit pattern 1M cow-max-overlays=500
[ "$(limits)" = "1000 1000" ] || die "the limits are $(limits)"
log_lacks 'warning'
# More files than the soft limit allowed.
py <<'END'
for i in range(200):
    connect(str(i)).pwrite(b"%06d" % i, 0)
for i in range(200):
    same(connect(str(i)).pread(6, 0), b"%06d" % i, "export %d" % i)
END
stop_nbdkit

# The default is more than that.
under=(prlimit --nofile=100:200)
start_nbdkit pattern 1M
log_has 'warning:.* 200 .*cow-max-overlays=1024'
[ "$(grep -c warning "$log")" -eq 1 ] || die "more than one warning"
py <<'END'
h = connect()
h.pwrite(b"x", 0)
same(h.pread(1, 0), b"x", "data")
END
stop_nbdkit

start_nbdkit pattern 1M cow-max-overlays=200
log_has 'warning:.* 200 .*cow-max-overlays=200'
stop_nbdkit
start_nbdkit pattern 1M cow-max-overlays=20
log_lacks 'warning'
stop_nbdkit

# An overlay that is going to replace a file in a directory has that open as well.
mkdir "$tmp/d"
for n in 60 80; do
    start_nbdkit pattern 1M cow-save="$tmp/d/" cow-max-overlays=$n
    if [ $n = 60 ]; then log_lacks warning; else log_has "warning:.* 200 .*=80 .*each: 2"; fi
    py <<END
for i in range($n):
    connect(str(i)).pwrite(b"%06d" % i, 0)
END
    log_lacks error
    stop_nbdkit
    # (Now there is something to replace.)
    [ "$(find "$tmp/d" -name '*.qcow2' | wc -l)" -eq $n ] || die "not $n diffs"
done
start_nbdkit pattern 1M cow-save="$tmp/d/" cow-load="$tmp/d/" cow-max-overlays=60
py <<'END'
for i in range(60):
    connect(str(i)).pwrite(b"again.", 0)
END
open=$(find "/proc/$pid/fd" -lname "$tmp/d/*" | wc -l)
[ "$open" -eq 120 ] || die "$open files are open"
log_lacks error
