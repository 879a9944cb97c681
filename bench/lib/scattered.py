# SPDX-License-Identifier: BSD-3-Clause
"""Blocks that are scattered over a disk: what they cost on a file system of a disk,
until they are saved, and until they are deleted.
"""

import os
import shutil
import struct
import subprocess
import time
from contextlib import contextmanager

import nbd

import servers
from handover import SAVED_DISK, plain_file, scatter, settle_disk, timed_end
from load import connect
from servers import G, K, M, Base, Server

# ----------------------------------------------------------------------
# On the disk that diffs are saved to

AMOUNT = 256 * M

JOBS = [
    dict(name="scattered-save", title="256 MiB scattered over 64 GiB: to a durable diff, "
         "in place (limit: fdatasync)", unit="s", better="less", digits=2),
    dict(name="scattered-delete", title="to delete that diff (limit: that file)",
         unit="s", better="less", digits=3),
    dict(name="scattered-discard", title="to end without saving, once all was written "
         "back", unit="s", better="less", digits=2),
]


def delete(path):
    """In seconds: until the disk has it too."""
    settle_disk()
    start = time.monotonic()
    os.unlink(path)
    os.sync()
    return time.monotonic() - start


def sparse_file(amount):
    with plain_file(amount) as (path, _, took):
        yield "scattered-save", took
        yield "scattered-delete", delete(path)


def overlay(amount):
    base = Base(None, "memory %d" % SAVED_DISK)
    diff = os.path.join(servers.disk_work, "diff.qcow2")
    with Server("cow", base, "cow-save=" + diff) as server:
        settle_disk()
        scatter(amount, "--iodepth=16", "--uri=" + server.uri())
        yield "scattered-save", timed_end(server)
    yield "scattered-delete", delete(diff)

    with Server("cow", base, tmpdir=servers.disk_work) as server:
        scatter(amount, "--iodepth=16", "--uri=" + server.uri())
        settle_disk()
        yield "scattered-discard", timed_end(server)


def on_disk(kind, _bases, scale):
    yield from (sparse_file if kind == "limit" else overlay)(AMOUNT // scale)


# ----------------------------------------------------------------------
# On XFS

XFS_AMOUNT = 64 * M
XFS_FULL = G

XFS_JOBS = [
    dict(name="xfs-space", title="64 MiB scattered over 64 GiB, on XFS: disk taken for "
         "each byte", unit="", better="less", digits=2),
    dict(name="xfs-saved", title="the same, saved in place: without the diff's tables",
         unit="", better="less", digits=2),
    dict(name="xfs-tables", title="the tables of that diff", unit="", better="less",
         digits=2),
    dict(name="xfs-full", title="scattered blocks that an XFS of 1 GiB takes, until it "
         "is full", unit="MiB", better="more", digits=0),
]


@contextmanager
def xfs(size):
    """An XFS of its own, in a file; None where this machine does not let us."""
    image = os.path.join(servers.disk_work, "xfs.img")
    where = os.path.join(servers.disk_work, "xfs")
    os.makedirs(where, exist_ok=True)
    with open(image, "wb") as f:
        f.truncate(size)
    mounted = False
    try:
        if shutil.which("mkfs.xfs") and os.geteuid() == 0:
            subprocess.run(["mkfs.xfs", "-q", "-f", image], check=True)
            mounted = subprocess.run(["mount", "-o", "loop", image, where],
                                     stderr=subprocess.DEVNULL).returncode == 0
        yield where if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", where], check=True)
        os.unlink(image)


def used(where):
    os.sync()
    st = os.statvfs(where)
    return (st.f_blocks - st.f_bfree) * st.f_frsize


def written_until_full(uri):
    """One block for each MiB of the disk, then the next of each.  Returns bytes."""
    h = connect(uri)
    data = os.urandom(4 * K)
    written = 0
    try:
        for i in range(K):
            for offset in range(i * 4 * K, SAVED_DISK, M):
                h.pwrite(data, offset)
                written += len(data)
    except nbd.Error as error:
        if error.errno != "ENOSPC":
            raise
    h.shutdown()
    return written


def tables(diff):
    """Bytes of the L1 and L2 tables of a qcow2 image."""
    with open(diff, "rb") as f:
        header = f.read(48)
        cluster = 1 << struct.unpack_from(">I", header, 20)[0]
        entries, offset = struct.unpack_from(">IQ", header, 36)
        f.seek(offset)
        l1 = struct.unpack(">%dQ" % entries, f.read(8 * entries))
    return 8 * entries + cluster * len(set(filter(None, l1)))


def taken(kind, amount, save=False):
    """Bytes that scattered blocks take of a new XFS, and those of the diff's tables."""
    with xfs(4 * G) as where:
        diff = os.path.join(where, "diff.qcow2")
        before = used(where)
        with Server(kind, Base(None, "memory %d" % SAVED_DISK),
                    *(["cow-save=" + diff] if save else []), tmpdir=where) as server:
            scatter(amount, "--iodepth=16", "--uri=" + server.uri())
            if not save:
                return used(where) - before, 0
        return used(where) - before, tables(diff)


def on_xfs(kind, _bases, scale):
    amount = XFS_AMOUNT // min(scale, 4)
    with xfs(4 * G) as where:
        if where is None:
            return
    yield "xfs-space", taken(kind, amount)[0] / amount
    if kind == "cow":
        whole, of_tables = taken(kind, amount, save=True)
        yield "xfs-saved", (whole - of_tables) / amount
        yield "xfs-tables", of_tables / amount
    else:
        yield "xfs-saved", None
        yield "xfs-tables", None
    if scale == 1:
        with xfs(XFS_FULL) as where, \
             Server(kind, Base(None, "memory %d" % SAVED_DISK), tmpdir=where) as server:
            yield "xfs-full", written_until_full(server.uri()) / M
