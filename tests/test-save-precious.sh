#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What must not be lost to a save, though it has the name of one: files of the base in a
# directory, internal snapshots, and what the user that nbdkit becomes cannot replace.
# Said at the start.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file pattern
requires qemu-img --version
base_file "$tmp/base" 1048576

# A directory whose files are the base.
mkdir "$tmp/disks"
cp "$tmp/base" "$tmp/disks/x.qcow2"
nbdkit_refuses "files of the base" --filter="$FILTER" file dir="$tmp/disks" \
    cow-save="$tmp/disks/"
nbdkit_refuses "dir=$tmp/disks" --filter="$FILTER" file dir="$tmp/disks" \
    cow-save="$tmp/disks"

# One that is a diff of this filter's making, and would be replaced elsewhere.
start_nbdkit file "$tmp/base" cow-save="$tmp/ours"
stop_nbdkit
cp "$tmp/ours" "$tmp/disks/x.qcow2"
for name in x.qcow2 new; do
    nbdkit_refuses "files of the base" --filter="$FILTER" file dir="$tmp/disks" \
        cow-save="$tmp/disks/$name"
done
[ "$(ls "$tmp/disks")" = x.qcow2 ] || die "something was left behind"
cmp "$tmp/disks/x.qcow2" "$tmp/ours"

# Internal snapshots are ignored when an image is loaded, and so would be gone.
for with in "cow-load=$tmp/diff" cow-detect-zeroes=false; do
    rm -f "$tmp/diff"
    start_nbdkit file "$tmp/base" cow-save="$tmp/diff"
    echo "connect().pwrite(b'x' * 5000, 5000)" | py
    stop_nbdkit
    qemu-img snapshot -c moment "$tmp/diff"
    before=$(fingerprint "$tmp/diff")
    nbdkit_refuses "internal snapshots" --filter="$FILTER" file "$tmp/base" \
        cow-save="$tmp/diff" "$with"
    [ "$(fingerprint "$tmp/diff")" = "$before" ] || die "the image was changed"
    qemu-img snapshot -d moment "$tmp/diff"
    start_nbdkit file "$tmp/base" cow-save="$tmp/diff" "$with"
    stop_nbdkit
done

# A diff that the user of option -u cannot read, or not replace.
if [ "$(id -u)" -eq 0 ] && id nobody >/dev/null 2>&1; then
    chmod 755 "$tmp"
    mkdir "$tmp/theirs"
    cp "$tmp/diff" "$tmp/theirs/diff"
    chown nobody "$tmp/theirs"
    chmod 600 "$tmp/theirs/diff"
    nbdkit_refuses "cannot be read" -u nobody --filter="$FILTER" file "$tmp/base" \
        cow-save="$tmp/theirs/diff"
    chmod 644 "$tmp/theirs/diff"
    chown root "$tmp/theirs"
    chmod 1777 "$tmp/theirs"
    nbdkit_refuses "belongs to another user" -u nobody --filter="$FILTER" \
        file "$tmp/base" cow-save="$tmp/theirs/diff"
fi
