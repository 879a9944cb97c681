#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# With cow-views=true, and not without, the names NAME@base, NAME@snapshot,
# NAME@diff.qcow2 and NAME@full.qcow2 are views of the export NAME.  They are listed, with
# a description, after the names of the plugin and those that have an overlay.  No name
# that contains "@" goes to the plugin then.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file pattern

# For all that follows: how to list.
cat >"$tmp/listing.py" <<'END'
from cowtest import *

VIEWS = "@base", "@snapshot", "@diff.qcow2", "@full.qcow2"


def listed():
    """[(name, description)...], in order."""
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(os.environ["sock"])
    found = []
    h.opt_list(lambda name, description: found.append((name, description)))
    h.opt_abort()
    return found


def names():
    return [name for name, description in listed()]


def with_views(names):
    return names + [n + v for n in names for v in VIEWS]


def described(name):
    """What NBD_OPT_GO tells of an export."""
    h = nbd.NBD()
    h.set_full_info(True)
    h.set_export_name(name)
    h.connect_unix(os.environ["sock"])
    return h.get_export_description()


def refused_with(name, reason):
    """A connection to the export is refused, and the log says why."""
    before = server_log()
    expect(refused(name), True, "refusal of " + name)
    until(lambda: reason in server_log()[len(before):], "the reason: " + reason)
END

# The plugin's own names with "@" cannot be reached while views are on: it might serve any
# name, and the base would look like the moment that there is not.
mkdir "$tmp/d"
for f in a user@host a@b@c x@snapshots @ snapshot base y@diff.qcow2.bak @base.txt \
    own@snapshot; do
    base_file "$tmp/d/$f" 65536
done
start_nbdkit file dir="$tmp/d" cow-views=true
py <<'END'
from listing import *
plugins = sorted(os.listdir(tmp + "/d"))
found = listed()
expect(sorted(n for n, d in found[:len(plugins)]), plugins, "the plugin's names")
for n, d in found[len(plugins):]:
    if not d:
        fail("%s has no description" % n)
reachable = [n for n in plugins if "@" not in n]
expect(reachable, ["a", "base", "snapshot"], "names without @")
for n in with_views(reachable):
    if n not in names():
        fail("%s is not listed" % n)

# There are none of what looks like a view itself.
expect([n for n in names() if n.count("@") > 1], ["a@b@c"], "views of a view in the list")

for n in plugins:
    if n not in reachable:
        expect(refused(n), True, "refusal of " + n)
        continue
    h = connect(n)
    expect(h.is_read_only(), False, "read only: " + n)
    h.pwrite(b"written to " + n.encode(), 0)
    for v in VIEWS:
        s = connect(n + v)
        expect(s.is_read_only(), True, "read only: " + n + v)
        expect(described(n + v), dict(found)[n + v], "description")
        if v == "@base":
            same(s.pread(65536, 0), base(0, 65536), n + v)
        elif v == "@snapshot":
            same(s.pread(11 + len(n), 0), b"written to " + n.encode(), n + v)
        else:
            same(s.pread(4, 0), b"QFI\xfb", n + v)

# No views of views, nor of what there is not.
for v in VIEWS:
    for w in VIEWS:
        refused_with("a" + v + w, "no views of a view")
        refused_with(v + w, "no views of a view")
    refused_with("nothing" + v, "nothing")
for n, reason in (("a@", "names no moment"), ("a@Snapshot", 'no moment "Snapshot"'),
                  ("a@snapshot ", "names no moment"), ("a@diff", 'no moment "diff"'),
                  ("a@live", 'no moment "live"'), ("user@host", "user"),
                  ("own@snapshot", "own")):
    refused_with(n, reason)
for n in "asnapshot", "nothing":
    expect(refused(n), True, "refusal of " + n)
END
stop_nbdkit

# Switched off, which is the default, they are the plugin's, all of them.
for args in "" cow-views=false; do
    # shellcheck disable=SC2086
    start_nbdkit file dir="$tmp/d" $args
    py <<'END'
from listing import *
expect(sorted(names()), sorted(os.listdir(tmp + "/d")), "the list")
h = connect("own@snapshot")
h.pwrite(b"!", 0)
same(h.pread(65536, 0), b"!" + base(1, 65535), "the plugin's own")
for n in "a@snapshot", "a@base", "@snapshot":
    expect(refused(n), True, "refusal of " + n)
END
    stop_nbdkit
done

# A plugin that serves any name and lists one: names that have an overlay are listed, as
# long as it is kept, and none twice.
start_nbdkit pattern 1M cow-views=true
py <<'END'
from listing import *
expect(names(), with_views([""]), "the list at first")
h = [connect(n) for n in ("", "vm1", "vm 2/\u00e4", "idle", "x" * 4087)]
for i in h[:3] + h[4:]:
    i.pwrite(b"w", 0)
# Without what would be too long for NBD.
known = ["", "idle", "vm 2/\u00e4", "vm1", "x" * 4087]
wanted = [n for n in with_views(known) if len(n) <= 4096]
expect(len(wanted), 5 * len(known) - 2, "names that are not too long")
found = names()
expect(found[0], "", "the plugin's name")
expect(sorted(found[:5]), sorted(known), "names that have an overlay")
expect(sorted(found), sorted(wanted), "the list with overlays")
leave(*h)
known.remove("idle")
wanted = [n for n in with_views(known) if len(n) <= 4096]
expect(sorted(names()), sorted(wanted), "the list without what was thrown away")
END
nbdinfo --list --json "$uri" >"$tmp/list" || die "nbdinfo --list"
[ "$(grep -c '"export-name":' "$tmp/list")" -eq 18 ] || { cat "$tmp/list"; die "nbdinfo"; }
grep -q '"description": "the disk, frozen when you connect"' "$tmp/list" ||
    die "nbdinfo --list has no description"
stop_nbdkit
log_lacks error

# The room in a list ends at 10,000 names.
mkdir "$tmp/many"
(cd "$tmp/many" && seq -f 'disk%.0f' 3000 | xargs touch)
start_nbdkit file dir="$tmp/many" cow-views=true
py <<'END'
from listing import *
found = names()
expect(len(found), 10000, "names in the list")
expect(sorted(found[:3000]), sorted(os.listdir(tmp + "/many")), "the plugin's names")
for n in "disk1@snapshot", "disk3000@diff.qcow2":
    connect(n)
END
stop_nbdkit
log_lacks error
(cd "$tmp/many" && seq -f 'disk%.0f' 3001 10000 | xargs touch)
start_nbdkit file dir="$tmp/many" cow-views=true
py <<'END'
from listing import *
expect(len(names()), 10000, "names in the list")
h = connect("disk1")
expect(len(names()), 10000, "names in the list")
leave(h)
END
stop_nbdkit
log_lacks error

# With overlays for connections, there is nothing to look at but the base.
start_nbdkit pattern 1M cow-views=true cow-scope=connection
py <<'END'
from listing import *
other = connect("other")
refused_with("@snapshot", "cow-scope=connection")
leave(other)
h = connect()
h.pwrite(b"x", 0)
same(connect("@base").pread(M, 0), base(0, M), "the base")
expect(names(), ["", "@base"], "the list")
for v in VIEWS[1:]:
    refused_with(v, "cow-scope=connection")
same(h.pread(M, 0), b"x" + base(1, M - 1), "the live disk")
END
stop_nbdkit

# A view of what nobody has open is an overlay as long as it is open.
start_nbdkit pattern 1M cow-views=true cow-max-overlays=1
py <<'END'
from listing import *
b = connect("b@snapshot")
refused_with("a", "cow-max-overlays=1")
leave(b)
a = connect("a")
refused_with("b@snapshot", "cow-max-overlays=1")
leave(a, connect("a@snapshot"), connect("a@diff.qcow2"), connect("b@base"))
END
stop_nbdkit

# Parameters.
for value in '' 2 maybe /path; do
    nbdkit_refuses cow-views --filter="$FILTER" null 1M cow-views="$value"
done
for value in "" cow-views=false; do
    for p in cow-save-format=portable cow-save-backing=x; do
        # shellcheck disable=SC2086
        nbdkit_refuses "cow-views=true" --filter="$FILTER" null 1M $p $value
    done
done
nbdkit_refuses "add cow-save" --filter="$FILTER" null 1M cow-views=true cow-save-compact=true
nbdkit_refuses cow-save-backing --filter="$FILTER" null 1M cow-views=true \
    cow-save-backing-format=raw
nbdkit_refuses cow-block-size --filter="$FILTER" null 1M cow-views=true \
    cow-save-format=extended cow-block-size=128K
