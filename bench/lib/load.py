# SPDX-License-Identifier: BSD-3-Clause
"""The load: fio's nbd engine, and libnbd where one needs to say more."""

import json
import subprocess
import sys
import time

import nbd

from servers import M


class Fio:
    """A run of fio, which has been started: on URI, or if that is None where OPTIONS
    say.
    """

    def __init__(self, uri, *options, connections=1):
        command = ["fio", "--name=w", "--ioengine=nbd", "--thread",
                   "--group_reporting", "--numjobs=%d" % connections,
                   "--randrepeat=1", "--output-format=json",
                   "--percentile_list=50:99:99.9", *options]
        if uri is not None:
            command.append("--uri=" + uri)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)

    def running(self):
        return self.process.poll() is None

    def end(self):
        """What fio says: a dictionary for "read" and one for "write"."""
        out, err = self.process.communicate()
        if self.process.returncode != 0 or "{" not in out:
            sys.exit("bench: fio failed: " + " ".join(self.process.args) + "\n" + err)
        return json.loads(out[out.index("{"):])["jobs"][0]


def fio(uri, *options, connections=1):
    return Fio(uri, *options, connections=connections).end()


def rate(result):
    """MiB a second, of both directions."""
    return sum(result[d]["bw_bytes"] for d in ("read", "write")) / M


def connect(uri, extents=False):
    h = nbd.NBD()
    if extents:
        h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    return h


def ms(function, *args):
    """How many milliseconds a call takes."""
    start = time.monotonic()
    function(*args)
    return 1000 * (time.monotonic() - start)
