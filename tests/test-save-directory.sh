#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# With a directory, each export in which something was written has its diff there, under a
# name that cannot leave the directory, hide, or clash with another one.  With a file, a
# second export is refused, and the message says to name a directory.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin eval file
requires qemu-img --version
mkdir "$tmp/d"

# A plugin with any export.
serve ()
{
    start_nbdkit eval open='echo "$3"' default_export='echo' get_size='echo 64K' \
        pread='head -c "$3" /dev/zero' "$@"
}

# Each name and its file.
cat >"$tmp/names" <<'END'
	default.qcow2
a	a.qcow2
default	%64efault.qcow2
default2	default2.qcow2
Default	Default.qcow2
.	%2E.qcow2
..	%2E..qcow2
.hidden	%2Ehidden.qcow2
not.hidden	not.hidden.qcow2
../up	%2E.%2Fup.qcow2
/etc/passwd	%2Fetc%2Fpasswd.qcow2
a/b	a%2Fb.qcow2
a%2Fb	a%252Fb.qcow2
100%	100%25.qcow2
two words	two%20words.qcow2
a.qcow2	a.qcow2.qcow2
größe	größe.qcow2
-rf	-rf.qcow2
END

serve cow-save="$tmp/d/"
py <<'END'
names = [l.rstrip("\n").split("\t") for l in open(tmp + "/names", encoding="utf-8")]
for extra in "line\nbreak", "tab\tulator", "del\x7f":
    file = extra.replace("\n", "%0A").replace("\t", "%09").replace("\x7f", "%7F")
    names.append([extra, file + ".qcow2"])
for i, (name, file) in enumerate(names):
    h = connect(name)
    h.pwrite(b"%8d" % i * 512, i * 512)
# Only read, or flushed, or with an empty trim of what is zero already.
h = connect("unchanged")
h.pread(4096, 0)
h.flush()
expect(len({f for n, f in names}), len(names), "files")
with open(tmp + "/wanted", "w", encoding="utf-8") as f:
    f.write("\n".join(sorted((f for n, f in names), key=lambda s: s.encode())) + "\n")
END
stop_nbdkit
log_lacks error
ls -A "$tmp/d" | sort | cmp - "$tmp/wanted" ||
    { ls -A "$tmp/d" | sort | diff - "$tmp/wanted" >&2 || :; die "other names"; }
for file in "$tmp"/d/*; do
    sound_diff "$file"
done
[ ! -e "$tmp/up.qcow2" ] || die "a name has left the directory"

# Each has what was written to it, and gets it back.
serve cow-load="$tmp/d"
py <<'END'
names = [l.rstrip("\n").split("\t") for l in open(tmp + "/names", encoding="utf-8")]
names += [["line\nbreak"], ["tab\tulator"], ["del\x7f"]]
for i, name in enumerate(names):
    h = connect(name[0])
    got = h.pread(64 * K, 0)
    want = bytearray(64 * K)
    want[i * 512:i * 512 + 4096] = b"%8d" % i * 512
    same(got, want, "export %r" % name[0])
same(connect("other").pread(64 * K, 0), bytes(64 * K), "another export")
END
stop_nbdkit

# Refused when it connects: a name that is too long for a file (its limit is 255, with
# the suffix and what is encoded), and one whose file would replace a foreign one.
rm -f "$tmp"/d/* "$tmp"/d/.[!.]*
echo foreign >"$tmp/d/foreign.qcow2"
serve cow-save="$tmp/d"
py <<'END'
h = connect("n" * 249)
h.pwrite(b"x", 0)
expect(refused("n" * 250), True, "a long name is refused")
expect(refused("n" * 247 + "/"), True, "a long encoded name is refused")
expect(refused("n" * 246 + "/"), False, "one that fits")
expect(refused("foreign"), True, "a foreign file is in the way")
connect("b").pwrite(b"y", 0)
END
stop_nbdkit
log_has "error: cow-save=$tmp/d: export refused: .*File name too long"
log_has "error: cow-save=$tmp/d: export refused: $tmp/d/foreign.qcow2 exists .*move it away"
[ "$(cat "$tmp/d/foreign.qcow2")" = foreign ] || die "the foreign file has changed"
only_files "$tmp/d" b.qcow2 foreign.qcow2 "$(printf 'n%.0s' {1..249}).qcow2"

# A file takes one export, whichever it is; the same one may come again.
serve cow-save="$tmp/diff"
py <<'END'
h = connect("one")
h.pwrite(b"one" * 1000, 0)
expect(refused("two"), True, "the second export is refused")
connect("one").pwrite(b"again", 30000)
expect(refused(""), True, "the default export is refused as well")
END
stop_nbdkit
log_has "error: cow: export \"two\" refused: .*cow-save=$tmp/diff.*name a directory"
sound_diff "$tmp/diff"
truncate -s 64K "$tmp/zeroes"
qemu-io -r -f qcow2 -c "read -P 0x61 30000 1" -c "read -P 0 40000 100" "$tmp/diff" \
    >"$tmp/out"
! grep -i 'verification failed' "$tmp/out" || die "another export's diff"
