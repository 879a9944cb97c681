#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A diff that was copied to a block device is loaded from there, whatever lies behind it on the
# device.  One that is in use is refused, and a device is nothing that cow-save replaces.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires qemu-img --version
requires qemu-io --version
[ "$(id -u)" -eq 0 ] || skip "a loop device needs root"
base_file "$tmp/base" 4194304

# Behind the end of the diff there is garbage.
start_nbdkit file "$tmp/base" cow-save="$tmp/diff"
echo 'connect().pwrite(b"from a device " * 70000, 12345)' | py
nbdcopy "$uri" "$tmp/shown"
stop_nbdkit
py <<'END'
diff = open(tmp + "/diff", "rb").read()
with open(tmp + "/disk", "wb") as f:
    f.write(diff + random.Random(1).randbytes(16 * M - len(diff)))
END
device=$(losetup -f --show "$tmp/disk" 2>"$tmp/losetup.err") ||
    skip "no loop device: $(cat "$tmp/losetup.err")"
cleanup_fn losetup -d "$device"
fingerprint "$tmp/disk" >"$tmp/before"

for args in "" cow-save="$tmp/again"; do
    # shellcheck disable=SC2086
    start_nbdkit file "$tmp/base" cow-load="$device" $args
    qemu-img compare -q -f raw -F raw "$uri" "$tmp/shown" || die "the disk is another one"
    # The locks of a reader.
    ! qemu-io -f qcow2 -c 'write 0 1k' "$device" >/dev/null 2>&1 || die "not locked"
    stop_nbdkit
done
diff_is "$tmp/again" "$tmp/base" "$tmp/shown"
exec 8<"$device"
start_nbdkit file "$tmp/base" cow-load=/dev/fd/8
qemu-img compare -q -f raw -F raw "$uri" "$tmp/shown" || die "the disk is another one"
stop_nbdkit
exec 8<&-

# Somebody else writes it.
mkfifo "$tmp/silent"
exec 7<>"$tmp/silent"
command qemu-io -f qcow2 "$device" <&7 >"$tmp/holder" 2>&1 &
holder=$!
cleanup_fn eval 'kill $holder 2>/dev/null || :'
# Its prompt comes when it has the device.  (A second one that tries to open it meanwhile
# may be what the first one is refused for.)
until grep -q 'qemu-io>' "$tmp/holder"; do
    kill -0 $holder || die "not opened: $(cat "$tmp/holder")"
    sleep 0.05
done
nbdkit_refuses "is in use by another program" --filter="$FILTER" file "$tmp/base" \
    cow-load="$device"
kill $holder
wait $holder || :

# What can be loaded from it cannot be saved there.
nbdkit_refuses "is a block device, no regular file" --filter="$FILTER" file "$tmp/base" \
    cow-load="$device" cow-save="$device"
fingerprint "$tmp/disk" | cut -d ' ' -f 1 | cmp - <(cut -d ' ' -f 1 "$tmp/before") ||
    die "the device was written"
dd if=/dev/zero of="$device" bs=64k count=1 conv=notrunc,fsync status=none
nbdkit_refuses "offset" --filter="$FILTER" file "$tmp/base" cow-load="$device"
