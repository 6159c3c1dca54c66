"""Scripts that lie beside the package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load(path: str) -> ModuleType:
    """Execute a script of the repository, without its ``main``; dataclasses look modules up."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
