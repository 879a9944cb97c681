#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# sanitized.sh [bash] TEST: runs one test of a build with sanitizers.
#
# Whoever reports something exits with 99, but a test may not see that status
# (of a server in the background, say).  So all reports go to files, and a test
# that left one has failed.
set -u

reports=$PWD/sanitizer-reports
test_name=$(basename "${!#}")
mkdir -p "$reports"
rm -f "$reports/$test_name".*

common="exitcode=99:log_path=$reports/$test_name"
export ASAN_OPTIONS="$common:detect_leaks=1:detect_stack_use_after_return=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export TSAN_OPTIONS="$common:halt_on_error=1:second_deadlock_stack=1:suppressions=${abs_top_srcdir:?}/tests/tsan.supp${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
export LSAN_OPTIONS="suppressions=${abs_top_srcdir:?}/tests/lsan.supp:print_suppressions=0${LSAN_OPTIONS:+:$LSAN_OPTIONS}"
export UBSAN_OPTIONS="$common:halt_on_error=1:print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"

# The thread sanitizer's shadow memory does not go with the address space
# layouts of newer kernels, so give everything below here a fixed one.
case $1 in */*) ;; bash) ;; *) set -- "./$1" "${@:2}" ;; esac
setarch "$(uname -m)" -R "$@"
status=$?

shopt -s nullglob
for report in "$reports/$test_name".*; do
    echo "--- $report"
    cat "$report"
    status=99
done
exit $status
