# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
#
# A Linux guest, for tests that need a real one.  Sourced after functions.sh.
#
#   guest_ready             skips the test where no guest can be run
#   run_guest DISK <<'END'  boots a guest with DISK, a URI, as /dev/vda.  It runs
#   ...                     the commands (of busybox's shell, until one fails) and
#   END                     turns itself off.  What they print is in $guest_log.
#
# The guest is a kernel, and as its root a file system in memory with busybox and
# those modules that the disk and ext4 need.  The processor is emulated, so nothing is
# asked of the machine but programs (qemu-system-x86_64, modprobe, a static busybox) and
# the kernel: the newest one in boot/, with its modules, below
#
#   GUEST_ROOT        where a kernel's package was unpacked (default: /)

: "${GUEST_ROOT:=/}"
guest_log=${tmp:?}/guest.log

# The last line of a guest in which all commands have succeeded.
guest_marker="guest: all commands have succeeded"

guest_ready ()
{
    PATH=$PATH:/usr/sbin:/sbin
    _guest_needs qemu-system-x86_64 qemu-system-x86_64 --version
    _guest_needs "busybox, statically linked" _find_busybox
    _guest_needs modprobe modprobe --version
    _guest_needs "a kernel below $GUEST_ROOT that can be read, with its modules" _find_kernel
    [ -e "$tmp/initramfs" ] || _make_initramfs
}

# _guest_needs WHAT COMMAND...: skips the test when COMMAND does not succeed.  CI has
# to install all of it, and must not take a test for passed that was not run.
_guest_needs ()
{
    local what=$1
    shift
    "$@" </dev/null >/dev/null 2>&1 && return
    [ -z "${CI:-}" ] || die "CI has to install $what"
    skip "this needs $what"
}

_find_busybox ()
{
    _busybox=$(command -v busybox) && ! ldd "$_busybox" && "$_busybox" cpio --help
}

# Sets $_kernel, and in $_modules the files to load, in order.
_find_kernel ()
{
    local kernels k
    mapfile -t kernels < <(printf '%s\n' "${GUEST_ROOT%/}"/boot/vmlinuz-* | sort -rV)
    for k in "${kernels[@]}"; do
        if [ -r "$k" ] && _find_modules "${k##*/vmlinuz-}"; then
            _kernel=$k
            return
        fi
    done
    return 1
}

_find_modules ()
{
    local name steps=
    for name in virtio_pci virtio_blk ext4; do
        # A line is "insmod FILE PARAMETERS" or "builtin NAME".
        steps+=$(modprobe -d "$GUEST_ROOT" -S "$1" --show-depends "$name")$'\n' || return
    done
    # One that several need comes several times.
    mapfile -t _modules < <(awk '$1 == "insmod" && !seen[$2]++ { print $2 }' <<<"$steps")
}

_make_initramfs ()
{
    local root=$tmp/initramfs.d i module
    mkdir -p "$root"/{bin,dev,mnt,modules,proc,sys}
    cp "$_busybox" "$root/bin/busybox"
    for i in "${!_modules[@]}"; do
        module=${_modules[i]}
        case $module in
            *.xz) xz -dc "$module" ;;
            *.zst) zstd -dcq "$module" ;;
            *.gz) gzip -dc "$module" ;;
            *) cat "$module" ;;
        esac >"$root/modules/$(printf %02d "$i")-$(basename "${module%.ko*}").ko"
    done
    cat >"$root/init" <<END
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# The firmware has left the cursor inside of a line.
echo
for module in /modules/*; do
    insmod \$module
done
sh -eu /commands 2>&1 && echo "$guest_marker"
poweroff -f
END
    chmod +x "$root/init"
    _pack "$root" >"$tmp/initramfs"
}

# Not compressed: to unpack it takes an emulated processor longer than to read it.
_pack ()
{
    (cd "$1" && find . | "$_busybox" cpio -o -H newc 2>/dev/null)
}

# guest_prepare: takes the commands, and sets guest_options, of qemu: all but the disk.
guest_prepare ()
{
    # The commands come as a second archive; the kernel unpacks one after the other.
    mkdir -p "$tmp/commands.d"
    cat >"$tmp/commands.d/commands"
    { cat "$tmp/initramfs"; _pack "$tmp/commands.d"; } >"$tmp/initramfs.all"

    guest_options=(-nodefaults -no-user-config -nographic -no-reboot
        -accel tcg -cpu max -m 256M -nic none
        -kernel "$_kernel" -initrd "$tmp/initramfs.all"
        -append "console=ttyS0 quiet panic=-1 no_timer_check"
        -serial "file:$tmp/guest.console")
}

# guest_succeeded: the commands have, in a guest that has ended.
guest_succeeded ()
{
    tr -d '\r' <"$tmp/guest.console" >"$guest_log"
    grep -qxF "$guest_marker" "$guest_log" ||
        _guest_failed "a command in the guest failed"
}

run_guest ()
{
    guest_prepare
    timeout -k 5 "${guard:?}" qemu-system-x86_64 "${guest_options[@]}" \
        -drive "file=$1,format=raw,if=virtio,discard=unmap" \
        </dev/null >"$tmp/guest.qemu" 2>&1 ||
        _guest_failed "qemu ended with status $?"
    guest_succeeded
}

_guest_failed ()
{
    tail -n 40 "$tmp/guest.qemu" "$tmp/guest.console" >&2
    die "$1"
}
