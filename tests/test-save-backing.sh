#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The backing file in the diff: by default one that opens anywhere and reads as zeroes,
# with cow-save-backing what it names (and the format that goes with it), so that the diff
# is ready to use, or none.  It is a name and no more: nothing opens it or must be there.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
base_file "$tmp/base" 1000000
diff=$tmp/diff

# save ARGS...: makes $tmp/diff, and $tmp/shown.
save ()
{
    start_nbdkit file "$tmp/base" "$@"
    py <<'END'
h = connect()
h.pwrite(b"written" * 1000, 100000)
h.zero(50000, 500000)
END
    nbdcopy "$uri" "$tmp/shown"
    stop_nbdkit
    qemu-img info -U -f qcow2 --output=json "$diff" >"$tmp/info"
}

# recorded KEY: what the image says.
recorded ()
{
    py "$1" <<'END'
import json
with open(tmp + "/info") as f:
    print(json.load(f).get(sys.argv[1], "-"))
END
}

for where in "cow-save=$diff" "cow-save=$diff cow-save-compact=true" stream; do
    if [ "$where" = stream ]; then
        save_now () { save cow-save=/dev/fd/7 "$@" 7>"$diff"; }
    else
        # shellcheck disable=SC2086
        save_now () { save $where "$@"; }
    fi

    # Opens in another directory, and the holes are zeroes.
    save_now
    [ "$(recorded backing-filename-format)" = raw ] || die "no format raw"
    (cd / && qemu-img convert -O raw "$diff" "$tmp/alone")
    py <<'END'
with open(tmp + "/alone", "rb") as f:
    alone = f.read()
whole = 1000000 // 512 * 512 + 512
want = bytearray(base(0, 1000000) + bytes(whole - 1000000))
want[100000:107000] = b"written" * 1000
want[500000:550000] = bytes(50000)
# Blocks at the ends of what was changed are whole, zeroed blocks are zero.
for start in range(0, whole, 4096):
    if not (start + 4096 > 100000 and start < 107000
            or start + 4096 > 500000 and start < 550000):
        want[start:start + 4096] = bytes(min(4096, whole - start))
same(alone, want, "the diff by itself")
END
    rebased_is "$diff" "$tmp/base" "$tmp/shown"

    # Ready to use.
    save_now cow-save-backing="$tmp/base"
    [ "$(recorded backing-filename)" = "$tmp/base" ] || die "another backing file"
    [ "$(recorded backing-filename-format)" = raw ] || die "no format raw"
    sound_diff "$diff"
    qemu-img compare -q -F raw "$diff" "$tmp/shown" || die "not ready to use"

    save_now cow-save-backing=nowhere/else.img cow-save-backing-format=qcow2
    [ "$(recorded backing-filename)" = nowhere/else.img ] || die "another name"
    [ "$(recorded backing-filename-format)" = qcow2 ] || die "another format"

    save_now cow-save-backing=none
    [ "$(recorded backing-filename)" = - ] || die "a backing file"
    [ "$(recorded backing-filename-format)" = - ] || die "a backing format"
    diff_is "$diff" "$tmp/base" "$tmp/shown"
done

# The longest name.
name=$(printf 'x%.0s' {1..1023})
save cow-save="$diff" cow-save-backing="$name"
[ "$(recorded backing-filename)" = "$name" ] || die "not the longest name"
