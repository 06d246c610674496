"""The layout of the code: rooms that can be read in one sitting, and checkpoints that have all of them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 500
FOLDERS = ("modeling_yan", "examples", "tests")
CHECKPOINTS = sorted((ROOT / "examples" / "checkpoints").iterdir())


def test_no_file_of_code_is_too_long():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not path.is_symlink()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_bundled_checkpoint_links_every_flat_file_of_the_models(folder):
    flat = {path.name for path in (ROOT / "modeling_yan").glob("*_yan.py")}
    links = {path.name: path for path in folder.glob("*.py")}
    assert links.keys() == flat
    assert all(path.resolve() == ROOT / "modeling_yan" / name for name, path in links.items())
