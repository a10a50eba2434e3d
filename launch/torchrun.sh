#!/usr/bin/env bash
# Train under torchrun. All arguments go to launch.train:
#
#   bash launch/torchrun.sh --preset gpt2-small --precision bf16 --out runs/gpt2
#
# RANKS     processes on this node: a number, or "gpu" for one on each GPU (the default; 2 without a GPU)
# RESTARTS  how often a run that lost a rank starts again, from its newest checkpoint (3)
# NODES     number of nodes (1). For several, start this on each of them, at the same time, with the same
#           --out on a filesystem that all see, and
# HEAD      the name or address of one of them, with a port if 29500 is taken: HEAD=node0:29600
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# what `make env` installed, unless another environment is active
[ -z "${VIRTUAL_ENV:-}" ] && [ -d "$root/.venv/bin" ] && PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

fail() { echo "launch/torchrun.sh: error: $1" >&2; exit 2; }
command -v python >/dev/null || fail "python is not on PATH: run 'make env', or activate an environment"
command -v torchrun >/dev/null || fail "torchrun is not on PATH: run 'make env', or install torch"
case " $* " in *" --help "* | *" -h "*) exec python -m launch.options --help ;; esac
export LAUNCH_INTEGERS="RESTARTS NODES"
[ "${RANKS:-}" = gpu ] || LAUNCH_INTEGERS+=" RANKS"
python -m launch.options "$@" >&2 || exit 2 # what is wrong ends here, once, and not on every rank

# How long a stopped run has for its last checkpoint, in seconds; torchrun's own 30 are few for large models.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
# Without this torch keeps one store for all restarts, and ranks that started again now and then read the
# addresses of dead ones, and hang (https://github.com/pytorch/pytorch/issues/135712, seen with torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun takes this too, but with a warning of four lines
nodes=${NODES:-1}
where=(--standalone)
if [ "$nodes" != 1 ]; then
    [ -n "${HEAD:-}" ] || fail "NODES=$nodes needs HEAD, the name of the node where the ranks meet"
    [[ $HEAD == *:* ]] || HEAD=$HEAD:29500
    # The same id on every node: two runs on one port would otherwise join each other.
    where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-launch}")
fi
ranks=${RANKS:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo 2)}
exec torchrun "${where[@]}" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-3}" -m launch.train "$@"
