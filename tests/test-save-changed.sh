#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Somebody else has changed the diff, or put another one in its place, since the server
# began to use it: it is not replaced.  The server's own diff is kept beside it, one line
# says so, and the status is 1.  What only got another name or mode is replaced.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin eval file
requires qemu-img --version
base_file "$tmp/base" 1048576
mkdir "$tmp/t" "$tmp/temporary"
export TMPDIR=$tmp/temporary

start_nbdkit file "$tmp/base" cow-save="$tmp/old"
echo 'connect().pwrite(b"old" * 3000, 5000)' | py
stop_nbdkit

# change HOW FILE
change ()
{
    case $1 in
        # Programs that know qemu's locks cannot do that.
        written) printf 'more' | dd of="$2" bs=1 seek=4096 conv=notrunc status=none ;;
        replaced) cp "$tmp/old" "$2.new"; mv "$2.new" "$2" ;;
        touched) touch "$2" ;;
        appeared) cp "$tmp/old" "$2" ;;
        mode) chmod 640 "$2" ;;
        linked) ln "$2" "$tmp/link"; rm "$tmp/link" ;;
        read) cat "$2" >/dev/null ;;
        gone) rm "$2" ;;
    esac
}

# kept_beside HOW ARGS...: FILE is as somebody else has left it; the diff lies beside.
kept_beside ()
{
    local how=$1 kept
    shift
    rm -f "$tmp"/t/*
    [ "$how" = appeared ] || cp "$tmp/old" "$tmp/t/diff"
    start_nbdkit file "$tmp/base" cow-save="$tmp/t/diff" "$@"
    echo 'connect().pwrite(b"new" * 3000, 9000)' | py
    nbdcopy "$uri" "$tmp/shown"
    change "$how" "$tmp/t/diff"
    cp -p "$tmp/t/diff" "$tmp/changed"
    end_nbdkit TERM 1
    log_has "cow-save=$tmp/t/diff: $tmp/t/diff was changed by somebody else"
    kept=$(kept_diff "$log")
    cmp "$tmp/t/diff" "$tmp/changed" || die "$how: it was replaced"
    case $kept in "$tmp/t/cow-kept-"*) ;; *) die "$how: kept in $kept" ;; esac
    only_files "$tmp/t" "${kept##*/}" diff
    only_files "$tmp/temporary" ""
    diff_is "$kept" "$tmp/base" "$tmp/shown"
}

saved ()
{
    local how=$1
    shift
    rm -f "$tmp"/t/*
    cp "$tmp/old" "$tmp/t/diff"
    start_nbdkit file "$tmp/base" cow-save="$tmp/t/diff" "$@"
    echo 'connect().pwrite(b"new" * 3000, 9000)' | py
    nbdcopy "$uri" "$tmp/shown"
    change "$how" "$tmp/t/diff"
    stop_nbdkit
    log_lacks error
    only_files "$tmp/t" diff
    diff_is "$tmp/t/diff" "$tmp/base" "$tmp/shown"
}

for how in written replaced touched appeared; do
    kept_beside $how
    kept_beside $how cow-save-compact=true
done
kept_beside written cow-load="$tmp/t/diff"
for how in mode linked read gone; do
    saved $how
    saved $how cow-load="$tmp/t/diff"
done

# In a directory, one export's diff was changed: that one is kept, the other is saved.
rm -f "$tmp"/t/*
serve ()
{
    start_nbdkit eval open='echo "$3"' get_size='echo 64K' \
        pread='head -c "$3" /dev/zero' cow-load="$tmp/t/" cow-save="$tmp/t/"
}
write_both ()
{
    py "$1" <<'END'
for name in "a", "b":
    connect(name).pwrite(sys.argv[1].encode() * 1000, 0)
END
}
serve
write_both one
stop_nbdkit
serve
write_both two
change written "$tmp/t/a.qcow2"
cp "$tmp/t/a.qcow2" "$tmp/changed"
end_nbdkit TERM 1
kept=$(kept_diff "$log")
cmp "$tmp/t/a.qcow2" "$tmp/changed" || die "the changed one was replaced"
only_files "$tmp/t" a.qcow2 b.qcow2 "${kept##*/}"
for diff in "$tmp/t/b.qcow2" "$kept"; do
    qemu-img convert -f qcow2 -O raw "$diff" "$tmp/raw"
    [ "$(head -c 6 "$tmp/raw")" = twotwo ] || die "$diff has not what was written"
done
