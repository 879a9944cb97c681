#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What a diff that is loaded says of its backing file: the server warns if that is there
# and another file than the base, or if it is not there.  It is looked at, and not opened
# (see test-load-opens-nothing.sh).

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_plugin nbd
requires qemu-img --version
requires qemu-nbd --version
base_file "$tmp/base" 1048576
cp "$tmp/base" "$tmp/other"
ln -s base "$tmp/link"
mkdir "$tmp/dir"
qemu-img create -q -f qcow2 "$tmp/golden" 1M

# image NAME BACKING [FORMAT]: makes it.
image ()
{
    rm -f "$tmp/$1"
    qemu-img create -q -f qcow2 -u -b "$2" -F "${3:-raw}" "$tmp/$1" 1M
}

# warns WARNING ARGS...: there is just this one ("": none), and the disk is served.
warns ()
{
    start_nbdkit "${@:2}"
    nbdinfo --size "$uri" >"$tmp/size"
    if [ -n "$1" ]; then
        [ "$(grep -c warning: "$log")" -eq 1 ] || { cat "$log" >&2; die "not one warning"; }
        log_has "warning: cow-load=$tmp/.*$1"
    else
        log_lacks warning:
    fi
    log_lacks error:
    stop_nbdkit
}

for name in base ./base "$tmp/base" link dir/../base; do
    image diff $name
    warns "" file "$tmp/base" cow-load="$tmp/diff"
    warns "backing file is $tmp/base, and the base is another file, file=$tmp/other" \
        file "$tmp/other" cow-load="$tmp/diff"
done
# Relative names are relative to the image, wherever the server runs.
cd "$tmp/dir"
image diff base
warns "" file "$tmp/base" cow-load=../diff
warns "" file "$tmp/base" cow-load="$tmp/diff"
cd "$tmp"
warns "" file "$tmp/base" cow-load=diff
cd /
image dir/default.qcow2 ../other
warns "another file" file "$tmp/base" cow-load="$tmp/dir/"
warns "" file "$tmp/other" cow-load="$tmp/dir/"

# Where nothing says which file the base is.
image diff base
warns "" pattern 1M cow-load="$tmp/diff"
# The base may be the disk in an image.
image diff golden qcow2
qemu_nbd=(nbd command=qemu-nbd arg=-r arg=-f arg=qcow2)
warns "" "${qemu_nbd[@]}" arg="$tmp/golden" cow-load="$tmp/diff"
image diff base
warns "another file" "${qemu_nbd[@]}" arg="$tmp/golden" cow-load="$tmp/diff"

# A diff may lie on another one that is loaded too.
image lower base
image diff lower qcow2
warns "" file "$tmp/base" cow-load="$tmp/lower" cow-load="$tmp/diff"
warns "another file" file "$tmp/base" cow-load="$tmp/diff"

# Not there.
image diff nowhere
warns "backing file nowhere is not there" file "$tmp/base" cow-load="$tmp/diff"
image diff "$tmp/base/x"
warns "is not there" file "$tmp/base" cow-load="$tmp/diff"
for name in nbd:unix:/nowhere "nbd+unix:///?socket=/nowhere" \
        'json:{"driver":"null-co","size":1048576}' file:nowhere; do
    image diff "$name"
    warns "" file "$tmp/base" cow-load="$tmp/diff"
done
# In one line, whatever the name is.
image diff $'no\nsuch\e[2Jfile'
warns 'no\?such\?\[2Jfile is not there' file "$tmp/base" cow-load="$tmp/diff"
# (A terminal takes 9b and c2 9b for the start of a command.  a4 alone is no character.)
image diff $'no\xc2\x9b2J\x9b2J\xc3\xa4\xa4file'
warns $'no\\?\\?2J\\?2J\xc3\xa4\\?file is not there' file "$tmp/base" cow-load="$tmp/diff"

# An image from a pipe is in no directory, so only absolute names say where.
image diff nowhere
start_pipe ()
{
    start_nbdkit file "$tmp/base" cow-load=/dev/fd/8 8< <(cat "$tmp/diff")
    nbdinfo --size "$uri" >"$tmp/size"
}
start_pipe
log_lacks warning:
stop_nbdkit
image diff "$tmp/nowhere"
start_pipe
log_has "warning: cow-load=/dev/fd/8: its backing file $tmp/nowhere is not there"
stop_nbdkit
