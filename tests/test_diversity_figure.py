"""The figure of quality against diversity shows the means of its tables."""

import json

import pytest

RUNS = {
    "AR decoder": {
        "0": {"best": {"greedy": {"bleu": 30.0}}, "drawn": {"0.5": {"bleu": 20.0, "self_bleu": 40.0}}},
        "1": {
            "best": {"greedy": {"bleu": 32.0}},
            "drawn": {"0.5": {"bleu": 24.0, "self_bleu": 44.0}, "1.0": {"bleu": 9.0, "self_bleu": 8.0}},
        },
    },
    "YAN, one expert, CRF": {"0": {"best": {"3": {"bleu": 33.0}}}},
}


@pytest.fixture
def script(load_script):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    return load_script("diversity_figure")


def test_a_line_joins_the_means_of_temperatures_and_a_star_is_the_text_without_sampling(script):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    script.draw_panel(axes, {"task": "e2e", "runs": RUNS})
    drawn, *stars = axes.get_lines()
    assert drawn.get_xydata().tolist() == [[8.0, 9.0], [42.0, 22.0]]
    assert [star.get_xydata().tolist() for star in stars] == [[[100.0, 31.0]]]  # an arm without drawn texts has none
    assert [text.get_text() for text in axes.texts] == ["1", "0.5"]


def test_equal_tables_give_an_equal_file(script, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"task": "e2e", "runs": RUNS}))
    files = [tmp_path / name for name in ("one.svg", "two.svg")]
    for file in files:
        script.main([str(tmp_path / "table.json"), "--output", str(file)])
    assert files[0].read_bytes() == files[1].read_bytes()
