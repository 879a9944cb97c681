# SPDX-License-Identifier: BSD-3-Clause
"""Reading and writing: jobs for fio, in sessions.

The jobs of a session run one behind the other on one server, so that a later one
finds what an earlier one has written.  Each server does each session once a round,
taking turns.
"""

from bases import DISK, PACKED
from load import fio, rate
from servers import G, K, M, CannotDo, Server, warm


class Job:
    """A line of fio.  LIMIT is what the limit does it on: a full "copy" of the disk, a
    fresh "sparse" file, the "base" itself, or None: there is none.  KEEPS: it needs
    what earlier connections wrote.
    """

    def __init__(self, name, title, limit, *options, amount, smallest, depth=16,
                 connections=1, keeps=False):
        self.name = name
        self.title = title
        self.limit = limit
        self.options = options
        self.amount = amount
        self.smallest = smallest  # that a connection does, however quick
        self.depth = depth
        self.connections = connections
        self.keeps = keeps

    def described(self):
        return dict(name=self.name, title=self.title, unit="MiB/s", better="more")

    def run(self, server, amount):
        """MiB a second."""
        if self.keeps and server.kind == "nbd-server":
            raise CannotDo
        each = max(amount // self.connections, self.smallest)
        return rate(fio(server.uri(self.export(server)), *self.options,
                        "--iodepth=%d" % self.depth, "--io_size=%d" % each,
                        connections=self.connections))

    def export(self, server):
        if server.kind != "limit" or self.limit == "base":
            return None
        if self.limit is None:
            raise CannotDo
        return self.limit


class Session:
    """QUICK: quick runs have it for all servers, else for this filter and the limit."""

    def __init__(self, name, jobs, base="fast", quick=False):
        self.name = name
        self.jobs = jobs
        self.base = base
        self.quick = quick


def part_of_disk(offset, size, connections):
    """fio's options: so much of the disk, of which each connection has a share."""
    share = size // connections
    options = ["--offset=%d" % offset, "--size=%d" % share]
    return options + ["--offset_increment=%d" % share] * (connections > 1)


# What the limit reads, and what it writes: there is no limit for writes over a slow base.
USUAL_LIMITS = "copy", "sparse"
LIMITS_OF_BASE = "base", None


def small_requests(tag, words, reads, writes, disk=DISK, limits=USUAL_LIMITS,
                   **options):
    """Random requests of 4 KiB to the first half of the disk, so many bytes of each."""
    copy, sparse = limits
    where = ["--bs=4k",
             *part_of_disk(0, disk // 2, options.get("connections", 1))]

    def job(name, title, limit, rw, amount, *more, keeps=True):
        return Job(name + tag, title + words, limit, "--rw=" + rw, *where, *more,
                   amount=amount, smallest=256 * K, keeps=keeps, **options)

    return [
        job("read-4k-base", "random read 4 KiB, base", copy, "randread", reads,
            keeps=False),
        job("write-4k-fresh", "random write 4 KiB, fresh", sparse, "randwrite", writes,
            keeps=False),
        job("read-4k-mixed", "random read 4 KiB, overlay and base mixed", copy,
            "randread", reads, "--randseed=2"),
        job("write-4k-again", "random write 4 KiB, overwrite", sparse, "randwrite",
            writes),
        job("mix-4k", "random 4 KiB, 70% reads 30% writes", sparse and copy, "randrw",
            reads, "--rwmixread=70", "--randseed=3"),
    ]


def large_requests(tag, words, disk=DISK, limits=USUAL_LIMITS, depth=8, **options):
    """Sequential requests of 1 MiB, and random ones of 64 KiB to the second half."""
    copy, sparse = limits
    half = disk // 2
    connections = options.get("connections", 1)
    first, second, whole = (part_of_disk(offset, size, connections)
                            for offset, size in ((0, half), (half, half), (0, disk)))

    def job(name, title, limit, rw, bs, where, amount, keeps=True):
        return Job(name + tag, title + words, limit, "--rw=" + rw, "--bs=" + bs,
                   *where, amount=amount, smallest=4 * M, keeps=keeps, depth=depth,
                   **options)

    return [
        job("write-1m-fresh", "sequential write 1 MiB, fresh", sparse, "write", "1m",
            first, half, keeps=False),
        job("read-1m", "sequential read 1 MiB, base and overlay", copy, "read", "1m",
            whole, disk),
        job("read-64k", "random read 64 KiB, base and overlay", copy, "randread", "64k",
            whole, half // 2),
        job("write-64k-fresh", "random write 64 KiB, fresh", sparse, "randwrite", "64k",
            second, half // 2, keeps=False),
        job("write-64k-again", "random write 64 KiB, overwrite", sparse, "randwrite",
            "64k", second, half // 2),
    ]


def scattered_reads():
    """All of the first half, written in random order, then read in order."""
    where = part_of_disk(0, DISK // 2, 1)
    return [
        Job("write-4k-all", "random write 4 KiB, each block of 1 GiB once", "sparse",
            "--rw=randwrite", "--bs=4k", *where, amount=DISK // 2, smallest=M),
        Job("read-1m-scattered", "sequential read 1 MiB of that", "sparse", "--rw=read",
            "--bs=1m", *where, amount=DISK // 2, smallest=M, depth=8, keeps=True),
    ]


D1, C4 = ", depth 1", ", 4 connections"
SLOW, XZ = ", base with 1 ms per request", ", base of xz"

SESSIONS = [
    Session("small requests", small_requests("", "", 256 * M, 256 * M), quick=True),
    Session("large requests", large_requests("", ""), quick=True),
    Session("reads of what was written in random order", scattered_reads()),
    Session("small requests" + D1, small_requests("-d1", D1, 64 * M, 64 * M, depth=1)),
    Session("large requests" + D1, large_requests("-d1", D1, depth=1)),
    Session("small requests" + C4,
            small_requests("-c4", C4, 256 * M, 256 * M, connections=4)),
    Session("large requests" + C4, large_requests("-c4", C4, connections=4)),
    Session("small requests" + SLOW,
            small_requests("-slow", SLOW, 16 * M, 128 * M, limits=LIMITS_OF_BASE),
            base="slow"),
    Session("large requests" + SLOW, large_requests("-slow", SLOW,
                                                    limits=LIMITS_OF_BASE), base="slow"),
    Session("small requests" + XZ,
            small_requests("-xz", XZ, M, 2 * M, disk=PACKED, limits=LIMITS_OF_BASE),
            base="xz"),
    Session("large requests" + XZ,
            large_requests("-xz", XZ, disk=PACKED, limits=LIMITS_OF_BASE), base="xz"),
]


def run_session(session, kind, bases, scale):
    """Yields (name of a job, its figure, or None where this kind cannot do it)."""
    base = bases[session.base]
    if kind == "limit":
        bases["sparse"]()
        if session.base == "fast":
            base = bases["files"]
    amount = max(j.amount // scale for j in session.jobs)
    warm(min(2 * amount, 2 * G))
    try:
        server = Server(kind, base)
    except CannotDo:
        for job in session.jobs:
            yield job.name, None
        return
    with server:
        for job in session.jobs:
            try:
                figure = job.run(server, job.amount // scale)
            except CannotDo:
                figure = None
            yield job.name, figure
