#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The base is never written: after requests of all kinds its content, size and times are
# what they were, though the file could be written.  It is opened for reading only.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file

base_file "$tmp/base" 4194304
fingerprint "$tmp/base" >"$tmp/before"
for args in cow-on-read=false cow-on-read=true cow-on-cache=true \
    cow-scope=connection; do
    start_nbdkit file "$tmp/base" $args
    py <<'END'
h = connect()
rand = random.Random(5)
for i in range(100):
    at = rand.randrange(4 * M)
    n = min(rand.randrange(1, 100000), 4 * M - at)
    h.pwrite(b"x" * n, at, nbd.CMD_FLAG_FUA)
    h.zero(n, at // 2)
    h.trim(n // 2 + 1, at // 3)
    h.cache(n, at)
    h.pread(n, at)
h.flush()
fds = "/proc/%s/fd" % os.environ["pid"]
for fd in os.listdir(fds):
    try:
        if os.readlink(fds + "/" + fd) != tmp + "/base":
            continue
        with open(fds + "info/" + fd) as f:
            flags = int(re.search(r"flags:\s*(\d+)", f.read()).group(1), 8)
        expect(flags & os.O_ACCMODE, os.O_RDONLY, "access mode of the base")
    except FileNotFoundError:
        pass
END
    stop_nbdkit
    fingerprint "$tmp/base" | cmp - "$tmp/before" || die "the base has changed"
done

# One that cannot be written at all.
chmod 444 "$tmp/base"
fingerprint "$tmp/base" >"$tmp/before"
start_nbdkit file "$tmp/base"
py <<'END'
h = connect()
h.pwrite(b"x" * 10000, 10000)
same(h.pread(10000, 10000), b"x" * 10000, "written")
END
fingerprint "$tmp/base" | cmp - "$tmp/before" || die "the base has changed"
