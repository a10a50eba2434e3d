"""Everything that the documentation shows is run or checked: code, commands, figures, links."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from benchmarks.memory import on_a_rank
from benchmarks.shapes import Shapes, gpt2_small, llama, llama_7b, lora
from shard4bit.cli.main import main
from tests.docs.blocks import ALL_PAGES, PAGES, ROOT, Block, blocks

TAGS = {"python", "bash", "json", "text"}  # run, checked, parsed, not code


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tagged(tag: str) -> list[Block]:
    return [b for page in ALL_PAGES for b in blocks(page) if b.tag == tag]


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_every_block_has_a_known_tag(page: Path) -> None:
    for block in blocks(page):
        assert block.tag in TAGS, f"{block}: unknown language {block.tag!r}; use one of {sorted(TAGS)}"
        runs = page in PAGES or block.tag != "python"
        assert runs, f"{block}: Python of this page is not run; show it in README.md or docs/*.md"


def runs_here(page: Path) -> bool:
    """Whether what its Python needs is installed; DeepSpeed cannot be everywhere."""
    needs = "import deepspeed\n" in page.read_text(encoding="utf-8")
    return not needs or importlib.util.find_spec("deepspeed") is not None


RUN = [page for page in PAGES if any(b.tag == "python" for b in blocks(page)) and runs_here(page)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """All pages' Python, each page in a process of its own, on the CPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "tests.docs.blocks", *map(str, RUN)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        cwd=tmp_path_factory.mktemp("pages"),
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize("page", RUN, ids=name)
def test_python_blocks_run(page: Path, outcome: subprocess.CompletedProcess[str]) -> None:
    count = sum(b.tag == "python" for b in blocks(page))
    done = f"{name(page)}: ran {count} blocks\n" in outcome.stdout
    assert done, outcome.stdout + outcome.stderr


def test_json_blocks_parse() -> None:
    for block in tagged("json"):
        json.loads(block.text)


@pytest.mark.parametrize("block", tagged("bash"), ids=str)
def test_commands_exist(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            check_command(words, str(block))


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_trainings_of_a_page_do_not_go_on_from_each_other(page: Path) -> None:
    lines = [line for b in blocks(page) if b.tag == "bash" for line in b.text.splitlines()]
    launched = [line for line in lines if re.search(r"launch\.train\b|launch/\w+\.s[hb]", line)]
    folders = [re.findall(r"--out (\S+)", line) for line in launched]
    assert all(folders) and len(set(map(tuple, folders))) == len(folders), launched


def check_command(words: list[str], where: str) -> None:
    program, rest = words[0], words[1:]
    if program == "make":
        known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        targets = [w for w in rest if "=" not in w and not w.startswith("-")]
        assert targets and set(targets) <= known, f"{where}: the Makefile lacks one of {targets}"
    elif Path(program).name in ("python", "python3"):
        check_python(rest, where)
    elif program == "torchrun":
        while rest and rest[0].startswith("--"):
            rest = rest[1 if rest[0] == "--standalone" or "=" in rest[0] else 2 :]
        check_python(rest, where)
    elif program in ("bash", "sbatch"):
        while rest[0].startswith("--"):
            rest = rest[2:]
        assert (ROOT / rest[0]).is_file(), f"{where}: no file {rest[0]}"
    elif program == "pip":
        assert rest[:1] == ["install"] and rest[-1] == ".", f"{where}: {words}"
        assert (ROOT / "setup.py").is_file()
    else:
        raise AssertionError(f"{where}: no check for the command {program!r}")


def check_python(words: list[str], where: str) -> None:
    """``-m module options``, ``-c program`` or ``script options``."""
    if words[0] == "-c":
        compile(words[1], where, "exec")
    elif words[0] == "-m":
        module, options = words[1], words[2:]
        path = ROOT / module.replace(".", "/")
        ours = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert ours or importlib.util.find_spec(module.split(".")[0]), f"{where}: no module {module}"
        if ours:
            for option in options:
                if option.startswith("--"):
                    assert option.split("=")[0] in help_of(module), f"{where}: {module} lacks {option}"
    else:
        assert (ROOT / words[0]).exists(), f"{where}: no file {words[0]}"


@lru_cache
def help_of(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{name(page)}: {target} does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, f"{name(page)}: {target}: no such heading"


def test_the_page_on_memory_shows_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(ROOT / "docs" / "memory.md")
    command = next(b for b in found if b.tag == "bash").text.splitlines()[0]
    assert main(shlex.split(command)[3:]) == 0
    assert next(b for b in found if b.tag == "text").text.strip() == capsys.readouterr().out.strip()


def table_rows(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines()]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_figures_of_memory_are_those_of_the_benchmark() -> None:
    rows = table_rows((ROOT / "README.md").read_text(encoding="utf-8"))
    for kind in ("rank1", "block", "factored"):
        row = next(r for r in rows if f'second_moment="{kind}"' in r[0])
        assert row[1:] == [f"{on_a_rank(s, kind, 1):.4f}" for s in (gpt2_small(), llama())], kind
    models: dict[str, Shapes] = {
        "GPT-2 small": gpt2_small(),
        "Llama 1.1 B": llama(),
        "Llama 7 B": llama_7b(),
        "LoRA rank 8 (1.1 B)": lora(),
    }
    head = next(i for i, r in enumerate(rows) if r[0] == "ranks (FSDP2)")
    worlds = [int(w) for w in rows[head][1:]]
    checked = 0
    for row in rows[head + 2 :]:
        found = re.fullmatch(r'(.*), `"(\w+)"`', row[0])
        if found is None:
            break
        shapes, kind = models[found[1]], found[2]
        assert row[1:] == [f"{on_a_rank(shapes, kind, w):.3f}" for w in worlds], row[0]
        checked += 1
    assert checked == 6
