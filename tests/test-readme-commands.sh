#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The commands of README.md, below "Recipes": each block is run as it stands there, in
# order, and all of them a second time.  What they leave is looked at.  (Those above
# build and install; CI runs them in roots of their own.)

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires nbdcopy --version
requires qemu-io --version
readme=$test_dir/../README.md

# Each block becomes a file.
awk -v dir="$tmp" '
    /^## / { recipes = /^## Recipes$/ }
    /^```$/ { block = "" }
    block { print >block }
    /^```sh$/ && recipes { block = sprintf("%s/block%02d", dir, ++n) }' "$readme"
[ "$(find "$tmp" -name 'block*' | wc -l)" -ge 8 ] || die "the blocks were not found"

# has FILE COMMAND...: qemu-io's commands succeed on the image FILE.
has ()
{
    local image=$1 format=qcow2 command args=()
    shift
    case $image in *.img) format=raw ;; esac
    for command; do
        args+=(-c "$command")
    done
    qemu-io -r -f "$format" "${args[@]}" "$image" >qemu-io.log
    ! grep -q 'failed' qemu-io.log || { cat qemu-io.log >&2; die "$image has something else"; }
}

rm -f ./*
for _ in 1 2; do
    for block in "$tmp"/block*; do
        bash -e "$block" >out 2>&1 ||
            { cat "$block" out >&2; die "this block of README.md failed"; }
        [ ! -e farm.pid ] || process_ended "$(cat farm.pid)"
    done
    # What the recipes wrote.  Nothing of the disk changed.
    has disk.img 'read -P 0 0 64M'
    has diff.qcow2 'read -P 1 1M 64k' 'read -P 2 2M 64k' 'read -P 0 3M 16M' 'read -P 0 0 64k'
    has diffs/web1.qcow2 'read -P 1 1M 64k' 'read -P 0 2M 64k'
    has diffs/web2.qcow2 'read -P 0 1M 64k' 'read -P 2 2M 64k'
    for copy in backup.img changes.qcow2 full.qcow2; do
        has "$copy" 'read -P 1 1M 64k' 'read -P 0 2M 64k'
    done
    has tuesday.qcow2 'read -P 0 1M 64k' 'read -P 2 2M 64k'
    [ "$(stat -c %s full.qcow2)" -lt 1000000 ] || die "full.qcow2 has what is empty"
done

# The packages that it names are those that the build wants.
. "$test_dir/../.ci/packages.sh"
# shellcheck disable=SC2154,SC2086
wanted=$(echo $packages_to_build)
grep -qxF "apt-get install -y --no-install-recommends $wanted" "$readme" ||
    die "README.md installs other packages than: $wanted"
