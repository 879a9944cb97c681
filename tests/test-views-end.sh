#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The server ends, and saves its overlay in place, while clients have views and read them.
# The diff is sound, has what the disk was at the end, and takes no space for what only a
# view had.  A client gets an error for what it reads of its view then, or what is right.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin pattern
requires_filter pause
requires qemu-img --version
size=$((16 * 1024 * 1024))
base_file "$tmp/base" $size

# run SIGNAL ARGS...
run ()
{
    local signal=$1
    echo "$*"
    shift
    rm -rf "$tmp/d" "$tmp/pause"
    mkdir "$tmp/d"
    start_nbdkit --filter=pause pattern $size pause-control="$tmp/pause" cow-views=true \
        cow-save="$tmp/d/diff" "$@"
    py "$signal" <<'END'
import signal, subprocess
size = 16 * M
h = connect()
p = Pause()
rand = random.Random(8)
moments = []


def view(name):
    """A view, and what it shows."""
    v = connect(name)
    n = v.get_size()
    moments.append((v, v.pread(n, 0)))


h.pwrite(b"1" * (8 * M), 0)
view("@snapshot")
h.pwrite(b"2" * (4 * M), 6 * M)
view("@diff.qcow2")
h.pwrite(b"3" * (2 * M), 9 * M)
view("@full.qcow2")
# Nothing of it stays but a few blocks in slots that views have, and in others.
h.zero(size, 0)
for i in range(8):
    h.pwrite(b"4" * 5000, i * 1900000 + 1000)
h.trim(5000, 3 * 1900000 + 1000)
with open(tmp + "/wanted", "wb") as f:
    f.write(h.pread(size, 0))
for v, content in moments:
    same(v.pread(len(content), 0), content, "a view before the end")

# Reads are under way all the time; one of them, of what the snapshot has of the base and
# then of the file, has come as far as the base.
snapshot, content = moments[0]
p.pause()
waiting = read(snapshot, M, 8 * M - 512)
across = read(snapshot, 4 * M, 7 * M)
time.sleep(0.1)
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
some_reads()
p.resume()
some_reads()
ended = 0
flying.append((waiting, content[8 * M - 512:9 * M - 512]))
flying.append((across, content[7 * M:11 * M]))
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
    cmp "$tmp/copy" "$tmp/d/diff" || die "the diff has changed since it was complete"
    diff_is "$tmp/d/diff" "$tmp/base" "$tmp/wanted"
    # 7 times 3 blocks of 4K and 17 tables, or fewer large ones.
    used=$(du -k "$tmp/d/diff" | cut -f 1)
    [ "$used" -le "$most" ] || die "the diff takes $used KiB, it should be $most or less"
    only_files "$tmp/d" diff
}

most=600
run TERM
run INT cow-save-format=extended
most=1500
run TERM cow-block-size=64K
