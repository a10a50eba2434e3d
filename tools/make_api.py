"""Write docs/api.md from the docstrings of what is public: python tools/make_api.py"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
WIDTH = 110
HEAD = """# API reference

What `import shard4bit` offers, from its docstrings. (Made by `python tools/make_api.py`; do not edit.)
"""
#: heading -> (module, names in order), or where the name is not for import, only what calls return
PARTS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "Optimizers": [("shard4bit", ("AdamW4bit", "SGD4bit"))],
    "FSDP": [("shard4bit.fsdp", ("wrap",))],
    "DeepSpeed": [("shard4bit.deepspeed", ("AdamW4bit", "SGD4bit", "full_moment", "local_moment"))],
    "Checkpoints": [
        ("shard4bit", ("save", "load", "digest")),
        ("shard4bit.checkpoint.background", ("Saving",)),
        ("shard4bit.api", ("Loaded",)),
        ("shard4bit.checkpoint.verify", ("verify",)),
    ],
    "Other optimizers' states": [("shard4bit", ("import_state", "export_state"))],
    "Specs": [("shard4bit.spec", ("QuantSpec", "parse_spec"))],
    "Reports and plots": [("shard4bit.optim.report", ("Report",)), ("shard4bit.plot", ("moments",))],
    "Errors": [("shard4bit", ("Shard4bitError", "LayoutError", "StateError", "CheckpointError"))],
}


def text_of(thing: Any) -> str:
    """Its docstring as Markdown: double backticks single, arguments as a list."""
    text = (inspect.getdoc(thing) or "").replace("``", "`")
    text = re.sub(r"^Args:\n", "", text, flags=re.M)
    return re.sub(r"^(?:    )?([a-z_]+(?:, [a-z_]+)*): ", r"- `\1`: ", text, flags=re.M)


def signature(thing: Any) -> str:
    """For people: without quotes around types, one argument a line where it is long."""
    shown = inspect.signature(thing)
    skipped = [p for name, p in shown.parameters.items() if name != "self"]
    shown = shown.replace(parameters=skipped)
    line = str(shown.replace(return_annotation=inspect.Signature.empty))
    line = re.sub(r": '([^']*)'", r": \1", line).replace("'", '"')
    back = shown.return_annotation
    line += "" if back is inspect.Signature.empty else f" -> {str(back).strip(chr(39))}"
    return re.sub(r"(?:[a-z_0-9]+\.)+([A-Z]\w*)", r"\1", line)


def wrapped(name: str, line: str) -> str:
    """The signature, broken at the arguments where it is too long."""
    whole = name + line
    if len(whole) <= WIDTH:
        return whole
    inner, _, back = whole.partition("(")[2].rpartition(")")
    depth, parts = 0, [""]
    for c in inner:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return name + "(\n" + "".join(f"    {p.strip()},\n" for p in parts) + ")" + back


def entry(prefix: str, name: str, thing: Any, shown: set[Any]) -> Iterator[str]:
    """Of a function or class; of a class the public methods too that were not ``shown`` before."""
    full = f"{prefix}.{name}"
    yield f"### `{full}`\n"
    if inspect.isclass(thing) and issubclass(thing, Exception):
        yield f"A `{thing.__bases__[0].__name__}`. {text_of(thing)}\n"
        return
    yield f"```text\n{wrapped(full, signature(thing))}\n```\n"
    yield text_of(thing) + "\n"
    if inspect.isclass(thing):
        for method, found in methods(thing, shown):
            yield f"#### `{name}.{method}`\n\n```text\n{wrapped(method, signature(found))}\n```\n"
            yield text_of(found) + "\n"


def methods(cls: type, shown: set[Any]) -> Iterator[tuple[str, Any]]:
    """Those that shard4bit defines and documents."""
    for base in cls.__mro__:
        for name, found in vars(base).items():
            ours = base.__module__.startswith("shard4bit") and getattr(cls, name) is found
            for_users = not name.startswith("_") and name not in ("bind", "set_layout")  # adapters call these
            if ours and for_users and inspect.isfunction(found) and found.__doc__ and found not in shown:
                shown.add(found)
                yield name, found


def page() -> str:
    """The whole reference."""
    lines, shown = [HEAD], set[Any]()
    for title, parts in PARTS.items():
        lines.append(f"## {title}\n")
        for module_name, names in parts:
            module = import_module(module_name)
            for name in names:
                lines += entry(module_name, name, getattr(module, name), shown)
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
