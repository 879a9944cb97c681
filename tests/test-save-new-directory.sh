#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A directory that cow-load and cow-save both name may be missing, as a file may be: it is
# made, and the next server loads from it.  One that only one of them names is not made.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern
mkdir "$tmp/t"

for names in "$tmp/t/new/ $tmp/t/new/" "$tmp/t/../t/two $tmp/t/two//"; do
    read -r load save <<<"$names"
    for data in first second; do
        start_nbdkit pattern 1M cow-load="$load" cow-save="$save"
        py $data <<'END'
h = connect()
data = sys.argv[1].encode()
same(h.pread(5, 0), b"first" if data == b"second" else base(0, 5), "what is loaded")
h.pwrite(data, len(data) if data == b"second" else 0)
END
        stop_nbdkit
        log_lacks error
        only_files "$save" default.qcow2
    done
done

nbdkit_refuses "cow-save=$tmp/t/none/" --filter="$FILTER" pattern 1M cow-save="$tmp/t/none/"
nbdkit_refuses "cow-load=$tmp/t/none/" --filter="$FILTER" pattern 1M \
    cow-load="$tmp/t/none/" cow-save="$tmp/t/"
nbdkit_refuses "cow-load=$tmp/t/no/such/" --filter="$FILTER" pattern 1M \
    cow-load="$tmp/t/no/such/" cow-save="$tmp/t/no/such/"
only_files "$tmp/t" new two
