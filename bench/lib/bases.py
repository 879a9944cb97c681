# SPDX-License-Identifier: BSD-3-Clause
"""The disks that the servers serve, made once."""

import os
import subprocess

import servers
from servers import G, K, M, Base

DISK = 2 * G
PACKED = 64 * M  # of data that xz makes half as long


def random_file(path):
    piece = os.urandom(32 * M)
    with open(path, "wb") as f:
        for _ in range(0, DISK, len(piece)):
            f.write(piece)


def packed_file(path):
    with open(path, "wb") as f:
        for _ in range(0, PACKED, 4 * K):
            f.write(os.urandom(2 * K) + bytes(2 * K))
    subprocess.run(["xz", "-T0", "-0", "--block-size=256KiB", path], check=True)
    return path + ".xz"


def sparse_file(path, size):
    if os.path.exists(path):
        os.unlink(path)
    with open(path, "wb") as f:
        f.truncate(size)


def prepare():
    """The bases by name.  "files" is for the limit: exports "copy", a full copy of the
    disk, and "sparse", a file that a call of bases["sparse"] empties.
    """
    disk, packed, golden, empty, files = (
        os.path.join(servers.work, n)
        for n in ("disk", "packed", "golden", "empty", "files"))
    os.mkdir(files)
    random_file(disk)
    random_file(os.path.join(files, "copy"))
    sparse_file(golden, 10 * G)
    sparse_file(empty, 1024 * G)
    packed = packed_file(packed)
    return {
        "fast": Base(disk),
        "slow": Base(disk, "--filter=noextents --filter=delay file {file} rdelay=1ms",
                     others=False),
        "xz": Base(packed, "--filter=xz file {file}", others=False),
        "golden": Base(golden),
        "empty": Base(empty),
        "files": Base(None, "file dir=" + files),
        "sparse": lambda: sparse_file(os.path.join(files, "sparse"), DISK),
    }
