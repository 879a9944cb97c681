#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The directory of the target is removed, or renamed, while the server runs: the changes
# are kept as a complete diff in $TMPDIR, one line says where, and the status is 1.  Another
# directory of that name is used again.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern eval
requires qemu-img --version
base_file "$tmp/base" 1048576
mkdir "$tmp/kept"
export TMPDIR=$tmp/kept

write_some ()
{
    echo 'connect().pwrite(b"gone" * 5000, 300000)' | py
    nbdcopy "$uri" "$tmp/shown"
}

for compact in false true; do
    for how in removed renamed; do
        mkdir "$tmp/t"
        start_nbdkit pattern 1M cow-save="$tmp/t/diff" cow-save-compact=$compact
        write_some
        case $how in
            removed) rm -r "$tmp/t" ;;
            renamed) rm -rf "$tmp/moved"; mv "$tmp/t" "$tmp/moved" ;;
        esac
        end_nbdkit TERM 1
        kept=$(kept_diff "$log")
        [ "$(dirname "$kept")" = "$tmp/kept" ] || die "kept in $kept"
        diff_is "$kept" "$tmp/base" "$tmp/shown"
        only_files "$tmp/kept" "${kept##*/}"
        rm "$kept"
    done

    # Removed, and there again.
    mkdir "$tmp/t"
    start_nbdkit pattern 1M cow-save="$tmp/t/diff" cow-save-compact=$compact
    write_some
    rm -r "$tmp/t"
    mkdir "$tmp/t"
    status=0
    clients_have_gone
    child=${_servers[$server]}
    unset "_servers[$server]"
    kill -TERM "$pid"
    wait "$child" || status=$?
    if [ $status -eq 0 ]; then
        kept=$tmp/t/diff
    else
        kept=$(kept_diff "$log")
    fi
    diff_is "$kept" "$tmp/base" "$tmp/shown"
    rm -rf "$tmp/t" "$kept"
done

# Of several exports, each is kept.
mkdir "$tmp/t"
start_nbdkit eval open='echo "$3"' get_size='echo 64K' pread='head -c "$3" /dev/zero' \
    cow-save="$tmp/t/"
py <<'END'
for name in "a", "b", "../c":
    connect(name).pwrite(name[-1].encode() * 64 * K, 0)
END
rm -r "$tmp/t"
end_nbdkit TERM 1
[ "$(grep -c 'error: cow-save=.*were kept, as a complete diff, in ' "$log")" -eq 3 ] ||
    die "not three lines"
sed -n 's/.*as a complete diff, in //p' "$log" >"$tmp/list"
all=
while read -r kept; do
    sound_diff "$kept"
    qemu-img convert -f qcow2 -O raw "$kept" "$tmp/raw"
    all+=$(tr -s abc <"$tmp/raw")
done <"$tmp/list"
[ "$(fold -w 1 <<<"$all" | sort | tr -d '\n')" = abc ] || die "kept: '$all'"
