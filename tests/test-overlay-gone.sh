#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# When the directory for overlays is gone, the error says that, and advises nothing that
# would not help.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin memory

mkdir "$tmp/overlays"
TMPDIR=$tmp/overlays start_nbdkit memory 1M
rmdir "$tmp/overlays"
py <<'END'
try:
    connect().pwrite(b"x" * 4096, 0)
    sys.exit("the write was taken")
except nbd.Error:
    pass
END
log_has "overlay file in $tmp/overlays: No such file or directory"
log_lacks trimming
log_lacks "makes room"
stop_nbdkit
