# SPDX-License-Identifier: BSD-3-Clause
"""What was measured, as Markdown: bench/RESULTS.md, and the figures of README.md."""

from report import NAMES, jobs_of
from servers import KINDS, SNAPSHOTS

RESULTS = """\
# Results

This page is what `./bench/run --from bench/figures.json --markdown` prints.
It has all that was measured; `README.md` has eight figures of it.

{machine}
`./bench/run` on an idle machine measures all of it anew, and `./bench/run --parts PART` one part.

![Speed](charts/speed.svg)

![Requests about large ranges](charts/ranges.svg)

![Memory](charts/memory.svg)

## How to read it

  * Figures are medians of {rounds} rounds, in which the servers took turns.
    What takes minutes was measured in one to four rounds.
    The machine had other work beside most of this; overwrites with a snapshot and the longest waits were measured apart, with none.
  * The machine is a virtual one.
    Rounds differ by a fifth there, at times by far more: `bench/figures.json` has each.
    So medians that differ by less are equal.
  * All files are on tmpfs, but diffs are saved on ext4, and what says so is on XFS.
  * Requests of 4 KiB and 64 KiB are 16 at a time, those of 1 MiB are eight at a time, unless the job says another depth.
  * "No overlay" is the limit: nbdkit's file plugin on a full copy of the disk, or on a sparse file for fresh writes.
    For saving, it is an fdatasync of the same blocks.
    For reads of 64 KiB over xz, it unpacks all that is read, and the others half of it.
  * nbdkit's own filter saves nothing.
    What is measured there is `qemu-img create` and `qemu-img rebase`.
  * nbdkit's own filter keeps the space of what is trimmed, the others give it back.
  * A slot of this filter is 32 blocks, 128 KiB.
  * "The longest" is that of all requests in ten seconds, some of which the machine itself delays.
    So what the same client waited in the ten seconds before is there too.
  * "Cannot" is what a program does not do, or what there is not without an overlay.
  * "–" was not measured.
"""


def table(head, rows):
    print("| %s |" % " | ".join(head))
    print("| --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| %s |" % " | ".join(row))


def title(job):
    unit = job.job["unit"]
    return job.job["title"] + (", " + unit if unit else "")


def figure(job, kind):
    return job.text(kind).replace("-", "–")


def machine(result):
    m = result["machine"]
    return "Measured on %s, processors: %s; %s; %s." % (
        result["date"], m["cpu"], m["system"], ", ".join(m["programs"]))


def results(result):
    """bench/RESULTS.md: a table for each part, of the kinds that take part in it."""
    print(RESULTS.format(machine=machine(result), rounds=result["rounds"]), end="")
    jobs = jobs_of(result)
    for part in result["parts"]:
        mine = [jobs[job["name"]] for job in part["jobs"]]
        kinds = [k for k in (*KINDS, *SNAPSHOTS) if any(job.job["figures"].get(k) for job in mine)]
        print("\n## %s\n" % part["name"].capitalize())
        table(["job"] + [NAMES[k] for k in kinds],
              [[title(job)] + [figure(job, k) for k in kinds] for job in mine])


# What it is, for a reader who does not know the jobs; the job; its part.
IN_README = [
    ("Random reads of 4 KiB from the base, MiB/s", "read-4k-base", "small requests"),
    ("Random writes of 4 KiB, MiB/s", "write-4k-fresh", "small requests"),
    ("Saving 1 GiB of scattered blocks as a diff, seconds", "save", "saving"),
    ("Overwrites of 4 KiB a second while a snapshot is held", "overwrite-held",
     "overwrites with a snapshot"),
    ("Memory for 128 KiB that are written one after the other, bytes",
     "memory-slot-run", "memory of a slot"),
    ("Memory for 128 KiB that are written in random order, bytes",
     "memory-slot-spread", "memory of a slot"),
    ("Memory for a disk of 1 TiB with a block written in each 32 MiB, MiB",
     "memory-100", "size of an overlay"),
    ("Memory for each of 1000 disks on one base, KiB", "overlays-1000-memory",
     "number of overlays"),
]
README_KINDS = ["cow", "nbdkit", "qemu-qcow2", "qemu-cbw", "limit"]


def readme(result):
    """The figures of README.md."""
    jobs = jobs_of(result)
    table(["what"] + [NAMES[k] for k in README_KINDS] + ["measured by"],
          [[words] + [figure(jobs[name], k) for k in README_KINDS]
           + ["`./bench/run --parts '%s$'`" % part] for words, name, part in IN_README])
    print("\n" + machine(result))


PAGES = {"results": results, "readme": readme}
