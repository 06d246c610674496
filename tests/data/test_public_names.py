import subprocess
import sys

import pytest

import modeling_yan.data as data

PRINT_IMPORTED = "import sys, modeling_yan.data; print([n for n in sys.modules if n.startswith('modeling_yan.data.')])"


def test_every_public_name_is_there():
    assert all(getattr(data, name) is not None for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = data.nonsense


@pytest.mark.slow
def test_the_package_imports_no_file_that_is_also_a_command():
    # `python -m modeling_yan.data.stories` would warn about it.
    done = subprocess.run([sys.executable, "-c", PRINT_IMPORTED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
