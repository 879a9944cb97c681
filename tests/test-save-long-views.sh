#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Views are held while all of the disk is overwritten, again and again: the overlay file
# gets so long that its refcount table does not fit into the head.  It is saved in place all
# the same, though $TMPDIR has no room.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin memory
requires qemu-img --version
d=$tmp/d
mkdir "$d"
if [ -w /dev/shm ]; then
    rmdir "$d"
    memory=$(mktemp -d /dev/shm/cowtest.XXXXXX)
    cleanup_fn rm -rf "$memory"
    ln -s "$memory" "$d"
fi
mkdir "$tmp/temporary"
no_leak_check
export TMPDIR=$tmp/temporary
start_nbdkit memory 3328M cow-views=true cow-save="$d/diff"
rmdir "$TMPDIR"

# One block of each slot; each overwrite takes a fresh place.
py "$pid" <<'END'
h = connect()
views = []
for name in "@snapshot", "@diff.qcow2", "@full.qcow2", None:
    data = b"%d" % len(views) * 4 * K
    for at in range(0, 3328 * M, 128 * K):
        h.pwrite(data, at)
    if name:
        views.append(connect(name))
same(views[0].pread(4 * K, 1000 * 128 * K), b"0" * 4 * K, "the first view")
os.kill(int(sys.argv[1]), 15)
while not os.path.exists(tmp + "/d/diff"):
    said = open(os.environ["log"]).read()
    if "error:" in said:
        fail(said)
    time.sleep(0.05)
END
nbdkit_ended
log_lacks error
only_files "$d/" diff
sound_diff "$d/diff"

mkdir "$TMPDIR"
start_nbdkit memory 3328M cow-load="$d/diff"
py <<'END'
h = connect()
for at in range(0, 3328 * M, 128 * K):
    same(h.pread(8 * K, at), b"3" * 4 * K + bytes(4 * K), "what was saved at %d" % at)
END
stop_nbdkit
