#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The programs that views are for take them while the live disk is written all the time:
# nbdcopy, qemu-img convert and compare, and restic from a pipe.  What they got of one moment
# is the same in all forms, and a moment that there was.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
requires nbdcopy --version
requires restic version

base_file "$tmp/base" 4194304
truncate -s 8M "$tmp/base"

# The load: two writers, each with regions of its own.  In a region, all is written with one
# number, in one write, or zeroed; so it can be seen whether a copy has parts of two moments.
cat >"$tmp/load.py" <<'END'
from cowtest import *
w = int(sys.argv[1])
REGION = 90000
h = connect()
rand = random.Random(w)
number = 0
while os.path.exists(tmp + "/load"):
    flying = {}
    for at in rand.sample(range(w, 80, 2), 8):
        number += 1
        one = struct.pack(">QQ", number, number)
        buf = nbd.Buffer.from_bytearray(bytearray(one * (REGION // 16)))
        if rand.random() < 0.8:
            flying[h.aio_pwrite(buf, at * REGION)] = buf
        else:
            flying[h.aio_zero(REGION, at * REGION)] = None
    while flying:
        h.poll(1000)
        for cookie in [c for c in flying if h.aio_command_completed(c)]:
            del flying[cookie]
    # How far it is.
    with open(tmp + "/load%d.new" % w, "w") as f:
        f.write(str(number))
    os.rename(tmp + "/load%d.new" % w, tmp + "/load%d" % w)
    time.sleep(0.01)        # others want the processor too
h.shutdown()
END

start_load ()
{
    touch "$tmp/load"
    loads=()
    for w in 0 1; do
        PYTHONPATH=$tmp PYTHONDONTWRITEBYTECODE=1 \
            timeout "$guard" "$_python" "$tmp/load.py" $w &
        loads+=($!)
    done
    goes_on
}

# goes_on: the load has gone on, both of it.
goes_on ()
{
    local w before
    for w in 0 1; do
        before=$(cat "$tmp/load$w" 2>/dev/null || :)
        until [ "$(cat "$tmp/load$w" 2>/dev/null || :)" != "$before" ]; do
            kill -0 "${loads[$w]}" || die "a writer has ended"
            sleep 0.02
        done
    done
}

end_load ()
{
    local w
    rm "$tmp/load"
    for w in 0 1; do
        wait "${loads[$w]}" || die "a writer has failed"
    done
}

# whole FILE: FILE is a disk in which no region has parts of two writes.
whole ()
{
    py "$1" <<'END'
with open(sys.argv[1], "rb") as f:
    disk = f.read()
with open(tmp + "/base", "rb") as f:
    before = f.read()
expect(len(disk), 8 * M, "length")
REGION = 90000
data = 0
for at in range(0, 80 * REGION, REGION):
    got = disk[at:at + REGION]
    if got == got[:16] * (REGION // 16):
        data += got[:16] != bytes(16)
    elif got != before[at:at + REGION]:
        fail("the region at %d has parts of several writes" % at)
same(disk[80 * REGION:], bytes(8 * M - 80 * REGION), "the end")
if data == 0:
    fail("there is nothing of what was written")
END
}

# as_raw FILE: the disk that the image FILE shows over the base, in FILE.raw.
as_raw ()
{
    sound_diff "$1"
    qemu-img convert -O raw "$(over_base "$1" "$tmp/base")" "$1.raw"
}

start_nbdkit file "$tmp/base" cow-views=true cow-save-backing="$tmp/base" \
    cow-control="$tmp/control"
start_load

# One moment, with a name: the same for everybody, for as long as it takes.
py <<'END'
Control()("moment", "m", "default")
END

# nbdcopy, from one connection and from several.
nbdcopy "$(view @m)" "$tmp/snapshot"
goes_on
nbdcopy --connections=4 "$(view @m)" - | cmp - "$tmp/snapshot" ||
    die "nbdcopy: another snapshot"
whole "$tmp/snapshot"
nbdcopy "$(view @m/diff.qcow2)" "$tmp/diff"
goes_on
nbdcopy --connections=4 "$(view @m/diff.qcow2)" - | cmp - "$tmp/diff" ||
    die "nbdcopy: another diff"
as_raw "$tmp/diff"
whole "$tmp/diff.raw"
nbdcopy --connections=4 "$(view @m/full.qcow2)" "$tmp/full"
goes_on
sound_diff "$tmp/full"
qemu-img convert -f qcow2 -O raw "$tmp/full" "$tmp/full.raw"
whole "$tmp/full.raw"

# qemu-img, of the exports themselves.
for format in raw qcow2; do
    qemu-img convert -f raw -O $format "$(view @m)" "$tmp/converted"
    qemu-img compare -q -f $format -F raw "$tmp/converted" "$tmp/snapshot" ||
        die "qemu-img convert: another snapshot"
    qemu-img compare -q -f $format -F raw "$tmp/converted" "$(view @m)" ||
        die "qemu-img compare: another snapshot"
done
goes_on
for v in diff full; do
    qemu-img convert -f qcow2 -O raw "$(view @m/$v.qcow2)" "$tmp/converted"
    cmp "$tmp/converted" "$tmp/$v.raw" || die "qemu-img convert: another $v image"
    qemu-img compare -q -f qcow2 -F raw "$(view @m/$v.qcow2)" "$tmp/$v.raw" ||
        die "qemu-img compare: another $v image"
    qemu-img check -q -f qcow2 "$(view @m/$v.qcow2)" || die "qemu-img check: $v"
done
qemu-img compare -q -f raw -F raw "$(view @base)" "$tmp/base" || die "qemu-img: the base"
goes_on

# restic, from a pipe.
export RESTIC_REPOSITORY=$tmp/repository RESTIC_PASSWORD=secret
export RESTIC_CACHE_DIR=$tmp/cache
restic -q init
for v in snapshot diff.qcow2 full.qcow2; do
    case $v in snapshot) what=@m ;; *) what=@m/$v ;; esac
    nbdcopy "$(view $what)" - |
        timeout "$guard" restic -q backup --stdin --stdin-filename $v ||
        die "the backup of $what failed"
    timeout "$guard" restic -q dump latest /$v >"$tmp/restored"
    cmp "$tmp/restored" "$tmp/${v%.qcow2}" || die "restic: another $v"
done
goes_on
py <<'END'
Control()("forget", "m", "default")
END

# Moments of their own, one after the other.
for i in 1 2 3; do
    nbdcopy "$(view @diff.qcow2)" "$tmp/next"
    as_raw "$tmp/next"
    whole "$tmp/next.raw"
    ! cmp -s "$tmp/next" "$tmp/diff" || die "the moment is still the first one"
    goes_on
done
end_load

# The disk stands still: all views are of what it is.
clients_have_gone
nbdcopy "$uri" "$tmp/shown"
whole "$tmp/shown"
nbdcopy "$(view @snapshot)" - | cmp - "$tmp/shown" || die "the last snapshot"
qemu-img compare -q -f qcow2 -F raw "$(view @diff.qcow2)" "$tmp/shown" ||
    die "the last diff"
qemu-img compare -q -f qcow2 -F raw "$(view @full.qcow2)" "$tmp/shown" ||
    die "the last full image"
stop_nbdkit
log_lacks error
