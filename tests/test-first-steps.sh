#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The scripts that people run first say why they end.  ./quickstart works where pkg-config
# knows no library for more tests, and when it is run again.  A command that fails is
# named.  Who cannot install packages is told how that is done.
#
# The scripts are run in a source tree where there is nothing to build.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires setsid --version
requires qemu-io --version
requires nbdcopy --version
PATH=$PATH:/usr/sbin:/sbin
requires command -v mke2fs
requires command -v debugfs
requires_plugin file

src=$tmp/src
export BUILD_DIR=$src/build
mkdir -p "$src/.ci" "$src/bench" "$BUILD_DIR" "$tmp/bin"
cp "$test_dir/../runtests" "$test_dir/../quickstart" "$src"
cp "$test_dir/../bench/run" "$src/bench"
cp "$test_dir/../.ci/"*.sh "$src/.ci"

# program NAME: a program of that name, from standard input, stands before the real one.
program ()
{
    { echo "#!$(command -v bash)"; cat; } >"$tmp/bin/$1"
    chmod +x "$tmp/bin/$1"
}

program dpkg-query <<<'echo installed'
program pkg-config <<<'case $2 in nbdkit | zlib) echo 1 ;; *) exit 1 ;; esac'
program nbdkit <<END
exec $TEST_WRAPPER $(command -v "$NBDKIT") "\$@"
END
program configured <<END
echo configured >>$tmp/configured
mkdir -p .libs
ln -sf "$FILTER" .libs/nbdkit-cow-filter.so
printf 'all:\ndistclean:\n' >Makefile
END
mv "$tmp/bin/configured" "$src/configure"

# tell STATUS COMMAND...: the command ends so.  What it prints is in $tmp/out.
tell ()
{
    local want=$1 status=0
    shift
    PATH=$tmp/bin:$PATH timeout "$guard" "$@" >"$tmp/out" 2>&1 || status=$?
    [ $status -eq "$want" ] ||
        { cat "$tmp/out" >&2; die "status $status, not $want: $*"; }
}

# told LINE: that was the last line; or the one before with "-2".
told ()
{
    tail -n "${2:-1}" "$tmp/out" | head -n 1 | grep -qE -e "$1" ||
        { cat "$tmp/out" >&2; die "not told: $1"; }
}

for _ in 1 2; do
    tell 0 "$src/quickstart"
    grep -q '^It worked' "$tmp/out" || { cat "$tmp/out" >&2; die "it did not work"; }
done
# What it says to type next works.
next=$(tail -n 1 "$tmp/out")
tell 0 env -C "$tmp" bash -c "$next"
sound_diff "$tmp/try.qcow2"
[ "$(wc -l <"$tmp/configured")" -eq 1 ] || die "configured again, for nothing"

# A command that fails without a word.
program mke2fs <<<'exit 3'
tell 3 "$src/quickstart"
told '^quickstart: this failed with status 3 .*mke2fs'
rm "$tmp/bin/mke2fs"

# The build fails.
printf 'all:\n\tfalse\ndistclean:\n' >"$BUILD_DIR/Makefile"
tell 1 "$src/quickstart"
told '^quickstart: the build failed'
tell 1 "$src/bench/run" --quick
told '^bench/run: the build failed'
tell 1 "$src/runtests"
told '^runtests: the build failed' 2
printf 'exit 1\n' >"$src/configure"
rm "$BUILD_DIR/configured-as"
tell 1 "$src/quickstart"
told '^quickstart: the build failed'

# Packages are missing, and this is not root: with a sudo that refuses, and without.
program id <<<'echo 1000'
program dpkg-query <<<'exit 1'
program sudo <<<'echo "not in the sudoers file" >&2; exit 1'
for script in runtests quickstart bench/run; do
    for sudo in yes no; do
        if [ $sudo = yes ]; then
            tell 1 "$src/$script"
        else
            mkdir -p "$tmp/few"
            for f in bash dirname tr cat; do ln -sf "$(command -v $f)" "$tmp/few"; done
            cp "$tmp/bin/id" "$tmp/bin/dpkg-query" "$tmp/few"
            tell 1 env PATH="$tmp/few" bash "$src/$script"
        fi
        grep -qE '^apt-get update && apt-get install .*[a-z]' "$tmp/out" ||
            { cat "$tmp/out" >&2; die "$script does not tell the command"; }
        grep -qF "${script##*/}: packages are missing" "$tmp/out" ||
            { cat "$tmp/out" >&2; die "$script does not tell why it ends"; }
    done
done
