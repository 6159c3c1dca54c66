"""What is installed: each file of the package that is no Python is named in setup.cfg."""

from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_scanvi"


def test_every_file_is_installed():
    """And nothing is named that is not there."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = {k: v.split() for k, v in config["options.package_data"].items()}
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".py"]
    files = [p for p in files if p.parent.name != "__pycache__"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in files}
    assert folders == set(named)
    for path in files:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(fnmatch(path.name, pattern) for pattern in named[package]), path


def test_every_folder_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
