#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Over a plugin that takes one request at a time there are views like over any other.  Over
# one that serves one connection at a time there are none: who looks at a view would
# wait for ever for the live disk's client to go.  The server says so and does not start.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin eval
requires_filter noparallel
common=(get_size='echo 1M' pread='head -c "$3" /dev/zero' can_multi_conn='exit 0')

refused=cow-views=true
nbdkit_refuses "$refused" --filter="$FILTER" eval "${common[@]}" cow-views=true \
    thread_model='echo serialize_connections'
nbdkit_refuses "$refused" --filter="$FILTER" --filter=noparallel memory 1M cow-views=true \
    serialize=connections
start_nbdkit eval "${common[@]}" thread_model='echo serialize_connections'
stop_nbdkit

for model in serialize_all_requests serialize_requests parallel; do
    start_nbdkit eval "${common[@]}" cow-views=true thread_model="echo $model"
    py <<'END'
h = connect()
h.pwrite(b"before", 1000)
s, other = connect("@snapshot"), connect("@snapshot")
image = connect("@full.qcow2")
h.pwrite(b"later!", 1000)
h.zero(4 * K, 8 * K)
for v in s, other:
    same(v.pread(M, 0), bytes(1000) + b"before" + bytes(M - 1006), "the snapshot")
if b"before" not in image.pread(image.get_size(), 0):
    fail("the image has not what was written")
same(h.pread(6, 1000), b"later!", "the live disk")
for v in s, other, image, h:
    v.shutdown()
END
    clients_have_gone
    stop_nbdkit
    log_lacks error
done
