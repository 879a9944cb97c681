#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# After an upgrade of nbdkit, configure and make build everything anew.  The new headers
# carry older dates than the objects, so make by itself would compile nothing.  Where make cannot know what to build, configure refuses; and so does it where
# the filter would not work, on 32 bits.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires pkg-config nbdkit
unset MAKEFLAGS MFLAGS MAKELEVEL CFLAGS LDFLAGS
top=$(cd "$test_dir/.." && pwd)
requires test -x "$top/configure"
requires test ! -e "$top/config.status" # nothing can be built elsewhere then

headers=$(pkg-config --variable=includedir nbdkit)
mkdir -p "$tmp/pkgconfig" "$tmp/build"
export PKG_CONFIG_PATH=$tmp/pkgconfig NBDKIT_LIBS=' '
cd "$tmp/build"

# nbdkit_is VERSION: from now on, the headers are of that version, and old.
nbdkit_is ()
{
    mkdir "$tmp/$1"
    cp "$headers"/nbdkit-*.h "$tmp/$1"
    sed -i "s/\(NBDKIT_VERSION_STRING\) .*/\1 \"$1\"/" "$tmp/$1/nbdkit-version.h"
    touch -d 2001-01-01 "$tmp/$1"/*
    rm -f "$tmp/current"
    ln -s "$tmp/$1" "$tmp/current"
    cat >"$tmp/pkgconfig/nbdkit.pc" <<END
Name: nbdkit
Description: a fake
Version: $1
Cflags: -I$tmp/current
filterdir=$tmp/filters
END
}

# configure [ARGUMENT...]: without what costs time and is not looked at.
configure ()
{
    "$top/configure" -q --cache-file="$tmp/cache" --disable-silent-rules CFLAGS=-O0 "$@" \
        >"$tmp/out" 2>&1
}

# built: makes all, tests too, and prints how many objects were compiled.
built ()
{
    make -j 2 check TESTS= >"$tmp/out" 2>&1 || { cat "$tmp/out" >&2; die "make failed"; }
    grep -c -- ' -c .* -o ' "$tmp/out" || :
}

nbdkit_is 1.98.1
configure || { cat "$tmp/out" >&2; die "configure failed"; }
all=$(built)
[ "$all" -gt 20 ] || die "only $all objects were compiled"
[ "$(built)" -eq 0 ] || die "compiled again, for nothing"
# The same version.
configure
[ "$(built)" -eq 0 ] || die "compiled again, though configured as before"

# Without configure, the filter cannot get objects of two versions.
nbdkit_is 1.98.2
rm -f nbdkit_cow_filter_la-cow.* cow.lo cow.o
! make cow.lo >"$tmp/out" 2>&1 || die "compiled for a version that configure did not see"
grep -q "run ./configure again" "$tmp/out" || { cat "$tmp/out" >&2; die "make does not say why"; }

configure
again=$(built)
[ "$again" -eq "$all" ] || die "$again of $all objects were compiled for the new version"
grep -q 1.98.2 .libs/nbdkit-cow-filter.so || die "the filter is for another version"
! grep -q 1.98.1 .libs/nbdkit-cow-filter.so || die "the filter is for the old version"

# Where make follows no dependencies.
configure --disable-dependency-tracking
nbdkit_is 1.98.3
for _ in 1 2; do
    ! configure --disable-dependency-tracking || die "configured over objects of another version"
    tail -n 1 "$tmp/out" | grep -q 'error: .* another nbdkit than 1.98.3: run make clean' ||
        { cat "$tmp/out" >&2; die "configure does not say why"; }
done
make clean >/dev/null
configure --disable-dependency-tracking || { cat "$tmp/out" >&2; die "refused without objects"; }

# On 32 bits.
! ac_cv_sizeof_size_t=4 configure || die "configured for 32 bits"
tail -n 1 "$tmp/out" | grep -q 'error: a 64-bit system is needed' ||
    { cat "$tmp/out" >&2; die "configure does not say that it wants 64 bits"; }
