#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A diff that lives on from run to run keeps its backing file: its name and format, or that
# it has none.  Only cow-save-backing gives it another one.  What takes the place of a file
# that is not what the disk started from does not get that one's.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
base_file "$tmp/base" 1048576
qemu-img create -q -f qcow2 -b base -F raw "$tmp/middle" 1M
mkdir "$tmp/dir"
diff=$tmp/diff

# run ARGS...: a client writes something.  Leaves $tmp/shown.
run ()
{
    start_nbdkit file "$tmp/base" "$@"
    py <<'END'
connect().pwrite(b"x" * 5000, 70000)
END
    nbdcopy "$uri" "$tmp/shown"
    log_lacks error
    stop_nbdkit
}

# backing FILE NAME FORMAT: it has this backing file ("-": none).
backing ()
{
    qemu-img info -U -f qcow2 --output=json "$1" >"$tmp/info"
    py "$2" "$3" <<'END'
import json
with open(tmp + "/info") as f:
    info = json.load(f)
expect((info.get("backing-filename", "-"), info.get("backing-filename-format", "-")),
       (sys.argv[1], sys.argv[2]), "backing file")
END
}

for compact in false true; do
    live=(cow-load="$diff" cow-save="$diff" "cow-save-compact=$compact")
    rm -f "$diff"
    run "${live[@]}"
    qemu-img rebase -u -b base -F raw -f qcow2 "$diff"
    for _ in 1 2; do
        run "${live[@]}"
        backing "$diff" base raw
        sound_diff "$diff"
        qemu-img compare -q -F raw "$diff" "$tmp/shown" || die "not ready to use"
    done
    # Also where nothing is written, and where no format is said.
    start_nbdkit file "$tmp/base" "${live[@]}"
    nbdinfo --size "$uri" >"$tmp/size"
    stop_nbdkit
    backing "$diff" base raw
    run "${live[@]}" cow-save-backing=middle cow-save-backing-format=qcow2
    run "${live[@]}"
    backing "$diff" middle qcow2
    run "${live[@]}" cow-save-backing=none
    run "${live[@]}"
    backing "$diff" - -
    run "${live[@]}" cow-save-backing=base
    backing "$diff" base raw
done

# An empty one, whose client comes and goes.
rm "$diff"
qemu-img create -q -f qcow2 -b base -F raw "$diff" 1M
start_nbdkit file "$tmp/base" cow-load="$diff" cow-save="$diff"
nbdinfo --size "$uri" >"$tmp/size"
stop_nbdkit
backing "$diff" base raw

# The lowest of several, and not one that lies on others, or is not loaded.
run cow-load="$diff" cow-load="$tmp/middle" cow-save="$diff"
backing "$diff" base raw
cp "$diff" "$tmp/upper"
run cow-load="$tmp/middle" cow-load="$tmp/upper" cow-save="$tmp/upper"
backing "$tmp/upper" "$(printf 'json:{"driver":"raw","file":{"driver":"null-co","size":%d,"read-zeroes":true}}' 1048576)" raw
cp "$diff" "$tmp/upper"
run cow-load="$tmp/middle" cow-save="$tmp/upper"
qemu-img info -U "$tmp/upper" >"$tmp/info" || die "qemu-img cannot tell"
! grep -q base "$tmp/info" || die "the name is of another image"

# Of each export.
run cow-load="$tmp/dir" cow-save="$tmp/dir"
qemu-img rebase -u -b ../base -F raw -f qcow2 "$tmp/dir/default.qcow2"
run cow-load="$tmp/dir" cow-save="$tmp/dir"
backing "$tmp/dir/default.qcow2" ../base raw
