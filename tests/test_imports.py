"""Imports point down only, and nobody outside the engines' adapters touches private parts of torch.

Read from the syntax trees of all modules, so that imports inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "shard4bit"

#: From top to bottom. A part may import what is below it, and itself.
LAYERS = (
    {"cli", "__main__"},
    {"api", "inventory", "plot", "rectangles"},
    {"fsdp", "deepspeed"},
    {"optim", "checkpoint"},
    {"placement"},
    {"sharding"},
    {"dispatch"},
    {"cuda"},
    {"reference"},
    {"backend", "comm", "windows"},
    {"state"},
    {"maths"},
    {"log"},
    {"layout", "spec", "errors"},
)
SIDEWAYS = {("__main__", "cli"), ("api", "inventory"), ("inventory", "rectangles"), ("comm", "backend")}
ENGINES = {"fsdp", "deepspeed"}
THIRD_PARTY = {  # package -> the parts that may import it; None: any but the lowest layer
    "torch": None,
    "numpy": None,
    "safetensors": {"checkpoint", "cli"},
    "rich": {"cli"},
    "matplotlib": {"plot"},
    "xxhash": {"checkpoint"},
    "cupy": {"cuda"},
    "deepspeed": {"deepspeed"},
}
#: Private or special attributes that may be used outside the adapters: file, attribute.
ALLOWED = {
    ("optim/base.py", "_optimizer_load_state_dict_pre_hooks"),
    ("optim/base.py", "_optimizer_load_state_dict_post_hooks"),
    ("comm.py", "_foreach_copy_"),  # of the documented torch._foreach family: many small copies in one launch
    ("optim/alike.py", "_C"),  # its compiler compares many tensors in one call; not needed
    ("optim/alike.py", "_dynamo"),
    ("cuda/runtime.py", "_C"),  # the current stream's handle without a Stream object, as torch's compiled
    ("cuda/runtime.py", "_cuda_getCurrentRawStream"),  # code gets it; not needed
    ("placement.py", "_fsdp_flattened"),  # FSDP1's mark on original parameters, which must be refused
    ("placement.py", "_shapes"),  # of what its flat parameters hold, likewise
    ("sharding.py", "_local_tensor"),  # what DTensor.to_local() gives, at once
    ("sharding.py", "__create_chunk_list__"),  # how DTensor describes its piece to checkpoints
}


@dataclass(frozen=True)
class Import:
    """``module`` is absolute; ``names`` those of ``from module import names``. ``lazy``: in a function;
    ``typing``: under ``if TYPE_CHECKING``."""

    module: str
    names: tuple[str, ...]
    lazy: bool
    typing: bool
    line: int

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def parts(self) -> set[str]:
        """The parts of shard4bit that this imports; "" is the package itself."""
        if self.top != "shard4bit":
            return set()
        if self.module == "shard4bit":
            return {name if is_module(name) else "" for name in self.names} or {""}
        return {self.module.split(".")[1]}


def is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


def imports(tree: ast.AST, package: str = "shard4bit") -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), lazy, typing, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(module, tuple(a.name for a in node.names), lazy, typing, node.lineno)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, typing)

    return visit(tree, False, False)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def part_of(path: Path) -> str:
    """The part a file belongs to; "" for the package's own __init__.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def name_of(path: Path) -> str:
    """Path inside the package, as in ALLOWED."""
    return path.relative_to(PACKAGE).as_posix()


def level(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=[name_of(p) for p in FILES])


# ---- directions -------------------------------------------------------------------------------------


def fault_of_direction(part: str, found: Import) -> str | None:
    """What is wrong with an import by ``part``, if anything."""
    for target in found.parts():
        if target == "":
            return "imports the package itself, which is above everything"
        if target in (part, "errors") or (part, target) in SIDEWAYS:
            continue
        if level(target) <= level(part):
            return f"imports {target}, which is not below {part}"
        if target == "cuda" and not (part == "dispatch" and found.lazy):
            return "imports cuda, which only a function of dispatch may"
    if found.top in THIRD_PARTY:
        allowed = THIRD_PARTY[found.top]
        if (allowed is not None and part not in allowed) or part in LAYERS[-1]:
            return f"imports {found.top}, which {part} must not"
    elif found.top != "shard4bit" and found.top not in sys.stdlib_module_names:
        return f"imports {found.top}, which is neither in the standard library nor a dependency"
    return None


@each_file
def test_imports_point_down(path: Path) -> None:
    part, package = part_of(path), ".".join(["shard4bit", *path.relative_to(PACKAGE).parts[:-1]])
    if part == "":
        now = [i for i in imports(parsed(path), package) if not i.typing]
        assert all(i.top in sys.stdlib_module_names for i in now), now  # the rest is loaded when asked for
        return
    assert any(part in layer for layer in LAYERS), f"{part}: a new part needs its place in LAYERS"
    faults = [(i.line, fault_of_direction(part, i)) for i in imports(parsed(path), package)]
    assert [f for f in faults if f[1]] == []


def test_no_cycles() -> None:
    """Between modules, lazy imports counted; what may only be imported for types is not."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        here = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        edges = graph.setdefault(here, set())
        for found in imports(parsed(path), here if path.name == "__init__.py" else here.rpartition(".")[0]):
            if found.top != "shard4bit" or found.typing:
                continue
            inner = [f"{found.module}.{name}" for name in found.names]
            modules = [m for m in inner if is_module(m.split(".", 1)[1].replace(".", "/"))]
            edges |= set(modules or [found.module]) - {here}
    order = list(TopologicalSorter(graph).static_order())
    assert (
        order.index("shard4bit.spec") < order.index("shard4bit.state") < order.index("shard4bit.optim.base")
    )


def test_every_part_is_found() -> None:
    """The walk sees the library: all parts that exist are in a layer, and the known ones exist."""
    parts = {part_of(path) for path in FILES} - {""}
    assert parts <= set().union(*LAYERS)
    assert parts >= {
        "api",
        "fsdp",
        "optim",
        "checkpoint",
        "dispatch",
        "reference",
        "windows",
        "maths",
        "layout",
        "errors",
    }
    assert len(FILES) > 25


@pytest.mark.parametrize(
    ("part", "line", "wrong"),
    [
        ("spec", "import torch", True),
        ("layout", "from shard4bit.spec import QuantSpec", True),
        ("spec", "from shard4bit.errors import StateError", False),
        ("state", "from shard4bit import layout", False),
        ("maths", "from shard4bit import state", True),
        ("maths", "def f():\n    from shard4bit.state import Moment", True),
        ("optim", "from shard4bit.checkpoint.store import write", True),
        ("checkpoint", "from shard4bit.optim.base import Bound", True),
        ("checkpoint", "import xxhash", False),
        ("optim", "import xxhash", True),
        ("fsdp", "from shard4bit.deepspeed import wrap", True),
        ("deepspeed", "import shard4bit.fsdp.wrap", True),
        ("deepspeed", "from deepspeed.runtime import engine", False),
        ("api", "from shard4bit.inventory import Inventory", False),
        ("inventory", "from shard4bit.api import save", True),
        ("comm", "from shard4bit.backend import Work", False),
        ("backend", "from shard4bit.comm import Link", True),
        ("reference", "from shard4bit.dispatch import backend_for", True),
        ("dispatch", "from shard4bit.cuda.backend import KernelBackend", True),
        ("dispatch", "def f():\n    from shard4bit.cuda.backend import KernelBackend", False),
        ("placement", "def f():\n    from shard4bit.cuda.backend import KernelBackend", True),
        ("reference", "import cupy", True),
        ("cuda", "import cupy", False),
        ("optim", "from shard4bit import AdamW4bit", True),
        ("optim", "import shard4bit", True),
        ("optim", "import pandas", True),
        ("errors", "import torch", True),
    ],
)
def test_the_rule_itself(part: str, line: str, wrong: bool) -> None:
    faults = [fault_of_direction(part, found) for found in imports(ast.parse(line))]
    assert len(faults) == 1 and (faults[0] is not None) == wrong, faults


# ---- private parts of others ------------------------------------------------------------------------

#: special names that Python itself gives meaning
PYTHONS = {name for kind in (object, type, dict, Exception, test_no_cycles) for name in dir(kind)} | {
    "__all__",
    "__dict__",
    "__file__",
    "__getattr__",
    "__name__",
    "__post_init__",
    "__setstate__",
    "__slots__",
    "__version__",
}


def own_names(tree: ast.AST) -> set[str]:
    """Names that a module defines: functions, classes, variables, attributes and fields it assigns."""
    out: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            out.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            out.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            out.add(node.attr)
    return out


def is_private(name: str) -> bool:
    return name.startswith("_") and name not in PYTHONS


def private_uses(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of private modules imported, of private attributes that are not ``own``, by a dot or
    by getattr and its like, and of any private attribute of something imported from elsewhere."""
    foreign: set[str] = set()
    for found in imports(tree):
        if found.top in ("shard4bit", "__future__"):
            continue
        foreign |= set(found.names) or {found.top}
        for name in (*found.module.split("."), *found.names):
            if name.startswith("_") or name.endswith("_utils"):
                yield found.line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            foreign |= {a.asname for a in node.names if a.asname and not _ours(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            of_others = isinstance(root, ast.Name) and root.id in foreign
            if of_others or node.attr not in own:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            given = node.args[1] if len(node.args) > 1 else None
            text = given.value if isinstance(given, ast.Constant) else None
            if isinstance(text, str) and is_private(text) and text not in own:
                yield node.lineno, text


def _ours(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shard4bit")


OWN = set().union(*(own_names(parsed(path)) for path in FILES if part_of(path) not in ENGINES))


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) not in ENGINES], ids=name_of)
def test_no_private_parts_of_torch_outside_the_adapters(path: Path) -> None:
    found = [use for use in private_uses(parsed(path), OWN) if (name_of(path), use[1]) not in ALLOWED]
    assert found == []


def test_what_is_allowed_is_still_used() -> None:
    used = {(name_of(p), use[1]) for p in FILES for use in private_uses(parsed(p), OWN)}
    assert used >= ALLOWED


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch._foreach_add_([], 1)", ["_foreach_add_"]),
        ("import torch.distributed as dist\ndist._get_default_group()", ["_get_default_group"]),
        ("import torch\ntorch.distributed._state", ["_state"]),
        ("from torch._utils import x", ["_utils"]),
        ("from torch.distributed.utils import _sync", ["_sync"]),
        ("import torch._C", ["_C"]),
        ("from torch.distributed.fsdp import _common_utils", ["_common_utils"]),
        ("from torch.testing import common_utils", ["common_utils"]),
        ("def f(p):\n    return p._fsdp_flattened", ["_fsdp_flattened"]),
        ("def f(p):\n    return getattr(p, '_local_tensor', None)", ["_local_tensor"]),
        ("def f(p):\n    return p.__secret__()", ["__secret__"]),
        ("class A:\n    def f(self):\n        self._mine = 1\n        self._mine, type(self).__name__", []),
        ("from torch import nn\nnn.functional.relu", []),
        ("def f(p):\n    return getattr(p, 'grad', None)", []),
    ],
)  # fmt: skip
def test_the_search_itself(source: str, expected: list[str]) -> None:
    tree = ast.parse(source)
    assert [name for _, name in private_uses(tree, own_names(tree))] == expected
