#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The server is told to stop while several clients write, zero and trim all the time and
# do not go.  The diff is complete soon; each request that was acknowledged is in it, none
# is there by half that was not, and what comes later fails with ESHUTDOWN.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin file
requires qemu-img --version
size=$((8 * 1024 * 1024))
base_file "$tmp/base" $size
mkdir "$tmp/exports"
for i in 0 1 2; do
    ln "$tmp/base" "$tmp/exports/e$i"
done

# run SIGNAL NR-CONNECTIONS EXPORTS ARGS...: EXPORTS is "one", or "each" where each
# connection has an export of its own.
run ()
{
    local signal=$1 connections=$2 exports=$3 c
    shift 3
    rm -rf "$tmp/diff"
    if [ "$exports" = one ]; then
        start_nbdkit file "$tmp/base" cow-save="$tmp/diff" "$@"
    else
        mkdir "$tmp/diff"
        start_nbdkit file dir="$tmp/exports" cow-save="$tmp/diff" "$@"
    fi
    py "$signal" "$connections" "$exports" <<'END'
import collections, signal, threading

SIZE = 8 * M
CELL = 3000                # no multiple of a block
each = sys.argv[3] == "each"
number, nr = getattr(signal, "SIG" + sys.argv[1]), int(sys.argv[2])
cells = SIZE // CELL // nr  # of each connection
stop = time.monotonic() + guard / 2


def pattern(c, i, version):
    return struct.pack(">IIII", c, i, version, 0xc0ffee) * (CELL // 16) + b"tail5678"


class Client:
    """Writes its cells; knows what each may hold: the last acknowledged version, and
    those that are in flight.
    """

    def __init__(self, c):
        self.c, self.h = c, connect("e%d" % c if each else "")
        self.acked = {}      # cell -> content (bytes or None: zeroes)
        self.pending = {}    # cell -> content
        self.errors = collections.Counter()
        self.acks = 0
        self.rand = random.Random(c)
        self.t = threading.Thread(target=self.run)

    def run(self):
        flying = {}
        version = 0
        ended = False
        while not ended or flying:
            while not ended and len(flying) < 8:
                i = self.rand.randrange(cells)
                if i in self.pending:
                    continue
                at = (self.c * cells + i) * CELL
                version += 1
                kind = self.rand.random()
                if kind < 0.8:
                    content = pattern(self.c, i, version)
                    buf = nbd.Buffer.from_bytearray(bytearray(content))
                    cookie = self.h.aio_pwrite(buf, at)
                else:
                    content, buf = None, None
                    call = self.h.aio_zero if kind < 0.9 else self.h.aio_trim
                    cookie = call(CELL, at)
                self.pending[i] = content
                flying[cookie] = (i, content, buf)
            self.h.poll(1000)
            for cookie in list(flying):
                try:
                    if not self.h.aio_command_completed(cookie):
                        continue
                except nbd.Error as e:
                    # What is refused was not done: pending, so either is right only
                    # for those that the server had not finished.
                    self.errors[errno.errorcode.get(e.errnum, e.errnum)] += 1
                    i, content, buf = flying.pop(cookie)
                    del self.pending[i]
                    ended = True
                    continue
                i, content, buf = flying.pop(cookie)
                self.acked[i] = content
                del self.pending[i]
                self.acks += 1
            if time.monotonic() > stop:
                fail("the writes were never refused")


clients = [Client(c) for c in range(nr)]
for c in clients:
    c.t.start()
until(lambda: all(c.acks > 300 for c in clients), "writes")
os.kill(int(os.environ["pid"]), number)
diffs = [tmp + "/diff/e%d.qcow2" % c for c in range(nr)] if each else [tmp + "/diff"]
until(lambda: all(map(os.path.exists, diffs)), "the diff")
for c in clients:
    c.t.join()
for c in clients:
    expect(set(c.errors), {"ESHUTDOWN"}, "the errors")
    expect(c.acks > 300, True, "acknowledged")

# Still connected: writes go on being refused.  (Reads may be.)
for c in clients:
    try:
        c.h.pwrite(b"late", 0)
        fail("a late write was acknowledged")
    except nbd.Error as e:
        if e.errnum not in (errno.ESHUTDOWN, 0):
            expect(errno.errorcode[e.errnum], "ESHUTDOWN", "a late write")

want = bytearray(base(0, SIZE))
for c in clients:
    if each:
        want = bytearray(base(0, SIZE))
    for i, content in c.acked.items():
        at = (c.c * cells + i) * CELL
        want[at:at + CELL] = content or bytes(CELL)
    with open(tmp + ("/wanted%d" % c.c if each else "/wanted"), "wb") as f:
        f.write(want)
print(sys.argv[1], sum(c.acks for c in clients), "requests acknowledged")
END
    nbdkit_ended
    log_lacks error
    if [ "$exports" = one ]; then
        diff_is "$tmp/diff" "$tmp/base" "$tmp/wanted"
    else
        for ((c = 0; c < connections; c++)); do
            diff_is "$tmp/diff/e$c.qcow2" "$tmp/base" "$tmp/wanted$c"
        done
    fi
}

run TERM 4 one
run INT 8 one cow-block-size=64K
run HUP 3 one cow-save-compact=true
run QUIT 4 one cow-save-format=extended
run TERM 4 one cow-block-size=2M
run TERM 3 each
run INT 3 each cow-save-compact=true
