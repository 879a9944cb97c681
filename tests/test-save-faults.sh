#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Each write, sync, link, rename, truncation and allocation of a save fails in turn.
# Whatever fails: the target is what it was before, or the complete diff; in the first case
# the one line on standard error names a complete diff that was kept elsewhere, and the
# server ends with status 1.  Where the overlay's disk did not take all of it, the line
# says that what was kept may be damaged.
#
# The calls are made to fail by save-faults.c.  Once alone; and in the target's file
# system that one and all that follow, as on a disk that breaks.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
preload save-faults
base_file "$tmp/base" 1000000
mkdir "$tmp/t" "$tmp/kept"
export COW_FAULTS=$tmp/faults

# On the disk that does not break; elsewhere, if there is such a place.
elsewhere=$tmp/kept
if [ -w /dev/shm ] && [ "$(stat -c %d /dev/shm)" != "$(stat -c %d "$tmp")" ]; then
    elsewhere=$(mktemp -d /dev/shm/cowtest.XXXXXX)
    cleanup_fn rm -rf "$elsewhere"
fi

# An older diff, which a later one may replace.
start_nbdkit file "$tmp/base" cow-save="$tmp/old"
echo "connect().pwrite(b'old' * 5000, 70000)" | py
stop_nbdkit

# damaged WHAT: the log says so just where a call has failed that is about what the disk
# took of the overlay: on a disk that breaks, the sync before it is kept elsewhere.
damaged ()
{
    local wanted=0
    case $hit,$mode,$1 in
        sync_file_range,*) wanted=1 ;;
        *cow-save-compact*) ;;
        fsync,* | *,on,*) wanted=1 ;;
    esac
    [ "$(grep -c 'perhaps damaged as its disk' "$log")" -eq $wanted ] ||
        die "$1 ($hit): wrong about damage"
}

# change_disk: the same each time; $tmp/wanted is what the disk is then.
change_disk ()
{
    py <<'END'
h = connect()
h.pwrite(b"new" * 50000, 12345)
h.zero(200000, 400000)
if not os.path.exists(tmp + "/wanted"):
    with open(tmp + "/wanted", "wb") as f:
        f.write(h.pread(1000000, 0))
END
}

# run OLD-OR-NEW FIRST LAST ERRNO ARGS...: makes calls FIRST..LAST of the save fail.
# Sets $hit, the names of calls that failed.
run ()
{
    local target=$1 first=$2 last=$3 error=$4 status=0 what="$*" child kept
    shift 4
    rm -f "$tmp"/t/* "$tmp"/kept/* "$elsewhere"/* "$COW_FAULTS" "$COW_FAULTS.hit"
    [ "$target" = new ] || cp --sparse=always "$tmp/old" "$tmp/t/diff"
    TMPDIR=$elsewhere start_nbdkit file "$tmp/base" cow-save="$tmp/t/diff" "$@"
    change_disk
    echo "$first $last $error" >"$COW_FAULTS.new"
    mv "$COW_FAULTS.new" "$COW_FAULTS"
    clients_have_gone
    child=${_servers[$server]}
    unset "_servers[$server]"
    kill -TERM "$pid"
    wait "$child" || status=$?
    no_sanitizer_report "$log" || die "$what"
    hit=
    [ ! -e "$COW_FAULTS.hit" ] || hit=$(xargs <"$COW_FAULTS.hit")

    if [ $status -eq 0 ]; then
        log_lacks error
        diff_is "$tmp/t/diff" "$tmp/base" "$tmp/wanted"
        only_files "$tmp/t" diff
        return
    fi
    [ $status -eq 1 ] || die "$what ($hit): status $status"
    [ "$(grep -c error: "$log")" -eq 1 ] || die "$what ($hit): not one line"
    log_has "error: cow-save=$tmp/t/diff: "
    if grep -q 'the diff is complete, but may not outlive a crash' "$log"; then
        diff_is "$tmp/t/diff" "$tmp/base" "$tmp/wanted"
        return
    fi
    if [ "$target" = new ]; then
        [ ! -e "$tmp/t/diff" ] || die "$what ($hit): there is a diff"
    else
        cmp "$tmp/t/diff" "$tmp/old" || die "$what ($hit): the old diff has changed"
    fi
    kept=$(kept_diff "$log") || die "$what ($hit): nothing was kept"
    diff_is "$kept" "$tmp/base" "$tmp/wanted"
    damaged "$*"
    # Nothing else is left.
    rm "$kept"
    [ "$target" = new ] || rm "$tmp/t/diff"
    [ -z "$(find "$tmp/t" "$tmp/kept" "$elsewhere" -type f)" ] ||
        die "$what ($hit): left behind: $(find "$tmp/t" "$elsewhere" -type f)"
}

# each ARGS...: until there is nothing more to fail.
each ()
{
    local n last
    for ((n = 1; ; n++)); do
        case $mode in once) last=$n ;; on) last=1000000 ;; esac
        run "$target" $n $last "$error" "$@"
        [ -n "$hit" ] || break
        [ $n -lt 200 ] || die "200 calls have failed, and that was not all"
    done
    echo "$target $mode errno $error $*: $((n - 1)) calls"
    [ $n -gt 3 ] || die "no calls were made to fail"
}

for target in new old; do
    mode=once error=5
    each
    each cow-save-compact=true
    if [ "$elsewhere" != "$tmp/kept" ]; then
        export COW_FAULTS_DIR=$tmp
        mode=on error=28
        each
        each cow-save-compact=true
        unset COW_FAULTS_DIR
    fi
done

# The disk has not taken all of the overlay, and a copy cannot be written: it is kept in its
# own file, though that was to be streamed and is no image yet.
rm -f "$tmp"/kept/* "$COW_FAULTS" "$COW_FAULTS.hit"
TMPDIR=$tmp/kept start_nbdkit file "$tmp/base" cow-save=-
change_disk
echo "1 3 5" >"$COW_FAULTS"
end_nbdkit TERM 1
[ "$(xargs <"$COW_FAULTS.hit")" = "sync_file_range fsync open of a directory" ] ||
    die "other calls have failed: $(xargs <"$COW_FAULTS.hit")"
hit=sync_file_range
damaged "own file"
diff_is "$(kept_diff "$log")" "$tmp/base" "$tmp/wanted"
