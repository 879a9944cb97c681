#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# With one name in cow-load and cow-save, which need not be there at first, the overlay
# lives on from run to run, also through runs without a client, and with a directory.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
base_file "$tmp/base" 1000003
mkdir "$tmp/t" "$tmp/exports" "$tmp/link"
cp "$tmp/base" "$tmp/wanted"
cp "$tmp/base" "$tmp/exports/a"
cp "$tmp/base" "$tmp/exports/b"

# run NR ARGS...: what earlier runs wrote is there, and this one adds something.
run ()
{
    local nr=$1
    shift
    start_nbdkit file "$tmp/base" "$@"
    [ "$nr" = none ] || py "$nr" <<'END'
nr = int(sys.argv[1])
with open(tmp + "/wanted", "rb") as f:
    model = bytearray(f.read())
h = connect()
same(h.pread(len(model), 0), model, "the disk at the start of run %d" % nr)
for at in (nr * 1000, 500000 + nr * 30000, 700000):
    data = b"run %4d" % nr * 700
    h.pwrite(data, at)
    model[at:at + len(data)] = data
h.zero(20000, 100000 + 7000 * nr)
model[100000 + 7000 * nr:120000 + 7000 * nr] = bytes(20000)
with open(tmp + "/wanted", "wb") as f:
    f.write(model)
END
    stop_nbdkit
    log_lacks 'error|warning'
    diff_is "$tmp/t/diff" "$tmp/base" "$tmp/wanted"
    only_files "$tmp/t" diff
}

run 1 cow-load="$tmp/t/diff" cow-save="$tmp/t/diff"
run 2 cow-load="$tmp/t/diff" cow-save="$tmp/t/diff"
run none cow-load="$tmp/t/diff" cow-save="$tmp/t/diff"
# By other names of the same place.
ln -s "$tmp/t" "$tmp/link/t"
run 3 cow-load="$tmp/link/t/diff" cow-save="$tmp/t/../t/diff"
run 4 cow-load="$tmp/t/diff" cow-save="$tmp/link/t/diff" cow-save-compact=true
run 5 cow-load="$tmp/t/diff" cow-save="$tmp/t/diff" cow-block-size=64K \
    cow-save-format=extended
run 6 cow-load="$tmp/t/diff" cow-save="$tmp/t/diff"

# No client in the first run, and the file is not there.
rm "$tmp/t/diff"
cp "$tmp/base" "$tmp/wanted"
start_nbdkit file "$tmp/base" cow-load="$tmp/t/diff" cow-save="$tmp/t/diff"
stop_nbdkit
log_lacks 'error'
[ ! -e "$tmp/t/diff" ] || sound_diff "$tmp/t/diff"
run 1 cow-load="$tmp/t/diff" cow-save="$tmp/t/diff"
run 2 cow-load="$tmp/t/diff" cow-save="$tmp/t/diff"

# A directory: what an export has goes on, also if it is another one that is used.
rm "$tmp/t/diff"
for i in 1 2 3 4; do
    start_nbdkit file dir="$tmp/exports" cow-load="$tmp/t/" cow-save="$tmp/t/"
    py $i <<'END'
i = int(sys.argv[1])
name = "a" if i % 2 else "b"
h = connect(name)
for j in range(1, i + 2):
    if (i - j) % 2 == 0 and j < i:
        same(h.pread(6, j * 5000), b"run %2d" % j, "what run %d wrote to %s" % (j, name))
    elif j != i:
        same(h.pread(6, j * 5000), base(j * 5000, 6), "nothing of run %d" % j)
h.pwrite(b"run %2d" % i, i * 5000)
END
    stop_nbdkit
    log_lacks 'error|warning'
done
only_files "$tmp/t" a.qcow2 b.qcow2
