# shellcheck shell=bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What the scripts that people run have in common: none ends without saying why, and
# none leaves behind what it has started.  Sourced first, under "set -e".

# A command that fails ends the script, and most commands say why, but not all.
set -E
trap 'tell_failure $? "$BASH_COMMAND" "${BASH_SOURCE[0]##*/}" $LINENO' ERR
tell_failure ()
{
    # What fails in a subshell may be what was asked there; if not, it comes here again.
    [ "$BASH_SUBSHELL" -gt 0 ] ||
        echo "${0##*/}: this failed with status $1 ($3, line $4): $2" >&2
}

trap 'interrupted INT 130' INT
trap 'interrupted TERM 143' TERM
trap 'interrupted HUP 129' HUP
interrupted ()
{
    trap '' INT TERM HUP
    echo "${0##*/}: ended by SIG$1" >&2 || : # the terminal may have gone
    end_jobs
    exit "$2"
}

# run_job COMMAND [ARGUMENT...]: runs it in a session of its own.  So nothing in it can
# wait for the terminal, and a signal to this script ends all of it at once.
run_job ()
{
    (trap - ERR INT QUIT TERM HUP; exec setsid "$@") </dev/null &
    wait $!
}

# end_jobs: ends what run_job runs.
end_jobs ()
{
    local job i
    for job in $(jobs -p); do
        # It may not have its session yet.
        kill -TERM -- "-$job" 2>/dev/null || kill -TERM "$job" 2>/dev/null || continue
        for ((i = 0; i < 60; i++)); do
            kill -0 -- "-$job" 2>/dev/null || continue 2
            sleep 0.05
        done
        kill -KILL -- "-$job" 2>/dev/null || :
    done
}
