# SPDX-License-Identifier: BSD-3-Clause
"""Requests about large ranges, and what happens to the changes in the end."""

import os
import signal
import subprocess
import time
from contextlib import contextmanager

import servers
from load import connect, fio, ms
from servers import G, M, Base, Server, warm


# ----------------------------------------------------------------------
# Zero, trim and extents

RANGES = [
    dict(name="%s-1g-%s" % (op, state), title="%s of 1 GiB, %s" % (op, words),
         unit="ms", better="less")
    for state, words in (("fresh", "nothing written there"),
                         ("written", "all of it written"))
    for op in ("zero", "trim")
] + [
    dict(name="extents-fragmented",
         title="all extents of 1 GiB with 65536 scattered blocks", unit="ms",
         better="less"),
    dict(name="extents-empty", title="all extents of 1 TiB with nothing in it",
         unit="ms", better="less"),
]


def all_extents(h, count):
    """Ask for them as clients do: as much at once as one request can."""
    offset = 0

    def found(_context, _offset, entries, _err):
        nonlocal offset
        offset += sum(entries[::2])

    while offset < count:
        h.block_status(min(count - offset, 2 * G), offset, found)


def extents(uri, count):
    h = connect(uri, extents=True)
    can = h.can_meta_context("base:allocation")
    took = ms(all_extents, h, count) if can else None
    h.shutdown()
    return took


def large_op(uri, op, count, offset):
    h = connect(uri)
    can = getattr(h, "can_" + op)()
    took = ms(getattr(h, op), count, offset) if can else None
    h.shutdown()
    return took


def ranges(kind, bases, scale):
    count = G // scale
    warm(2 * count)
    base, export = bases["fast"], None
    if kind == "limit":
        base, export = bases["files"], "sparse"
        bases["sparse"]()
    with Server(kind, base) as server:
        uri = server.uri(export)
        for i, op in enumerate(("zero", "trim")):
            yield op + "-1g-fresh", large_op(uri, op, count, i * G)
        for op in "zero", "trim":
            if kind == "nbd-server":  # what is written is gone with the connection
                yield op + "-1g-written", None
                continue
            fio(uri, "--rw=write", "--bs=1m", "--iodepth=8", "--size=%d" % count)
            yield op + "-1g-written", large_op(uri, op, count, 0)
    base = bases["empty"]
    if kind == "limit":
        base = bases["files"]
        bases["sparse"]()
    with Server(kind, base) as server:
        uri = server.uri(export)
        fio(uri, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=%d" % count,
            "--io_size=%d" % (count // 4))
        yield "extents-fragmented", extents(uri, count)
    with Server(kind, bases["empty"]) as server:
        yield "extents-empty", extents(server.uri(), 1024 * G)


# ----------------------------------------------------------------------
# Saving, streaming, loading

SAVING = [
    dict(name="save", title="1 GiB scattered over 64 GiB: to a durable diff (limit: "
         "fdatasync)", unit="s", better="less", digits=2),
    dict(name="save-total", title="the same, from the first write on", unit="s",
         better="less", digits=2),
    dict(name="save-size", title="that diff: space it takes (limit: the blocks)",
         unit="MiB", better="less", digits=1),
    dict(name="stream", title="that diff as a stream, from tmpfs", unit="s", better="less",
         digits=2),
    dict(name="stream-size", title="that stream: its length", unit="MiB",
         better="less", digits=1),
    dict(name="load", title="to load that diff, into tmpfs, and answer", unit="s",
         better="less", digits=2),
]

SAVED_DISK = 64 * G


def scatter(amount, *where):
    """Each time to the same places."""
    fio(None, "--rw=randwrite", "--bs=4k", "--size=%d" % SAVED_DISK,
        "--io_size=%d" % amount, "--randseed=4", *where)


def settle_disk():
    os.sync()
    time.sleep(1)


def space(path):
    return os.stat(path).st_blocks * 512 / M


def timed_end(server):
    """From the signal to the end of the server, in seconds."""
    start = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    server.process.wait()
    return time.monotonic() - start


@contextmanager
def plain_file(amount):
    """The same blocks in a sparse file: its path, how long all took, and how long
    fdatasync did.
    """
    path = os.path.join(servers.disk_work, "plain")
    with open(path, "wb") as f:
        f.truncate(SAVED_DISK)
    settle_disk()
    start = time.monotonic()
    scatter(amount, "--ioengine=psync", "--filename=" + path, "--fallocate=none",
            "--invalidate=0")
    with open(path, "rb+") as f:
        took = ms(os.fdatasync, f.fileno()) / 1000
    yield path, time.monotonic() - start, took
    if os.path.exists(path):
        os.unlink(path)


def synced(amount):
    with plain_file(amount) as (path, total, took):
        yield "save", took
        yield "save-total", total
        yield "save-size", space(path)


def saved(base, amount):
    diff = os.path.join(servers.disk_work, "diff.qcow2")
    with Server("cow", base, "cow-save=" + diff) as server:
        settle_disk()
        start = time.monotonic()
        scatter(amount, "--iodepth=16", "--uri=" + server.uri())
        yield "save", timed_end(server)
        yield "save-total", time.monotonic() - start
    yield "save-size", space(diff)

    with Server("cow", base, "cow-save=-", stdout=subprocess.PIPE) as server:
        scatter(amount, "--iodepth=16", "--uri=" + server.uri())
        start = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        length = 0
        while piece := os.read(server.process.stdout.fileno(), M):
            length += len(piece)
        yield "stream", time.monotonic() - start
        yield "stream-size", length / M
        server.process.stdout.close()

    start = time.monotonic()
    with Server("cow", base, "cow-load=" + diff) as server:
        h = connect(server.uri())
        h.pread(512, 0)
        yield "load", time.monotonic() - start
        h.shutdown()
    os.unlink(diff)


def rebased(base, amount):
    """What its manual tells to do: compare the disk with the base."""
    diff = os.path.join(servers.disk_work, "diff.qcow2")
    with Server("nbdkit", base) as server:
        scatter(amount, "--iodepth=16", "--uri=" + server.uri())
        start = time.monotonic()
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b",
                        server.uri(), diff], check=True)
        subprocess.run(["qemu-img", "rebase", "-F", "raw", "-b", base.file, diff],
                       check=True)
        with open(diff, "rb+") as f:
            os.fdatasync(f.fileno())
        yield "save", time.monotonic() - start
    yield "save-size", space(diff)
    os.unlink(diff)


def saving(kind, bases, scale):
    amount = G // scale
    path = os.path.join(servers.disk_work, "disk")
    with open(path, "wb") as f:
        f.truncate(SAVED_DISK)
    base = Base(path)
    if kind == "limit":
        yield from synced(amount)
    elif kind == "cow":
        yield from saved(base, amount)
    else:
        yield from rebased(base, amount)
    os.unlink(path)


# ----------------------------------------------------------------------
# Saving while snapshots are held

VIEWS = 3
ENDS = [
    dict(name="end" + name, title="256 MiB of random blocks in memory: to a diff, in place"
         + words, unit="s", better="less", digits=2)
    for name, words in (("", ""), ("-views", ", with %d snapshots held and all "
                                   "overwritten since each" % VIEWS))
]


def ends(_kind, _bases, scale):
    amount = 256 * M // scale
    diff = os.path.join(servers.work, "end.image")
    for name, views in ("end", 0), ("end-views", VIEWS):
        warm((1 + views) * amount)
        with Server("cow", Base(None, "memory 1G"), "cow-views=true",
                    "cow-save=" + diff) as server:
            def write():
                fio(server.uri(), "--rw=randwrite", "--bs=4k", "--iodepth=16",
                    "--size=%d" % amount)
            write()
            held = []
            for _ in range(views):
                held.append(connect(server.uri("@snapshot")))
                write()
            start = time.monotonic()
            os.kill(server.pid, signal.SIGTERM)
            while not os.path.exists(diff):  # the server waits for its readers
                time.sleep(0.001)
            yield name, time.monotonic() - start
            for h in held:
                h.shutdown()
        os.unlink(diff)
