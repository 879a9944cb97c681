#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# cow-base-id: what the base is called is written into the diff, and a diff of a base that
# is called otherwise is refused, though its first bytes are the same.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
base_file "$tmp/base" 1048576
diff=$tmp/diff

# run ARGS...: a client writes something.
run ()
{
    start_nbdkit file "$tmp/base" "$@"
    py <<'END'
connect().pwrite(b"x" * 5000, 70000)
END
    log_lacks error
    stop_nbdkit
}

# refuses ARGS...: no client gets in, and both names are shown.
refuses ()
{
    start_nbdkit file "$tmp/base" "$@"
    py <<'END'
expect(refused(""), True, "refused")
END
    [ "$(grep -c error: "$log")" -eq 1 ] || die "not one error"
    log_has "cow-load=.*\"golden 1\".*cow-base-id=golden 2.*cow-base-check=false"
    stop_nbdkit
}

run cow-save="$diff" "cow-base-id=golden 1"
sound_diff "$diff"
run cow-load="$diff" "cow-base-id=golden 1"
refuses cow-load="$diff" "cow-base-id=golden 2"
cp "$diff" "$tmp/before"
refuses cow-load="$diff" cow-save="$diff" "cow-base-id=golden 2"
cmp "$diff" "$tmp/before" || die "the diff has changed"
run cow-load="$diff" "cow-base-id=golden 2" cow-base-check=false

# Who does not give one has nothing to compare, and the diff keeps what it has.
run cow-load="$diff" cow-save="$diff"
refuses cow-load="$diff" "cow-base-id=golden 2"
run cow-load="$diff" cow-save="$tmp/copy"
refuses cow-load="$tmp/copy" "cow-base-id=golden 2"

# A diff without one can be given one, and insisting gives it another.
plain=$tmp/plain
run cow-save="$plain"
run cow-load="$plain" "cow-base-id=golden 2"
run cow-load="$plain" cow-save="$plain" "cow-base-id=golden 1"
refuses cow-load="$plain" "cow-base-id=golden 2"
run cow-load="$plain" cow-save="$plain" "cow-base-id=golden 2" cow-base-check=false
run cow-load="$plain" "cow-base-id=golden 2"

# Streams and views.
start_nbdkit file "$tmp/base" cow-views=true "cow-base-id=golden 1" cow-save=/dev/fd/7 \
    7>"$tmp/stream"
nbdcopy "$(view @diff.qcow2)" "$tmp/view"
stop_nbdkit
refuses cow-load="$tmp/stream" "cow-base-id=golden 2"
refuses cow-load="$tmp/view" "cow-base-id=golden 2"

# What lies on another diff may have been made over the disk that this one makes.
start_nbdkit file "$tmp/base" cow-save="$tmp/monday" "cow-base-id=golden 1"
py <<'END'
connect().pwrite(b"monday" * 1000, 0)
END
nbdcopy "$uri" "$tmp/monday.raw"
stop_nbdkit
start_nbdkit file "$tmp/monday.raw" cow-save="$tmp/tuesday" cow-base-id=monday
py <<'END'
connect().pwrite(b"tuesday" * 1000, 500000)
END
stop_nbdkit
start_nbdkit file "$tmp/base" cow-load="$tmp/monday" cow-load="$tmp/tuesday" \
    "cow-base-id=golden 1"
py <<'END'
want = bytearray(base(0, M))
want[0:6000] = b"monday" * 1000
want[500000:507000] = b"tuesday" * 1000
same(connect().pread(M, 0), want, "two days")
END
log_lacks error
stop_nbdkit
start_nbdkit file "$tmp/base" cow-load="$tmp/tuesday"
py <<'END'
expect(refused(""), True, "refused")
END
log_has "the first 65536 bytes"
stop_nbdkit
# And so may one that was made over the base.
run cow-load="$tmp/monday" cow-load="$diff" "cow-base-id=golden 1"

# What a diff says is shown so that it does nothing to a terminal.
py "$diff" "$tmp/odd" <<'END'
image = open(sys.argv[1], "rb").read()
expect(image.count(b"golden 1"), 1, "its ID")
open(sys.argv[2], "wb").write(image.replace(b"golden 1", b"g\xc2\x9b2J\x9b\xc3\xa4"))
END
start_nbdkit file "$tmp/base" cow-load="$tmp/odd" cow-base-id=$'golden \xc2\x9b2'
py <<'END'
expect(refused(""), True, "refused")
END
log_has $'called "g\\?\\?2J\\?\xc3\xa4", .* cow-base-id=golden \\?\\?2;'
stop_nbdkit

# What can be an ID.
long=$(printf 'x%.0s' {1..255})
run cow-save="$tmp/long" cow-base-id="$long"
run cow-load="$tmp/long" cow-base-id="$long"
for id in "" "x$long" $'two\nlines' $'\e[2J'; do
    nbdkit_refuses cow-base-id --filter="$FILTER" null 1M cow-base-id="$id"
    ! grep -q $'\e' "$tmp/refused" || die "shown as it is"
    [ "$(wc -l <"$tmp/refused")" -eq 1 ] || die "not one line"
done
for value in "" 2 maybe; do
    nbdkit_refuses cow-base-check --filter="$FILTER" null 1M cow-base-check="$value"
done
