#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Ends without a signal from outside: the command of --run ends, the last client of the
# exitlast filter goes, the event of exitwhen comes.  And a server in the background,
# with names relative to where it was started.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin file
requires qemu-img --version
requires qemu-io --version
base_file "$tmp/base" 1048576
diff=$tmp/diff
cp "$tmp/base" "$tmp/wanted"
printf '%4096s' '' | tr ' ' A | dd of="$tmp/wanted" bs=4096 seek=3 conv=notrunc status=none
write="qemu-io -f raw -c 'write -q -P 0x41 12288 4096'"

good ()
{
    ! grep error "$tmp/err" || die "an error was printed"
    diff_is "$diff" "$tmp/base" "$tmp/wanted"
    rm "$diff"
}

# --run: the status is the command's.
for status in 0 7; do
    r=0
    # shellcheck disable=SC2086
    timeout "$guard" $TEST_WRAPPER "$NBDKIT" -U - --filter="$FILTER" file "$tmp/base" \
        cow-save="$diff" --run "$write \"\$uri\"; exit $status" >"$tmp/err" 2>&1 || r=$?
    [ $r -eq $status ] || die "status $r, not $status"
    good
done

# exitlast and exitwhen, in front of this filter and behind it.
for filters in "--filter=exitlast --filter=$FILTER" "--filter=$FILTER --filter=exitlast"; do
    "$NBDKIT" --filter=exitlast null --version >/dev/null 2>&1 ||
        { echo "no exitlast filter"; continue; }
    # shellcheck disable=SC2086
    start_server $filters file "$tmp/base" cow-save="$diff"
    eval "$write" '"$uri"'
    nbdkit_ended
    cp "$log" "$tmp/err"
    good

    # The diff of a client that only reads.
    # shellcheck disable=SC2086
    start_server $filters file "$tmp/base" cow-save="$diff"
    nbdinfo --size "$uri" >/dev/null
    nbdkit_ended
    log_lacks error
    diff_is "$diff" "$tmp/base" "$tmp/base"
    rm "$diff"
done
for filters in "--filter=exitwhen --filter=$FILTER" "--filter=$FILTER --filter=exitwhen"; do
    "$NBDKIT" --filter=exitwhen null --version >/dev/null 2>&1 ||
        { echo "no exitwhen filter"; continue; }
    # shellcheck disable=SC2086
    start_server $filters file "$tmp/base" cow-save="$diff" \
        exit-when-file-created="$tmp/event" exit-when-poll=1
    eval "$write" '"$uri"'
    [ ! -e "$diff" ] || die "saved too early"
    : >"$tmp/event"
    nbdkit_ended
    cp "$log" "$tmp/err"
    good
    rm "$tmp/event"
done

# In the background.
mkdir "$tmp/d"
(
    cd "$tmp/d"
    # shellcheck disable=SC2086
    $TEST_WRAPPER "$NBDKIT" -U "$tmp/b.sock" -P "$tmp/b.pid" --filter="$FILTER" \
        file "$tmp/base" cow-save=diff.qcow2 2>"$tmp/err"
)
eval "$write" "'nbd+unix:///?socket=$tmp/b.sock'"
kill "$(cat "$tmp/b.pid")"
py <<'END'
pid = open(tmp + "/b.pid").read().strip()
until(lambda: not os.path.exists("/proc/" + pid), "the end of the server")
END
[ -e "$tmp/d/diff.qcow2" ] || die "no diff where the server was started"
mv "$tmp/d/diff.qcow2" "$diff"
good
only_files "$tmp/d" ""
