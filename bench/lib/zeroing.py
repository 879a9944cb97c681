# SPDX-License-Identifier: BSD-3-Clause
"""Zero and trim of a large range that was written, and how long others wait
meanwhile.
"""

import ctypes
import os
import random
import threading
import time

import servers
from load import connect, fio, ms
from servers import G, K, M, Base, Server, warm

BLOCK = 4 * K
OPS = "zero", "trim"
WRITTEN = {"some": "64 MiB of it written at random", "all": "all of it written"}


def job(name, title):
    return dict(name=name, title=title, unit="ms", better="less")


JOBS = [
    job("%s-%s%s" % (op, written, what), "%s of 1 GiB, %s%s" % (op, words, more))
    for written, words in WRITTEN.items()
    for op in OPS
    for what, more in (
        ("", ""),
        ("-wait", ": the longest that a write of 4 KiB by another took meanwhile"),
        ("-usual", ": the longest that one took in as long a time before"))
] + [
    job("punch", "the kernel's punch of 1 GiB, all of it written"),
]

libc = ctypes.CDLL(None)
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
FIRST = 128 * K  # where the overlay has it: large pages depend on that


def kernel_punch(size):
    fd = os.open(servers.work, os.O_TMPFILE | os.O_WRONLY)
    with open(fd, "wb", buffering=0) as f:
        f.seek(FIRST)
        for _ in range(0, size, M):
            f.write(bytes(M))
        return ms(libc.fallocate, fd, PUNCH, ctypes.c_long(FIRST),
                  ctypes.c_long(size))


def fill(server, written, size):
    how = {"some": ["--rw=randwrite", "--bs=4k", "--iodepth=16",
                    "--io_size=%d" % (size // 16)],
           "all": ["--rw=write", "--bs=1m"]}
    fio(server.uri(), "--size=%d" % size, *how[written])


class Other(threading.Thread):
    """Another client, which writes one block behind the other.  (libnbd lets go of
    Python's lock while it waits.)
    """

    def __init__(self, uri, offset):
        super().__init__()
        self.h = connect(uri)
        self.offset = offset
        self.ended = False
        self.writes = []
        self.start()

    def run(self):
        data = os.urandom(BLOCK)
        while not self.ended:
            begin = time.monotonic()
            self.h.pwrite(data, self.offset + random.randrange(1000) * BLOCK)
            self.writes.append((begin, time.monotonic()))

    def end(self):
        self.ended = True
        self.join()
        self.h.shutdown()


def longest(writes):
    return 1000 * max(end - begin for begin, end in writes)


def one(op, written, size):
    warm(2 * size)
    with Server("cow", Base(None, "memory %d" % (2 * size))) as server:
        h = connect(server.uri())
        request = getattr(h, op)
        fill(server, written, size)
        took = ms(request, size, 0)
        yield "%s-%s" % (op, written), took

        # Once more, with somebody else at work.
        fill(server, written, size)
        other = Other(server.uri(), size)
        time.sleep(0.2)
        before = time.monotonic()
        time.sleep(took / 1000)
        start = time.monotonic()
        request(size, 0)
        end = time.monotonic()
        other.end()
        h.shutdown()
        yield "%s-%s-wait" % (op, written), longest(
            w for w in other.writes if w[1] > start and w[0] < end)
        yield "%s-%s-usual" % (op, written), longest(
            w for w in other.writes if before < w[1] <= start)


def measure(quick):
    size = 64 * M if quick else G
    for written in WRITTEN:
        for op in OPS:
            yield from one(op, written, size)
    yield "punch", kernel_punch(size)
