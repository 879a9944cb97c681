#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual's recipe for a disk that is larger than its base, also for a diff that was
# saved when it was not.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires_filter truncate

# larger PATTERN: the disk is larger, has what the job has written, and more is written.
larger ()
{
    sock=disk.sock py "$1" <<'END'
h = connect()
expect(h.get_size(), 4 * G, "the size")
with open("seen.img", "rb") as f:
    same(h.pread(2 * M, 0), f.read(), "what the job has written")
same(h.pread(M, 2 * M), bytes(M), "what is behind the base")
if sys.argv[1] == "new":
    h.pwrite(b"large" * 100000, 3 * G)
same(h.pread(500000, 3 * G), b"large" * 100000, "what was written there")
END
    rm -f disk.sock
}

fresh
nbdkit -U - --filter=cow file disk.img cow-save=diff.qcow2 --run './job "$uri"'
run <<'END'
qemu-img resize diff.qcow2 4G
END
for what in new old; do
    run <<'END'
nbdkit -U disk.sock --filter=cow --filter=truncate file disk.img truncate=4G \
    cow-load=diff.qcow2 cow-save=diff.qcow2
END
    larger $what
    stop_server
done

# In qemu too.
qemu-img rebase -u -f qcow2 -b disk.img -F raw diff.qcow2
py <<'END'
with open("larger.img", "wb") as f, open("seen.img", "rb") as seen:
    f.write(seen.read())
    f.seek(3 * G)
    f.write(b"large" * 100000)
    f.truncate(4 * G)
END
qemu-img compare -q -f qcow2 -F raw diff.qcow2 larger.img || die "not the larger disk"
