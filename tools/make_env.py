"""Make the checkout's virtual environment: python3 tools/make_env.py .venv

Where the base interpreter has torch 2.11 or newer (a GPU machine), the environment sees all of the
base interpreter's packages and only what is missing is installed; torch never is. Elsewhere torch is
installed first, pinned, so that no later range pulls in another build, and then every pinned
package. DeepSpeed comes last, because its build looks at torch. It is no error if nothing can be
downloaded as long as what the demo imports is there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
DEEPSPEED = ["deepspeed==0.19.8", "einops==0.8.2", "hjson==3.1.0", "msgpack==1.2.4", "ninja==1.13.2"]
DEEPSPEED += ["psutil==7.2.2", "py-cpuinfo==9.0.0", "pydantic==2.14.3"]
WITHOUT_OPERATORS = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}  # while DeepSpeed is built
REQUIREMENTS = ROOT / "requirements-dev.txt"
NEW_ENOUGH = "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)"
FOR_DEMO = ["torch", "numpy", "safetensors", "xxhash", "tqdm", "matplotlib"]
MODULE_OF = {
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "nvidia-cuda-nvrtc": "nvidia.cu13",
    "mpich": "mpi4py",  # who has mpi4py has an MPI, whose mpirun a second one would hide
}  # where the import name is not the package's


def fail(message):
    """Print one line of error and leave with status 1."""
    sys.exit("make env: error: " + message)


def has(python, *modules):
    """Say whether the interpreter at path `python` can import all of the modules."""
    return runs(python, "import " + ", ".join(modules))


def runs(python, code):
    """Say whether the interpreter at path `python` runs a line of code without an error."""
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def pip(python, *packages, **variables):
    """Install packages quietly with the environment's pip; return whether that worked."""
    command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    env = {**os.environ, **variables}
    return subprocess.run([*command, "--retries", "2", *packages], cwd=ROOT, env=env).returncode == 0


def create(venv):
    """Create the environment at `venv` unless it works already; return its interpreter's path."""
    python = venv / "bin" / "python"
    if not (python.exists() and has(python, "sys")):
        shutil.rmtree(venv, ignore_errors=True)
        command = [sys.executable, "-m", "venv", str(venv)]
        if subprocess.run(command, capture_output=True).returncode != 0:  # no ensurepip: no pip
            shutil.rmtree(venv, ignore_errors=True)
            if subprocess.run([*command, "--without-pip"]).returncode != 0:
                fail(f"'{' '.join(command)}' failed; on Debian the package python3-venv is needed")
    return python


def link(python, name, folders):
    """Put folders on the environment's import path, behind its own packages, as NAME.pth."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    Path(site.stdout.strip(), name + ".pth").write_text("".join(f"{f}\n" for f in folders))


def missing(python):
    """Return the lines of the requirements whose package the environment cannot import."""
    lines = [x.strip() for x in REQUIREMENTS.read_text().splitlines()]
    found = []
    for line in lines:
        name = line.split("==")[0]
        if line and not line.startswith("#") and not has(python, MODULE_OF.get(name, name)):
            found.append(line)
    return found


def add_deepspeed(python):
    """Install DeepSpeed unless it is there; warn if that fails."""
    if has(python, "torch", "deepspeed"):
        return
    print(f"make env: installing {DEEPSPEED[0]}")
    if not pip(python, "--no-build-isolation", *DEEPSPEED, **WITHOUT_OPERATORS):
        print("make env: warning: DeepSpeed could not be installed; the tests that need it are skipped")


def main():
    """Bring the environment named by the first argument up to date."""
    if sys.version_info < (3, 10):  # noqa: UP036  (make may find an older one)
        fail(
            f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}; "
            "name another with 'make PYTHON=/path/to/python3 env'"
        )
    venv = Path(sys.argv[1]).absolute()
    if Path(sys.prefix).resolve() == venv.resolve():  # called from inside the environment itself
        outer = os.path.join(sys.base_prefix, "bin", "python3")
        os.execv(outer, [outer, *sys.argv])
    base_has_torch = runs(sys.executable, NEW_ENOUGH)
    python = create(venv)
    link(python, "shard4bit-checkout", [ROOT])
    if base_has_torch:
        print("make env: using the torch that the base interpreter has")
        link(python, "base-site", [x for x in sys.path if x.endswith("-packages")])
        wanted = missing(python)
        installed = not wanted or pip(python, *wanted)
    else:
        print(f"make env: installing {TORCH} and the packages of {REQUIREMENTS.name} (minutes)")
        installed = pip(python, TORCH, "numpy") and pip(python, "-r", str(REQUIREMENTS))
    if installed:
        add_deepspeed(python)
        return
    if not has(python, *FOR_DEMO):
        lacking = [x for x in FOR_DEMO if not has(python, x)]
        fail("these could not be installed, and the demo needs them: " + ", ".join(lacking))
    names = dict.fromkeys(line.split("==")[0] for line in missing(python))
    print("make env: warning: not everything could be installed. The demo runs, but the checks and")
    print("make env: warning: tests that need one of these do not: " + ", ".join(names))


if __name__ == "__main__":
    main()
