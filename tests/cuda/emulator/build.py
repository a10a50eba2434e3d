"""Builds a kernel source with g++ into a shared object, once for each source and set of flags."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX", "g++")
LANGUAGE = ["-x", "c++", "-std=c++17"]
FLAGS = [
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",  # square roots inline
    "-ffp-contract=off",  # no fma that the source does not ask for
    "-fno-strict-aliasing",  # kernels reinterpret pointers to read vectors
    "-U_FORTIFY_SOURCE",  # its longjmp dislikes leaving a fibre
    "-w",
]
SANITIZE = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
PATTERN = (
    "-ftrivial-auto-var-init=pattern"  # a striking value for local variables without one; from g++ 12 on
)
KERNEL = re.compile(r"(>?)\s*\b__global__\s+void\s+(\w+)\s*\(")  # with the end of a template<...> before it


def available() -> bool:
    """Whether there is a compiler to build with."""
    return shutil.which(COMPILER) is not None


@functools.cache
def shared_object(source: str, flags: tuple[str, ...], sanitize: bool) -> Path:
    """Build the source, or find what was built before; RuntimeError if it does not compile."""
    expanded = preprocess(source, flags)
    checks = [*SANITIZE, *([PATTERN] if accepts(PATTERN) else [])] if sanitize else []
    options = [*LANGUAGE, *FLAGS, *checks, *flags]
    parts = [expanded, source, headers(), version(), *options]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + ".so"
    target = cache() / name
    if not target.exists():
        kernels = dict.fromkeys(name for template, name in KERNEL.findall(expanded) if not template)
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            compile_and_link(program(source, list(kernels)), options, Path(folder))
            os.replace(Path(folder, "kernel.so"), target)  # at once: another process may build it too
    return target


def preprocess(source: str, flags: Sequence[str]) -> str:
    """Return the source with its includes and macros expanded, but for CUDA's keywords."""
    keywords = ["-DCUSIM=1", "-D__launch_bounds__(...)="]
    return run([COMPILER, "-E", "-P", *LANGUAGE, *keywords, *flags, "-"], f'#line 1 "kernel.cu"\n{source}')


def program(source: str, kernels: Sequence[str]) -> str:
    """Return the whole text to compile: the source in its namespaces, and an entry for each kernel."""
    exports = "\n".join(f"CUSIM_EXPORT({name})" for name in kernels)
    return (
        f'namespace cusim_device {{ namespace {{\n#line 1 "kernel.cu"\n{source}\n'
        f'#line 1 "entries of the kernels"\n}} }}\n{exports}\n'
    )


def compile_and_link(text: str, options: Sequence[str], folder: Path) -> None:
    """Write kernel.so into the folder. Linked apart, so that a sanitizer brings no library of its own."""
    unit = str(folder / "kernel.o")
    run([COMPILER, "-c", *options, "-include", str(HERE / "cusim.h"), "-", "-o", unit], text)
    run([COMPILER, "-shared", unit, "-o", str(folder / "kernel.so"), "-lrt"])


def run(command: Sequence[str], text: str = "") -> str:
    """Run a command on a text and return what it prints; RuntimeError with its complaint if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


@functools.cache
def accepts(option: str) -> bool:
    """Whether the compiler knows an option."""
    try:
        run([COMPILER, "-E", *LANGUAGE, option, "-"])
    except RuntimeError:
        return False
    return True


@functools.cache
def headers() -> str:
    """Return the text of the emulator's own headers."""
    return "\0".join(path.read_text() for path in sorted(HERE.glob("*.h")))


@functools.cache
def version() -> str:
    """Return what the compiler says about itself."""
    return run([COMPILER, "--version"])


@functools.cache
def cache() -> Path:
    """Return the folder for what was built: the user's own, or a fresh one if others could write there."""
    folder = Path(tempfile.gettempdir(), f"cusim-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        folder = Path(tempfile.mkdtemp(prefix="cusim-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
