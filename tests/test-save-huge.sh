#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The largest disks.  Standard L2 entries where they can address the disk, extended ones
# where they cannot, and where these cannot either, the export is refused when it is
# opened, with a message that says which parameter helps.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin memory
requires qemu-img --version

# saved SIZE KIND ARGS...: a disk of SIZE, with something at its very end.
saved ()
{
    local size=$1 kind=$2
    shift 2
    rm -f "$tmp/diff"
    start_nbdkit memory "$size" cow-save="$tmp/diff" cow-save-backing=none "$@"
    py <<'END'
h = connect()
h.pwrite(b"last" * 1024, h.get_size() - 4 * K)
h.pwrite(b"first", 0)
END
    stop_nbdkit
    log_lacks error:
    # Qemu needs more than a GiB to check what may be so long.
    [ "$(stat -c %s "$tmp/diff")" -gt $((1 << 30)) ] || sound_diff "$tmp/diff"
    qemu-img info -f qcow2 "$tmp/diff" >"$tmp/info"
    grep -q "extended l2: $kind" "$tmp/info" ||
        { cat "$tmp/info" >&2; die "$size $*: extended l2 is not $kind"; }

    start_nbdkit memory "$size" cow-load="$tmp/diff"
    py <<'END'
h = connect()
same(h.pread(5, 0), b"first", "the first bytes")
same(h.pread(4 * K, h.get_size() - 4 * K), b"last" * 1024, "the last bytes")
END
    stop_nbdkit
}

saved 8T false
saved 8T true cow-save-format=extended
saved $(((8 << 40) + 512)) true
saved 9T true
saved 9T false cow-block-size=8K
saved 1P false cow-block-size=64K
saved $((4 << 50)) true

# refused SIZE ARGS...
refused ()
{
    local size=$1
    shift
    rm -f "$tmp/diff"
    start_nbdkit memory "$size" cow-save="$tmp/diff" "$@"
    py <<'END'
expect(refused(), True, "refused")
END
    log_has "error: cow: export .* refused: .*too large.*cow-block-size="
    # Nobody could connect: the same error at the end.
    end_nbdkit TERM 1
    [ ! -e "$tmp/diff" ] || die "a diff of a disk that is too large"
}
refused $(((4 << 50) + 512))
refused $((4 << 50 | 1 << 40)) cow-save-format=extended
refused 7E
