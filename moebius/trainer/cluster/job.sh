# ----------------------------------------------------------------------------------------------
# What follows is the same for every job. Its parts: small helpers, the signals, how a step is
# started on all nodes, the preflight, the training, and what to do when that has ended.

set -u -o pipefail
restart=${SLURM_RESTART_COUNT:-0}   # SLURM leaves it unset in the first stretch
launch=$SLURM_JOB_ID.$restart
stop_file=$submission/stop-$launch
failures=$submission/failures-$SLURM_JOB_ID
finished=$submission/finished${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}

say() { echo "[$(date +%T) job $launch] $*"; }

# What the training has written about itself in this stretch, as "stopped true": its state, and
# whether starting again would help. Nothing where it did not come that far.
standing() {
    sed -n "/\"launch\": \"$launch\"/ s/.*\"state\": \"\([a-z]*\)\".*\"again\": \([a-z]*\).*/\1 \2/p" \
        "$run/standing.json" 2>/dev/null
}

# The step of which it has last told, in this stretch or in an earlier one; 0 before any.
reached() {
    number=$(sed -n 's/.*"step": \([0-9][0-9]*\).*/\1/p' "$run/standing.json" 2>/dev/null)
    echo "${number:-0}"
}

# A command that SLURM, which may be ending this shell, does not interrupt.
shielded() (trap '' TERM; "$@")

# What SLURM knows of the job, by a name of `scontrol show job`.
job_fact() {
    shielded scontrol show job "$SLURM_JOB_ID" --oneliner | sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

requeue() {   # requeue WHY [NODES]: NODES are not to be used again
    say "to be requeued: $1"
    ended=
    trap 'ended=1' TERM   # with which SLURM now ends this shell
    if scontrol requeue "$SLURM_JOB_ID"; then
        # SLURM takes these of jobs that wait only, and gives this shell some seconds more.
        [ -z "${2:-}" ] || shielded scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$2" \
            || say "error: these nodes could not be excluded: $2"
        for _ in {1..60}; do [ -n "$ended" ] || sleep 1; done
        exit 1
    fi
    say "error: SLURM does not requeue it; the next job of a chain, or the same command, goes on"
    exit 1
}

count_failure() {   # so many only, for most failures come again
    count=$(cat "$failures" 2>/dev/null | wc -l)
    if [ "$count" -ge "$max_requeues" ]; then
        say "error: $1; not requeued: that was done $count times (max_requeues)"
        return 1
    fi
    echo "$(date +%FT%T) stretch $restart on $SLURM_JOB_NODELIST: $1" >> "$failures"
}

requeue_after_failure() {
    count_failure "$1" || exit 1
    requeue "$1 ($((count + 1)) of $max_requeues)" "${2:-}"
}

# --- signals ---
# USR1 comes some minutes before the time limit, and with preemption where the site has set it up
# so: the run is to save and stop. TERM comes with scancel, at the very end, and where SLURM itself
# requeues the job; the training gets it, too.
# The file is for a training that is just being started and does not listen to signals yet.
step= asked= cancelled= over= signalled=
on_usr1() {
    asked=1 signalled=1
    say "USR1: asking the run to save and stop"
    touch "$stop_file"
    [ -z "$step" ] || kill -USR1 "$step"
}
on_term() {
    cancelled=1 signalled=1
    say "TERM: SLURM is ending the job"
    # SLURM never requeues a job that is out of time. The training may still be saving: go on waiting.
    if [ -z "$over" ] && job_fact Reason | grep -qx TimeLimit; then
        over=1
        if count_failure "its time was over before it had saved"; then
            say "to be requeued: its time was over before it had saved"
            shielded scontrol requeue "$SLURM_JOB_ID" || say "error: SLURM does not requeue it"
        fi
    fi
}
trap on_usr1 USR1
trap on_term TERM

# --- nodes ---
# The processes meet at the first node; addresses are those by which SLURM itself reaches nodes.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
addresses=$(scontrol show node "$SLURM_JOB_NODELIST" --oneliner \
    | sed -n 's/^NodeName=\([^ ]*\).* NodeAddr=\([^ ]*\).*/\1 \2/p')
address=$(sed -n "s/^$first //p" <<< "$addresses")
if [ -z "$address" ]; then
    say "error: scontrol does not know the address of node '$first', where the processes are to meet"
    exit 1
fi
port=$((20000 + SLURM_JOB_ID % 12000))   # below those that the kernel gives to others
cpus=$((${SLURM_CPUS_ON_NODE:-$processes} / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}
# Without this torchrun gives restarted processes the addresses of those that have died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export addresses address port MOEBIUS_STOP_FILE=$stop_file

# Run by bash on every node. A signal to a step reaches all of its processes, and torchrun would
# die of USR1; the processes of the training install a handler of their own. PET_* are options of
# torchrun: who serves the rendezvous and the address of this node, both of which it would guess,
# and time for nodes that are slow to start, as where an image has to be fetched.
on_node='
trap "" USR1
if ! getent ahosts "$address" > /dev/null; then
    echo "error: node $SLURMD_NODENAME ($(hostname)) cannot resolve $address, where the processes are to meet"
    exit 1
fi
echo "node $SLURM_NODEID is $SLURMD_NODENAME ($(hostname)), to meet at $address:$port"
export PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0)),read_timeout=600,join_timeout=900
export PET_LOCAL_ADDR=$(sed -n "s/^$SLURMD_NODENAME //p" <<< "$addresses")
exec "$@"
'

# start NAME RESTARTS COMMAND...: torchrun on every node; leaves the exit code in $code. All CPUs of a
# node are for all of its processes: bound to those of one task, they would share a core. The
# rendezvous is c10d, not a static one: its agents see at once that another one has to restart,
# where the processes of a static one would hang in a collective until its time is over.
start() {
    name=$1 restarts=$2
    shift 2
    srun --job-name="$name" --kill-on-bad-exit=1 --cpu-bind=none "${srun_options[@]}" \
        bash -c "$on_node" _ "${python[@]}" -m torch.distributed.run \
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" --max-restarts="$restarts" \
        --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$launch.$name" \
        -m moebius.trainer "$@" &
    step=$!
    while :; do   # a signal to this shell ends `wait` early
        signalled=
        wait "$step"
        code=$?
        [ -n "$signalled" ] || break
    done
    step=
}

if [ -e "$finished" ]; then
    say "the run is complete: an earlier job of this submission has done it"
    exit 0
fi
say "nodes $SLURM_JOB_NODELIST, $processes processes each, run folder $run"
env | grep -E '^(SLURM|NCCL|CUDA|TORCH|OMP|MOEBIUS|UCX|FI|GLOO)_' \
    | grep -viE '^[^=]*(token|secret|password|key|jwt|credential)' | sort > "$submission/environment-$launch"

# --- preflight ---
if [ -n "$preflight" ]; then
    rm -f "$run/preflight.json" "$run/preflight-bad-nodes"   # of an earlier stretch
    start preflight 0 preflight "$config" "${preflight_options[@]}"
    if [ "$code" != 0 ] && [ -z "$asked$cancelled" ]; then
        # As where a node is lost or a step cannot be started: nothing is known of any node.
        [ -e "$run/preflight.json" ] \
            || requeue_after_failure "the preflight has ended with code $code and without a report"
        bad=$(sort -u "$run/preflight-bad-nodes" 2>/dev/null | paste -sd, -)
        if [ -n "$bad" ] && [ -n "$exclude_bad_nodes" ]; then
            excluded=$(job_fact ExcNodeList)
            [ "$excluded" = "(null)" ] || bad=$bad,$excluded
            requeue_after_failure "the preflight found bad nodes, from now on excluded: $bad" "$bad"
        fi
        say "error: the preflight failed${bad:+, bad nodes: $bad}; see $run/preflight.json"
        exit 1
    fi
fi

# --- training ---
if [ -n "$cancelled" ]; then exit 143; fi
if [ -n "$asked" ]; then requeue_after_failure "asked to stop before the training began"; fi
before=$(reached)
start train "$max_restarts" train "$config" --stopped-exit-code 0
read -r state again <<< "$(standing)"
say "the training has ended with code $code: ${state:-nothing is known of it}"

# --- and then? ---
if [ "$state" = complete ]; then
    touch "$finished"
    exit 0
fi
if [ -n "$cancelled" ]; then
    [ -n "$over" ] || say "not requeued by this script; the same command goes on from the last checkpoint"
    exit 143
fi
if [ "$again" = false ]; then
    say "not requeued: see $run/standing.json"
    exit $((code > 0 ? code : 75))
fi
if [ "$state" = stopped ]; then
    if [ "$(reached)" -gt "$before" ]; then requeue "it was stopped and has saved"; fi
    # A `time` that is too short for a start would give one stretch after the other.
    requeue_after_failure "it was stopped before it had made a step"
fi
requeue_after_failure "the training failed or lost a node (code $code)"
