#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The shared object exports what nbdkit looks up by name and nothing else.
set -eu

if ! command -v nm >/dev/null; then
    echo "skipped: nm is not installed (Debian, Ubuntu: binutils)"
    exit 77
fi

exported=$(nm -D --defined-only "$FILTER" | awk '{ print $3 }' | sort | xargs)
if [ "$exported" != "cow_debug_verbose filter_init" ]; then
    echo "$FILTER exports: $exported"
    exit 1
fi
