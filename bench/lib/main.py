# SPDX-License-Identifier: BSD-3-Clause
"""Measures this filter against what people use in its place.

Everything is on tmpfs but the saving of diffs and what says so; servers take turns; before each one
memory is touched (HACKING, "Measuring").  Figures are medians of the rounds, with the
smallest and the largest.
"""

import argparse
import functools
import os
import random
import re
import signal
import sys
import tempfile

import bases
import freezing
import handover
import pages
import report
import scale
import scattered
import servers
import speed
import zeroing
from servers import ALTERNATIVES, G, KINDS, SNAPSHOTS

MEMORY = "/dev/shm"


class Part:
    """Jobs that are measured together: RUN (kind, bases, scale) yields the name and
    the figure of each, once a round; None for what this kind cannot do.  What is slow
    takes part in so many ROUNDS only; the kinds in ONCE in the first round of a full
    run only; and in a quick run just the kinds in QUICK, if that is given.
    """

    def __init__(self, name, jobs, kinds, run, once=(), rounds=None, quick=None):
        self.name = name
        self.jobs = jobs
        self.kinds = kinds
        self.run = run
        self.once = once
        self.rounds = rounds
        self.quick = quick or [k for k in kinds if k not in once]

    def kinds_of_round(self, i, quick):
        if self.rounds is not None and i >= self.rounds:
            return []
        if quick:
            return self.quick
        kinds = [k for k in self.kinds if i == 0 or k not in self.once]
        # Not in rotation: each would always come after the same one.
        random.Random("%s %d" % (self.name, i)).shuffle(kinds)
        return kinds


def only_cow(measure):
    return lambda _kind, _bases, scale: measure(quick=scale > 1)


# nbd-server has a process for each connection, which is gone when that ends.
IN_ONE_PROCESS = [k for k in ALTERNATIVES if k != "nbd-server"]

PARTS = [
    Part(s.name, [j.described() for j in s.jobs], list(KINDS),
         functools.partial(speed.run_session, s),
         quick=None if s.quick else ["limit", "cow"]) for s in speed.SESSIONS
] + [
    Part("large ranges", handover.RANGES, list(KINDS), handover.ranges),
    Part("saving", handover.SAVING, ["limit", "cow", "nbdkit"], handover.saving,
         once=["nbdkit"]),
    Part("scattered blocks on a disk", scattered.JOBS, ["limit", "cow"],
         scattered.on_disk),
    Part("scattered blocks on XFS", scattered.XFS_JOBS, ["cow", "nbdkit-4k"],
         scattered.on_xfs, rounds=3),
    Part("saving while snapshots are held", handover.ENDS, ["cow"], handover.ends),
    Part("size of an overlay", scale.SIZES, ["cow", *IN_ONE_PROCESS], scale.sizes),
    Part("memory of a slot", scale.SLOTS, ["cow"], scale.slots),
    Part("number of overlays", scale.NUMBERS, ["cow", *IN_ONE_PROCESS], scale.numbers,
         once=IN_ONE_PROCESS),
    Part("zeroing much", zeroing.JOBS, ["cow"], only_cow(zeroing.measure), rounds=3),
    Part("freezing", freezing.JOBS, ["cow"], only_cow(freezing.measure), rounds=3),
    Part("longest waits", freezing.WAIT_JOBS, ["cow"], only_cow(freezing.longest_waits)),
    Part("overwrites with a snapshot", freezing.OVERWRITES, ["cow", *SNAPSHOTS],
         freezing.overwrites),
]

# What quick runs divide amounts by.
QUICK_SCALE = 32

# Bytes of memory that files take at most, full and quick.
NEEDED = 16 * G, 6 * G


def measure(parts, rounds, quick, found):
    """Fill in FOUND, {name of a job: {kind: [figure of each round]}}; figures are None
    where a kind cannot do it.
    """
    if not quick:
        servers.warm(NEEDED[0] - 2 * G)
    made = bases.prepare()
    for i in range(rounds):
        for part in parts:
            for kind in part.kinds_of_round(i, quick):
                report.progress("round %d of %d: %s, %s"
                                % (i + 1, rounds, part.name, kind))
                for name, figure in part.run(kind, made, QUICK_SCALE if quick else 1):
                    found[name].setdefault(kind, []).append(figure)
    report.progress("")


def check_room(quick):
    needed = NEEDED[quick]
    st = os.statvfs(MEMORY) if os.path.isdir(MEMORY) else None
    if not st or st.f_bavail * st.f_frsize < needed:
        sys.exit("bench: %s has not %d GiB free; mount a larger tmpfs there"
                 % (MEMORY, needed // G))


def end_on_signals():
    """So that servers and files are gone whatever ends us; by the first signal, for a
    second one may come while they are being removed.
    """
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

    def end(_number, _frame):
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        sys.exit("bench: interrupted")

    for number in signals:
        signal.signal(number, end)


def run(args):
    check_room(args.quick)
    machine = report.machine()
    end_on_signals()
    servers.filter = args.filter
    found = {job["name"]: {} for part in args.parts for job in part.jobs}
    name = "figures-incomplete.json"  # until they are
    with tempfile.TemporaryDirectory(prefix="cow-bench-", dir=MEMORY) as work, \
         tempfile.TemporaryDirectory(prefix="cow-bench-", dir=args.disk) as disk_work:
        servers.work, servers.disk_work = work, disk_work
        try:
            measure(args.parts, args.rounds, args.quick, found)
            name = "figures.json"
        finally:  # an hour's figures are not lost with the last one
            result = report.make(machine, args.parts, found, args.rounds, args.quick)
            if any(found.values()):
                report.save(result, os.path.join(args.out, name))
    return result


def arguments():
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="one round of little: shows that all works, no figures "
                        "to rely on")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 5, or with "
                        "--quick 1")
    parser.add_argument("--parts", metavar="REGEX", default="",
                        help="only parts whose name matches; they are:\n"
                        + "\n".join(part.name for part in PARTS))
    parser.add_argument("--out", metavar="DIR",
                        help="where figures.json and charts/*.svg go; default "
                        "build/measured")
    parser.add_argument("--from", dest="source", metavar="FILE",
                        help="measure nothing: show the figures of this JSON file, and "
                        "draw them")
    parser.add_argument("--markdown", choices=pages.PAGES, metavar="PAGE", nargs="?",
                        const="results", help="with --from: print bench/RESULTS.md, or "
                        "with PAGE=readme the\nfigures of README.md, and nothing else")
    parser.add_argument("--disk", metavar="DIR", default="/var/tmp",
                        help="where to save diffs; default /var/tmp")
    parser.add_argument("--filter", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.markdown and not args.source:
        parser.error("--markdown goes with --from")
    if args.rounds is None:
        args.rounds = 1 if args.quick else 5
    if args.rounds < 1:
        parser.error("--rounds=%d: must be 1 or more" % args.rounds)
    try:
        args.parts = [p for p in PARTS if re.search(args.parts, p.name)]
        if not args.parts:
            parser.error("--parts: no part has such a name; --help lists them")
        if not args.markdown:
            os.makedirs(args.out, exist_ok=True)
        if args.source:
            args.result = report.load(args.source)
        elif not os.path.isdir(args.disk):
            parser.error("--disk=%s: no directory" % args.disk)
    except re.error as error:
        parser.error("--parts=%s: %s" % (args.parts, error))
    except OSError as error:
        parser.error(str(error))
    except ValueError as error:
        parser.error("--from=%s: %s" % (args.source, error))
    return args


def main():
    args = arguments()
    if args.markdown:
        pages.PAGES[args.markdown](args.result)
        return
    result = args.result if args.source else run(args)
    report.show(result)
    report.charts(result, os.path.join(args.out, "charts"))


if __name__ == "__main__":
    sys.exit(main())
