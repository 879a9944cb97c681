#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# -D cow.verbose=1 makes the filter say what it does, request by request, and of which
# export; without it nothing is said of requests.  (nbdkit's own lines of -v start in
# the same way, but do not have the export's name.)

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern

requests ()
{
    py <<'END'
h = connect("some name")
h.pread(1111, 2222)
h.pwrite(b"x" * 3333, 4444)
h.zero(5555, 6666)
h.zero(8192, 8192, nbd.CMD_FLAG_FAST_ZERO)
h.trim(7777, 8888)
h.cache(9999, 11110)
h.flush()
raw_extents(h, 12321, 23432)
END
}

start_nbdkit -v -D cow.verbose=1 pattern 1M
requests
log_has 'cow: .*some name.*read.*1111.*2222'
log_has 'cow: .*some name.*write.*3333.*4444'
log_has 'cow: .*some name.*zero.*5555.*6666'
log_has 'cow: .*some name.*fast.*zero.*8192.*8192'
log_has 'cow: .*some name.*trim.*7777.*8888'
log_has 'cow: .*some name.*cache.*9999.*11110'
log_has 'cow: .*some name.*flush'
log_has 'cow: reading [0-9]* bytes at [0-9]* of the base'
log_has 'cow: changing 1 slots from offset 0'
# The cleaner does so a moment later.
until grep -qE 'cow: punching [0-9]* bytes' "$log"; do sleep 0.05; done
log_has 'cow: made an overlay for export "some name"'
log_has 'cow: .*some name.*extents.*12321.*23432'
stop_nbdkit

start_nbdkit -v pattern 1M
requests
log_lacks 'cow: .*some name.*(read|write|zero|trim|cache|extents|flush)'
log_lacks 'cow: (reading|changing|punching|made) '
stop_nbdkit

start_nbdkit pattern 1M
requests
log_lacks 'cow: '
