#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Tests run in a chroot whose / is no mount point, as where packages are built.  Mounts
# cannot be made private there.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires unshare -m true

# All of this machine, in a plain directory.
mkdir "$tmp/root"
cat >"$tmp/in-chroot" <<'END_OF_SCRIPT'
cd "$1"
for path in /*; do
    if [ -L "$path" ]; then
        cp -P "$path" .
    elif [ -d "$path" ]; then
        mkdir ".$path"
        mount --rbind "$path" ".$path"
    fi
done
chroot . "$2" echo "It ran."
END_OF_SCRIPT
unshare -m bash -e "$tmp/in-chroot" "$tmp/root" "$abs_top_builddir/tests/alone" >"$tmp/out" 2>&1 ||
    { cat "$tmp/out" >&2; die "no test can be run in a chroot"; }
grep -qx "It ran\." "$tmp/out" || die "the test was not run"
