"""The page of reliability is that of its figures, and there are as many cases of bad input as it says."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "reliability"


@pytest.fixture
def page():
    spec = importlib.util.spec_from_file_location("reliability_page", ROOT / "examples/reliability/page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_its_figures(page):
    written = (ROOT / "docs" / "reliability.md").read_text()
    assert written == page.make_page(FIGURES)
    assert len(written.splitlines()) <= 150


def test_the_figures_are_what_they_should_be():
    faults = json.loads((FIGURES / "faults.json").read_text())["faults"]
    for found in faults.values():
        for name in ("with_a_clear_error", "second_refused", "last_checkpoint_kept"):
            assert found.get(name, found["faults"]) == found["faults"]
        assert found["with_the_undisturbed_weights"] == found.get("runs_to_their_end", found["faults"])
    for runs in json.loads((FIGURES / "long-run.json").read_text())["runs"].values():
        for found in runs.values():
            assert found.get("growth_mib", 0) < 20
            assert found.get("equal_to_alone", found["times"]) == found["times"]


def test_a_case_is_counted_by_the_first_kind_in_its_id(page):
    assert page.kind_of("tests/test_bad_calls.py::test_generate[generate-seed-text]") == "generate"
    assert page.kind_of("tests/test_bad_calls.py::test_weights[attention-drawn-weights-decoder]") == "weights"
    assert page.kind_of("tests/test_bad_input.py::TestPrompts::test_of_floats[mamba]") == page.OTHERS
    assert page.kind_of("tests/test_bad_calls.py::test_forward_of_labels") is None


def test_there_are_at_least_three_hundred_cases(page):
    cases = json.loads((FIGURES / "bad-input.json").read_text())["cases"]
    assert sum(cases[kind] for kind in page.KINDS) >= 300
    assert set(cases) == {*page.KINDS, page.OTHERS}
