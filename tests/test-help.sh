#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# nbdkit --help lists every parameter of the filter, and --version knows it.

. "${srcdir:-$(dirname "$0")}/functions.sh"

# shellcheck disable=SC2086
{
    $TEST_WRAPPER "$NBDKIT" --filter="$FILTER" null --help >"$tmp/help"
    $TEST_WRAPPER "$NBDKIT" --filter="$FILTER" null --version >"$tmp/version"
}
for parameter in cow-base-check cow-base-id cow-block-size cow-detect-zeroes cow-load cow-on-read \
    cow-on-cache cow-save cow-save-backing cow-save-backing-format \
    cow-save-compact cow-save-format cow-scope cow-max-overlays cow-views; do
    grep -q "^$parameter=" "$tmp/help" || die "the help does not have $parameter"
done
# In lines that fit a terminal.
sed -n '/^filter: cow/,/^plugin:/p' "$tmp/help" | sed 1,2d >"$tmp/ours"
[ -s "$tmp/ours" ] || die "no section of the filter"
! grep -E '^.{80}' "$tmp/ours" || die "a line of the help is too long"
grep -q '^cow' "$tmp/version" ||
    die "nbdkit --version does not list the filter"
