# SPDX-License-Identifier: BSD-3-Clause
"""What was measured, on a terminal (a table, the bars), as JSON and as charts."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time

from servers import ALTERNATIVES, KINDS, QEMU, SNAPSHOTS

WIDTH = 9  # of a column


def progress(line):
    """Says what is being measured, where somebody is looking."""
    if sys.stderr.isatty():
        print("\r\033[K" + line, end="", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------
# The result: a dictionary that can be written as JSON

def first_line(*command):
    try:
        out = subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        out = None
    return out.splitlines()[0] if out else "?"


def commit():
    """Which sources were measured; "?" where they are no clone."""
    return first_line("git", "-C", os.path.dirname(os.path.abspath(__file__)),
                      "describe", "--always", "--dirty")


def machine():
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(": ")[1].strip() for line in f
                    if line.startswith("model name")), platform.machine())
    with open("/etc/os-release") as f:
        system = next(line.split("=")[1].strip().strip('"') for line in f
                      if line.startswith("PRETTY_NAME"))
    return {
        "cpu": "%d x %s" % (os.cpu_count(), cpu),
        "system": "%s, Linux %s" % (system, platform.release()),
        "programs": ["nbdkit-cow-filter " + commit(),
                     first_line("nbdkit", "--version"),
                     first_line("qemu-nbd", "--version").split("(")[0].strip(),
                     first_line("fio", "--version")],
    }


def make(machine_used, parts, found, rounds, quick):
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_used,
        "rounds": rounds,
        "quick": quick,
        "parts": [
            {"name": part.name,
             "jobs": [dict(job, figures=found[job["name"]]) for job in part.jobs]}
            for part in parts
        ],
    }


def load(path):
    with open(path) as f:
        result = json.load(f)
    if not isinstance(result, dict) or "parts" not in result:
        raise ValueError("no figures of bench/run")
    return result


def save(result, path):
    with open(path, "w") as f:
        json.dump(result, f, indent=1)
        f.write("\n")


# ----------------------------------------------------------------------
# Figures

class Job:
    """A job of a result; its figures are None where there are none."""

    def __init__(self, job):
        self.job = job
        self.more_is_better = job["better"] == "more"

    def values(self, kind):
        return [v for v in self.job["figures"].get(kind, []) if v is not None]

    def median(self, kind):
        values = self.values(kind)
        return statistics.median(values) if values else None

    def cannot(self, kind):
        return kind in self.job["figures"] and not self.values(kind)

    def text(self, kind):
        """For a table."""
        return "cannot" if self.cannot(kind) else number(self.median(kind), self.job)

    def times_better(self, kind):
        """How many times this filter is better than that kind."""
        ours, theirs = self.median("cow"), self.median(kind)
        if ours is None or theirs is None:
            return None
        a, b = (ours, theirs) if self.more_is_better else (theirs, ours)
        return a / b if b else None

    def than_best_of(self, kinds):
        ratios = [r for r in map(self.times_better, kinds) if r is not None]
        return min(ratios) if ratios else None


def jobs_of(result):
    return {job["name"]: Job(job) for part in result["parts"] for job in part["jobs"]}


# ----------------------------------------------------------------------
# The table

def number(value, job):
    if value is None:
        return "-"
    digits = job.get("digits", 0 if value >= 100 else 1 if value >= 10 else 2)
    return "%.*f" % (digits, value)


def ratio(value):
    if value is None:
        return "-"
    if value == float("inf"):
        return "it cannot"
    return "%.2f" % value if value < 10 else "%.0f" % value


def columns(*texts):
    return "".join(str(t).rjust(WIDTH + 2) for t in texts)


def show_job(job, kinds):
    unit = job.job["unit"]
    print(job.job["title"] + (", %s" % unit if unit else ""))
    print("  median " + columns(*(job.text(k) for k in kinds),
                                ratio(job.times_better("limit")),
                                ratio(job.than_best_of([*ALTERNATIVES, *SNAPSHOTS]))))
    if max(map(len, map(job.values, kinds))) < 2:
        return
    spread = [(min(v), max(v)) if (v := job.values(k)) else (None, None)
              for k in kinds]
    for word, end in ("least", 0), ("most", 1):
        print("  %-7s" % word + columns(*(number(s[end], job.job) for s in spread)))


def show(result):
    m = result["machine"]
    print("%s; %s; %s" % (m["cpu"], m["system"], ", ".join(m["programs"])))
    print("%s, rounds: %d%s\n" % (
        result["date"], result["rounds"],
        ", QUICK: of much less than the titles say, and not to be relied on"
        if result["quick"] else ""))
    for kind, words in {**KINDS, **SNAPSHOTS}.items():
        print("%-14s %s" % (kind, words))
    print("/limit, /best   how many times better than the limit, than the best of the "
          "others\n-               not measured")
    for part in result["parts"]:
        kinds = list(KINDS)
        if any(k in job["figures"] for job in part["jobs"] for k in SNAPSHOTS):
            kinds = ["cow", *SNAPSHOTS]
        print("\n" + part["name"].upper())
        print("         " + columns(*(k.replace("snapshot", "snap") for k in kinds),
                                    "/limit", "/best"))
        for job in part["jobs"]:
            show_job(Job(job), kinds)
    show_bars(result)


# ----------------------------------------------------------------------
# The bars: what this filter has to reach

def bars(result):
    """Yields (what, wanted, seen) of all bars that were measured; SEEN is a ratio of
    which more is better, WANTED the least of it.  Who cannot do it is beaten.
    """
    jobs = jobs_of(result)

    def against(name, kind_words, kinds, wanted):
        if name in jobs and jobs[name].median("cow") is not None:
            seen = jobs[name].than_best_of(kinds)
            if seen is None and all(map(jobs[name].cannot, kinds)):
                seen = float("inf")
            yield ("%s: against %s" % (jobs[name].job["title"], kind_words), wanted,
                   seen)

    def of(kind, name_a, name_b):
        """Its figure of one job to that of another."""
        a, b = (jobs[n].median(kind) if n in jobs else None for n in (name_a, name_b))
        return a / b if a and b else None

    for name, limit, nbdkit, qemu in (
            ("read-4k-base", 0.95, 1.5, 2.5), ("read-4k-mixed", 0.95, 1.5, 2.5),
            ("write-4k-fresh", 0.90, 4.5, 4.0), ("write-4k-again", 0.95, 3.5, 3.0),
            ("read-1m", 0.95, 0.95, 1.5), ("write-1m-fresh", 0.95, 1.0, 1.3)):
        yield from against(name, "the limit", ["limit"], limit)
        yield from against(name, "nbdkit's own", ["nbdkit"], nbdkit)
        yield from against(name, "the best of qemu's", QEMU, qemu)

    yield ("the slow base: random write 4 KiB against the same over the fast one", 0.90,
           of("cow", "write-4k-fresh-slow", "write-4k-fresh"))
    yield from against("write-4k-fresh-slow", "nbdkit's own", ["nbdkit"], 10)
    for name in "zero-1g-fresh", "trim-1g-fresh":
        yield from against(name, "nbdkit's own", ["nbdkit"], 100)
    for name in "read-4k-base", "write-4k-fresh", "write-4k-again":
        ours, limit = (of(k, name + "-c4", name) for k in ("cow", "limit"))
        yield ("4 connections against 1, as far as the limit scales: " + name, 1,
               ours / limit if ours and limit else None)
    yield from against("save", "nbdkit's own and qemu-img", ["nbdkit"], 20)
    yield from against("read-1m-scattered", "the limit", ["limit"], 0.5)
    yield ("overwrites with a snapshot held against those without", 0.8,
           of("cow", "overwrite-held", "overwrite"))
    yield from against("overwrite-held", "qemu's copy-before-write", SNAPSHOTS, 3)
    yield from against("xfs-full", "nbdkit's own, 4K", ["nbdkit-4k"], 0.9)


def most(result):
    """Yields (what, the most allowed, seen): figures of which less is better."""
    jobs = jobs_of(result)

    def figure(name, kind="cow"):
        return jobs[name].median(kind) if name in jobs else None

    yield ("bytes written to the overlay for each of the client's", 1.05,
           figure("amplification"))
    fdatasync = figure("save", "limit")
    if fdatasync is not None:
        yield ("save, s (1.3 times fdatasync + 0.3 s)", 1.3 * fdatasync + 0.3,
               figure("save"))
    for percent in 25, 50, 100:
        name = "memory-%d" % percent
        ours, own = figure(name), figure(name, "nbdkit")
        if ours is not None and own is not None:
            yield ("memory above nbdkit's own, MiB, %d%% touched" % percent,
                   4.2 / 1024 * 32768 * percent / 100 + 2, ours - own)
    for name, wanted in (("overwrite-growth", 1.1), ("overwrite-kept", 0.01),
                         ("scattered-discard", 2), ("xfs-space", 1.1), ("xfs-saved", 1.1),
                         ("memory-slot-run", 32), ("memory-slot-spread", 16 + 160)):
        if name in jobs:
            yield jobs[name].job["title"], wanted, figure(name)
    for name, words, share, more in (
            ("scattered-save", "half of fdatasync + 0.2 s", 0.5, 0.2),
            ("scattered-delete", "a tenth of the sparse file's", 0.1, 0)):
        limit = figure(name, "limit")
        if limit is not None:
            yield ("%s (%s)" % (jobs[name].job["title"], words), share * limit + more,
                   figure(name))
    for name in "wait-trim", "wait-release", "wait-views":
        usual = figure(name + "-usual")
        if usual is not None:
            yield jobs[name].job["title"] + " (usual + 5 ms)", usual + 5, figure(name)
    without = figure("end")
    if without is not None:
        yield ("a save with snapshots held (without + 0.3 s)", without + 0.3,
               figure("end-views"))
    memory, space = (figure("overlays-1000-" + w) for w in ("memory", "space"))
    if memory is not None:
        yield ("each of 1000 overlays, memory and file, KiB", 64, memory + space)


def show_bars(result):
    rows = [(what, ">= " + ratio(wanted), ratio(seen), seen >= wanted)
            for what, wanted, seen in bars(result) if seen is not None]
    rows += [(what, "<= %.2f" % wanted, "%.2f" % seen, seen <= wanted)
             for what, wanted, seen in most(result) if seen is not None]
    if not rows:
        return
    print("\nWHAT IS WANTED OF THIS FILTER" + (", of full runs" if result["quick"]
                                               else ""))
    for what, wanted, seen, met in rows:
        print("%-88s %10s %9s  %s" % (what, wanted, seen, "yes" if met else "NO"))


# ----------------------------------------------------------------------
# The charts

NAMES = {
    "limit": "no overlay",
    "cow": "this filter",
    "nbdkit": "nbdkit's cow, 64K",
    "nbdkit-4k": "nbdkit's cow, 4K",
    "qemu-snapshot": "qemu-nbd --snapshot",
    "qemu-qcow2": "qemu-nbd, qcow2",
    "nbd-server": "nbd-server -c",
    "qemu-cbw": "qemu, copy-before-write",
}

COLOURS = dict(zip(KINDS, ("#888888", "#1b7837", "#9970ab", "#c2a5cf", "#f4a582",
                           "#d6604d", "#4393c3")))


def gnuplot(path, script):
    head = ("set terminal svg size 860,420 font 'sans,12' background 'white'\n"
            "set output '%s'\nset border 3\nset tics nomirror out\nset bmargin 4\n"
            "set grid ytics lc rgb '#dddddd'\n" % path)
    subprocess.run(["gnuplot"], input=head + script, text=True, check=True)


def block(name, rows):
    """Data for gnuplot; what there is not is '-'."""
    lines = [" ".join('"%s"' % v if isinstance(v, str) else
                      "-" if v is None else "%g" % v for v in row) for row in rows]
    return "$%s << EOD\n%s\nEOD\nset datafile missing '-'\n" % (name, "\n".join(lines))


def bars_chart(path, title, labels, kinds, value, more=""):
    """A group of bars for each (name, label): VALUE (job name, kind).  No chart where
    there is no value.
    """
    rows = [[label, *(value(name, k) for k in kinds)] for name, label in labels]
    if all(v is None for row in rows for v in row[1:]):
        return
    plots = ", ".join("$data using %d:xtic(1) title \"%s\" lc rgb '%s'"
                      % (i + 2, NAMES[k], COLOURS[k]) for i, k in enumerate(kinds))
    gnuplot(path, block("data", rows)
            + "set title \"%s\"\nset style data histogram\n"
            "set style histogram clustered gap 1\nset style fill solid\n"
            "set key outside right top\n%s\nplot %s\n" % (title, more, plots))


def charts(result, directory):
    jobs = jobs_of(result)
    os.makedirs(directory, exist_ok=True)

    def share_of_limit(name, kind):
        limit, theirs = jobs[name].median("limit"), jobs[name].median(kind)
        return theirs / limit if limit and theirs is not None else None

    def median(name, kind):
        return jobs[name].median(kind)

    def have(labels):
        return [(n, l) for n, l in labels if n in jobs]

    speed = have([("read-4k-base", "read 4K\\nbase"),
                  ("read-4k-mixed", "read 4K\\nmixed"),
                  ("write-4k-fresh", "write 4K\\nfresh"),
                  ("write-4k-again", "write 4K\\nagain"),
                  ("read-1m", "read 1M"), ("write-1m-fresh", "write 1M\\nfresh")])
    bars_chart(os.path.join(directory, "speed.svg"),
               "Speed, as a share of the same with no overlay (more is better)",
               speed, ["cow", *ALTERNATIVES], share_of_limit,
               "set yrange [0:*]\nset arrow from graph 0, first 1 to graph 1, "
               "first 1 nohead lc rgb '#888888'")

    times = have([("zero-1g-fresh", "zero 1 GiB\\nfresh"),
                  ("zero-1g-written", "zero 1 GiB\\nwritten"),
                  ("extents-empty", "extents\\nempty 1 TiB"),
                  ("extents-fragmented", "extents\\nfragmented")])
    bars_chart(os.path.join(directory, "ranges.svg"),
               "Requests about large ranges: milliseconds (less is better)",
               times, list(KINDS), median, "set logscale y\nset format y '%g'")

    kinds = [k for k in ["cow", *ALTERNATIVES]
             if "memory-100" in jobs and median("memory-100", k)]
    if kinds:
        percents = 0, 25, 50, 100
        rows = [[float(p), *(median("memory-%d" % p, k) for k in kinds)]
                for p in percents]
        plots = ", ".join("$data using 1:%d title \"%s\" with linespoints lw 2 "
                          "pt 7 lc rgb '%s'" % (i + 2, NAMES[k], COLOURS[k])
                          for i, k in enumerate(kinds))
        gnuplot(os.path.join(directory, "memory.svg"), block("data", rows)
                + "set title \"Memory, MiB: a disk of 1 TiB, a block written in so "
                "many %% of its 32 MiB\"\nset key outside right top\n"
                "set yrange [0:*]\nplot %s\n" % plots)
