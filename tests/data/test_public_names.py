import subprocess
import sys

import pytest

import modeling_yan.data as data


def test_every_public_name_is_there():
    assert all(getattr(data, name) is not None for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = data.nonsense


@pytest.mark.parametrize("command", ["stories", "tasks", "tokenizer"])
def test_files_are_commands_and_run_without_warnings(command):
    arguments = [sys.executable, "-W", "error::RuntimeWarning", "-m", f"modeling_yan.data.{command}", "--help"]
    assert "--output" in subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
