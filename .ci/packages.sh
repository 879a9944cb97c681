# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The packages that each job needs, by their names in Debian and Ubuntu, and a
# function that installs what is missing of them.  Sourced by runtests,
# quickstart, bench/run and .ci/run.
#
# shellcheck disable=SC2034

packages_to_build="gcc libc6-dev make autoconf automake libtool pkgconf perl
    nbdkit nbdkit-plugin-dev zlib1g-dev libzstd-dev"

packages_to_demonstrate="libnbd-bin qemu-utils e2fsprogs"

packages_to_test="$packages_to_demonstrate
    python3-libnbd libcmocka-dev libnbd-dev binutils borgbackup fio fuse3 gnutls-bin
    jq procps libvirt-clients qemu-system-x86 restic strace systemd util-linux
    xz-utils"

packages_to_measure="fio gnuplot-nox nbd-server python3-libnbd qemu-system-common
    qemu-utils xfsprogs xz-utils"

# What is only asked of each change, in .ci/run: other programs that read images
# or take streams, what a guest needs besides its kernel, and roots of bare machines.
packages_to_check="clang clang-format clang-tidy libclang-rt-dev valgrind
    7zip btrfs-progs busybox-static debootstrap kmod libqcow-utils python3-libqcow shellcheck
    spin xfsprogs"

# What "make release" makes packages with, and what looks at them.
packages_to_package="build-essential debhelper dpkg-dev git lintian rpm"

# install_packages PACKAGE...: installs those that are missing, and says so.
# Where that cannot be done, it fails, with the command for who can.
install_packages ()
{
    local package missing='' as_root=()
    if ! command -v dpkg-query >/dev/null; then
        echo "Not Debian or Ubuntu: going on with what is installed." >&2
        return 0
    fi

    for package; do
        case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>&1) in
            installed) ;;
            *) missing+=" $package" ;;
        esac
    done
    [ -n "$missing" ] || return 0

    if [ "$(id -u)" -eq 0 ]; then
        as_root=(env)
    elif command -v sudo >/dev/null; then
        as_root=(sudo env)
    fi
    if [ ${#as_root[@]} -gt 0 ]; then
        echo "Installing:$missing"
        # Of the package manager's many lines, only those about trouble are shown.
        # shellcheck disable=SC2086
        "${as_root[@]}" apt-get -qq update &&
            "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
                --no-install-recommends -o Dpkg::Use-Pty=0 $missing \
                >/dev/null </dev/null &&
            return
    fi
    echo "Packages are missing.  As root, run this, then try again:" >&2
    echo "apt-get update && apt-get install --no-install-recommends$missing" >&2
    return 1
}

# fetch_kernel DIR: unpacks Debian's smallest kernel there, for tests/guest.sh.
# (Installed, it would become the machine's own.)
fetch_kernel ()
{
    [ ! -d "$1" ] || return 0
    package=$(apt-cache depends linux-image-cloud-amd64 |
                  sed -n 's/^ *Depends: //p')
    rm -rf "$1.part"
    mkdir -p "$1.part" &&
        (cd "$1.part" &&
             apt-get -qq -o APT::Sandbox::User=root download "$package" &&
             dpkg-deb -x ./*.deb . && rm ./*.deb &&
             PATH=$PATH:/usr/sbin:/sbin depmod -b . "${package#linux-image-}") &&
        mv "$1.part" "$1"
}
