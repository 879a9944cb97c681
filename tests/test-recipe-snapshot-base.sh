#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual's recipe for a disk on top of a view of another server: with shared=true of
# the nbd plugin its base stays the one of the first moment.  Without, it does not, which
# the manual says.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires_plugin nbd
requires_filter exportname

# of SERVER COMMAND...: runs COMMAND, which is for the server that has SERVER.sock.
of ()
{
    sock=$1.sock "${@:2}"
}

# write BYTES COUNT: they are written so many times, at the start of the disk.
write ()
{
    py "$@" <<'END'
h = connect()
h.pwrite(sys.argv[1].encode() * int(sys.argv[2]), 0)
END
}

# shows BYTE: it is in the base that the server shows, and "mine" in its overlay.
shows ()
{
    py "$1" <<'END'
for name in "", "@snapshot", "@base":
    h = connect(name)
    same(h.pread(1000, 8192), sys.argv[1].encode() * 1000, "the base in '%s'" % name)
    if name != "@base":
        same(h.pread(4, 0), b"mine", "what was written there")
END
}

fresh
run <<'END'
nbdkit -U disk.sock -P disk.pid --filter=cow file disk.img cow-views=true
END
of disk write a 1000000
run <<'END'
nbdkit -U test.sock -P test.pid --filter=cow --filter=exportname \
    nbd socket=disk.sock export=@snapshot shared=true default-export= cow-views=true
END
nbdinfo --size 'nbd+unix:///?socket=test.sock' # it has connected when it answers
of disk write b 1000000
of test write mine 1
of test shows a
of disk write c 1000000
of test shows a

# Without shared=true the base changes when nobody is connected.
server=$(cat test.pid)
kill "$server"
process_ended "$server"
nbdkit -U other.sock -P other.pid --filter=cow --filter=exportname \
    nbd socket=disk.sock export=@snapshot default-export= cow-views=true
of other write mine 1
of other shows c
of disk write d 1000000
for ((i = 0; i < 100; i++)); do
    ! (of other shows d) 2>/dev/null || break
    sleep 0.1
done
[ $i -lt 100 ] || die "the manual is wrong: the base stays without shared=true"
stop_server
