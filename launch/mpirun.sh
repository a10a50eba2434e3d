#!/usr/bin/env bash
# Train under mpirun (MPICH, Open MPI and their kin). All arguments go to launch.train, which takes the ranks
# from mpi4py (launch/mpi.py):
#
#   RANKS=4 bash launch/mpirun.sh --steps 100 --out runs/small
#
# RANKS    processes over all nodes (2)
# MPIARGS  options of mpirun, such as a list of hosts: MPIARGS="-hosts node0,node1 -ppn 8" with MPICH, or
#          MPIARGS="--hostfile hosts --bind-to none" with Open MPI
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# what `make env` installed, unless another environment is active
[ -z "${VIRTUAL_ENV:-}" ] && [ -d "$root/.venv/bin" ] && PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

fail() { echo "launch/mpirun.sh: error: $1" >&2; exit 2; }
command -v python >/dev/null || fail "python is not on PATH: run 'make env', or activate an environment"
command -v mpirun >/dev/null || fail "mpirun is not on PATH: load your MPI, or pip install mpi4py mpich"
python -c "import importlib.util as u, sys; sys.exit(u.find_spec('mpi4py') is None)" ||
    fail "mpirun needs mpi4py: pip install mpi4py"
case " $* " in *" --help "* | *" -h "*) exec python -m launch.options --help ;; esac
export LAUNCH_INTEGERS="RANKS"
python -m launch.options "$@" >&2 || exit 2 # what is wrong ends here, once, and not on every rank

# shellcheck disable=SC2086  # MPIARGS is several words
exec mpirun -n "${RANKS:-2}" ${MPIARGS:-} python -m launch.train "$@"
