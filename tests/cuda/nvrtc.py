"""Compiles kernels for real GPUs without one: NVRTC out of the pip package nvidia-cuda-nvrtc, by ctypes.

`resources` gives what each kernel needs, `sass` its instructions. Both raise RuntimeError with the compiler's
own words where a source does not compile.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# What CuPy 14.2 adds to a RawModule's options, less its include folders; the standard unless one is named.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
CUPY_STANDARD = "--std=c++17"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'"
    r".*?Function properties for (?P=name)\n[\s\w.]*? "
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Resources(NamedTuple):
    """What a thread of a kernel needs: registers, bytes of local arrays, bytes of spill stores and loads."""

    registers: int
    stack_bytes: int
    spill_bytes: int


def available() -> bool:
    """Whether the package with NVRTC is installed."""
    return _find("lib/libnvrtc.so.*") is not None


def resources(source: str, arch: str, options: Sequence[str] = ()) -> dict[str, Resources]:
    """Compile for an architecture such as sm_90 and return what each kernel needs, by its name."""
    log = compile_source(source, arch, tuple(options))[1]
    return {
        entry["name"]: Resources(
            int(entry["registers"]), int(entry["stack"]), int(entry["stores"]) + int(entry["loads"])
        )
        for entry in ENTRY.finditer(log)
    }


def sass(source: str, arch: str, options: Sequence[str] = ()) -> str:
    """Return the machine code as text. Needs nvdisasm: on PATH, in CUDA_HOME, or from pip."""
    folders = os.pathsep.join(
        [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    )
    tool = shutil.which("nvdisasm", path=folders) or _find("bin/nvdisasm")
    if tool is None:
        raise RuntimeError("there is no nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compile_source(source, arch, tuple(options))[0])
        file.flush()
        done = subprocess.run([str(tool), "--print-code", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed:\n{done.stderr}")
    return done.stdout


def instructions(disassembly: str) -> dict[str, list[str]]:
    """Return each kernel's instructions out of what `sass` gave, such as 'FFMA R4, R5, R6, R4'."""
    found: dict[str, list[str]] = {}
    kernel = ""
    for line in disassembly.splitlines():
        if section := re.match(r"\.section\s+\.text\.(\w+)|\s*//-+ \.text\.(\w+)", line):
            kernel = section[1] or section[2]
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line):
            found.setdefault(kernel, []).append(instruction[1])
    for listed in found.values():
        while listed and listed[-1] == "NOP":  # padding
            listed.pop()
    return found


@functools.lru_cache(maxsize=256)
def compile_source(source: str, arch: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Return the cubin and the compiler's log, in which ptxas reports on every kernel."""
    library = _library()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        standard = () if any("-std=" in option for option in options) else (CUPY_STANDARD,)
        words = [*options, *standard, *CUPY_OPTIONS, f"-arch={arch}", "--ptxas-options=-v"]
        texts = (ctypes.c_char_p * len(words))(*[word.encode() for word in words])
        status = library.nvrtcCompileProgram(program, len(words), texts)
        log = _fetch(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise RuntimeError(f"{_reason(status)} ({arch}):\n{log}")
        return _fetch(program, "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(program: ctypes.c_void_p, what: str) -> bytes:
    """Return one of a program's results: ProgramLog or CUBIN."""
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(_reason(status))


def _reason(status: int) -> str:
    return str(_library().nvrtcGetErrorString(status).decode())


@functools.cache
def _library() -> ctypes.CDLL:
    path = _find("lib/libnvrtc.so.*")
    if path is None:
        raise RuntimeError("the package nvidia-cuda-nvrtc is not installed")
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # which NVRTC opens by its bare name
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _find(pattern: str) -> Path | None:
    """Return a file of NVIDIA's pip packages, whose folder has CUDA's version in its name."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).glob(f"cu*/{pattern}")]
    return max(found, default=None)
