#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# Several connections send thousands of random requests of all kinds at a time,
# and all answers, the content of the disk and its extents must be those of a
# plain model in memory (see test-model.c): for several block sizes and odd disk
# sizes, over bases that keep it simple, that are slow, and that are picky.
#
# From the environment:
#
#   MODEL_SEED     to repeat a failure (it is printed first)
#   MODEL_RUN      a pattern, as of bash, for the names of the runs to do, such as
#                  '* 34603785 *'; runs that are left out change nothing in others
#   MODEL_FACTOR   more or less requests than usual, 0.1 being a tenth

. "${srcdir:-$(dirname "$0")}/functions.sh"
model=$abs_top_builddir/tests/model
[ -x "$model" ] || skip "tests/model was not built: it needs the headers of libnbd"
requires_plugin file
requires_filter delay blocksize-policy

: "${MODEL_SEED:=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}"
: "${MODEL_RUN:=*}"
: "${MODEL_FACTOR:=1}"
echo "MODEL_SEED=$MODEL_SEED"

requests=$(awk "BEGIN { n = int(4000 * $MODEL_FACTOR); print n < 60 ? 60 : n }")
# Six rounds are of six kinds.
rounds=$(awk "BEGIN { n = int(8 * $MODEL_FACTOR); print n < 6 ? 6 : n }")

# Makes $tmp/base.SIZE, data and holes in any places, and $tmp/map.SIZE, the
# extents that the file plugin sees in it, unless they are there.
make_base ()
{
    local size=$1
    [ ! -f "$tmp/base.$size" ] || return 0
    py "$tmp/base.$size" "$size" "$MODEL_SEED" <<'END'
path, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rand = random.Random(seed + size)
with open(path, "wb") as f:
    f.truncate(size)
    left = size * 6 // 10
    # The first block and the last bytes have data, or there is only a hole.
    pieces = [(0, 300), (size - 200, 200)] if rand.random() < 0.8 else []
    while left > 0:
        n = min(int(2 ** rand.uniform(0, 22)), left)
        pieces.append((rand.randrange(size), n))
        left -= n
    for at, n in pieces:
        at = max(at, 0)
        f.seek(at)
        f.write(rand.randbytes(min(n, size - at)))
END
    fingerprint "$tmp/base.$size" >"$tmp/fingerprint.$size"
    TEST_WRAPPER='' start_server -r file "$tmp/base.$size"
    nbdinfo --map "$uri" >"$tmp/map.$size" || die "nbdinfo --map failed"
    stop_nbdkit
}

# run BLOCK SIZE NAME [ARGUMENT...]: one server, one model.  The run's name is
# "BLOCK SIZE NAME".  Arguments are for nbdkit; those that start with "model" are
# for the model.
nr_runs=0
run ()
{
    local name="$1 $2 $3" block=$1 size=$2 bytes=2097152 seed word
    local for_model=() filters=() parameters=() start=$SECONDS
    # shellcheck disable=SC2053
    [[ $name == $MODEL_RUN ]] || return 0
    shift 3
    for word; do
        case $word in
            model*) for_model+=("${word#model}") ;;
            --filter=*) filters+=("$word") ;;
            *) parameters+=("$word") ;;
        esac
    done
    case $block in
        4K) bytes=4096 ;;
        64K) bytes=65536 ;;
    esac
    make_base "$size"
    start_nbdkit ${filters[@]+"${filters[@]}"} file "$tmp/base.$size" \
        cow-block-size="$block" ${parameters[@]+"${parameters[@]}"}
    # Another seed for each run, whichever runs are done.
    seed=$((MODEL_SEED + $(cksum <<<"$name" | cut -d ' ' -f 1)))
    if ! timeout "$guard" "$model" --seed=$seed --block-size=$bytes \
            --base-map="$tmp/map.$size" \
            --requests="$requests" --rounds="$rounds" \
            ${for_model[@]+"${for_model[@]}"} "$uri" "$tmp/base.$size" \
            >"$tmp/out" 2>&1; then
        cat "$tmp/out" >&2
        die "in '$name'; to repeat it: MODEL_SEED=$MODEL_SEED" \
            "MODEL_FACTOR=$MODEL_FACTOR MODEL_RUN='$name'"
    fi
    stop_nbdkit
    nr_runs=$((nr_runs + 1))
    echo "$name: $(tail -n 1 "$tmp/out") ($((SECONDS - start)) s)"
}

odd=$((33 * 1024 * 1024 + 777))
even=$((33 * 1024 * 1024 + 4096))
huge=$((100 * 1024 * 1024))
small=$((1024 * 1024 + 1))
slow="--filter=delay rdelay=1ms"
picky="--filter=blocksize-policy blocksize-minimum=4096
       blocksize-error-policy=error"

# Above 2M, blocks are of 2M.
run 4M $odd plain
for block in 4K 64K 2M; do
    for size in 1 511 4097 $small $odd $huge; do
        run $block "$size" plain
    done
    run $block 4097 keep cow-on-read=true model--cow-on-read
    run $block $odd keep cow-on-read=true model--cow-on-read
    run $block $odd prefetch cow-on-cache=true model--cow-on-cache
    run $block $odd one cow-scope=connection model--connections=1
    # shellcheck disable=SC2086
    {
        run $block $even picky $picky
        run $block $even keep-picky $picky cow-on-read=true model--cow-on-read
        # These make races likely.
        run $block $odd slow $slow
        run $block $odd keep-slow $slow cow-on-read=true cow-on-cache=true \
            model--cow-on-read model--cow-on-cache
    }
done
[ $nr_runs -gt 0 ] || die "no run is called '$MODEL_RUN'"

for file in "$tmp"/base.*; do
    fingerprint "$file" | cmp - "$tmp/fingerprint.${file##*.}" ||
        die "the base has changed: ${file##*/}"
done
