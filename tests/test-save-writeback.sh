#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A large overlay whose file is going to be the diff is written to its disk while it grows
# (seen with strace), what is added later too; one that is thrown away, or copied, is not.
# What goes wrong then is told at the end.

. "${srcdir:-$(dirname "$0")}/functions.sh"
no_leak_check
requires strace -V
requires_plugin memory
requires qemu-img --version
requires jq --version
under=(strace -f -qq -o "$tmp/strace" -e trace=sync_file_range -e signal=none)

# write_and_wait FIRST FATE: writes 64 MiB from MiB FIRST on, and waits until that is
# asked for, if it is going to be: at least all but the last 32 MiB, as the thread may
# end while this waits for the disk, and then the rest is too little to start it again.
write_and_wait ()
{
    py "$@" <<'END'
first, fate = int(sys.argv[1]), sys.argv[2]
data = os.urandom(M)
h = connect()
for n in range(first, first + 64):
    h.pwrite(data, n * M)
call = re.compile(r"sync_file_range\(\d+, (\d+), (\d+)")
if fate == "saved":
    while not any(int(at) + int(length) >= (first + 32) * M for at, length
                  in call.findall(open(tmp + "/strace").read())):
        time.sleep(0.05)
else:
    time.sleep(3)
END
}

threads ()
{
    find "/proc/$pid/task" -mindepth 1 -maxdepth 1 | wc -l
}

# no_more_threads: the thread that does it ends when there is nothing to do.
no_more_threads ()
{
    local i
    for ((i = 0; i < guard * 20; i++)); do
        [ "$(threads)" -gt "$threads" ] || return 0
        sleep 0.05
    done
    die "a thread is left"
}

for more in "" cow-save=- "cow-save=$tmp/diff cow-save-compact=true"; do
    : >"$tmp/strace"
    # shellcheck disable=SC2086
    start_nbdkit memory 1G $more
    write_and_wait 0 "thrown away"
    stop_nbdkit
    ! grep "sync_file_range.*_WRITE" "$tmp/strace" ||
        die "an overlay was written back that is thrown away ($more)"
done

start_nbdkit memory 1G cow-save="$tmp/diff"
# Whoever serves a client has started all its own.
echo "connect()" | py
clients_have_gone
threads=$(threads)
write_and_wait 0 saved
no_more_threads
write_and_wait 64 saved
no_more_threads
stop_nbdkit
! grep "sync_file_range.*= -1" "$tmp/strace" || die "not all of it went well"
# Waiting takes an error away that the sync has to tell.
! grep "sync_file_range.*_WAIT" "$tmp/strace" || die "it was waited for"
sound_diff "$tmp/diff"
[ "$(qemu-img map --output=json "$tmp/diff" |
         jq '[.[] | select(.data) | .length] | add')" -eq $((128 << 20)) ] ||
    die "the diff is not all that was written"

under+=(-e inject=sync_file_range:error=EROFS:when=1)
mkdir "$tmp/t" "$tmp/kept"
: >"$tmp/strace"
TMPDIR=$tmp/kept start_nbdkit memory 1G cow-save="$tmp/t/diff"
write_and_wait 0 saved
end_nbdkit TERM 1
log_has "error: cow-save=$tmp/t/diff: the disk of $tmp/t did not take all of the overlay"
log_has "as a complete diff, perhaps damaged as its disk did not take all of it, in $tmp/t/"
kept=$(kept_diff "$log")
sound_diff "$kept"
only_files "$tmp/t" "${kept##*/}"

# stream INJECTED STATUS: 1 MiB that is streamed at the end.
stream ()
{
    under=(strace -f -qq -o "$tmp/strace" -e trace=sync_file_range -e signal=none
           -e "inject=sync_file_range:$1")
    rm -f "$tmp"/kept/*
    timeout "$guard" cat "$tmp/fifo" >"$tmp/stream" &
    local reader=$!
    TMPDIR=$tmp/kept start_nbdkit memory 1G cow-save="$tmp/fifo"
    echo "connect().pwrite(os.urandom(M), 5 * M)" | py
    end_nbdkit TERM "$2"
    wait $reader
}
mkfifo "$tmp/fifo"

# There is none where it is known before, and the status tells it if it shows in the
# end, whatever the error is.
for error in EIO:when=1 EIO:when=2 EREMOTEIO:when=1 EINVAL:when=1; do
    stream error=$error 1
    log_has "error: cow-save=$tmp/fifo: the disk of $tmp/kept did not take all of the overlay"
    sound_diff "$(kept_diff "$log")"
    [ $error = EIO:when=2 ] || [ ! -s "$tmp/stream" ] || die "there is a stream"
done

# A sandbox that does not know the call.
stream error=EINVAL 0
sound_diff "$tmp/stream"
