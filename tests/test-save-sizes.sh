#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Disks of no byte, of one, and around sectors, blocks and slots: the diff is of the
# disk's size rounded up to 512, never shorter than 192 KiB, and what lies between the end
# of the disk and that is zeroes.  A large disk costs what was written to it.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin pattern memory
requires qemu-img --version

# save WHERE ARGS...: a server with $tmp/diff as its target.
save ()
{
    local where=$1
    shift
    rm -f "$tmp/diff"
    case $where in
        stream) start_nbdkit "$@" cow-save=/dev/fd/5 5>"$tmp/diff" ;;
        *) start_nbdkit "$@" cow-save="$tmp/diff" cow-save-backing=none ;;
    esac
}

check_size ()
{
    local rounded=$((($1 + 511) / 512 * 512)) said
    # Newer ones tell more of what lies below, indented.
    said=$(qemu-img info -f qcow2 "$tmp/diff" | grep '^virtual size:')
    [[ $said == *"($rounded bytes)" ]] || die "size $1: the diff has $said"
}

for size in 1 512 777 4097 131073 16777729; do
    # Nothing is there but the last byte, and only in a stream the first one.
    for where in file stream; do
        save $where pattern $size
        py $size $where <<'END'
h = connect()
size = int(sys.argv[1])
if sys.argv[2] == "stream":
    h.pwrite(b"F", 0)
h.pwrite(b"L", size - 1)
with open(tmp + "/shown", "wb") as f:
    f.write(b"".join(h.pread(min(M, size - at), at) for at in range(0, size, M)))
END
        stop_nbdkit
        log_lacks error:
        check_size $size
        base_file "$tmp/base" $size
        diff_is "$tmp/diff" "$tmp/base" "$tmp/shown"

        # In the image's last sector, behind the disk's end, are zeroes.
        tail=$(((512 - size % 512) % 512))
        if [ $tail -gt 0 ]; then
            qemu-io -f qcow2 -c "read -P 0 $size $tail" "$tmp/diff" >"$tmp/out"
            ! grep -i 'verification failed' "$tmp/out" ||
                die "size $size: bytes behind the end"
        fi
    done
done

# A tebibyte, and in it a few blocks far from each other.
for format in portable extended; do
    for where in file stream; do
        save $where memory 1T cow-save-format=$format
        py <<'END'
h = connect()
for i in range(64):
    h.pwrite(b"%8d" % i * 512, i * (16 * G + 8 * K))
h.zero(4 * K, 0)
END
        stop_nbdkit
        sound_diff "$tmp/diff"
        check_size $((1 << 40))
        used=$(du -k "$tmp/diff" | cut -f 1)
        # 64 blocks and 64 L2 tables (of a cluster each), and tables for the file.
        # A stream has no holes: the L1 table with its 4 MiB, where a slot is no
        # cluster, is part of it.
        case $format,$where in
            portable,file) most=1600 ;;
            portable,stream) most=4800 ;;
            extended,*) most=17500 ;;
        esac
        [ "$used" -le $most ] || die "$format, $where: the diff takes $used KiB"
        start_nbdkit memory 1T cow-load="$tmp/diff"
        py <<'END'
h = connect()
for i in range(1, 64):
    same(h.pread(4 * K, i * (16 * G + 8 * K)), b"%8d" % i * 512, "block %d" % i)
same(h.pread(4 * K, 0), bytes(4 * K), "the zeroed block")
expect(sum(e[1] for e in extents(h) if e[2] == DATA), 63 * 4 * K, "data")
END
        stop_nbdkit
    done
done

# No byte at all.
for where in file stream; do
    save $where null 0
    py <<'END'
expect(connect().get_size(), 0, "size")
END
    stop_nbdkit
    sound_diff "$tmp/diff"
    check_size 0
    start_nbdkit null 0 cow-load="$tmp/diff"
    py <<'END'
expect(connect().get_size(), 0, "size")
END
    stop_nbdkit
done
