#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The commands of the manual are run here as they stand there, and what they make is
# looked at; so do the scripts test-recipe-*.sh, which have a recipe of the manual each.
# No command is documented that none of them runs.

. "${srcdir:-$(dirname "$0")}/functions.sh"
. "${srcdir:-$(dirname "$0")}/documented.sh"
requires nbdcopy --version
requires xz --version
requires restic version
requires virsh --version
requires jq --version

xz -k "$tmp/made/disk.img"
restic init -q

# Ceph is disk.img.
cat >"$tmp/bin/rbd" <<'END'
#!/usr/bin/env bash
[ "$*" = "diff --format json --from-snap monday pool/disk@tuesday" ] || exit
echo '[{"offset":0,"length":65536,"exists":"true"},{"offset":524288,"length":65536,"exists":"false"}]'
END
chmod +x "$tmp/bin/"*
sed -i '2i set -- "${@/#\\/dev\\/rbd\\/pool\\/disk@tuesday/disk.img}"' "$tmp/bin/nbdkit"

# write_to EXPORT: a client of farm.sock changes something.
write_to ()
{
    sock=farm.sock py "$1" <<'END'
h = connect(sys.argv[1])
h.pwrite(sys.argv[1].encode() * 1000, 12345)
END
}

#------------------------------------------------------------- EXAMPLES --

fresh
run <<'END'
nbdkit -U - --filter=cow file disk.img --run 'qemu-system-x86_64 -m 1G -drive file="$uri",format=raw,if=virtio'
END

# Twice: without the file, and with it.
fresh
for _ in 1 2; do
    run <<'END'
nbdkit -U - --filter=cow file disk.img \
    cow-load=diff.qcow2 cow-save=diff.qcow2 \
    --run 'qemu-system-x86_64 -m 1G -drive file="$uri",format=raw,if=virtio'
END
    qemu-img check -q -f qcow2 diff.qcow2 || die "no sound diff"
done
run <<'END'
qemu-img rebase -u -b disk.img -F raw diff.qcow2
END
qemu-img compare -q -f qcow2 -F raw diff.qcow2 disk.img
run <<'END'
qemu-system-x86_64 -m 1G -drive file=diff.qcow2,format=qcow2,if=virtio
END

# What was written in one run is there in the next.
nbdkit -U - --filter=cow file disk.img cow-load=diff.qcow2 cow-save=diff.qcow2 \
    --run './job "$uri"'
nbdkit -U - --filter=cow file disk.img cow-load=diff.qcow2 cow-save=diff.qcow2 \
    --run 'nbdcopy "$uri" again.img'
cmp seen.img again.img || die "the changes are not there in the next run"
is_the_disk diff.qcow2

fresh
run <<'END'
nbdkit -U - --filter=cow file disk.img cow-save=job.qcow2 \
    cow-save-backing=disk.img --run './job "$uri"'
END
is_the_disk job.qcow2
qemu-img compare -q -f qcow2 -F raw job.qcow2 seen.img ||
    die "the base is not below the diff"

fresh
run <<'END'
nbdkit -U - --filter=cow file golden.img cow-save=job.qcow2 \
    cow-save-backing=golden.img --run './job "$uri"'
END
qemu-img compare -q -f qcow2 -F raw job.qcow2 seen.img ||
    die "the golden image is not below the diff"
run <<'END'
qemu-img map job.qcow2
END
cmp disk.img golden.img

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

# Two runs, and a file for each export that was written to in any of them.
fresh
for name in web1 a/b; do
    run <<'END'
nbdkit -U farm.sock --filter=cow file golden.img \
    cow-load=diffs/ cow-save=diffs/
END
    write_to "$name"
    stop_server
    rm -f farm.sock
done
(cd diffs && echo *) >files
echo "a%2Fb.qcow2 web1.qcow2" | diff - files || die "other diffs than expected"

fresh
run <<'END'
nbdkit -U scratch.sock --filter=cow file disk.img cow-scope=connection
END

#---------------------------------------------------------------- VIEWS --

fresh
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img cow-views=true
END
run <<'END'
nbdinfo --list 'nbd+unix://?socket=disk.sock'
END
./job 'nbd+unix:///?socket=disk.sock'
run <<'END'
nbdcopy 'nbd+unix:///@diff.qcow2?socket=disk.sock' diff.qcow2
END
is_the_disk diff.qcow2
run <<'END'
nbdcopy 'nbd+unix:///@full.qcow2?socket=disk.sock' full.qcow2
END
qemu-img compare -q -f qcow2 -F raw full.qcow2 seen.img || die "not the full disk"
run <<'END'
qemu-img map -f qcow2 'nbd+unix:///@diff.qcow2?socket=disk.sock'
END
run <<'END'
qemu-img compare -f qcow2 -F raw 'nbd+unix:///@full.qcow2?socket=disk.sock' seen.img
END

# Two minutes.
fresh
run <<'END'
nbdkit -U farm.sock --filter=cow file golden.img cow-views=true
END
run <<'END'
./job 'nbd+unix:///web1?socket=farm.sock' &
END
wait $!
minutes=0
sleep ()
{
    minutes=$((minutes + 1))
    [ $minutes -le 2 ]
}
run <<'END'
while sleep 60; do nbdcopy 'nbd+unix:///web1@diff.qcow2?socket=farm.sock' web1-$(date +%H%M).qcow2; done
END
unset -f sleep
for diff in web1-*.qcow2; do
    is_the_disk "$diff"
done

# The disk of Monday is the base; two ranges are other ones on Tuesday.
fresh
qemu-img convert -f raw -O qcow2 disk.img "$tmp/backup/monday.qcow2"
printf 'tuesday' | dd of=disk.img bs=1 seek=12345 conv=notrunc status=none
dd if=/dev/zero of=disk.img bs=65536 seek=8 count=1 conv=notrunc status=none
before=$(fingerprint disk.img)
run <<'END'
rbd diff --format json --from-snap monday pool/disk@tuesday >changes.json
END
run <<'END'
jq -r '.[] | "\(.offset) \(.length)"' changes.json >changes.list
END
run <<'END'
nbdkit -U disk.sock --filter=cow --filter=extentlist \
    file /dev/rbd/pool/disk@tuesday extentlist=changes.list cow-views=true
END
run <<'END'
nbdcopy 'nbd+unix:///@full.qcow2?socket=disk.sock' - | ssh backup 'cat >tuesday.qcow2'
END
[ "$(stat -c %s "$tmp/backup/tuesday.qcow2")" -lt 300000 ] || die "too much was sent"
mv "$tmp/backup/"*.qcow2 .
run <<'END'
qemu-img rebase -u -b monday.qcow2 -F qcow2 tuesday.qcow2
END
qemu-img compare -q -f qcow2 -F raw tuesday.qcow2 disk.img || die "not the disk of Tuesday"

#------------------------------------------------------------ STREAMING --

fresh
run <<'END'
nbdkit -U - --filter=cow file disk.img cow-save=- \
    --run './job "$uri" >&2' | ssh backup 'cat >diff.qcow2'
END
is_the_disk "$tmp/backup/diff.qcow2"

fresh
run <<'END'
nbdkit -U - --filter=cow file disk.img cow-save=/dev/fd/3 \
    --run './job "$uri"' 3>diff.qcow2
END
is_the_disk diff.qcow2
cmp diff.qcow2 "$tmp/backup/diff.qcow2"

# The manual says why the output has to go elsewhere.
nbdkit -U - --filter=cow file disk.img cow-save=- --run './job "$uri"' >mixed
head -n 1 mixed | grep -q 'This is the job' || die "the manual is wrong"

fresh
run <<'END'
mkfifo diff.fifo
END
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img cow-save=diff.fifo
END
./job 'nbd+unix:///?socket=disk.sock'
stop_server &
run <<'END'
gzip <diff.fifo >diff.qcow2.gz
END
wait $!
gzip -d diff.qcow2.gz
is_the_disk diff.qcow2

#------------------------------------------------ WORKING WITH THE DIFF --

fresh
nbdkit -U - --filter=cow file disk.img cow-save=diff.qcow2 --run './job "$uri"'
run <<'END'
qemu-img rebase -u -b disk.img -F raw diff.qcow2
END
run <<'END'
qemu-img map --output=json diff.qcow2
END
run <<'END'
qemu-img compare -f qcow2 -F raw diff.qcow2 seen.img
END
run <<'END'
qemu-system-x86_64 -m 1G -drive file=diff.qcow2,format=qcow2,if=virtio
END
is_the_disk diff.qcow2
run <<'END'
qemu-img convert -f qcow2 -O raw diff.qcow2 changed.img
END
cmp changed.img seen.img
run <<'END'
qemu-img commit diff.qcow2
END
cmp disk.img seen.img || die "the changes are not in the base"

fresh
run <<'END'
nbdkit -U disk.sock --filter=cow file disk.img
END
./job 'nbd+unix:///?socket=disk.sock'
run <<'END'
qemu-img create -F raw -b nbd:unix:disk.sock -f qcow2 diff.qcow2
END
run <<'END'
qemu-img rebase -F raw -b disk.img -f qcow2 diff.qcow2
END
is_the_disk diff.qcow2

fresh
run <<'END'
nbdkit -U - --filter=cow file disk.img cow-save=- \
    --run './job "$uri" >&2' \
    | restic backup --stdin --stdin-filename diff.qcow2
END
run <<'END'
restic dump latest diff.qcow2 >diff.qcow2
END
is_the_disk diff.qcow2

# libvirt takes the disks.  (Its driver "test" knows what is valid, and has no
# machines.)
sed -n '/^ <disk/,/^ <\/disk/p' "$test_dir/../nbdkit-cow-filter.pod" >disks
[ "$(grep -c '^ <disk' disks)" -eq 2 ] || die "the disks were not found"
awk -v RS='</disk>\n' -v ORS='</disk>\n' '{ print >("disk" NR ".xml") }' disks
for disk in disk1.xml disk2.xml; do
    {
        echo "<domain type='kvm'><name>a</name><memory unit='GiB'>1</memory>"
        echo "<os><type>hvm</type></os><devices>"
        cat "$disk"
        echo "</devices></domain>"
    } >domain.xml
    virsh -q -c test:///default define --validate domain.xml ||
        die "libvirt does not take this: $(cat "$disk")"
    sed -i 's/dev=/device=/' domain.xml
    ! virsh -q -c test:///default define --validate domain.xml 2>/dev/null ||
        die "libvirt takes anything"
done
fresh

# Nothing is documented that is not run: what is verbatim in the manual, but for XML, is a
# command that stands in one of the scripts.
join <"$test_dir/../nbdkit-cow-filter.pod" |
    sed -nE '/^=head1 DESCRIPTION/,$ s/^ ([^ <].*)/\1/p' >"$tmp/documented"
[ "$(wc -l <"$tmp/documented")" -ge 40 ] || die "the commands were not found"
cat "$test_dir"/test-*.sh | sed -n "/^ *run <<'END'$/,/^END$/p" | join |
    grep -vx -e " *run <<'END'" -e END >"$tmp/commands"
while IFS= read -r line; do
    grep -qxF -e "$line" "$tmp/commands" || die "documented but not run: $line"
done <"$tmp/documented"
