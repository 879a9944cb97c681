# shellcheck shell=sh
# SPDX-License-Identifier: BSD-3-Clause
#
# How runtests and quickstart build.  Sourced, after packages.sh, with $source
# set to the directory of the sources.

# Sets $build, the build directory: $BUILD_DIR, else build/.  Autoconf cannot
# build elsewhere once the source tree itself has been configured, so then it
# is the source tree.
if [ -f "$source/config.status" ]; then
    build=$source
else
    build=${BUILD_DIR:-$source/build}
fi

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
        (cd "$source" && autoreconf -i) || return 1
    fi

    # What was compiled with other arguments, or for another version of nbdkit,
    # is of no use; and libraries may have come since, for more tests.
    configured=$*
    for library in nbdkit zlib libzstd cmocka libnbd; do
        configured="$configured
$library $(pkg-config --modversion $library 2>/dev/null)"
    done
    mkdir -p "$build" && build=$(cd "$build" && pwd) || return 1
    if [ "$build" != "$source" ] &&
       { [ ! -f "$build/Makefile" ] ||
         [ "$(cat "$build/configured-as" 2>/dev/null)" != "$configured" ]; }; then
        rm -f "$build/configured-as"
        if [ -f "$build/Makefile" ]; then
            make -C "$build" distclean >/dev/null || return 1
        fi
        echo "configure $*"
        (cd "$build" && "$source/configure" -q "$@") || return 1
        echo "$configured" >"$build/configured-as"
    fi

    make -C "$build" --no-print-directory -j "$(nproc)" all
}
