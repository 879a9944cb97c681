#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A device and a list of what changed on it, as "rbd diff --format json" prints it: with
# nbdkit's extentlist filter below, NAME@full.qcow2 has what is in the list, nothing else is
# read, and on top of what the device was before it is the device.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter extentlist log
requires qemu-img --version
requires nbdcopy --version
requires jq --version

# In one line, numbers as such and the rest as strings.  The second range was discarded.
echo '[{"offset":0,"length":262144,"exists":"true"},{"offset":20971520,"length":4194304,"exists":"false"},{"offset":41943040,"length":98304,"exists":"true"}]' \
    >"$tmp/changes.json"
base_file "$tmp/monday" 42443776
py <<'END'
import json
with open(tmp + "/changes.json") as f, open(tmp + "/monday", "rb") as m, \
     open(tmp + "/tuesday", "wb") as t:
    t.write(m.read())
    for change in json.load(f):
        t.seek(change["offset"])
        t.write((b"T" if change["exists"] == "true" else b"\0") * change["length"])
END

# As the manual has it.
jq -r '.[] | "\(.offset) \(.length)"' "$tmp/changes.json" >"$tmp/changes.list"
printf '0 262144\n20971520 4194304\n41943040 98304\n' | cmp - "$tmp/changes.list" ||
    die "jq has made something else of it"
start_nbdkit --filter=extentlist --filter=log file "$tmp/tuesday" \
    extentlist="$tmp/changes.list" logfile="$tmp/log" cow-views=true
nbdcopy --connections=4 "$(view @full.qcow2)" - | cat >"$tmp/tuesday.qcow2"
py <<'END'
log = Log()
log.at = 0
listed = [(0, 262144), (20971520, 4194304), (41943040, 98304)]
reads = 0
for kind, at, n in log.requests("Read"):
    if not any(start <= at and at + n <= start + count for start, count in listed):
        fail("%d bytes at %d were read, which are not in the list" % (n, at))
    reads += n
# Once more the first 64 KiB, for the checksum.
expect(reads, 64 * K + sum(count for start, count in listed), "bytes that were read")
expect(log.requests("Extents"), [], "extents of what is below the list")
END

# on_monday_is FILE: the image on top of the old disk is the disk FILE.
on_monday_is ()
{
    sound_diff "$tmp/tuesday.qcow2"
    [ "$(stat -c %s "$tmp/tuesday.qcow2")" -le $((4554752 + 400000)) ] ||
        die "the image has more than what is in the list"
    qemu-img rebase -q -u -f qcow2 -b "$tmp/monday" -F raw "$tmp/tuesday.qcow2"
    qemu-img compare -q -f qcow2 -F raw "$tmp/tuesday.qcow2" "$1" ||
        die "the image on top of the old disk is not ${1##*/}"
}
on_monday_is "$tmp/tuesday"

# What is written to the live disk is in the image too.
py <<'END'
h = connect()
h.pwrite(b"new" * 1000, 10 * M)
leave(h)
with open(tmp + "/tuesday", "rb") as t, open(tmp + "/written", "wb") as w:
    w.write(t.read())
    w.seek(10 * M)
    w.write(b"new" * 1000)
END
nbdcopy "$(view @full.qcow2)" - | cat >"$tmp/tuesday.qcow2"
on_monday_is "$tmp/written"
clients_have_gone
stop_nbdkit
log_lacks error
