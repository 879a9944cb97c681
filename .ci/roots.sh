# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Bare machines to try things on: minimal roots of Debian, as debootstrap makes
# them.  Sourced by .ci/run.  It takes root, debootstrap and mounts.
#
#   roots_possible              says why not, and fails, where they cannot be made
#   make_root RELEASE           makes the pristine root of bookworm or trixie, once
#   new_root RELEASE ROOT       a machine of its own: ROOT is a new directory, and all
#                               that is done in it leaves the pristine root alone
#   copy_root OLD NEW           NEW is another machine, as OLD is now
#   in_root ROOT COMMAND...     runs a command there as root, in /root
#   in_root_as USER ROOT COMMAND...
#                               the same as that user, in the user's home; "guest"
#                               is one without sudo
#   put_tree ROOT DIR USER      copies the files of this repository to DIR (a path in
#                               ROOT), as a fresh clone of USER's
#   drop_root ROOT              removes it
#
#   roots_possible && make_root trixie && new_root trixie build-ci/a &&
#       in_root build-ci/a sh -c 'apt-get update && apt-get install -y gcc'
#   drop_root build-ci/a
#
# Each command has namespaces of its own for its mounts and processes.  So with
# its end, however it ends, all mounts are undone and all that it started is gone;
# what it wrote to files stays in ROOT.  Only one command at a time runs in all roots
# of a release, as these share what they download.
#
# The mirror, and how to reach it, are those of this machine.  Roots have no lists of
# packages before the first "apt-get update", as fresh machines.  They differ from
# what debootstrap makes in this: apt asks nothing, dpkg waits for no disk, and there
# are no translations.

# Where pristine roots and downloads are.
roots_dir=${ROOTS_DIR:-$PWD/build-ci/roots}

# apt_sources RELEASE: where this machine gets its packages from, as lines of
# "URI SUITE", with RELEASE in the place of its own.
apt_sources ()
{
    local own
    own=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
            'Created-By: Packages' |
        awk -v own="$own" -v release="$1" '
            $3 == "main" && index($2, own) == 1 && !seen[$0]++ {
                print $1, release substr($2, length(own) + 1)
            }'
}

# apt_settings: what this machine's apt has to know to reach its mirror.
apt_settings ()
{
    apt-config dump | grep -E '^Acquire::(https?::|Check-)' || :
}

roots_possible ()
{
    if [ "$(id -u)" -ne 0 ]; then
        echo "Roots take root."
    elif ! command -v debootstrap >/dev/null; then
        echo "There is no debootstrap."
    elif ! unshare -m -p -f mount -t tmpfs none /mnt; then
        echo "Mounts are not allowed here."
    elif ! apt_sources any | grep -q ' any$'; then
        echo "The package sources of this machine are not Debian's."
    else
        return 0
    fi
    return 1
}

make_root ()
{
    local root=$roots_dir/$1 cache=$roots_dir/cache/$1 mirror include=
    [ ! -d "$root" ] || return 0

    rm -rf "$root.part"
    mkdir -p "$cache"
    mirror=$(apt_sources "$1" | sed -n "s/ $1\$//p" | head -n 1)
    [[ $mirror != https:* ]] || include=--include=ca-certificates
    # (In a mount namespace, as debootstrap leaves what it mounts when interrupted.)
    unshare -m debootstrap --variant=minbase --cache-dir="$cache" \
            $include "$1" "$root.part" "$mirror" >"$root.log" 2>&1 ||
        { tail -n 20 "$root.log"; return 1; }

    rm -rf "$root.part/var/lib/apt/lists/"* "$root.part/var/cache/apt/"*.bin
    apt_sources "$1" | sed 's/.*/deb & main/' >"$root.part/etc/apt/sources.list"
    {
        apt_settings
        echo 'Acquire::Languages "none";'
        echo 'Acquire::Retries "3";'
        echo 'APT::Get::Assume-Yes "true";'
    } >"$root.part/etc/apt/apt.conf.d/90roots"
    printf '%s\n' force-unsafe-io 'path-exclude=/usr/share/locale/*' \
           >"$root.part/etc/dpkg/dpkg.cfg.d/roots"
    cp -L /etc/resolv.conf /etc/hosts "$root.part/etc/"
    chroot "$root.part" useradd -m -s /bin/bash guest
    mv "$root.part" "$root"
}

# A copy takes less than a second, and unlike an overlay is on a file system as
# machines have it.
new_root ()
{
    drop_root "$2"
    mkdir -p "$2"
    echo "$1" >"$2/release"
    cp -a "$roots_dir/$1" "$2/root"
}

copy_root ()
{
    drop_root "$2"
    cp -a "$1" "$2"
}

# mount_root ROOT COMMAND...: runs the command in mount and process namespaces where
# ROOT/root, its working directory, is a whole machine.
mount_root ()
{
    local release cache
    release=$(cat "$1/release") || return
    cache=$roots_dir/cache/$release
    # shellcheck disable=SC2016
    flock "$cache" unshare --mount --pid --fork --kill-child bash -c '
        set -e
        mount --bind "$1/root" "$1/root"
        cd "$1/root"
        cache=$2
        shift 2
        trap "exit 130" INT
        trap "exit 143" TERM
        mount -t proc proc proc
        mount -t sysfs sysfs sys
        mount --bind /dev dev
        mount -t devpts -o newinstance,gid=5,mode=620,ptmxmode=666 devpts dev/pts
        mount -t tmpfs -o mode=1777 tmpfs dev/shm
        mount -t tmpfs -o mode=755 tmpfs run
        mount --bind "$cache" var/cache/apt/archives
        "$@"' mount_root "$1" "$cache" "${@:2}"
}

in_root_as ()
{
    local user=$1 root=$2 home=/home/$1 path=/usr/local/bin:/usr/bin:/bin name
    shift 2
    if [ "$user" = root ]; then
        home=/root path=/usr/local/sbin:/usr/sbin:/sbin:$path
    fi
    set -- HOME="$home" USER="$user" LOGNAME="$user" PATH="$path" LANG=C.UTF-8 \
        TERM="${TERM:-dumb}" /usr/sbin/runuser -u "$user" -- "$@"
    for name in http_proxy https_proxy no_proxy; do
        [ -z "${!name:-}" ] || set -- "$name=${!name}" "$@"
    done
    mount_root "$root" chroot . /usr/bin/env -i -C "$home" "$@"
}

in_root ()
{
    in_root_as root "$@"
}

put_tree ()
{
    git ls-files -z | tar -c --null -T - |
        in_root "$1" sh -c 'mkdir -p "$1" && tar -x --no-same-owner -C "$1" &&
            chown -R "$2:" "$1"' put_tree "$2" "$3"
}

drop_root ()
{
    rm -rf "$1"
}
