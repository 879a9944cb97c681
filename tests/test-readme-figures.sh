#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The figures in README.md and bench/RESULTS.md are those of bench/figures.json, and the
# charts are there.

. "${srcdir:-$(dirname "$0")}/functions.sh"
top=$test_dir/..

# page NAME: what bench/run prints for this page.
page ()
{
    py "$top/bench" "$1" <<'END'
import runpy
bench, page = sys.argv[1:]
sys.path.insert(0, bench + "/lib")
sys.argv = ["run", "--from", bench + "/figures.json", "--markdown=" + page]
runpy.run_path(bench + "/lib/main.py", run_name="__main__")
END
}

page results >"$tmp/results"
[ "$(grep -c '^|' "$tmp/results")" -ge 80 ] || die "the tables are short"
diff -u "$tmp/results" "$top/bench/RESULTS.md" || die "bench/RESULTS.md has other figures"

# A head and eight figures, and where they were measured.
page readme >"$tmp/readme"
[ "$(grep -c '^|' "$tmp/readme")" -eq 10 ] || die "README.md is to have eight figures"
sed -n '/^| what /,/^Measured /p' "$top/README.md" | diff -u "$tmp/readme" - ||
    die "README.md has other figures"

# charts PAGE NUMBER: the charts that PAGE shows, so many, are there.
charts ()
{
    local charts chart
    charts=$(sed -n 's/^!\[.*\](\(.*\.svg\))$/\1/p' "$top/$1")
    [ "$(wc -w <<<"$charts")" -eq "$2" ] || die "$1 does not show $2 charts"
    for chart in $charts; do
        grep -q '</svg>' "$top/$(dirname "$1")/$chart" || die "no chart $chart"
    done
}
charts README.md 1
charts bench/RESULTS.md 3
