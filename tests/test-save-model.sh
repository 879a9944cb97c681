#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Round trips of a disk to which the model test has sent random requests of all kinds
# from several connections (see test-model.sh, also for the variables from the
# environment).  At its end, the disk holds what the model says; the diff over the base
# is that disk; a server that loads the diff shows that disk; and what that one saves is
# that disk again.

. "${srcdir:-$(dirname "$0")}/functions.sh"
model=$abs_top_builddir/tests/model
[ -x "$model" ] || skip "tests/model was not built: it needs the headers of libnbd"
requires qemu-img --version
requires_plugin file

: "${MODEL_SEED:=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}"
: "${MODEL_RUN:=*}"
: "${MODEL_FACTOR:=1}"
echo "MODEL_SEED=$MODEL_SEED"
requests=$(awk "BEGIN { n = int(500 * $MODEL_FACTOR); print n < 60 ? 60 : n }")

make_base ()
{
    [ ! -f "$tmp/base" ] || [ "$(stat -c %s "$tmp/base")" != "$1" ] || return 0
    py "$tmp/base" "$1" "$MODEL_SEED" <<'END'
path, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rand = random.Random(seed + size)
with open(path, "wb") as f:
    f.truncate(size)
    for i in range(12):
        at = rand.randrange(size)
        f.seek(at)
        f.write(rand.randbytes(min(int(2 ** rand.uniform(0, 21)), size - at)))
END
}

# save_as KIND ARGS...: a server that will save its overlay in $tmp/diff.
save_as ()
{
    local kind=$1
    shift
    rm -f "$tmp/diff"
    if [ "$kind" = stream ]; then
        start_nbdkit "$@" cow-save=/dev/fd/5 5>"$tmp/diff"
    else
        start_nbdkit "$@" cow-save="$tmp/diff"
    fi
}

# run BLOCK SIZE KIND [PARAMETER...]: parameters that start with "model" are for the
# model.
nr_runs=0
run ()
{
    local name="$1 $2 $3" block=$1 size=$2 kind=$3 seed start=$SECONDS
    local word for_model=() parameters=()
    # shellcheck disable=SC2053
    [[ $name == $MODEL_RUN ]] || return 0
    shift 3
    for word; do
        case $word in
            model*) for_model+=("${word#model}") ;;
            *) parameters+=("$word") ;;
        esac
    done
    set -- ${parameters[@]+"${parameters[@]}"}
    make_base "$size"
    seed=$((MODEL_SEED + $(cksum <<<"$name" | cut -d ' ' -f 1)))

    save_as "$kind" file "$tmp/base" cow-block-size="$block" "$@"
    if ! timeout "$guard" "$model" --seed=$seed \
            --block-size="$(numfmt --from=iec "$block")" --requests="$requests" \
            --rounds=6 --max-request=1048576 --result="$tmp/wanted" \
            ${for_model[@]+"${for_model[@]}"} "$uri" "$tmp/base" >"$tmp/out" 2>&1; then
        cat "$tmp/out" >&2
        die "the model, in '$name'; to repeat it: MODEL_SEED=$MODEL_SEED" \
            "MODEL_FACTOR=$MODEL_FACTOR MODEL_RUN='$name'"
    fi
    nbdcopy "$uri" "$tmp/shown"
    stop_nbdkit
    log_lacks error:
    cmp "$tmp/shown" "$tmp/wanted" || die "$name: the disk is not the model's"
    rebased_is "$tmp/diff" "$tmp/base" "$tmp/wanted"

    # Once more round, with other blocks.
    mv "$tmp/diff" "$tmp/loaded"
    local other=4K
    [ "$block" != 4K ] || other=16K
    save_as "$kind" file "$tmp/base" cow-block-size=$other cow-load="$tmp/loaded" "$@"
    nbdcopy "$uri" "$tmp/shown"
    stop_nbdkit
    cmp "$tmp/shown" "$tmp/wanted" || die "$name: the loaded disk is another one"
    rebased_is "$tmp/diff" "$tmp/base" "$tmp/wanted"
    if [ $other = 4K ]; then
        # Larger blocks have been made whole with what was in the base.
        qemu-img compare -q "$tmp/diff" "$tmp/loaded" || die "$name: another diff"
    fi
    nr_runs=$((nr_runs + 1))
    echo "$name: $(tail -n 1 "$tmp/out") ($((SECONDS - start)) s)"
}

odd=$((3 * 1024 * 1024 + 513))
even=$((9 * 1024 * 1024))
for block in 4K 64K 2M; do
    run $block 777 in-place
    run $block $odd in-place
    run $block $odd stream
done
for block in 4K 64K; do
    run $block $odd compact cow-save-compact=true
    run $block $odd extended cow-save-format=extended
done
run 4K $even none cow-save-backing=none cow-detect-zeroes=true model--lax
run 4K $even stream cow-save-format=extended
run 64K $even compact cow-save-compact=true cow-save-format=extended
run 8K $((33 * 1024 * 1024 + 777)) in-place cow-on-read=true model--cow-on-read
[ $nr_runs -gt 0 ] || die "no run is called '$MODEL_RUN'"
