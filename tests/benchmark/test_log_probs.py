"""The benchmark of targets' log-probabilities measures two ways that give the same."""

import json

import log_probs


def test_both_sizes_are_measured(tmp_path):
    output = tmp_path / "log-probs.json"
    log_probs.main(["--divide_by", "32", "--repeats", "1", "--output", str(output)])
    sizes = json.loads(output.read_text())["sizes"]
    assert list(sizes) == list(log_probs.SIZES)
    assert all(figures["ratio"] > 0 for figures in sizes.values())
    # 30,522 logits of 128 tokens in float32, and one sum for each token
    assert sizes["tokens"]["bytes"] == {"torch": 4 * 128 * 30_522, "package": 4 * 128}
