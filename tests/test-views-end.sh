#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The server ends, and saves its overlay in place, while clients have views and read them.
# The diff is sound, has what the disk was at the end, and takes no space for what only a
# view had (as there is little of that, and it lies in memory if possible).  A client gets an error for what it reads of its view then, or what is right.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin pattern
requires_filter pause log
requires qemu-img --version
size=$((16 * 1024 * 1024))
base_file "$tmp/base" $size

d=$tmp/d
mkdir "$d"
if [ -w /dev/shm ]; then
    rmdir "$d"
    memory=$(mktemp -d /dev/shm/cowtest.XXXXXX)
    cleanup_fn rm -rf "$memory"
    ln -s "$memory" "$d"
fi

# run SIGNAL ARGS...
run ()
{
    local signal=$1
    echo "$*"
    shift
    rm -rf "$tmp/pause" "$tmp/log" "${d:?}"/*
    start_nbdkit --filter=log --filter=pause pattern $size pause-control="$tmp/pause" \
        logfile="$tmp/log" cow-views=true cow-save="$tmp/d/diff" "$@"
    py "$signal" <<'END'
import signal
size = 16 * M
h = connect()
p, log = Pause(), Log()
rand = random.Random(8)
moments = []


def view(name):
    """A view, and what it shows."""
    v = connect(name)
    n = v.get_size()
    moments.append((v, v.pread(n, 0)))


h.pwrite(b"0" * 100000, 15 * M + 1000)
h.pwrite(b"1" * (8 * M), 4 * M)
view("@snapshot")
h.pwrite(b"2" * (4 * M), 10 * M)
view("@diff.qcow2")
h.pwrite(b"3" * (2 * M), 13 * M)
view("@full.qcow2")
# Little of it stays, and a few blocks are written in slots that views have, and in others.
h.zero(15 * M, 0)
for i in range(8):
    h.pwrite(b"4" * 5000, i * 1900000 + 1000)
h.trim(5000, 3 * 1900000 + 1000)
with open(tmp + "/wanted", "wb") as f:
    f.write(h.pread(size, 0))
for v, content in moments:
    same(v.pread(len(content), 0), content, "a view before the end")

# Reads are under way all the time; two of them, of what the snapshot has of the base and
# then of the file, have come as far as the base.
snapshot, content = moments[0]
p.pause()
log.mark()
waiting = [(at, n, read(snapshot, n, at)) for at, n in ((3 * M, 3 * M), (4 * M - 512, M))]
log.wait(len(waiting))
flying = []


def some_reads():
    """A few: told to end, each of a connection's 16 threads takes one more request."""
    for v, content in moments:
        for i in range(4):
            n = rand.randrange(1, 100 * K)
            at = rand.randrange(len(content) - n)
            flying.append((read(v, n, at), content[at:at + n]))


some_reads()
os.kill(int(os.environ["pid"]), getattr(signal, "SIG" + sys.argv[1]))
until(lambda: os.path.exists(tmp + "/d/diff"), "the diff")
subprocess.run(["cp", "--sparse=always", tmp + "/d/diff", tmp + "/copy"], check=True)
saved = os.stat(tmp + "/d/diff")
with open(tmp + "/saved", "w") as f:
    f.write("%d %d" % (saved.st_ino, saved.st_mtime_ns))
some_reads()
p.resume()
some_reads()
ended = 0
flying += [(r, content[at:at + n]) for at, n, r in waiting]
for r, wanted in flying:
    try:
        r.wait()
    except nbd.Error as e:
        expect(errno.errorcode[e.errnum], "ESHUTDOWN", "error of a read")
        ended += 1
        continue
    same(r.buf.to_bytearray(), wanted, "a view at the end")
if ended == 0:
    fail("all views go on when the overlay is saved")
for v, content in moments:
    v.shutdown()
h.shutdown()
END
    nbdkit_ended
    log_lacks error
    # Complete while they were still there, and the same file now.
    cmp "$tmp/copy" "$tmp/d/diff" || die "the diff has changed since"
    py <<'END'
now = os.stat(tmp + "/d/diff")
with open(tmp + "/saved") as f:
    expect("%d %d" % (now.st_ino, now.st_mtime_ns), f.read(), "the file")
END
    diff_is "$tmp/d/diff" "$tmp/base" "$tmp/wanted"
    # About 50 blocks of 4K and 17 tables, or fewer large ones.
    used=$(du -k "$tmp/d/diff" | cut -f 1)
    [ "$used" -le "$most" ] || die "the diff takes $used KiB, it should be $most or less"
    only_files "$tmp/d" diff
}

most=600
run TERM
run INT cow-save-format=extended
most=1500
run TERM cow-block-size=64K
