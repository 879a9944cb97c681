#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Every command of README and of the manual is run here as it stands there.  In
# front of the real programs stand two small ones: nbdkit with this filter for
# --filter=cow, and qemu without a window, that ends after it has started.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires qemu-system-x86_64 --version
requires qemu-img --version
requires nbdinfo --version
requires xz --version

# The servers are stopped as soon as a command has ended, and nbdkit does not free
# a connection that has not quite ended then.
export ASAN_OPTIONS="${ASAN_OPTIONS:-}:detect_leaks=0"

real_nbdkit=$(command -v "$NBDKIT")
real_qemu=$(command -v qemu-system-x86_64)
mkdir "$tmp/bin" "$tmp/work"
cat >"$tmp/bin/nbdkit" <<END
#!/usr/bin/env bash
exec $TEST_WRAPPER $real_nbdkit -P $tmp/pid "\${@/#--filter=cow/--filter=$FILTER}"
END
cat >"$tmp/bin/qemu-system-x86_64" <<END
#!/usr/bin/env bash
unset LD_PRELOAD
(sleep 1; echo 'info block'; echo quit) |
    $real_qemu "\$@" -display none -monitor stdio >$tmp/qemu.log || exit
grep -q 'driver\|nbd\|virtio' $tmp/qemu.log
END
chmod +x "$tmp/bin/"*
PATH=$tmp/bin:$PATH
cd "$tmp/work"

commands=$tmp/commands
: >"$commands"

stop_server ()
{
    local server
    if [ -s "$tmp/pid" ]; then
        server=$(cat "$tmp/pid")
        while kill "$server" 2>/dev/null; do
            sleep 0.05
        done
    fi
}
cleanup_fn stop_server

# fresh: the files that the commands are about, and no server.
fresh ()
{
    stop_server
    rm -f "$tmp/pid" ./*
    base_file disk.img 2097152
    xz -k disk.img
    cp disk.img golden.img
    before=$(fingerprint disk.img)
}

# run: the command on standard input, which is one line.
run ()
{
    local line
    IFS= read -r line
    printf '%s\n' "$line" >>"$commands"
    eval "$line" || die "this command failed: $line"
    [ "$(fingerprint disk.img)" = "$before" ] || die "the base changed: $line"
}

fresh
run <<'END'
nbdkit -U - --filter=cow file disk.img --run 'qemu-system-x86_64 -m 1G -drive file="$uri",format=raw,if=virtio'
END

fresh
run <<'END'
nbdkit -U disk.sock --filter=cow --filter=xz file disk.img.xz cow-on-read=true
END
run <<'END'
nbdinfo 'nbd+unix:///?socket=disk.sock'
END

fresh
run <<'END'
nbdkit -U farm.sock --filter=cow file golden.img
END
run <<'END'
qemu-system-x86_64 -m 1G -drive file='nbd+unix:///web1?socket=farm.sock',format=raw,if=virtio
END
run <<'END'
qemu-system-x86_64 -m 1G -drive file='nbd+unix:///web2?socket=farm.sock',format=raw,if=virtio
END
run <<'END'
nbdinfo 'nbd+unix:///web1?socket=farm.sock'
END
run <<'END'
nbdinfo 'nbd+unix:///web2?socket=farm.sock'
END

fresh
run <<'END'
nbdkit -U scratch.sock --filter=cow file disk.img cow-scope=connection
END

fresh
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img
END
sock=disk.sock py <<'END'
h = connect()
h.pwrite(b"x" * 100000, 12345)
h.zero(65536, 1048576)
END
run <<'END'
qemu-img create -F raw -b nbd:unix:disk.sock -f qcow2 diff.qcow2
END
run <<'END'
qemu-img rebase -F raw -b disk.img -f qcow2 diff.qcow2
END
qemu-img compare -f qcow2 diff.qcow2 -F raw 'nbd+unix:///?socket=disk.sock'
fresh

# Nothing is documented that was not run above.  The commands that build are
# those that brought us here.
builds='^(autoreconf -i|\./configure|make|sudo make install|\./quickstart.*|\./runtests.*)$'
sed -nE -e 's/^ {4}((nbd|qemu|make|autoreconf|sudo|\.\/)[^ ]*.*)/\1/p' \
    "$test_dir/../README" |
    sed -E 's/ {4,}.*//' >"$tmp/documented"
sed -nE '/^=head1 DESCRIPTION/,$ s/^ ((nbd|qemu)[^ ]* .*)/\1/p' \
    "$test_dir/../nbdkit-cow-filter.pod" >>"$tmp/documented"
[ "$(wc -l <"$tmp/documented")" -ge 20 ] || die "the commands were not found"
while IFS= read -r line; do
    [[ ! $line =~ $builds ]] || continue
    grep -qxF -e "$line" "$commands" || die "documented but not run: $line"
done <"$tmp/documented"
