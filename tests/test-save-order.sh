#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What a crash may leave behind (seen with strace): all of the file is written and synced
# before it gets the name, and the directory is synced after that, both for a new file and
# for one that is replaced.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires strace -V
requires_plugin pattern
requires qemu-img --version
mkdir "$tmp/t"
under=(strace -f -qq -yy -o "$tmp/strace"
    -e "trace=desc,file,close,%file,fsync,fdatasync,linkat,rename,renameat,renameat2")

for args in "" cow-save-compact=true; do
    for target in new replaced; do
        # shellcheck disable=SC2086
        start_nbdkit pattern 1M cow-save="$tmp/t/diff" $args
        py <<'END'
h = connect()
h.pwrite(b"order" * 9999, 12345)
h.zero(100000, 500000)
END
        stop_nbdkit
        log_lacks error
        sound_diff "$tmp/t/diff"
        py $target <<'END'
replaced = sys.argv[1] == "replaced"
line = re.compile(r"^\d+ +(?:<\.\.\. )?(\w+)[( ](.*)")
t = tmp + "/t"
steps, named = [], False
with open(tmp + "/strace", errors="replace") as f:
    lines = f.readlines()
# Calls that were interrupted by another thread's come in two lines.
calls, unfinished = [], {}
for l in lines:
    who = l.split()[0]
    if "<unfinished ...>" in l:
        unfinished[who] = l[:l.index("<unfinished")].rstrip("\n")
    elif "resumed>" in l and who in unfinished:
        calls.append(unfinished.pop(who) + l[l.index("resumed>") + 8:])
    else:
        calls.append(l)
for l in calls:
    m = line.match(l)
    if not m or re.search(r"= -1 ", l):
        continue
    call, rest = m.groups()
    # The file without a name, or with the temporary one, of the target's directory.
    on_file = re.match(r"\d+<%s/[^>]*>" % re.escape(t), rest)
    on_dir = re.match(r"\d+<%s/?>" % re.escape(t), rest)
    if on_file and re.match(r"p?writev?(64|2)?$|fallocate|ftruncate", call):
        if call == "fallocate" and "PUNCH_HOLE" in rest and named:
            fail("punched after it had the name")
        steps.append("write")
    elif on_file and call in ("fsync", "fdatasync"):
        steps.append("sync")
    elif on_dir and call in ("fsync", "fdatasync"):
        steps.append("sync of the directory")
    elif call in ("linkat", "rename", "renameat", "renameat2") and t + "/diff\"" in rest:
        steps.append("name")
        named = True
    elif call == "linkat" and t + "/" in rest:
        steps.append("link")
    elif call in ("unlink", "unlinkat") and t + "/diff\"" in rest:
        fail("the older diff was removed")
if "write" not in steps or steps.count("name") != 1:
    fail("steps: %s" % steps)
last = [s for i, s in enumerate(steps) if i == 0 or steps[i - 1] != s]
want = ["write", "sync"] + (["link"] if replaced else []) \
    + ["name", "sync of the directory"]
expect(last[-len(want):], want, "the last steps")
if "write" in last[-len(want) + 1:]:
    fail("written after the sync: %s" % last)
END
    done
    rm "$tmp/t/diff"
done
