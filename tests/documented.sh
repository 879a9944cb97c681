# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
#
# For tests that run the commands of README.md and of the manual as they stand there.
# Sourced after functions.sh.
#
#   fresh           no server, and a directory with just the files that commands are about
#   run <<'END'     runs a command, which may go on in the next line after a backslash, and
#   ...             sees that the base does not change, as long as there is $before.
#   END             test-documented-commands.sh looks for these lines in all scripts
#   join            makes one line of lines that go on in the next one
#   stop_server     ends the servers that commands have left in the background
#   is_the_disk     see there
#
# In front of the real programs stand cowctl, as it was built, and small ones: nbdkit with this filter for
# --filter=cow, qemu without a window, which ends after it has started, and ssh, to
# $tmp/backup.  ./job writes to the disk that it is given.  More can be put into $tmp/bin.

requires qemu-img --version
requires nbdinfo --version

# The servers are stopped as soon as a command has ended, and nbdkit does not free
# a connection that has not quite ended then.
no_leak_check

_real_nbdkit=$(command -v "$NBDKIT")
_real_qemu=$(command -v qemu-system-x86_64) || skip "this needs: qemu-system-x86_64"
mkdir "${tmp:?}/bin" "$tmp/made" "$tmp/work"
cat >"$tmp/bin/nbdkit" <<END
#!/usr/bin/env bash
set -- "\${@/#--filter=cow/--filter=$FILTER}"
case " \$* " in *" -P "*) ;; *) set -- -P $tmp/work/server.pid "\$@" ;; esac
exec $TEST_WRAPPER $_real_nbdkit "\$@"
END
cat >"$tmp/bin/qemu-system-x86_64" <<END
#!/usr/bin/env bash
unset LD_PRELOAD
(sleep 1; echo 'info block'; echo quit) |
    $_real_qemu "\$@" -display none -monitor stdio >$tmp/qemu.log || exit
grep -q 'driver\|nbd\|virtio' $tmp/qemu.log
END
cat >"$tmp/made/job" <<'END'
#!/usr/bin/env bash
unset LD_PRELOAD
echo "This is the job, with $1"
qemu-io -f raw -c 'write -P 0x6a 100000 300000' -c 'write -z 1M 64k' "$1" &&
    nbdcopy "$1" seen.img
END
cat >"$tmp/bin/ssh" <<END
#!/usr/bin/env bash
[ \$# -eq 2 ] && [ "\$1" = backup ] && cd "$tmp/backup" && exec bash -c "\$2"
END
ln -s "${abs_top_builddir:?}/cowctl/cowctl" "$tmp/bin/cowctl"
chmod +x "$tmp/bin/"* "$tmp/made/job"
base_file "$tmp/made/disk.img" 2097152
PATH=$tmp/bin:$PATH
cd "$tmp/work" || die "no $tmp/work"

# What is not in the directory of the commands: a place for backups, and restic's
# repository and borg's.
mkdir "$tmp/backup"
export RESTIC_REPOSITORY=$tmp/restic RESTIC_PASSWORD=secret
export RESTIC_CACHE_DIR=$tmp/restic-cache XDG_CACHE_HOME=$tmp/cache

# All are told before one is waited for: one may be the client of another.
stop_server ()
{
    local file servers=() server
    for file in "$tmp/work"/*.pid; do
        [ ! -s "$file" ] || servers+=("$(cat "$file")")
        rm -f "$file"
    done
    for server in ${servers[@]+"${servers[@]}"}; do
        kill "$server" 2>/dev/null || :
    done
    for server in ${servers[@]+"${servers[@]}"}; do
        process_ended "$server"
    done
}
cleanup_fn stop_server

fresh ()
{
    stop_server
    rm -rf "$tmp/work"/*
    cp "$tmp/made/"* .
    cp disk.img golden.img
    mkdir diffs
    before=$(fingerprint disk.img)
}

join ()
{
    sed -e :again -e '/\\$/ { N; s/ *\\\n */ /; b again; }'
}

# adapt LINE: the command as it can be run here.  A script may have its own.
adapt ()
{
    echo "$1"
}

run ()
{
    local line
    line=$(join)
    eval "$(adapt "$line")" || die "this command failed: $line"
    [[ $line == "qemu-img commit "* || -z $before ]] ||
        [ "$(fingerprint disk.img)" = "$before" ] || die "the base changed: $line"
}

# is_the_disk FILE: with the base below it, the diff FILE is what the job has seen.
is_the_disk ()
{
    qemu-img check -q -f qcow2 "$1" || die "$1 is damaged"
    cp "$1" checked.qcow2
    qemu-img rebase -q -u -f qcow2 -b disk.img -F raw checked.qcow2
    qemu-img compare -q -f qcow2 -F raw checked.qcow2 seen.img ||
        die "$1 is not what the job has seen"
    ! cmp -s seen.img disk.img || die "the job has changed nothing"
}
