"""Pre-training is measured with and without workers, on texts that take long to tokenise."""

import json

import pytest
import workers
from accelerate.state import AcceleratorState


@pytest.mark.slow
def test_every_number_of_workers_is_measured(tmp_path):
    AcceleratorState._reset_state(True)
    output = tmp_path / "workers.json"
    words = ["--workers", "0", "1", "--num_updates", "5", "--repeats", "1", "--num_words", "800", "--batch_size", "4"]
    workers.main([*words, "--output", str(output)])
    found = json.loads(output.read_text())["workers"]
    assert list(found) == ["0", "1"]
    assert all(figures["updates_per_s"]["median"] > 0 for figures in found.values())
    assert all(figures["cpu_s"]["median"] > 0 for figures in found.values())
