#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Extents of a huge disk: regions that nobody touched are passed over as a whole, and
# what was written is found at the far end.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin null

start_nbdkit null 16T
py <<'END'
h = connect()
T = 1 << 40
h.pwrite(b"x" * 100, 16 * T - 100)
h.pwrite(b"x" * 4096, 5 * T)
h.zero(1 << 31, 9 * T)
expect(extents(h), [(0, 5 * T, HOLE_ZERO), (5 * T, 4096, DATA),
                    (5 * T + 4096, 11 * T - 8192, HOLE_ZERO),
                    (16 * T - 4096, 4096, DATA)], "extents")
END
