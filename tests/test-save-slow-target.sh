#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The file that is to be replaced lies on a slow disk: while one export waits for it to be
# opened and read, other exports can be connected to, and used.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin eval
preload save-faults
mkdir "$tmp/t"
export guard=60

serve ()
{
    start_nbdkit eval thread_model='echo parallel' open='echo "$3"' get_size='echo 64K' \
        pread='head -c "$3" /dev/zero' cow-save="$tmp/t/"
}

serve
echo 'connect("slow").pwrite(b"older" * 1000, 0)' | py
stop_nbdkit

export COW_HELD=$tmp/t/slow.qcow2
serve
echo 'connect("slow").pwrite(b"newer" * 1000, 0)' | py &
slow=$!
for ((i = 0; i < 1000; i++)); do
    [ ! -e "$COW_HELD.held" ] || break
    sleep 0.05
done
py <<'END'
h = connect("quick")
h.pwrite(b"new" * 1000, 0)
same(h.pread(3000, 0), b"new" * 1000, "the other export")
END
kill -0 $slow || die "nothing has waited"
touch "$COW_HELD.go"
wait $slow
stop_nbdkit
rm "$COW_HELD.go" "$COW_HELD.held"
only_files "$tmp/t" quick.qcow2 slow.qcow2
sound_diff "$tmp/t/slow.qcow2"
