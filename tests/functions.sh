# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What the test scripts have in common.  Every script starts with
#
#   . "${srcdir:-$(dirname "$0")}/functions.sh"
#
# and ends with status 0 (passed), 77 (cannot be run here, the reason is
# printed) or anything else (failed).
#
# Taken from the environment:
#
#   FILTER            the filter under test: a path, or a name as nbdkit takes it
#                     (default: the one that was built)
#   TEST_WRAPPER      words to put in front of nbdkit, such as valgrind and its
#                     options, or env LD_PRELOAD=...
#   NBDKIT            the server (default: nbdkit)
#   srcdir            where the scripts are
#   abs_top_builddir  the top of the build tree
#
# Set here: $tmp, a directory of the script's own that is removed at its end
# (short, because socket names must be).
#
# Nothing in the tests measures time.  The one limit that there is, $guard
# seconds, is there so that a server that hangs ends in a failure; whoever waits
# for a test to fail that way may set it lower.

set -eu -o pipefail

test_dir=$(cd "${srcdir:-$(dirname "${BASH_SOURCE[0]}")}" && pwd)
: "${abs_top_builddir:=$(dirname "$test_dir")}"
: "${FILTER:=$abs_top_builddir/.libs/nbdkit-cow-filter.so}"
: "${TEST_WRAPPER:=}"
: "${NBDKIT:=nbdkit}"
case $FILTER in */*) FILTER=$(realpath "$FILTER") ;; esac
: "${guard:=600}"
export guard

# What the programs print is compared.
export LC_ALL=C
# Who runs a script by itself may do so on a terminal: nothing is to wait for it, or to
# set it (which stops qemu-io in the background), and Ctrl-C is to reach the clients.
exec </dev/null
# A script that is about $TMPDIR sets it for its own servers.
tmp=$(mktemp -d "${TMPDIR:-/tmp}/cowtest.XXXXXX")
unset TMPDIR
export tmp

# The servers that were started and not yet stopped: number -> process.
declare -A _servers=() _idle_pipes=()
_nr_servers=0
_cleanup_commands=()

die ()
{
    echo "$(basename "$0"): FAILED: $*" >&2
    exit 1
}

skip ()
{
    [ "${CI:-}" != true ] || die "must not be skipped here: $*"
    echo "$(basename "$0"): SKIPPED: $*"
    exit 77
}

# cleanup_fn COMMAND...: runs COMMAND when the script ends, the latest first,
# after the servers have been stopped.
cleanup_fn ()
{
    _cleanup_commands+=("$(printf '%q ' "$@")")
}

_at_exit ()
{
    local status=$? n i
    trap - EXIT INT TERM HUP
    set +e
    # After a failure the server may hang, or wait for a base that is paused.
    if [ $status -ne 0 ]; then guard=5; fi
    for n in "${!_servers[@]}"; do
        _stop "$n" || { [ $status -eq 0 ] && status=1; }
    done
    if [ $status -ne 0 ] && [ $status -ne 77 ]; then
        for i in "$tmp"/server*.log; do
            [ -s "$i" ] || continue
            echo "--- ${i##*/}" >&2
            tail -n 60 "$i" | cut -c 1-300 >&2
        done
    fi
    for ((i = ${#_cleanup_commands[@]} - 1; i >= 0; i--)); do
        eval "${_cleanup_commands[i]}"
    done
    rm -rf "$tmp"
    exit $status
}
trap _at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# requires COMMAND...: skips the test when COMMAND does not succeed.
requires ()
{
    "$@" </dev/null >/dev/null 2>&1 || skip "this needs: $*"
}

# requires_plugin NAME, requires_filter NAME: as above, for parts of nbdkit.
requires_plugin ()
{
    requires "$NBDKIT" "$1" --version
}

requires_filter ()
{
    local f
    for f in "$@"; do
        requires "$NBDKIT" --filter="$f" null --version
    done
}

# start_nbdkit ARGS...: starts a server in the foreground with the filter, and
# waits until it can be connected to.  Sets, for the server started last: $sock,
# $uri, $pid, $log (its standard error), $server (the number that stop_nbdkit
# takes).
start_nbdkit ()
{
    start_server --filter="$FILTER" "$@"
}

# start_server ARGS...: the same, without the filter unless ARGS name it.
# The array $under is put in front of the server, outside of $TEST_WRAPPER.
under=()
start_server ()
{
    server=$((++_nr_servers))
    sock=$tmp/s$server
    log=$tmp/server$server.log
    uri="nbd+unix:///?socket=$sock"
    export sock uri log
    # shellcheck disable=SC2086
    ${under[@]+"${under[@]}"} $TEST_WRAPPER "$NBDKIT" -f -U "$sock" \
        -P "$sock.pid" "$@" </dev/null >"$log" 2>&1 &
    _servers[$server]=$!
    # The file is there a moment before its content is.
    until [ -s "$sock.pid" ] && [ -S "$sock" ]; do
        if ! kill -0 "${_servers[$server]}" 2>/dev/null; then
            wait "${_servers[$server]}" || :
            unset "_servers[$server]"
            die "the server did not start: $*"
        fi
        sleep 0.05
    done
    pid=$(cat "$sock.pid")
    export pid
    _idle_pipes[$server]=$(_pipes "$pid")
}

# A connection of nbdkit's has a pipe, the last thing that goes when it ends.
_pipes ()
{
    find "/proc/$1/fd" -lname 'pipe:*' 2>/dev/null | wc -l
}

# stop_nbdkit [NUMBER]: stops a server (the one started last) and fails if it
# does not end as it should.
stop_nbdkit ()
{
    _stop "${1:-$server}" || die "the server did not end well"
}

_stop ()
{
    local n=$1 child=${_servers[$1]} i status=0 server_pid
    unset "_servers[$n]"
    server_pid=$(cat "$tmp/s$n.pid")
    # What a connection has is not freed when the server is told to stop before
    # the connection has ended.  So let those end whose clients have just gone.
    for ((i = 0; i < 100; i++)); do
        [ "$(_pipes "$server_pid")" -gt "${_idle_pipes[$n]}" ] || break
        sleep 0.05
    done
    kill -TERM "$server_pid" 2>/dev/null
    for ((i = 0; i < guard * 20; i++)); do
        kill -0 "$child" 2>/dev/null || break
        sleep 0.05
    done
    if kill -0 "$child" 2>/dev/null; then
        echo "server $n did not stop" >&2
        kill -KILL "$server_pid" "$child" 2>/dev/null
        wait "$child"
        return 1
    fi
    wait "$child" || status=$?
    if [ $status -ne 0 ]; then
        echo "server $n ended with status $status" >&2
        return 1
    fi
    no_sanitizer_report "$tmp/server$n.log"
}

# no_leak_check: for a test that ends servers while clients are connected (what a
# connection has nbdkit does not free then, which is no leak of ours), or that traces
# servers (so nothing else can look at them).
no_leak_check ()
{
    export ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0"
}

# clients_have_gone: waits until the connections to the server started last have ended
# whose clients have gone.
clients_have_gone ()
{
    local i
    for ((i = 0; i < 100; i++)); do
        [ "$(_pipes "$pid")" -gt "${_idle_pipes[$server]}" ] || break
        sleep 0.05
    done
}

# end_nbdkit SIGNAL... [STATUS]: when its clients have gone, tells the server started
# last to end, and fails unless it then ends with STATUS (0).
end_nbdkit ()
{
    local want=0 signal
    case ${!#} in [0-9]*) want=${!#} ;; esac
    clients_have_gone
    for signal; do
        case $signal in [0-9]*) ;; *) kill -"$signal" "$pid" 2>/dev/null || : ;; esac
    done
    nbdkit_ended "$want"
}

# nbdkit_ended [STATUS...]: the server started last ends by itself now, with one of
# these (0).
nbdkit_ended ()
{
    local child=${_servers[$server]} i status=0
    for ((i = 0; i < guard * 20; i++)); do
        kill -0 "$child" 2>/dev/null || break
        sleep 0.05
    done
    ! kill -0 "$child" 2>/dev/null || die "the server did not end"
    unset "_servers[$server]"
    wait "$child" || status=$?
    [[ " ${*:-0} " == *" $status "* ]] ||
        die "the server ended with status $status, not ${*:-0}"
    no_sanitizer_report "$log" || die "in $log"
}

# process_ended PID: waits for a process that is no child of the script.  (Some scripts
# have a sleep of their own.)
process_ended ()
{
    while kill -0 "$1" 2>/dev/null; do
        command sleep 0.05
    done
}

# view NAME: the URI of an export of the server started last, as "@snapshot".
view ()
{
    echo "nbd+unix:///$1?socket=$sock"
}

# sound_diff FILE: FILE is a qcow2 image that qemu finds nothing wrong with, and that
# is long enough for all readers.
sound_diff ()
{
    local said
    [ -f "$1" ] || die "there is no $1"
    said=$(qemu-img check -q -f qcow2 "$1" 2>&1) && [ -z "$said" ] ||
        die "qemu-img check of ${1##*/}: $said"
    [ "$(stat -L -c %s "$1")" -ge 196608 ] || die "${1##*/} is too short"
}

# over_base DIFF BASE: a name for qemu of the image DIFF with the raw disk BASE
# behind it, whatever DIFF itself says.
over_base ()
{
    printf 'json:{"driver":"qcow2","file":{"driver":"file","filename":"%s"},"backing":{"driver":"raw","file":{"driver":"file","filename":"%s"}}}' \
        "$1" "$2"
}

# diff_is DIFF BASE RAW: DIFF is sound and, over BASE, has the content of RAW.
diff_is ()
{
    sound_diff "$1"
    qemu-img compare -q -F raw "$(over_base "$1" "$2")" "$3" ||
        die "${1##*/} over ${2##*/} is not ${3##*/}"
}

# rebased_is DIFF BASE RAW: the same, in the way that the manual has it; DIFF is
# left as it is.
rebased_is ()
{
    sound_diff "$1"
    cp --sparse=always "$1" "$tmp/rebased"
    qemu-img rebase -q -u -b "$2" -F raw -f qcow2 "$tmp/rebased"
    qemu-img compare -q -f qcow2 -F raw "$tmp/rebased" "$3" ||
        die "${1##*/} rebased onto ${2##*/} is not ${3##*/}"
    rm "$tmp/rebased"
}

# kept_diff LOG: where the one line of LOG says that the changes were kept, perhaps
# damaged or not.
kept_diff ()
{
    [ "$(grep -c 'error:' "$1")" -eq 1 ] || { cat "$1" >&2; die "not one error"; }
    sed -n 's/.*error: .*the changes were kept, as a complete diff, \(perhaps damaged .*, \)\?in //p' "$1" |
        grep . || { cat "$1" >&2; die "nothing was kept"; }
}

# only_files DIR NAME...: DIR has just these files, those with a dot in front too.
only_files ()
{
    local dir=$1 found
    shift
    found=$(ls -A "$dir")
    [ "$found" = "$(printf '%s\n' "$@" | sort)" ] ||
        die "in ${dir##*/}: '$found', not '$*'"
}

# preload LIBRARY: loads a library that the tests built into the servers that are
# started from now on, behind the runtime of a sanitizer if there is one.
preload ()
{
    local library=$abs_top_builddir/tests/.libs/$1.so
    [ -e "$library" ] || skip "tests/$1 was not built"
    case $TEST_WRAPPER in
        *LD_PRELOAD=*) TEST_WRAPPER=$(sed -E "s|(LD_PRELOAD=[^ ]*)|\1:$library|" <<<"$TEST_WRAPPER") ;;
        *) TEST_WRAPPER="env LD_PRELOAD=$library $TEST_WRAPPER" ;;
    esac
}

# for_nobody: what another user needs may lie where only root looks.  Copies it: the filter
# to $tmp/filter.so, and what $TEST_WRAPPER has preloaded, for which that is changed.
for_nobody ()
{
    local library
    chmod 755 "$tmp"
    cp "$FILTER" "$tmp/filter.so"
    chmod 755 "$tmp/filter.so"
    for library in $(grep -oE "${abs_top_builddir}[^ :]*\.so" <<<"$TEST_WRAPPER"); do
        cp "$library" "$tmp"
        chmod 755 "$tmp/${library##*/}"
        TEST_WRAPPER=${TEST_WRAPPER//"$library"/"$tmp/${library##*/}"}
    done
}

# no_sanitizer_report FILE: true when no sanitizer complained in FILE.
no_sanitizer_report ()
{
    if grep -aE 'ERROR: .*Sanitizer|WARNING: .*Sanitizer|: runtime error: ' \
            "$1" >&2; then
        echo "a sanitizer complained in ${1##*/}" >&2
        return 1
    fi
}

# nbdkit_refuses WORD ARGS...: nbdkit must not start with ARGS (which include
# the filter), its exit status must be a failure and not a crash, and the last
# error that it prints must contain WORD.  (One more may stand before it: nbdkit's
# functions that parse a value print their own.)  The output is left in
# $tmp/refused.  No --run: its status would be the command's wherever that ends before
# the server does.
nbdkit_refuses ()
{
    local word=$1 status=0
    shift
    rm -f "$tmp/refused.sock" # left behind by one that was refused late
    # shellcheck disable=SC2086
    timeout -k 5 60 ${under[@]+"${under[@]}"} $TEST_WRAPPER "$NBDKIT" \
        -f -U "$tmp/refused.sock" "$@" </dev/null >"$tmp/refused" 2>&1 || status=$?
    if [ $status -ne 1 ] || ! no_sanitizer_report "$tmp/refused" ||
       [ "$(grep -c 'error:' "$tmp/refused")" -gt 2 ] ||
       ! grep 'error:' "$tmp/refused" | tail -n 1 | grep -qF -e "$word"; then
        cat "$tmp/refused" >&2
        die "expected status 1 (got $status) and an error with '$word': $*"
    fi
}

# Clients that may wait for ever for a server that hangs.
for _client in nbdcopy nbdinfo qemu-img qemu-io fio; do
    eval "$_client () { timeout --foreground \"\$guard\" $_client \"\$@\"; }"
done

# log_has PATTERN, log_lacks PATTERN: about what the server said so far.
log_has ()
{
    grep -qE -e "$1" "$log" || die "the server's log has no line with '$1'"
}

log_lacks ()
{
    ! grep -E -e "$1" "$log" || die "the server's log has a line with '$1'"
}

# fingerprint FILE: what must not change of a base: content, size, mtime, ctime.
fingerprint ()
{
    stat -c '%s %y %z' "$1"
    sha256sum <"$1"
}

# py [ARGS...] <<EOF: runs a Python program that has libnbd and the module
# "cowtest" (below) at hand.  The Python of libnbd's shell is used; where another
# one comes first in $PATH, the system's.
_python=
py ()
{
    if [ -z "$_python" ]; then
        for _python in python3 /usr/bin/python3 ""; do
            [ -n "$_python" ] || skip "this needs Python with libnbd"
            ! "$_python" -c 'import nbd' 2>/dev/null || break
        done
        _write_cowtest
    fi
    local script
    script=$(mktemp "$tmp/script.XXXXXX")
    { echo 'from cowtest import *'; cat; } >"$script"
    PYTHONPATH=$tmp PYTHONDONTWRITEBYTECODE=1 \
        timeout "$guard" "$_python" "$script" "$@"
}

# base_file FILE SIZE: makes FILE, in which every 8 bytes hold their own offset,
# big-endian (the same that nbdkit's pattern plugin serves).
base_file ()
{
    py "$@" <<'END'
with open(sys.argv[1], "wb") as f:
    f.write(base(0, int(sys.argv[2])))
END
}

_write_cowtest ()
{
    cat >"$tmp/cowtest.py" <<'END'
import errno, os, random, re, socket, struct, subprocess, sys, time
import nbd

DATA, HOLE, ZERO, HOLE_ZERO = 0, 1, 2, 3
K, M, G = 1 << 10, 1 << 20, 1 << 30
tmp = os.environ["tmp"]
guard = int(os.environ["guard"])


def connect(export="", sock=None):
    """A new connection, libnbd's own checks of requests switched off."""
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_export_name(export)
    h.add_meta_context("base:allocation")
    h.connect_unix(sock or os.environ["sock"])
    return h


def refused(export="", sock=None):
    """Whether a connection is refused."""
    try:
        connect(export, sock)
        return False
    except nbd.Error:
        return True


def fail(what):
    sys.exit("FAILED: " + what)


def expect(got, want, what):
    if got != want:
        fail("%s: got %r, expected %r" % (what, got, want))


def same(got, want, what):
    """Compares bytes; says where the first difference is."""
    got, want = bytes(got), bytes(want)
    if got == want:
        return
    if len(got) != len(want):
        fail("%s: %d bytes, expected %d" % (what, len(got), len(want)))
    at = next(i for i in range(len(got)) if got[i] != want[i])
    fail("%s: byte %d is %r..., expected %r..."
         % (what, at, got[at:at + 8], want[at:at + 8]))


def raises(error, function, *args, **kwargs):
    """function must fail with this errno."""
    try:
        function(*args, **kwargs)
    except nbd.Error as e:
        if e.errnum != error:
            fail("%s: %s, expected %s" % (function.__name__, e,
                                          errno.errorcode[error]))
        return
    fail("%s succeeded, expected %s"
         % (function.__name__, errno.errorcode[error]))


def base(offset, count):
    """The bytes of the pattern plugin and of base_file."""
    first = offset // 8
    last = (offset + count + 7) // 8
    b = struct.pack(">%dQ" % (last - first),
                    *range(first * 8, last * 8, 8))
    return b[offset - first * 8:offset - first * 8 + count]


def extents(h, offset=0, count=None, flags=0):
    """[(offset, length, type)...] of the range, neighbours of one type merged."""
    end = h.get_size() if count is None else offset + count
    found = []
    while offset < end:
        entries = []

        def cb(context, start, e, err):
            expect(start, offset, "offset of the extents")
            entries.extend(e)
        n = min(end - offset, 0xfffff000)
        h.block_status(n, offset, cb, flags)
        if not entries:
            fail("no extent at %d" % offset)
        for length, kind in zip(entries[0::2], entries[1::2]):
            length = min(length, end - offset)
            if length == 0:
                break
            if found and found[-1][2] == kind:
                found[-1] = (found[-1][0], found[-1][1] + length, kind)
            else:
                found.append((offset, length, kind))
            offset += length
    return found


def raw_extents(h, count, offset, flags=0):
    """[(length, type)...], as the server gave them for one request."""
    entries = []
    h.block_status(count, offset,
                   lambda c, o, e, err: entries.extend(e), flags)
    return list(zip(entries[0::2], entries[1::2]))


def until(condition, what):
    """Waits until condition() is true."""
    end = time.monotonic() + guard / 2
    while not condition():
        if time.monotonic() > end:
            fail("waited in vain: " + what)
        time.sleep(0.01)


def turn(h):
    """Lets the connection h do what it can do now, without waiting."""
    while h.poll(0) > 0:
        pass


class Command:
    """A request that is in flight."""

    def __init__(self, h, cookie):
        self.h = h
        self.cookie = cookie
        # All of it has been sent when the handle has nothing left to write.
        while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
            h.poll(-1)

    def completed(self):
        turn(self.h)
        return self.h.aio_command_completed(self.cookie)

    def wait(self, what="request"):
        """Waits for the answer; an error of the server raises nbd.Error."""
        until(self.completed, what)

    def answered(self):
        """Whether there is an answer, be it an error."""
        try:
            return self.completed()
        except nbd.Error:
            return True


def read(h, count, offset, buf=None):
    buf = buf or nbd.Buffer(count)
    c = Command(h, h.aio_pread(buf, offset))
    c.buf = buf
    return c


def write(h, data, offset):
    buf = nbd.Buffer.from_bytearray(bytearray(data))
    c = Command(h, h.aio_pwrite(buf, offset))
    c.buf = buf
    return c


def zero(h, count, offset, flags=0):
    return Command(h, h.aio_zero(count, offset, flags=flags))


def trim(h, count, offset):
    return Command(h, h.aio_trim(count, offset))


def cache(h, count, offset):
    return Command(h, h.aio_cache(count, offset))


class Pause:
    """nbdkit's pause filter: while paused, the base answers nothing.  One for a server.

    The filter has a thread that is not ended before its code is unloaded; if it is not
    waiting for the kernel then, the server crashes.  So the connection for which it waits
    stays open as long as the server lives.
    """

    def __init__(self):
        self.s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.s.connect(tmp + "/pause")
        null = subprocess.DEVNULL
        self.holder = subprocess.Popen(
            ["sh", "-c", "while kill -0 $pid 2>/dev/null; do sleep 0.1; done"],
            pass_fds=[self.s.fileno()], stdin=null, stdout=null, stderr=null)

    def _command(self, c):
        self.s.sendall(c)
        expect(self.s.recv(1), c.upper(), "answer of the pause filter")

    def pause(self):
        self._command(b"p")

    def resume(self):
        self._command(b"r")
        time.sleep(0.05)        # for the thread to wait again


class Log:
    """nbdkit's log filter: what the base is asked."""
    line = re.compile(r"connection=(\d+) (\w+) id=\d+ offset=(0x[0-9a-f]+)"
                      r" count=(0x[0-9a-f]+)")

    def __init__(self, path=None):
        self.path = path or tmp + "/log"
        self.at = 0
        self.mark()

    def mark(self):
        """Forgets what was asked before now."""
        self.at = os.stat(self.path).st_size

    def requests(self, *kinds):
        """[(kind, offset, count)...] since the mark, in order."""
        with open(self.path) as f:
            f.seek(self.at)
            found = []
            for l in f:
                m = self.line.search(l)
                if m and (not kinds or m.group(2) in kinds):
                    found.append((m.group(2), int(m.group(3), 16),
                                  int(m.group(4), 16)))
            return found

    def wait(self, nr):
        """Waits until the base has been asked nr requests since the mark."""
        until(lambda: len(self.requests()) >= nr,
              "%d requests to the base" % nr)


class Refused(Exception):
    """By the control socket; its text is why."""


class Control:
    """The control socket of a server: cow-control=$tmp/control."""

    def __init__(self, path=None):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.connect(path or tmp + "/control")
        self.f = self.s.makefile("rw", newline="\n")

    def __call__(self, *words):
        """Sends a command; returns the lines of the answer as [(key, value)...]."""
        self.f.write(" ".join(words) + "\n")
        self.f.flush()
        found = []
        while True:
            line = self.f.readline()
            if not line.endswith("\n"):
                fail("the control socket was closed in the middle of an answer")
            line = line[:-1]
            if line == "ok":
                return found
            if line.startswith("error "):
                raise Refused(line[6:])
            found.append(tuple(line.split("=", 1)))

    def refuses(self, reason, *words):
        try:
            self(*words)
        except Refused as e:
            if reason not in str(e):
                fail("%r refused with %r, not %r" % (words, str(e), reason))
            return
        fail("%r was not refused" % (words,))


def pipes():
    """How many ends of pipes the server has, two of them for each connection."""
    found = 0
    fds = "/proc/%s/fd" % os.environ["pid"]
    for fd in os.listdir(fds):
        try:
            found += os.readlink(fds + "/" + fd).startswith("pipe:")
        except FileNotFoundError:
            pass
    return found


def leave(*handles):
    """Disconnects, and waits until the server has closed these connections.  (One that
    serves one request after the other has no pipes for them.)
    """
    left = pipes() - 2 * len(handles)
    for h in handles:
        h.shutdown()
    until(lambda: pipes() <= left, "the end of %d connections" % len(handles))


def overlays(directory):
    """The stat results of the server's nameless files in directory (but not of
    valgrind's).
    """
    found = []
    fds = "/proc/%s/fd" % os.environ["pid"]
    for fd in os.listdir(fds):
        try:
            to = os.readlink(fds + "/" + fd)
            if (to.startswith(directory + "/") and to.endswith(" (deleted)")
                    and not to.startswith(directory + "/valgrind_")):
                found.append(os.stat(fds + "/" + fd))
        except FileNotFoundError:
            pass
    return found


def used(directory):
    """Bytes that the overlays in directory take."""
    return sum(s.st_blocks * 512 for s in overlays(directory))


def settles(directory, least, most, what):
    """Waits until the overlays in directory take so much.  (The cleaner gives back.)"""
    until(lambda: least <= used(directory) <= most,
          "%s: %d bytes, not %d to %d" % (what, used(directory), least, most))


def server_log():
    with open(os.environ["log"], errors="replace") as f:
        return f.read()
END
}
