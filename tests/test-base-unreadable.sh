#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A base whose first bytes cannot be read: what is written is saved all the same, after a
# warning, without a checksum.  A diff that has one is not loaded, as nobody can tell
# whether it belongs to this base; cow-base-check=false loads it.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter error
requires qemu-img --version
base_file "$tmp/base" 1048576

# broken ARGS...: serves a base of which nothing can be read.
broken ()
{
    start_nbdkit --filter=error file "$tmp/base" error-pread-rate=100% error=EIO "$@"
}

# shows: what was written is there.
shows ()
{
    py <<'END'
same(connect().pread(8192, 8192), b"x" * 8192, "what was written")
END
}

for start in start_nbdkit broken; do
    if [ $start = start_nbdkit ]; then
        start_nbdkit file "$tmp/base" cow-save="$tmp/good"
    else
        broken cow-save="$tmp/diff"
    fi
    py <<'END'
connect().pwrite(b"x" * 8192, 8192)
END
    if [ $start = broken ]; then
        log_has 'warning: export "": the first bytes of the base cannot be read: Input/output'
        [ "$(grep -c warning: "$log")" -eq 1 ] || die "not one warning"
    fi
    stop_nbdkit
done
sound_diff "$tmp/diff"
cp "$tmp/base" "$tmp/want"
head -c 8192 /dev/zero | tr '\0' x |
    dd of="$tmp/want" bs=8192 seek=1 conv=notrunc status=none
diff_is "$tmp/diff" "$tmp/base" "$tmp/want"

# That one says nothing of the first bytes, so it can be loaded with and without them.
broken cow-load="$tmp/diff"
shows
stop_nbdkit
start_nbdkit file "$tmp/base" cow-load="$tmp/diff"
shows
log_lacks error
stop_nbdkit

broken cow-load="$tmp/good"
py <<'END'
expect(refused(""), True, "refused")
END
log_has "cow-load=$tmp/good: the first bytes of the base cannot be read.*cow-base-check=false"
stop_nbdkit
broken cow-load="$tmp/good" cow-base-check=false
shows
stop_nbdkit

# A client that comes again when the base has got well is let in, and what is saved has a
# checksum.
: >"$tmp/ill"
start_nbdkit --filter=error file "$tmp/base" error-pread-rate=100% \
    error-pread-file="$tmp/ill" cow-load="$tmp/good" cow-save="$tmp/well"
py <<'END'
expect(refused(""), True, "refused")
END
rm "$tmp/ill"
shows
stop_nbdkit
broken cow-load="$tmp/well"
py <<'END'
expect(refused(""), True, "refused")
END
stop_nbdkit
