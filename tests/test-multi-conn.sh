#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Multi-conn is offered where all connections see one disk (cow-scope=export), and
# not where each has its own, whatever the base says about itself.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin memory
requires_filter multi-conn

for mode in disable plugin unsafe; do
    for scope in export connection; do
        start_nbdkit --filter=multi-conn memory 1M multi-conn-mode=$mode \
            cow-scope=$scope
        status=0
        nbdinfo --can multi-conn "$uri" || status=$?
        case $scope,$status in
            export,0 | connection,2) ;;
            *) die "scope $scope over multi-conn-mode=$mode: status $status" ;;
        esac
        stop_nbdkit
    done
done

# The default.
start_nbdkit memory 1M
nbdinfo --can multi-conn "$uri" || die "multi-conn is not offered by default"
