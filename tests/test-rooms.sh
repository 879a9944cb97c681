#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# test-rooms.sh: prints which file of the filter includes which, and which room thereby
# uses which other ones.  It fails where a room reaches above itself, where files go in a
# circle, where somebody else includes what is private to overlay/ and blk*.c, and where
# a file is longer than 1,000 lines or a function than 60.  A file is its .c and its .h;
# overlay.c has two of those, overlay.h and private.h; overlays.c has overlays.h and entry.h.

set -eu -o pipefail
export LC_ALL=C

top=$(cd "${srcdir:-$(dirname "$0")}/.." && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# Each may use those before it.
rooms="common format overlay base blk images server cow"

# sources DIR: those of the filter, which is in DIR.
sources ()
{
    sed -n '/^libcow_la_SOURCES/,/[^\\]$/p' "$1/Makefile.am" | grep -o '[^ 	]*\.[ch]\>'
    echo cow.c
}

# graph DIR: the graph of the sources in DIR; fails if it is not as it should be.
graph ()
{
    # (However it is spelled; in angle brackets, those that are files here.)
    (cd "$1" && sources . | xargs grep -HE '^[[:blank:]]*#[[:blank:]]*include' |
        sed -E 's/:[[:blank:]]*#[[:blank:]]*include[[:blank:]]*["<]([^">]*)(.).*/ \1 \2/' |
        while read -r from to end; do
            [ "$end" = ">" ] && { [ "$to" = config.h ] || [ ! -e "$to" ]; } || echo "$from $to"
        done) | awk -v rooms="$rooms" '
        function room_of (file) {
            if (file ~ "/")
                return substr (file, 1, index (file, "/") - 1)
            return file == "bitmap" ? "common" : file ~ /^blk/ ? "blk" : file
        }
        BEGIN {
            nr_rooms = split (rooms, name)
            for (i = 1; i <= nr_rooms; ++i)
                height[name[i]] = i
        }
        {
            from = $1; to = $2
            private = to == "overlay/private.h"
            sub (/\.[ch]$/, "", from); sub (/\.[ch]$/, "", to)
            sub (/^overlay\/private$/, "overlay/overlay", from)
            sub (/^overlay\/private$/, "overlay/overlay", to)
            sub (/^server\/entry$/, "server/overlays", from)
            sub (/^server\/entry$/, "server/overlays", to)
            here = room_of(from); there = room_of(to)
            if (!(here in height) || !(there in height))
                print "WRONG: of no room: " from " includes " to
            else if (height[there] > height[here])
                print "WRONG: " from " reaches up to " to
            else if (private && here != "overlay" && here != "blk")
                print "WRONG: " from " includes what is private to overlay"
            if (from != to && !seen[from, to]++)
                print "file", from, to
            if (here != there && !used[here, there]++)
                print "room", here, there
        }' >"$tmp/edges"

    echo "Rooms, and which others they use:"
    for room in $rooms; do
        echo "  $room: $(sed -n "s/^room $room //p" "$tmp/edges" | sort | xargs)"
    done
    echo "Files, and which others they include:"
    sed -n 's/^file //p' "$tmp/edges" | sort |
        awk '$1 != last { printf "%s  %s:", (NR > 1 ? "\n" : ""), $1; last = $1 }
             { printf " %s", $2 } END { print "" }'

    if grep '^WRONG' "$tmp/edges"; then
        return 1
    fi
    if ! sed -n 's/^file //p' "$tmp/edges" | tsort >/dev/null 2>"$tmp/circle"; then
        echo "WRONG: files go in a circle: $(sed -n 's/^tsort: \([^-]\)/\1/p' "$tmp/circle" | xargs)"
        return 1
    fi
}

# lengths DIR: the longest file and the longest function.
lengths ()
{
    (cd "$1" && sources . | xargs awk '
        FNR == 1 { start = 0 }
        /^[a-z_]/ { name = $1 }
        /^{/ { start = FNR; of = name }
        /^}/ && start {
            if (FNR - start - 1 > function_lines) {
                function_lines = FNR - start - 1
                longest_function = of " in " FILENAME
            }
            start = 0
        }
        FNR > file_lines { file_lines = FNR; longest_file = FILENAME }
        END {
            print "The longest file, " longest_file ", has " file_lines " lines."
            print "The longest function, " longest_function ", has " function_lines "."
            exit file_lines > 1000 || function_lines > 60
        }')
}

die ()
{
    echo "test-rooms.sh: $1" >&2
    exit 1
}

graph "$top" | tee "$tmp/graph"
[ "$(wc -l <"$tmp/graph")" -ge 30 ] || die "the sources were not found"
lengths "$top" || die "too long"

# It sees what is wrong.
cp -R "$top"/{Makefile.am,*.[ch],common,format,images,overlay,server} "$tmp"
chmod -R u+w "$tmp"
wrong ()
{
    local file=$1 include=$2 expected=$3
    cp "$tmp/$file" "$tmp/before"
    case $include in
        *include*) echo "$include" >>"$tmp/$file" ;;
        *) echo "#include \"$include\"" >>"$tmp/$file" ;;
    esac
    if graph "$tmp" >"$tmp/graph" || ! grep -q "^WRONG: $expected" "$tmp/graph"; then
        die "not seen: $file includes $include"
    fi
    mv "$tmp/before" "$tmp/$file"
}
wrong overlay/store.c blk.h "overlay/store reaches up to blk"
wrong base.h server/views.h "base reaches up to server/views"
wrong server/views.c overlay/private.h "server/views includes what is private"
wrong overlay/map.h overlay/overlay.h "files go in a circle"
wrong images/image.h nowhere/image.h "of no room"
wrong overlay/store.c "#include <blk.h>" "overlay/store reaches up to blk"
wrong overlay/store.c ' #  include	"blk.h"' "overlay/store reaches up to blk"

{
    echo "int"; echo "f (void)"; echo "{"; printf ';\n%.0s' {1..61}; echo "}"
} >>"$tmp/blk.c"
! lengths "$tmp" >"$tmp/lengths" || die "not seen: a long function"
grep -q "f in blk.c, has 61" "$tmp/lengths" || die "not seen which function is long"
