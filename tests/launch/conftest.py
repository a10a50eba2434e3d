"""What the tests of launchers share."""

from __future__ import annotations

import pytest

from tests.launch.running import STEPS, TINY


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run of STEPS steps of a tiny model on a tiny text."""
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("Every rank keeps its shard, and every shard its four bits.\n" * 100)
    return [*TINY, "--data", str(text), "--steps", str(STEPS)]
