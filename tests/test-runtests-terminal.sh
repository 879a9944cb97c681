#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# ./runtests on a terminal.  No test sees the terminal: qemu-io, which timeout puts into
# the background, would be stopped as soon as it sets it.  And what ends runtests (Ctrl-C,
# SIGTERM, the end of the terminal) ends all that it has started, and leaves no process,
# mount or file behind.
#
# runtests is run in a source tree where there is nothing to build, and "make check"
# there runs a test that is made here, as this build runs its tests.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires setsid --version
requires qemu-io --version
requires_plugin memory

src=$tmp/src
mkdir -p "$src/.ci" "$src/build/tests" "$tmp/bin" "$tmp/files"
cp "$test_dir/../runtests" "$src"
cp "$test_dir/../.ci/"*.sh "$src/.ci"
# Nothing is missing, and all was configured before.
printf '#!/bin/sh\necho installed\n' >"$tmp/bin/dpkg-query"
: >"$src/configure"
chmod +x "$tmp/bin/dpkg-query" "$src/configure"
cat >"$src/build/Makefile" <<END
all:
check:
	\$(MAKE) -C $abs_top_builddir/tests check-TESTS TESTS=$tmp/probe.sh \
	    TEST_SUITE_LOG=$src/build/tests/test-suite.log
END
(
    source=$src
    BUILD_DIR=$src/build
    . "$src/.ci/build.sh"
    configuration >"$src/build/configured-as"
)

# run_it HOW [COMMAND...]: runs runtests, or COMMAND, on a terminal.  It ends by itself,
# or when $tmp/ready is there, by "ctrl-c", "term" or "hangup".  What it prints is in
# $tmp/out.
run_it ()
{
    local how=$1
    shift
    [ $# -gt 0 ] || set -- "$src/runtests"
    rm -f "$tmp/ready"
    py "$how" "$@" <<'END' || { cat "$tmp/out" >&2; die "$how"; }
import pty, select, signal

how, command = sys.argv[1], sys.argv[2:]
end = time.monotonic() + guard / 2
env = {k: v for k, v in os.environ.items()
       if k not in ("BUILD_DIR", "TESTS", "MAKE_TARGET", "LD_PRELOAD")
       and not k.startswith(("MAKE", "MFLAGS"))}
env.update(TEST_JOBS="1", TMPDIR=tmp + "/files", PROBE=tmp,
           PATH=tmp + "/bin:" + env["PATH"])


def marked():
    """What is still running of it."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/environ" % pid, "rb") as f:
                if b"PROBE=" + tmp.encode() + b"\0" in f.read():
                    with open("/proc/%s/cmdline" % pid) as g:
                        found.append(g.read().replace("\0", " "))
        except OSError:
            pass
    return found


pid, fd = pty.fork()
if pid == 0:
    os.execvpe(command[0], command, env)
done = 0
with open(tmp + "/out", "wb") as out:
    while not done:
        if time.monotonic() > end:
            fail("it hangs: %s" % marked())
        if how and os.path.exists(tmp + "/ready"):
            if how == "ctrl-c":
                os.write(fd, b"\3")
            elif how == "term":
                os.kill(pid, signal.SIGTERM)
            elif how == "hangup":
                os.close(fd)
                fd = None
            how = ""
        if fd is None:
            time.sleep(0.05)
        else:
            if select.select([fd], [], [], 0.05)[0]:
                try:
                    out.write(os.read(fd, 65536))
                except OSError:         # the last one has closed it
                    os.close(fd)
                    fd = None
        done, status = os.waitpid(pid, os.WNOHANG)
with open(tmp + "/status", "w") as f:
    f.write("%d" % os.waitstatus_to_exitcode(status))
if marked():
    fail("still there: %s" % marked())
if os.listdir(tmp + "/files"):
    fail("left behind: %s" % os.listdir(tmp + "/files"))
END
    ! grep "$tmp/files" /proc/self/mounts || die "$how: something is still mounted"
}

# ended STATUS LINE: runtests has ended so, and LINE is the last that it printed.
ended ()
{
    [ "$(cat "$tmp/status")" -eq "$1" ] && tr -d '\r' <"$tmp/out" | tail -n 1 | grep -qxF "$2" ||
        { cat "$tmp/out" "$tmp/probe.log" >&2; die "status $(cat "$tmp/status"), not $1, or not '$2'"; }
}

# A test that looks for the terminal.
cat >"$tmp/probe.sh" <<END
! { : </dev/tty; } 2>/dev/null || { echo "there is /dev/tty"; exit 1; }
for fd in 0 1 2; do
    [ ! -t \$fd ] || { echo "\$fd is a terminal"; exit 1; }
done
nbdkit -U - memory 1M --run 'timeout 60 qemu-io -f raw -c "write 0 64k" "\$uri"'
END
run_it ""
ended 0 "1 passed, 0 failed, 0 skipped"
run_it "" make -C "$src/build" check
grep -q '^PASS ' "$tmp/probe.log" || { cat "$tmp/probe.log" >&2; die "make check"; }

# One that leaves a server running has failed.
echo "nbdkit -U \$TMPDIR/sock memory 1M" >"$tmp/probe.sh"
run_it ""
ended 1 "0 passed, 1 failed, 0 skipped"
grep -q 'left running: .*nbdkit' "$tmp/probe.log" || die "the server is not named"

# One that hangs has failed.
echo "sleep 1000" >"$tmp/probe.sh"
TEST_LIMIT=1 run_it ""
ended 1 "0 passed, 1 failed, 0 skipped"
grep -q 'it takes too long: .*sleep 1000' "$tmp/probe.log" || die "what hangs is not named"

# One that does not end by itself, with all that can be left behind.
cat >"$tmp/probe.sh" <<END
. "$test_dir/functions.sh"
start_nbdkit memory 1M
nbdkit -U "\$tmp/daemon" memory 1M
setsid bash -c 'trap "" TERM; sleep 1000; sleep 1000' &
mkdir "\$tmp/mounted"
mount -t tmpfs none "\$tmp/mounted" || :
kill -STOP "\$pid"
: >"$tmp/ready"
sleep 1000
END
for how in "ctrl-c 130 SIGINT" "term 143 SIGTERM"; do
    read -r how status signal <<<"$how"
    run_it "$how"
    [ "$(cat "$tmp/status")" -eq "$status" ] && grep -q "ended by $signal" "$tmp/out" ||
        { cat "$tmp/out" >&2; die "$how: status $(cat "$tmp/status")"; }
done
run_it ctrl-c make -C "$src/build" check
run_it hangup
[ "$(cat "$tmp/status")" -eq 129 ] || die "hangup: status $(cat "$tmp/status")"
