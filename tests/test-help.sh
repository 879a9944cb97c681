#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# nbdkit --help lists every parameter of the filter, and --version knows it.

. "${srcdir:-$(dirname "$0")}/functions.sh"

"$NBDKIT" --filter="$FILTER" null --help >"$tmp/help"
for parameter in cow-block-size cow-on-read cow-on-cache cow-scope \
    cow-max-overlays; do
    grep -q "^$parameter=" "$tmp/help" || die "the help does not have $parameter"
done
# In lines that fit a terminal.
sed -n '/^filter: cow/,/^plugin:/p' "$tmp/help" | sed 1,2d >"$tmp/ours"
[ -s "$tmp/ours" ] || die "no section of the filter"
! grep -E '^.{80}' "$tmp/ours" || die "a line of the help is too long"
"$NBDKIT" --filter="$FILTER" null --version | grep -q '^cow' ||
    die "nbdkit --version does not list the filter"
