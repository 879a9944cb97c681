#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The manual is well-formed, names every parameter, and is the page that make
# install would install.
set -eu

if ! command -v podchecker >/dev/null; then
    echo "skipped: podchecker is not installed (Debian, Ubuntu: perl)"
    exit 77
fi

pod=${abs_top_srcdir:?}/nbdkit-cow-filter.pod
page=${abs_top_builddir:?}/nbdkit-cow-filter.1

# With -warnings twice it also complains of what is only dubious, on standard
# error and with status 0.
complaints=$(podchecker -warnings -warnings "$pod" 2>&1 >/dev/null |
                 grep -v ' pod syntax OK\.$' || :)
podchecker "$pod"
if [ -n "$complaints" ]; then
    echo "$complaints"
    exit 1
fi

# A parameter is a string in cow.c that starts like one.
grep -o '"cow-[a-z-]*[a-z]"' "$abs_top_srcdir/cow.c" | tr -d '"' | sort -u |
    while read -r parameter; do
        if ! grep -q "^=item B<$parameter=" "$pod"; then
            echo "$parameter has no paragraph in the manual"
            exit 1
        fi
    done

grep -q '^\.TH "*nbdkit-cow-filter"* 1 ' "$page" ||
    { echo "$page has no title line for nbdkit-cow-filter(1)"; exit 1; }
