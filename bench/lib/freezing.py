# SPDX-License-Identifier: BSD-3-Clause
"""Snapshots: how long a writer waits when the disk is frozen and released, and what
overwrites cost while a snapshot is held.

A snapshot is held by a connection to the export @snapshot, and given back with it.
"""

import os
import random
import socket
import statistics
import struct
import sys
import time

from load import Fio, connect, fio
from servers import G, K, M, Base, Server, warm

BLOCK, SLOT = 4 * K, 128 * K  # of the filter
DEPTHS = 1, 16

# ----------------------------------------------------------------------
# The jobs: those of a large disk, and those of overwrites

CONNECTS = {  # after so much was written, all and if quick
    "connect-64m": (64 * M, 16 * M),
    "connect-1g": (G, 64 * M),
    "connect-4g": (4 * G, 128 * M),
}

# Slots that hold one block or all of theirs: how many, all and if quick, and how often
# each is written where all have a place of their own.
SLOTS = {"one": (262144, 16384), "full": (32768, 2048)}
BLOCKS = {"one": 1, "full": SLOT // BLOCK}
PASSES = {"one": 2, "full": 16}


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
] + [
    job("overwrite-%s%s" % (slots, when), "random overwrites of 4 KiB, depth 16, %s%s"
        % (words, more), unit, "more", digits)
    for slots, words in (("one", "slots of one block"), ("full", "full slots"))
    for when, more, unit, digits in (
        ("", "", "1/s", 0),
        ("-first", ": each slot's first after a snapshot, to that rate", "ratio", 2),
        ("-moved", ": once all have moved, to that rate", "ratio", 2))
] + [
    job("overwrite-full-random", "eight for each full slot with a snapshot held, "
        "to those without", "ratio", "more", 2),
] + [
    job("space-%s-%s" % (slots, when), "file space, %s, %s" % (words, more), "MiB",
        "less", 0)
    for slots, words in (("one", "1 GiB in slots of one block"),
                         ("full", "4 GiB in full slots"))
    for when, more in (("before", "before the snapshot"),
                       ("held", "with one since which each slot was written to"),
                       ("after", "once it is given back"))
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

def overwrite(server, offsets):
    """Writes a block at each of these offsets, in this order, at depth 16; returns how
    many a second.  (None of fio's patterns goes to each slot at random and just once,
    and libnbd's Python is slower than the server.)
    """
    # Magic numbers and layout are the NBD protocol's.
    requests = [struct.pack(">IHHQQI", 0x25609513, 0, 1, 0, offset, BLOCK)
                for offset in offsets]
    reply = struct.pack(">IIQ", 0x67446698, 0, 0)
    data = os.urandom(BLOCK)
    made, answers = 0, bytearray()
    h = connect(server.uri())
    with socket.socket(fileno=os.dup(h.aio_get_fd())) as s:
        s.setblocking(True)
        start = time.monotonic()
        while len(answers) < len(requests) * len(reply):
            end = len(answers) // len(reply) + 16
            s.sendall(b"".join(r + data for r in requests[made:end]))
            made = end
            answers += s.recv(16 * len(reply)) or sys.exit("bench: no answer")
        took = time.monotonic() - start
    h.shutdown()
    if answers != reply * len(requests):
        sys.exit("bench: a write failed")
    return len(requests) / took


def passes(slots, count, blocks):
    """So many writes to each slot, in random order: to any of its first BLOCKS."""
    return [slot * SLOT + random.randrange(blocks) * BLOCK
            for _ in range(count) for slot in random.sample(range(slots), slots)]


def overwrites(kind, quick):
    slots, blocks, count = SLOTS[kind][quick], BLOCKS[kind], PASSES[kind]
    rates, spaces = "overwrite-" + kind, "space-" + kind

    def rate(count):
        return overwrite(server, passes(slots, count, blocks))

    with start(slots * SLOT, 2 * slots * blocks * BLOCK) as server:
        if kind == "full":
            fio(server.uri(), "--rw=write", "--bs=1m", "--size=%d" % (slots * SLOT))
        else:
            rate(1)
        yield spaces + "-before", server.space() / M
        usual = rate(count)
        yield rates, usual
        held = snapshot(server)
        yield rates + "-first", rate(1) / usual
        yield spaces + "-held", server.space() / M
        yield rates + "-moved", rate(count) / usual
        held.shutdown()
        server.settle()
        yield spaces + "-after", server.space() / M
        if kind == "full":
            offsets = [random.randrange(slots * blocks) * BLOCK
                       for _ in range(8 * slots)]
            usual = overwrite(server, offsets)
            held = snapshot(server)
            yield rates + "-random", overwrite(server, offsets) / usual
            held.shutdown()


def measure(quick):
    yield from large_disk(quick)
    for kind in SLOTS:
        yield from overwrites(kind, quick)
