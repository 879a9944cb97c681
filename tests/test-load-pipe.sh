#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A diff from standard input, another descriptor or a FIFO is loaded like one from a file.  It is
# first copied to $TMPDIR, where nothing is left behind.  Who waits for a writer that never
# ends can press Ctrl-C.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires_plugin file
requires qemu-img --version
base_file "$tmp/base" 4194304
mkdir "$tmp/t"
export TMPDIR=$tmp/t # of the servers

# start ARGS...: a server with the standard input of this function.
start ()
{
    rm -f "$tmp/pid" "$tmp/sock"
    # shellcheck disable=SC2086
    $TEST_WRAPPER "$NBDKIT" -U "$tmp/sock" -P "$tmp/pid" --filter="$FILTER" \
        file "$tmp/base" "$@" >"$tmp/start.log" 2>&1 3>&- ||
        { cat "$tmp/start.log" >&2; die "the server did not start: $*"; }
    until [ -s "$tmp/pid" ]; do sleep 0.05; done
}

stop ()
{
    local pid
    [ -s "$tmp/pid" ] || return 0
    pid=$(cat "$tmp/pid")
    kill "$pid"
    process_ended "$pid"
    rm -f "$tmp/pid" "$tmp/sock"
    no_sanitizer_report "$tmp/start.log"
}
cleanup_fn stop

# serves_shown: the server has the disk that was saved.
serves_shown ()
{
    qemu-img compare -q -f raw -F raw "nbd+unix:///?socket=$tmp/sock" "$tmp/shown" ||
        die "the disk is another one: $1"
    only_files "$tmp/t" ""
    stop
}

# A diff of 1 MiB.
start_nbdkit file "$tmp/base" cow-save="$tmp/diff"
echo 'connect().pwrite(b"from a pipe " * 90000, 12345)' | py
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit

diff=$tmp/diff
cat "$diff" | start cow-load=-
serves_shown -
start cow-load=- <"$diff"
serves_shown "- as a file"
cat "$diff" | start cow-load=/dev/stdin
serves_shown /dev/stdin
start cow-load=/dev/fd/8 8< <(cat "$diff") </dev/null
serves_shown /dev/fd/8
start cow-load=/dev/fd/8 8<"$diff" </dev/null
serves_shown "/dev/fd/8 as a file"
mkfifo "$tmp/fifo"
# The writer comes later.
{ sleep 1; cat "$diff"; } >"$tmp/fifo" &
start cow-load="$tmp/fifo" </dev/null
wait $!
serves_shown FIFO
{ sleep 1; exec cat "$diff" >"$tmp/fifo"; } &
start cow-load="$tmp/fifo" </dev/null
wait $!
serves_shown "FIFO opened later"
rm "$tmp/fifo"
# By links that lead to no path.
ln -s /dev/stdin "$tmp/link"
cat "$diff" | start cow-load="$tmp/link"
serves_shown "a link to /dev/stdin"
exec 8< <(cat "$diff")
start cow-load="/proc/$$/fd/8" </dev/null
exec 8<&-
serves_shown "a pipe of another process"
# With a socket, as ssh gives to commands, in small pieces.
export FILTER
py "$tmp/diff" <<'END'
ours, theirs = socket.socketpair()
command = os.environ.get("TEST_WRAPPER", "").split() + [
    os.environ.get("NBDKIT", "nbdkit"), "-U", tmp + "/sock", "-P", tmp + "/pid",
    "--filter=" + os.environ["FILTER"], "file", tmp + "/base", "cow-load=-"]
p = subprocess.Popen(command, stdin=theirs)
theirs.close()
data = open(sys.argv[1], "rb").read()
for i in range(0, len(data), 50001):
    ours.sendall(data[i:i + 50001])
ours.close()
expect(p.wait(), 0, "status")
END
serves_shown socket

# From one server to the next.
start_nbdkit file "$tmp/base" cow-load="$tmp/diff"
# shellcheck disable=SC2086
$TEST_WRAPPER "$NBDKIT" -U - --filter="$FILTER" file "$tmp/base" \
    cow-load="$tmp/diff" cow-save=- \
    --run 'nbdinfo --size "$uri" >/dev/null' </dev/null | start cow-load=-
serves_shown "cow-save=- to cow-load=-"
stop_nbdkit

# refused WORD INPUT ARGS...
refused ()
{
    local word=$1 input=$2 status=0
    shift 2
    # shellcheck disable=SC2086
    timeout 60 $TEST_WRAPPER "$NBDKIT" ${socket:--f -U "$tmp/refused.sock"} \
        --filter="$FILTER" file "$tmp/base" "$@" <"$input" >"$tmp/refused" 2>&1 || status=$?
    [ $status -eq 1 ] && [ "$(grep -c error: "$tmp/refused")" -eq 1 ] &&
        grep -qF -e "$word" "$tmp/refused" ||
        { cat "$tmp/refused" >&2; die "not '$word', or status $status: $*"; }
    only_files "$tmp/t" ""
}
refused "named twice" "$tmp/diff" cow-load=- cow-load=-
refused "named twice" "$tmp/diff" cow-load=- cow-load=/dev/fd/0
mkfifo "$tmp/fifo"
cat "$tmp/diff" >"$tmp/fifo" &
refused "named twice" /dev/null cow-load="$tmp/fifo" cow-load="$tmp/fifo"
wait $! || :
socket=-s refused "option -s" "$tmp/diff" cow-load=-
refused "is a character device" /dev/null cow-load=-
refused "no open file" /dev/null cow-load=/dev/fd/77
refused "not open for reading" /dev/null cow-load=/dev/fd/7 7>"$tmp/out"
: >"$tmp/fifo" &
refused offset /dev/null cow-load="$tmp/fifo"
wait $!
head -c 100000 "$tmp/diff" >"$tmp/fifo" &
refused offset /dev/null cow-load="$tmp/fifo"
wait $!

# What has no room, or is too long for "ulimit -f": the line says where, and what to do.
yes >"$tmp/fifo" 2>/dev/null &
writer=$!
(
    ulimit -f 1000
    refused "set TMPDIR to another directory" /dev/null cow-load="$tmp/fifo"
    grep -q "copied to $tmp/t, which took [0-9]* bytes" "$tmp/refused" || die "not where"
)
kill $writer 2>/dev/null || :
wait $writer || :

# Ctrl-C while the writer goes on, and while there is none.
# (The busy one is last, as its "sleep" outlives it, and would be a writer of the next.)
for kind in none silent busy; do
    case $kind in
        none) writer= ;;
        silent) sleep 1000 >"$tmp/fifo" & writer=$! ;;
        busy) while sleep 0.1; do echo x; done >"$tmp/fifo" & writer=$! ;;
    esac
    # A shell without job control starts what is in the background without SIGINT.
    # shellcheck disable=SC2086
    env --default-signal=INT $TEST_WRAPPER "$NBDKIT" -f -U "$tmp/c.sock" --filter="$FILTER" \
        file "$tmp/base" cow-load="$tmp/fifo" </dev/null >"$tmp/c.log" 2>&1 &
    reader=$!
    until [ -n "$(find "/proc/$reader/fd" -lname "$tmp/fifo" 2>/dev/null)" ]; do
        kill -0 $reader || die "ended too early: $kind"
        sleep 0.05
    done
    kill -INT $reader
    status=0
    wait $reader || status=$?
    [ $status -eq 130 ] || die "Ctrl-C ended it with status $status: $kind"
    if [ -n "$writer" ]; then
        kill $writer 2>/dev/null || :
        wait $writer 2>/dev/null || :
    fi
    only_files "$tmp/t" ""
done
