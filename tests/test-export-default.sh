#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The export that a client gets without naming one is the one that the plugin calls
# its default, and has the same overlay under both names.  The list of exports is
# the plugin's.

. "${srcdir:-$(dirname "$0")}/functions.sh"
requires_plugin file
requires_filter exportname

mkdir "$tmp/d"
for f in a b; do base_file "$tmp/d/$f" 65536; done

start_nbdkit --filter=exportname file dir="$tmp/d" default-export=b
py <<'END'
h = connect("")
h.pwrite(b"x" * 1000, 0)
same(connect("b").pread(1000, 0), b"x" * 1000, "the default by its name")
connect("b").pwrite(b"y" * 1000, 60000)
same(h.pread(1000, 60000), b"y" * 1000, "the default without a name")
same(connect("a").pread(65536, 0), base(0, 65536), "the other export")
END
[ "$(nbdinfo --list --json "$uri" | grep -c '"export-name": "[ab]"')" -eq 2 ] ||
    die "the list of exports is not the plugin's"
