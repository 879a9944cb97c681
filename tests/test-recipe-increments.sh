#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The recipes of the manuals about moments, as they stand there: a backup each hour of what
# has changed, the chain put together and compared; one sandbox before a risky step.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires nbdcopy --version
requires restic version

# wrote [TEXT AT]...: somebody writes to the export $export of $server_sock.
wrote ()
{
    sock=$server_sock py "$export" "$@" <<'END'
h = connect(sys.argv[1])
for text, at in zip(sys.argv[2::2], sys.argv[3::2]):
    h.pwrite(text.encode() * 10000, int(at))
END
}

fresh
restic init -q
server_sock=disk.sock export=
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img cow-views=true cow-control=disk.ctl
END
wrote one 100000 one 500000
run <<'END'
cowctl -s disk.ctl moment at-8 default
END
wrote later 300000
run <<'END'
nbdcopy 'nbd+unix:///@at-8/full.qcow2?socket=disk.sock' at-8.qcow2
END
wrote two 500000
sock=disk.sock py <<'END'
connect().zero(200000, 0)
END
nbdcopy 'nbd+unix:///?socket=disk.sock' hour9.img
run <<'END'
cowctl -s disk.ctl moment at-9 default
END
wrote three 700000
run <<'END'
nbdcopy 'nbd+unix:///@at-8..at-9/diff.qcow2?socket=disk.sock' at-9.qcow2
END
run <<'END'
nbdcopy 'nbd+unix:///@at-8..at-9/diff.qcow2?socket=disk.sock' - | restic backup --stdin --stdin-filename at-9.qcow2
END
restic dump latest at-9.qcow2 | cmp - at-9.qcow2 || die "restic has another increment"
run <<'END'
cowctl -s disk.ctl forget at-8 default
END
cowctl -s disk.ctl --json list | jq -e '.[0].moments | map(.moment) == ["at-9"]' >/dev/null ||
    die "not the moments that there should be"
run <<'END'
qemu-img rebase -u -f qcow2 -F qcow2 -b at-8.qcow2 at-9.qcow2
END
run <<'END'
qemu-img convert -f qcow2 -O raw at-9.qcow2 restored.img
END
cmp restored.img hour9.img || die "the chain is not the disk of that hour"
stop_server

# cowctl(1).
fresh
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img cow-views=true cow-control=disk.ctl
END
wrote one 100000
run <<'END'
cowctl -s disk.ctl moment before-upgrade default
END
run <<'END'
cowctl -s disk.ctl list
END
run <<'END'
cowctl -s disk.ctl forget before-upgrade default
END
stop_server

cp disk.img "$tmp/made/golden.img"
fresh
server_sock=farm.sock export=web1
run <<'END'
nbdkit -U farm.sock --filter=cow file golden.img cow-views=true cow-control=farm.ctl
END
wrote one 100000
nbdcopy 'nbd+unix:///web1?socket=farm.sock' was.img
run <<'END'
cowctl -s farm.ctl moment before web1
END
wrote risky 0
run <<'END'
nbdcopy 'nbd+unix:///web1@before?socket=farm.sock' before.img
END
cmp before.img was.img || die "the moment has something else"
run <<'END'
cowctl -s farm.ctl list
END
cowctl -s farm.ctl list >list
grep -q '^web1 .* 1000777\|^web1 .* [0-9]* *0$' list || { cat list; die "the list"; }
grep -q '^ .*before .*20..-' list || { cat list; die "the list has no moment"; }
run <<'END'
cowctl -s farm.ctl forget before web1
END

# cowctl by itself: its socket by the environment, what it refuses, and with what status.
COW_CONTROL=farm.ctl cowctl --json list web1 | jq -e '.[0].export == "web1"' >/dev/null ||
    die "COW_CONTROL"
expect_status ()
{
    local status=0
    "${@:2}" >out 2>err || status=$?
    [ $status -eq "$1" ] || { cat err; die "status $status, not $1: ${*:2}"; }
    [ "$1" -eq 0 ] || [ -s err ] || die "no word: ${*:2}"
}
expect_status 2 cowctl
expect_status 2 cowctl --what
expect_status 1 cowctl list
expect_status 1 cowctl -s nowhere list
expect_status 1 cowctl -s disk.img list
expect_status 1 cowctl -s farm.ctl moment -x web1
expect_status 1 cowctl -s farm.ctl moment x nobody
grep -q 'cowctl: export "nobody"' err || die "not what is wrong"
expect_status 1 cowctl -s farm.ctl moment '' web1
expect_status 0 cowctl --help
expect_status 0 cowctl --version
expect_status 1 bash -c 'cowctl -s farm.ctl list >/dev/full'
stop_server

# Its completion.
. "$test_dir/../cowctl/bash-completion/cowctl"
COMP_WORDS=(cowctl mo) COMP_CWORD=1
_cowctl
[ "${COMPREPLY[*]}" = moment ] || die "completion: '${COMPREPLY[*]}'"
# What a client calls its export is nothing that a shell runs.
fresh
run <<'END'
nbdkit -U farm.sock --filter=cow file golden.img cow-views=true cow-control=farm.ctl
END
sock=farm.sock py <<'END'
for name in "$(touch${IFS}ran)", "web1":
    connect(name).pwrite(b"x", 0)
END
for words in "cowctl -s farm.ctl drop" "cowctl --socket = farm.ctl drop"; do
    read -r -a COMP_WORDS <<<"$words"
    COMP_CWORD=${#COMP_WORDS[@]}
    COMP_WORDS+=("")
    _cowctl
    [ ! -e ran ] || die "completion runs what a client says"
    [ "${#COMPREPLY[@]}" -eq 2 ] && [ "${COMPREPLY[1]}" = web1 ] ||
        die "completion: '${COMPREPLY[*]}'"
done
stop_server

join <"$test_dir/../cowctl/cowctl.pod" | sed -nE '/^=head1 EXAMPLES/,$ s/^ ([^ ].*)/\1/p' \
    >"$tmp/documented"
[ "$(wc -l <"$tmp/documented")" -eq 4 ] || die "the commands of cowctl(1) were not found"
while IFS= read -r line; do
    grep -qxF -e "$line" "$test_dir/${0##*/}" || die "documented but not run: $line"
done <"$tmp/documented"
