#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The diff as a stream: to standard output, a descriptor, a FIFO, a device.  It is the same
# as the compact file, byte for byte, holds no more than what was written, and is written
# from its start to its end (strace: no seek, no write at an offset).

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin pattern
requires qemu-img --version
size=$((64 * 1024 * 1024))
base_file "$tmp/base" $size
writes='
h = connect()
for i in range(100):
    h.pwrite(b"%8d" % i * 512, i * 640 * K + 20 * K)
h.zero(M, 0)
h.trim(8 * K, 40 * M)
'

# The file to compare with.
start_nbdkit pattern $size cow-save="$tmp/compact" cow-save-compact=true
echo "$writes" | py
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
diff_is "$tmp/compact" "$tmp/base" "$tmp/shown"
# 100 blocks and 32 L2 tables; header, L1, refcounts.
[ "$(stat -c %s "$tmp/compact")" -le $(((100 + 32 + 8) * 4096)) ] ||
    die "more than what was written: $(stat -c %s "$tmp/compact")"
# No holes, or there would be trouble with programs that do not know them.
[ "$(du -B 1 "$tmp/compact" | cut -f 1)" -ge "$(stat -c %s "$tmp/compact")" ] ||
    die "the compact file has holes"

# same_as_compact FILE
same_as_compact ()
{
    cmp "$1" "$tmp/compact" || die "${1##*/} is not what the compact file is"
}

# run_it PARAMETER: a server that runs a command, which writes to the disk, and says
# something on standard error.
run_it ()
{
    cat >"$tmp/command" <<END
exec >&2
export sock="\$unixsocket" log= PYTHONPATH=$tmp
$_python $tmp/writes.py
echo said by the command
END
    { echo 'from cowtest import *'; echo "$writes"; } >"$tmp/writes.py"
    # shellcheck disable=SC2086
    timeout "$guard" $TEST_WRAPPER "$NBDKIT" -f -U - --filter="$FILTER" pattern $size \
        "$1" --run "export unixsocket; bash $tmp/command" 2>"$tmp/run.err"
}
run_it cow-save=- | cat >"$tmp/streamed"
same_as_compact "$tmp/streamed"
grep -q "said by the command" "$tmp/run.err" || die "the command did not run"
! grep error "$tmp/run.err" || die "an error was printed"
run_it cow-save=/dev/stdout | cat >"$tmp/streamed"
same_as_compact "$tmp/streamed"
run_it cow-save=- >"$tmp/streamed"
same_as_compact "$tmp/streamed"
run_it cow-save=/dev/fd/9 9>"$tmp/streamed"
same_as_compact "$tmp/streamed"

# A pipe of which nothing is read for a while, and slowly then.
run_it cow-save=- | { sleep 0.3; dd bs=777 status=none; } >"$tmp/streamed"
same_as_compact "$tmp/streamed"

# In the middle of a file: a stream starts where the descriptor stands.
{ echo before; run_it cow-save=-; echo after; } >"$tmp/streamed"
{ echo before; cat "$tmp/compact"; echo after; } | cmp - "$tmp/streamed" ||
    die "not between what others wrote"

# A FIFO, whose reader comes before or after the end of the server.
mkfifo "$tmp/fifo"
timeout "$guard" cat "$tmp/fifo" >"$tmp/streamed" &
reader=$!
run_it cow-save="$tmp/fifo"
wait $reader
same_as_compact "$tmp/streamed"
{ until grep -q "said by" "$tmp/run.err"; do sleep 0.05; done
  sleep 0.3
  timeout "$guard" cat "$tmp/fifo" >"$tmp/streamed"; } &
reader=$!
: >"$tmp/run.err"
run_it cow-save="$tmp/fifo"
wait $reader
same_as_compact "$tmp/streamed"
[ -p "$tmp/fifo" ] || die "the FIFO is gone"

run_it cow-save=/dev/null
! grep error "$tmp/run.err" || die "an error was printed"
[ -c /dev/null ] || die "/dev/null is gone"

# A server in the background has the stream as well.
mkfifo "$tmp/out"
timeout "$guard" cat "$tmp/out" >"$tmp/streamed" &
reader=$!
# shellcheck disable=SC2086
$TEST_WRAPPER "$NBDKIT" -U "$tmp/b.sock" -P "$tmp/b.pid" --filter="$FILTER" pattern $size \
    cow-save=- >"$tmp/out"
sock=$tmp/b.sock py <<<"$writes"
kill "$(cat "$tmp/b.pid")"
wait $reader
same_as_compact "$tmp/streamed"

# The next part needs a tracer.
strace -V >/dev/null 2>&1 || { echo "no strace: not looked for seeks"; exit 0; }
under=(strace -f -qq -o "$tmp/strace" -yy -e 'trace=desc')
for format in portable extended; do
    start_nbdkit pattern $size cow-save=/dev/fd/9 cow-save-format=$format \
        9>"$tmp/streamed"
    echo "$writes" | py
    stop_nbdkit
    grep -q "write([0-9]*<$tmp/streamed>" "$tmp/strace" ||
        die "the tracer has not seen the stream"
    ! grep -E "(seek|pwrite|pwritev|truncate|fallocate|splice|copy_file_range)[0-9a-z_]*\(.*<$tmp/streamed>" \
        "$tmp/strace" || die "the stream was not just written"
done
