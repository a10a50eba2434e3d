#!/usr/bin/env bash
# Train under DeepSpeed's own launcher. All arguments go to launch.train:
#
#   bash launch/deepspeed.sh --engine zero2 --preset gpt2-small --precision bf16 --out runs/gpt2
#
# RANKS     processes on this node (all GPUs; 2 without a GPU); not with HOSTFILE
# HOSTFILE  several nodes: a file like launch/hostfile.example. DeepSpeed starts the ranks there by pdsh
#           and ssh, without a password, in this very folder, which all nodes must see.
# PORT      where the ranks meet, on the first node (29500)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# what `make env` installed, unless another environment is active
[ -z "${VIRTUAL_ENV:-}" ] && [ -d "$root/.venv/bin" ] && PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

fail() { echo "launch/deepspeed.sh: error: $1" >&2; exit 2; }
command -v python >/dev/null || fail "python is not on PATH: run 'make env', or activate an environment"
command -v deepspeed >/dev/null ||
    fail "deepspeed is not on PATH: DS_BUILD_OPS=0 pip install deepspeed==0.19.8"
case " $* " in *" --help "* | *" -h "*) exec python -m launch.options --help ;; esac
export LAUNCH_INTEGERS="RANKS PORT"
python -m launch.options "$@" >&2 || exit 2 # what is wrong ends here, once, and not on every rank

if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: no such file; see launch/hostfile.example"
    for tool in pdsh ssh; do
        command -v "$tool" >/dev/null || fail "$tool is not on PATH; HOSTFILE needs it"
    done
    where=(--hostfile "$HOSTFILE" --force_multi)
elif nvidia-smi -L >/dev/null 2>&1; then
    where=(--hostfile /dev/null ${RANKS:+--num_gpus "$RANKS"})
else
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    where=(--hostfile /dev/null --num_gpus "${RANKS:-2}") # "gpus" means processes
fi
set -m # in a process group of its own: what a terminal or batch system signals is this script
deepspeed "${where[@]}" --master_port "${PORT:-29500}" --module launch.train "$@" &
runner=$!
set +m
# On one node the deepspeed command would die of a signal and leave its ranks running, and its helper, below
# it, would give them 30 seconds; so the ranks themselves get the signal, and all end when they have saved.
early='' reached=''
stop() {
    if [ -n "${HOSTFILE:-}" ]; then kill -TERM "$runner"
    elif pkill -TERM -P "$(pgrep -d, -P "$runner")" 2>/dev/null; then reached=yes
    elif [ -z "$reached" ]; then
        early=143 # no rank is there yet, and deepspeed would end as if all had been done
        kill -TERM -- "-$runner" 2>/dev/null || true
    fi
}
trap stop TERM INT HUP
status=0
wait "$runner" || status=$?
while kill -0 "$runner" 2>/dev/null; do # the wait ended by the signal
    status=0
    wait "$runner" || status=$?
done
if [ "$status" = 0 ] && [ -n "$early" ]; then status=$early; fi
exit "$status"
