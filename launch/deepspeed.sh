#!/usr/bin/env bash
# Train under DeepSpeed's own launcher. All arguments go to launch.train:
#
#   bash launch/deepspeed.sh --engine zero2 --preset gpt2-small --precision bf16 --out runs/gpt2
#
# RANKS     processes on this node (all GPUs; 2 without a GPU); not with HOSTFILE
# HOSTFILE  several nodes: a file like launch/hostfile.example. DeepSpeed starts the ranks there by ssh without
#           a password, in this very folder, which all nodes must see.
# PORT      where the ranks meet, on the first node (29500)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$root/.venv/bin" ] && PATH="$root/.venv/bin:$PATH" # what `make env` installed
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

fail() { echo "launch/deepspeed.sh: error: $1" >&2; exit 2; }
command -v deepspeed >/dev/null ||
    fail "deepspeed is not on PATH: DS_BUILD_OPS=0 pip install deepspeed==0.19.8"
python -m launch.options "$@" >&2 || exit 2 # wrong options end here, once, and not on every rank

if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: no such file; see launch/hostfile.example"
    where=(--hostfile "$HOSTFILE")
elif nvidia-smi -L >/dev/null 2>&1; then
    where=(--hostfile /dev/null ${RANKS:+--num_gpus "$RANKS"})
else
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    where=(--hostfile /dev/null --num_gpus "${RANKS:-2}") # "gpus" means processes
fi
exec deepspeed "${where[@]}" --master_port "${PORT:-29500}" --module launch.train "$@"
