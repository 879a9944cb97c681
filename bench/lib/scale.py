# SPDX-License-Identifier: BSD-3-Clause
"""What overlays take: memory, file space, bytes written, as they grow in size and
number.
"""

import os
import statistics
from contextlib import ExitStack

from load import connect, fio, ms
from servers import G, K, M, Server

BLOCK = 4 * K

# ----------------------------------------------------------------------
# One overlay

SIZES = [
    dict(name="memory-%d" % percent, unit="MiB", better="less", digits=1,
         title="memory, 1 TiB disk, a block written in %d%% of its 32 MiB" % percent)
    for percent in (0, 25, 50, 100)
] + [
    dict(name="amplification", unit="", better="less", digits=2,
         title="bytes written to files for each one that a client writes (random "
         "4 KiB, fresh)"),
]

STRIDE = 32 * M
STRIDES = 1024 * G // STRIDE


def sizes(kind, bases, scale):
    with Server(kind, bases["empty"]) as server:
        yield "memory-0", server.memory() / M
        for percent in 25, 50, 100:
            # From the start again: what was written takes no more.
            count = STRIDES * percent // 100 // scale
            fio(server.uri(), "--rw=write", "--bs=4k", "--iodepth=16", "--size=1t",
                "--zonemode=strided", "--zonesize=4k", "--zonerange=%d" % STRIDE,
                "--io_size=%d" % (count * BLOCK))
            yield "memory-%d" % percent, server.memory() / M

    amount = 64 * M // scale
    with Server(kind, bases["fast"]) as server:
        before = server.written()
        fio(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=1g",
            "--io_size=%d" % amount)
        yield "amplification", (server.written() - before) / amount


# A slot of this filter is 128 KiB.  What it takes depends on whether its blocks lie one
# behind the other in the overlay's file; each block has some bits of its own besides.
SLOT = 128 * K
SLOTS = [
    dict(name="memory-slot-" + order, unit="bytes", better="less", digits=1,
         title="memory for each 128 KiB, all written, %s" % words)
    for order, words in (("run", "one block behind the other"),
                         ("spread", "block by block, in random order"))
]


def slots(kind, bases, scale):
    """By what the second half of the same many adds: the rest is the server's own."""
    for order, size, options in (
            ("run", 8 * G // scale, ["--rw=write", "--bs=32k"]),
            ("spread", 2 * G // scale, ["--rw=randwrite", "--bs=4k"])):
        half = size // 2
        with Server(kind, bases["empty"]) as server:
            taken = []
            for offset in 0, half:
                fio(server.uri(), *options, "--size=%d" % half, "--offset=%d" % offset)
                server.settle()
                taken.append(server.memory())
        yield "memory-slot-" + order, (taken[1] - taken[0]) * SLOT / half


# ----------------------------------------------------------------------
# Many overlays

COUNTS = [1, 100, 1000]

NUMBERS = [
    dict(name="overlays-%d-%s" % (count, what), unit=unit, better="less", digits=1,
         title="%d overlay%s on one base, a block written in each: %s"
         % (count, "s" if count > 1 else "", words))
    for count in COUNTS
    for what, unit, words in (
        ("time", "ms", "to make, connect and write, each"),
        ("diff", "ms", "to connect to the diff of each and read it"),
        ("memory", "KiB", "memory, all of it, for each"),
        ("space", "KiB", "file space of each"))
]


def write_block(uri, i):
    h = connect(uri)
    h.pwrite(os.urandom(BLOCK), i * M)
    return h


class Farm:
    """One server with an overlay for each export."""

    def __init__(self, kind, bases, stack):
        self.server = stack.enter_context(
            Server(kind, bases["golden"], "cow-views=true",
                   "cow-max-overlays=%d" % max(COUNTS)))

    def add(self, i):
        write_block(self.server.uri("vm%d" % i), i).shutdown()

    def read_diff(self, i):
        h = connect(self.server.uri("vm%d@diff.qcow2" % i))
        size = h.get_size()
        for offset in range(0, size, M):
            h.pread(min(M, size - offset), offset)
        h.shutdown()

    def taken(self):
        self.server.settle()
        return self.server.memory(), self.server.space()


class Herd:
    """A server for each overlay."""

    def __init__(self, kind, bases, stack):
        self.start = lambda i: stack.enter_context(
            Server(kind, bases["golden"], name="sock%d" % i))
        self.servers = []

    def add(self, i):
        server = self.start(i)
        self.servers.append(server)
        write_block(server.uri(), i).shutdown()

    def taken(self):
        return (sum(s.memory() for s in self.servers),
                sum(s.space() for s in self.servers))


def numbers(kind, bases, scale):
    for count in COUNTS:
        count_now = max(1, count // scale)
        with ExitStack() as stack:
            many = (Farm if kind == "cow" else Herd)(kind, bases, stack)
            times = [ms(many.add, i) for i in range(count_now)]
            diffs = ([ms(many.read_diff, i) for i in range(count_now)]
                     if kind == "cow" else None)
            memory, space = many.taken()
        name = "overlays-%d-" % count
        yield name + "time", statistics.median(times)
        yield name + "diff", diffs and statistics.median(diffs)
        yield name + "memory", memory / count_now / K
        yield name + "space", space / count_now / K
