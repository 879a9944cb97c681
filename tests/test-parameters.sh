#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A parameter that is not right keeps the server from starting, with one line that
# names it.

. "${srcdir:-$(dirname "$0")}/functions.sh"

for value in 0 1 2K 2048 4095 4097 5000 6K 3M -1 -4096 '' junk 4KK 0x 99E; do
    nbdkit_refuses cow-block-size --filter="$FILTER" null 1M \
        cow-block-size="$value"
done
for value in '' 2 maybe path ./path; do
    nbdkit_refuses cow-on-read --filter="$FILTER" null 1M cow-on-read="$value"
done
for value in '' 2 maybe /path; do
    nbdkit_refuses cow-on-cache --filter="$FILTER" null 1M \
        cow-on-cache="$value"
done
for value in '' exports Connection server; do
    nbdkit_refuses cow-scope --filter="$FILTER" null 1M cow-scope="$value"
done
for value in '' 0 -1 many 1.5 99999999999999999999999; do
    nbdkit_refuses cow-max-overlays --filter="$FILTER" null 1M \
        cow-max-overlays="$value"
done

# All that are right, and the last one of a kind counts.
start_nbdkit null 1M cow-block-size=64K cow-on-read=yes cow-on-cache=off \
    cow-scope=connection cow-max-overlays=3 cow-block-size=8K \
    cow-on-read=/nothing cow-on-cache=1 cow-scope=export cow-max-overlays=1
py <<'END'
h = connect()
expect(h.get_block_size(nbd.SIZE_PREFERRED), 8192, "block size")
expect(h.can_multi_conn(), True, "multi-conn")
expect(refused("b"), True, "refused")
END
stop_nbdkit

# Two of this filter would share one set of overlays.
nbdkit_refuses "only once" --filter="$FILTER" --filter="$FILTER" null 1M

# What is for the plugin goes to the plugin.
start_nbdkit null size=12345
[ "$(nbdinfo --size "$uri")" -eq 12345 ] || die "size= did not reach the plugin"
