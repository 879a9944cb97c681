#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The table in README.md is what was measured, and its charts are there.

. "${srcdir:-$(dirname "$0")}/functions.sh"
top=$test_dir/..

py "$top" >"$tmp/table" <<'END'
import runpy
bench = sys.argv[1] + "/bench"
sys.path.insert(0, bench + "/lib")
sys.argv = ["run", "--from", bench + "/figures.json", "--markdown"]
runpy.run_path(bench + "/lib/main.py", run_name="__main__")
END
[ "$(wc -l <"$tmp/table")" -ge 20 ] || die "the table is short"
grep '^|' "$top/README.md" | diff -u "$tmp/table" - || die "README.md has other figures"
charts=$(sed -n 's/^!\[.*\](\(.*\.svg\))$/\1/p' "$top/README.md")
[ "$(wc -w <<<"$charts")" -ge 3 ] || die "the charts were not found"
for chart in $charts; do
    grep -q '</svg>' "$top/$chart" || die "no chart $chart"
done
