#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The units in examples/: systemd finds nothing wrong with them, the command of the
# service serves the disk on the socket that systemd hands over and saves it, and the job
# fails when changes were kept under another name.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires systemd-analyze --version
requires systemd-socket-activate --version
[ -d /run/systemd ] || [ -w /run ] || skip "where systemd does not run, this needs root"
examples=$test_dir/../examples

# It complains on standard error, and of unknown keys with status 0.
systemd-analyze verify --man=no "$examples"/*.{service,socket,timer} >complaints 2>&1 ||
    die "systemd does not take the units: $(cat complaints)"
[ ! -s complaints ] || die "systemd complains: $(cat complaints)"

# value UNIT KEY: what KEY is in the unit.
value ()
{
    join <"$examples/$1" | sed -n "s/^$2=//p" | grep .
}

# command_of UNIT: its command, with the directory of the disk here.
command_of ()
{
    value "$1" ExecStart | sed "s|/var/lib/cow-disk|$tmp/work|g"
}

# What the manual says of the service.
for key in User TimeoutStopSec KillMode; do
    value cow-disk.service $key >/dev/null || die "cow-disk.service has no $key"
done
[ "$(value cow-disk.service StateDirectoryMode)" = 0700 ] || die "others can read the diff"
[ "$(value cow-disk.service Environment)" = TMPDIR=/var/lib/cow-disk ] ||
    die "what cannot be saved in its place is kept elsewhere"

# activate: starts the command as systemd does, once a client connects.
activate ()
{
    # nbdkit has a umask of its own; that is why the directory must keep others out.
    echo "umask 077; exec $(command_of cow-disk.service)" >start
    systemd-socket-activate -E PATH="$PATH" --listen="$tmp/work/cow-disk.sock" \
        bash "$tmp/work/start" </dev/null >activated.log 2>&1 &
    activated=$!
    until [ -S cow-disk.sock ]; do
        kill -0 $activated 2>/dev/null || die "not started: $(cat activated.log)"
        sleep 0.05
    done
}

stop_activated ()
{
    kill "$(cat server.pid)"
    wait $activated || die "the service failed: $(cat activated.log)"
    rm -f cow-disk.sock server.pid
}

fresh
# systemctl takes the units that there are.
cat >"$tmp/bin/systemctl" <<END
#!/usr/bin/env bash
[ "\$1 \$2" = "enable --now" ] && cd "$examples" && ls "\${@:3}"
END
chmod +x "$tmp/bin/systemctl"
run <<'END'
systemctl enable --now cow-disk.socket cow-kept.timer
END

# Two starts, the second of which goes on from the first.
activate
./job 'nbd+unix:///?socket=cow-disk.sock'
stop_activated
[ "$(stat -c %a diff.qcow2)" = 644 ] || die "the manual is wrong about the mode of a diff"
is_the_disk diff.qcow2
activate
nbdcopy 'nbd+unix:///?socket=cow-disk.sock' again.img
stop_activated
cmp again.img seen.img || die "the second start has not gone on"

# The job, as systemd takes it apart.
kept ()
{
    eval "$(command_of cow-kept.service)"
}
kept || die "the job fails where nothing was kept"
touch diffs/cow-kept-diff.qcow2
! kept >found || die "the job does not see what was kept"
grep -qx "$tmp/work/diffs/cow-kept-diff.qcow2" found || die "the job does not name it"
