"""The modules of examples/benchmark, importable by name as they are for one another, and tiny presets."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "benchmark"))

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_encoder_layers": 2,
    "num_flow_layers": 2,
    "num_decoder_layers": 1,
    "max_position_embeddings": 48,
    "canvas_length": 8,
    "state_size": 4,
    "time_step_rank": 2,
    "crf_rank": 0,
}


@pytest.fixture
def small_presets(tmp_path, monkeypatch):
    """The tiny presets, made smaller still."""
    import contenders

    for variant in contenders.VARIANTS:
        folder = tmp_path / f"yan-{variant}-tiny"
        folder.mkdir()
        config = json.loads((contenders.PRESETS / folder.name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **SMALL}))
    monkeypatch.setattr(contenders, "PRESETS", tmp_path)
    return tmp_path
