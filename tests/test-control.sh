#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The control socket: where it is made, what it answers, and that no client holds up
# another one, whatever it sends.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin memory

start_nbdkit memory 1M cow-views=true cow-control="$tmp/control"
[ "$(stat -c '%A' "$tmp/control")" = srw------- ] || die "others can use the socket"
py <<'END'
h = connect()
h.pwrite(b"x", 0)
good = Control()


def lines():
    expect([k for k, v in good("list")], ["export", "size", "connections"], "the list")


def raw(data):
    s = socket.socket(socket.AF_UNIX)
    s.connect(tmp + "/control")
    s.sendall(data)
    return s


def answer(s, end=b"\n"):
    got = b""
    while not got.endswith(end):
        piece = s.recv(65536)
        if not piece:
            break
        got += piece
    return got


lines()
expect(dict(good("list"))["connections"], "1", "connections")
for words, reason in (
        ("", "is no command"), ("   ", "is no command"), ("LIST", "is no command"),
        ("list a b", "this is: list"), ("moment", "this is: moment"),
        ("moment m", "this is: moment"), ("forget m", "this is: forget"),
        ("list nobody", "connect to it first"), ("list %", "hexadecimal"),
        ("list %4", "hexadecimal"), ("list %00", "hexadecimal"), ("list %zz", "hexadecimal"),
        ("moment m \x1b[2J", "connect to it first"),
        ("\x1b[2J" * 1000, "is no command")):
    good.refuses(reason, words)
expect(good("list", "default"), good(" \t list  default "), "blanks")

# Half a line, rubbish, too long a line, one with a zero; and silence.
silent = [raw(b"") for i in range(3)]
half = raw(b"lis")
lines()
rubbish = raw(bytes(range(1, 10)) + os.urandom(1000).replace(b"\0", b"x") + b"\n")
expect(answer(rubbish).startswith(b"error "), True, "answer to rubbish")
for data in b"y" * (2 * M), b"list\0\n", b"\0" * M:
    s = socket.socket(socket.AF_UNIX)
    s.connect(tmp + "/control")
    try:
        s.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass
    lines()
half.sendall(b"t default\nlist default\nli")
got = b""
while got.count(b"ok\n") < 2:
    got += answer(half)
lines()
half.close()

# One that asks for ever and never takes an answer.
deaf = socket.socket(socket.AF_UNIX)
deaf.connect(tmp + "/control")
deaf.setblocking(False)
try:
    while True:
        deaf.send(b"list\n" * 1000)
except BlockingIOError:
    pass
lines()

# More than there is room for: those go that were silent for the longest time.
many = [raw(b"list\n") for i in range(100)]
for s in many:
    s.settimeout(60)
    expect(answer(s, b"ok\n").endswith(b"ok\n"), True, "answer to one of many")
for s in silent:
    s.settimeout(60)
    expect(s.recv(1), b"", "what one gets that was silent")
good = Control()
lines()
deaf.close()

# Gone in the middle.
for i in range(200):
    raw(b"list\n" * (i % 5) + b"moment m%d def" % i).close()
lines()
leave(h)
END
nbdinfo --size "$uri" >"$tmp/size"

# Another server does not take a socket that is in use, or a file, and leaves both alone.
nbdkit_refuses cow-control --filter="$FILTER" memory 1M cow-views=true \
    cow-control="$tmp/control"
py <<'END'
Control()("list")
END
echo precious >"$tmp/file"
nbdkit_refuses "no dead socket" --filter="$FILTER" memory 1M cow-views=true \
    cow-control="$tmp/file"
[ "$(cat "$tmp/file")" = precious ] || die "a file was replaced"
nbdkit_refuses "cow-views=true" --filter="$FILTER" memory 1M cow-control="$tmp/x"
nbdkit_refuses "cow-control" --filter="$FILTER" memory 1M cow-views=true cow-control=
nbdkit_refuses "given once" --filter="$FILTER" memory 1M cow-views=true \
    cow-control="$tmp/x" cow-control="$tmp/y"
nbdkit_refuses "No such file" --filter="$FILTER" memory 1M cow-views=true \
    cow-control="$tmp/none/x"
nbdkit_refuses "bytes" --filter="$FILTER" memory 1M cow-views=true \
    cow-control="$tmp/$(printf '%0200d' 0)"
[ ! -e "$tmp/x" ] || die "a server that did not start left its socket behind"

# What a server that was killed has left is replaced.
kill -KILL "$pid"
nbdkit_ended 137
[ -S "$tmp/control" ] || die "there is no dead socket"
start_nbdkit memory 1M cow-views=true cow-control="$tmp/control"
py <<'END'
expect(Control()("list"), [], "nobody has connected")
END
stop_nbdkit
[ ! -e "$tmp/control" ] || die "the socket was left behind"

# In the background, where a server changes its directory; and with --run.
cd "$tmp"
# shellcheck disable=SC2086
$TEST_WRAPPER "$NBDKIT" -U bg.sock -P bg.pid --filter="$FILTER" memory 1M cow-views=true cow-control=bg
until [ -s bg.pid ]; do sleep 0.05; done
bg=$(cat bg.pid)
cleanup_fn eval "kill $bg 2>/dev/null || :"
py "$tmp/bg" <<'END'
expect(Control(sys.argv[1])("list"), [], "of a server in the background")
END
kill "$bg"
process_ended "$bg"
[ ! -e bg ] || die "the socket of a server in the background was left behind"
cat >"$tmp/ask" <<'END'
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("run")
s.sendall(b"list\n")
assert s.recv(100) == b"ok\n"
END
# shellcheck disable=SC2086
$TEST_WRAPPER "$NBDKIT" -U - --filter="$FILTER" memory 1M cow-views=true \
    cow-control=run --run 'python3 ask' ||
    die "with --run"
[ ! -e run ] || die "the socket of a server with --run was left behind"
