"""The Python of the README runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("n_blocks", [1, len(BLOCKS)], ids=["quick start", "all in order"])
def test_blocks_run(n_blocks, monkeypatch, capsys):
    """Fewer epochs, otherwise as they stand."""
    namespace: dict = {}
    for block in BLOCKS[:n_blocks]:
        exec(
            compile(block.replace("max_epochs=150", "max_epochs=2"), README.name, "exec"), namespace
        )
    assert namespace["adata"].obs["predicted"].isin(namespace["model"].fields.classes).all()
    assert namespace["probabilities"].shape == (700, 10)


def test_quick_start_is_short():
    """Fifteen lines at most."""
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 15
