# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
#
# How runtests, quickstart and bench/run build.  Sourced, after script.sh and
# packages.sh, with $source set to the directory of the sources.

# Sets $build, the build directory: $BUILD_DIR, else build/.  Autoconf cannot
# build elsewhere once the source tree itself has been configured, so then it
# is the source tree.
: "${source:?}"
if [ -f "$source/config.status" ]; then
    build=$source
else
    build=${BUILD_DIR:-$source/build}
fi

# configuration [CONFIGURE ARGUMENTS]: what a build is for.  What was compiled with
# other arguments, or for another version of nbdkit, is of no use; and libraries may
# have come since, for more tests.
configuration ()
{
    local library
    echo "$*"
    for library in nbdkit zlib libzstd cmocka libnbd; do
        echo "$library $(pkg-config --modversion $library 2>/dev/null || echo none)"
    done
}

# build_filter [CONFIGURE ARGUMENTS]: makes configure, configures where that was
# not done with these arguments for this nbdkit, and makes all.
build_filter ()
{
    if [ "$build" = "$source" ] && [ $# -gt 0 ]; then
        echo "This tree was configured in place: for other arguments than" \
             "those, run make distclean first." >&2
        return 1
    fi

    if [ ! -x "$source/configure" ]; then
        echo "autoreconf -i"
        run_job autoreconf -i "$source" || return
    fi

    mkdir -p "$build" && build=$(cd "$build" && pwd) || return
    if [ "$build" = "$source" ]; then
        configure_in_place || return
    elif [ ! -f "$build/Makefile" ] ||
         ! configuration "$@" | cmp -s - "$build/configured-as"; then
        configure_in "$build" "$@" || return
    fi

    run_job make -C "$build" --no-print-directory -j "$(nproc)" all
}

# configure_in DIR [CONFIGURE ARGUMENTS]: configures anew, with nothing left of what
# was built before.
configure_in ()
{
    local dir=$1
    shift
    rm -f "$dir/configured-as"
    if [ -f "$dir/Makefile" ]; then
        run_job make -C "$dir" distclean >/dev/null || return
    fi
    echo "configure $*"
    run_job env -C "$dir" "$source/configure" -q "$@" || return
    configuration "$@" >"$dir/configured-as"
}

# configure_in_place: who configured the source tree chose the arguments; they stay.
configure_in_place ()
{
    ! grep -qx "#define NBDKIT_HEADERS \"$(pkg-config --modversion nbdkit)\"" \
        "$source/config.h" || return 0
    echo "config.status --recheck"
    run_job env -C "$source" ./config.status -q --recheck &&
        run_job env -C "$source" ./config.status -q
}
