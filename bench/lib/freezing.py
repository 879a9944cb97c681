# SPDX-License-Identifier: BSD-3-Clause
"""Snapshots: how long others wait when the disk is frozen and released, and what
overwrites cost while a snapshot is held.

A snapshot is held by a connection to the export @snapshot, and given back with it.
"""

import os
import statistics
import time

import servers
from load import Fio, connect, fio
from servers import G, M, Base, Server, warm

DEPTHS = 1, 16

# ----------------------------------------------------------------------
# Freezing a large disk

CONNECTS = {  # after so much was written, all and if quick
    "connect-64m": (64 * M, 16 * M),
    "connect-1g": (G, 64 * M),
    "connect-4g": (4 * G, 128 * M),
}


def job(name, title, unit, better, digits):
    return dict(name=name, title=title, unit=unit, better=better, digits=digits)


JOBS = [
    job("latency-d%d%s" % (depth, when), "99.9%% of random writes of 4 KiB, depth %d, "
        "4 GiB written of 1 TiB, take no longer%s" % (depth, words), "ms", "less", 3)
    for depth in DEPTHS
    for when, words in (
        ("", ""),
        ("-freezing", ", while ten connections a second are made to @snapshot"),
        ("-releasing", ", while a snapshot is given back since which all changed"))
] + [
    job(name, "connect to @snapshot after %d MiB were written" % (amount // M), "ms",
        "less", 2)
    for name, (amount, _) in CONNECTS.items()
]


def start(size, space):
    """A server of a disk of this size, the overlay of which will take SPACE."""
    warm(space)
    return Server("cow", Base(None, "memory %d" % size), "cow-views=true")


def snapshot(server):
    return connect(server.uri("@snapshot"))


# ----------------------------------------------------------------------
# Latency

def random_blocks(count, depth):
    """fio's options to write COUNT bytes at random over the disk: each time the same
    blocks in the same order.
    """
    return ["--rw=randwrite", "--bs=4k", "--size=1t", "--norandommap",
            "--io_size=%d" % count, "--iodepth=%d" % depth]


def connect_time(server, count):
    """Of one connection at a time, when the one before has gone."""
    times = []
    for _ in range(count):
        server.settle()
        begin = time.monotonic()
        h = snapshot(server)
        times.append(time.monotonic() - begin)
        h.shutdown()
    return 1000 * statistics.median(times)


def p999(writer):
    """The time, in ms, within which 99.9% of its writes were answered."""
    return writer.end()["write"]["clat_ns"]["percentile"]["99.900000"] / 1e6


def freeze_during(writer, server, interval):
    while writer.running():
        begin = time.monotonic()
        snapshot(server).shutdown()
        time.sleep(max(0, begin + interval - time.monotonic()))


def latencies(server, depth, written, seconds):
    """Of a writer that writes once more what was written, or what it can of it in so
    many seconds; yields the end of the job's name, and its figure.
    """
    def writer():
        return Fio(server.uri(), *random_blocks(written, depth),
                   "--runtime=%d" % seconds)

    yield "", p999(writer())

    w = writer()
    freeze_during(w, server, seconds / 100)
    yield "-freezing", p999(w)

    server.settle()
    held = snapshot(server)
    pipes = server.pipes()
    fio(server.uri(), *random_blocks(written, 16))
    server.settle(pipes)
    w = writer()
    while server.pipes() == pipes and w.running():  # it has not connected yet
        time.sleep(0.01)
    held.shutdown()
    yield "-releasing", p999(w)
    server.settle()


def large_disk(quick):
    written, seconds = (128 * M, 2) if quick else (4 * G, 10)
    with start(1024 * G, 2 * written) as server:
        for name, amounts in CONNECTS.items():
            fio(server.uri(), *random_blocks(amounts[quick], 16))
            yield name, connect_time(server, 30 if quick else 100)
        for depth in DEPTHS:
            for when, figure in latencies(server, depth, written, seconds):
                yield "latency-d%d%s" % (depth, when), figure


# ----------------------------------------------------------------------
# Overwrites

FULL = G  # of a disk, all of it written
GIVEN_BACK = 10  # seconds after the release

OVERWRITES = [
    dict(name="overwrite", title="random overwrites of 4 KiB, depth 16, of 1 GiB that "
         "is full", unit="1/s", better="more", digits=0),
    dict(name="overwrite-held", title="the same with a snapshot held, each block once",
         unit="1/s", better="more", digits=0),
    dict(name="overwrite-growth", title="bytes by which files grew then, for each one "
         "written", unit="", better="less", digits=2),
    dict(name="overwrite-kept", title="of these, still taken %d s after the release"
         % GIVEN_BACK, unit="", better="less", digits=2),
]


class CopyBeforeWrite(Server):
    """qemu's way to a snapshot of a running disk: what is there is copied to a file
    before it is overwritten.  If not HELD, there is no snapshot.
    """

    def __init__(self, disk, held):
        self.held = held
        super().__init__("qemu-cbw", Base(disk))

    def target(self):
        return self.sock + ".target"

    def command(self, options):
        command = ["qemu-storage-daemon", "--blockdev",
                   "driver=file,node-name=disk,filename=" + self.base.file]
        if self.held:
            with open(self.target(), "wb") as f:
                f.truncate(os.path.getsize(self.base.file))
            command += ["--blockdev", "driver=file,node-name=target,filename="
                        + self.target(),
                        "--blockdev", "driver=copy-before-write,node-name=written,"
                        "file=disk,target=target",
                        "--blockdev", "driver=snapshot-access,node-name=snapshot,"
                        "file=written"]
        command += ["--nbd-server", "addr.type=unix,addr.path=" + self.sock,
                    "--export", "type=nbd,id=disk,writable=on,name=,node-name="
                    + ("written" if self.held else "disk")]
        if self.held:
            command += ["--export",
                        "type=nbd,id=snapshot,node-name=snapshot,name=snapshot"]
        return command

    def space(self):
        return os.stat(self.target()).st_blocks * 512 if self.held else 0


def fill(server, size):
    fio(server.uri(), "--rw=write", "--bs=1m", "--size=%d" % size)


def overwrite(server, size, seed):
    """Each block of the first half of SIZE bytes, once; returns how many a second."""
    result = fio(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=16",
                 "--size=%d" % (size // 2), "--randseed=%d" % seed)
    return result["write"]["iops"]


def copied_before(size):
    disk = os.path.join(servers.work, "overwritten")
    with open(disk, "wb") as f:
        f.truncate(size)
    with CopyBeforeWrite(disk, held=False) as server:
        fill(server, size)
        yield "overwrite", overwrite(server, size, 1)
    with CopyBeforeWrite(disk, held=True) as server:
        before = server.space()
        warm(size)  # once more: the host takes back what is not used
        yield "overwrite-held", overwrite(server, size, 2)
        yield "overwrite-growth", (server.space() - before) / (size // 2)
    # The target is a file, which goes whole with the snapshot.
    yield "overwrite-kept", 0.0
    os.unlink(disk)


def frozen(size):
    with start(size, 2 * size) as server:
        fill(server, size)
        yield "overwrite", overwrite(server, size, 1)
        before = server.space()
        held = snapshot(server)
        warm(size)
        yield "overwrite-held", overwrite(server, size, 2)
        yield "overwrite-growth", (server.space() - before) / (size // 2)
        held.shutdown()
        time.sleep(GIVEN_BACK)
        yield "overwrite-kept", (server.space() - before) / (size // 2)


def overwrites(kind, _bases, scale):
    size = FULL // scale
    if kind == "cow":
        yield from frozen(size)
    else:
        warm(2 * size)
        yield from copied_before(size)


# ----------------------------------------------------------------------
# The longest wait

WAITS = {
    "trim": "while 1 GiB of scattered blocks is trimmed",
    "release": "while a snapshot with 1 GiB of scattered changes is released",
    "views": "while views are opened 100 times a second",
}
WAIT_JOBS = [
    dict(name="wait-%s%s" % (event, what), title="random 4 KiB, depth 1: the longest "
         "%s" % (WAITS[event] + words), unit="ms", better="less", digits=2)
    for event in WAITS
    for what, words in (("", ""),
                        ("-usual", ": 99.9% of them in as long a time before"),
                        ("-before", ": the longest in as long a time before"))
]

WAIT_DISK = 64 * G
WATCHED = G  # behind it, where the writer is


def scatter(server, count):
    """So many bytes, at the same places each time."""
    fio(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=16",
        "--size=%d" % WAIT_DISK, "--io_size=%d" % count, "--randseed=4")


def trim_all(server):
    h = connect(server.uri())
    for offset in range(0, WAIT_DISK, G):
        h.trim(G, offset)
    h.shutdown()


def open_views(server, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        snapshot(server).shutdown()
        time.sleep(max(0, begin + 0.01 - time.monotonic()))


def waits(server, seconds, event):
    """Yields what somebody waits who reads and writes 4 KiB at a time for so many
    seconds: without the EVENT, then with it.
    """
    def client():
        return Fio(server.uri(), "--rw=randrw", "--bs=4k", "--iodepth=1",
                   "--offset=%d" % WAIT_DISK, "--size=%d" % WATCHED,
                   "--norandommap", "--time_based", "--runtime=%d" % seconds)

    def of(result, what):
        return max(what(result[d]["clat_ns"]) for d in ("read", "write")) / 1e6

    before = client().end()
    warm(WATCHED)
    running = client()
    time.sleep(0.5)  # it has connected
    event()
    during = running.end()
    yield "", of(during, lambda c: c["max"])
    yield "-usual", of(before, lambda c: c["percentile"]["99.900000"])
    yield "-before", of(before, lambda c: c["max"])


def longest_waits(quick):
    count, seconds = (32 * M, 2) if quick else (G, 10)
    with start(WAIT_DISK + WATCHED, 2 * count) as server:
        fio(server.uri(), "--rw=write", "--bs=1m", "--offset=%d" % WAIT_DISK,
            "--size=%d" % WATCHED)
        for event in WAITS:
            if event == "trim":
                scatter(server, count)
                happen = lambda: trim_all(server)
            elif event == "release":
                scatter(server, count)
                held = snapshot(server)
                scatter(server, count)
                happen = held.shutdown
            else:
                happen = lambda: open_views(server, seconds - 1)
            for what, figure in waits(server, seconds, happen):
                yield "wait-" + event + what, figure
            server.settle()


def measure(quick):
    yield from large_disk(quick)
