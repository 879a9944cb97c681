#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Multi-conn is offered where all connections see one disk (cow-scope=export), and
# not where each has its own, whatever the base says about itself.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin eval

# 0 is yes, 3 is no.
for base in 0 3; do
    for scope in export connection; do
        start_nbdkit eval get_size='echo 1M' \
            pread='head -c "$3" /dev/zero' can_multi_conn="exit $base" \
            cow-scope=$scope
        status=0
        nbdinfo --can multi-conn "$uri" || status=$?
        case $scope,$status in
            export,0 | connection,2) ;;
            *) die "scope $scope, can_multi_conn $base: status $status" ;;
        esac
        stop_nbdkit
    done
done

# The default.
start_nbdkit null 1M
nbdinfo --can multi-conn "$uri" || die "multi-conn is not offered by default"
