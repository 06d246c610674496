"""The demo: what its views show, and the page in a browser, every tab of it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modeling_yan.commands import demo, main
from modeling_yan.commands.demo import bundled_models
from modeling_yan.commands.loading import load_model, load_tokenizer

pytest.importorskip("matplotlib")
from modeling_yan.demo import views

ROOT = Path(__file__).parents[1]
PROMPT = "Where is the apple? Mary went to the kitchen. Mary took the apple."
ANSWER = "The apple is in the kitchen."
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def bundled():
    """The bundled Transformer and its tokenizer."""
    return load_model(bundled_models()[0], "cpu"), load_tokenizer(bundled_models()[0])


def test_drafts_settle_until_the_text_stands(bundled):
    *frames, page = views.write_live(*bundled, "Last word: The king went up to the <mask>.", 3, seed=1, num=2)
    assert [re.search(r"Step \d of \d", frame)[0] for frame in frames] == [f"Step {n} of 3" for n in (1, 2, 3)]
    assert all(frame.count("<tr>") == 2 for frame in frames)
    changed = [frame.count("unsettled") for frame in frames]
    assert changed[0] == frames[0].count("token")  # all are new
    assert changed[0] > changed[-1]
    assert "Drafts of text 1" in page
    words = re.findall(r"<span[^>]*>([^<]*)</span>", frames[-1].split("Text 2")[0])
    assert words == re.findall(r"<span[^>]*>([^<]*)</span>", page.split("Step 3")[1].split("legend")[0])


def test_a_draft_is_shown_before_the_next_step_is_begun(bundled, monkeypatch):
    model, tokenizer = bundled
    seen, solve = threading.Semaphore(0), model.generate

    def generate(*arguments, streamer, **options):
        put = streamer.put_draft

        def put_and_wait(tokens):
            put(tokens)
            assert seen.acquire(timeout=20), "nobody has seen the draft"

        streamer.put_draft = put_and_wait
        return solve(*arguments, streamer=streamer, **options)

    monkeypatch.setattr(model, "generate", generate)
    frames = []
    for frame in views.write_live(model, tokenizer, PROMPT, 3, seed=0, num=1):
        frames.append(frame)
        seen.release()
    assert ANSWER in frames[-1]


def test_tokens_have_the_colours_of_their_experts_where_there_are_several(bundled):
    path = views.path_of(*bundled, PROMPT, 2)
    assert path.text == ANSWER
    colored, plain = (views.tokens_html(path, 2, is_colored) for is_colored in (True, False))
    assert re.findall("background:(#......)", colored) == [views.PALETTE[expert] for expert in path.experts]
    assert set(re.findall("background:(#......)", plain)) == {views.PLAIN}
    assert views.has_colors(bundled[0])


def test_what_was_written_is_no_markup(bundled):
    path = views.path_of(*bundled, PROMPT, 1)
    path.text, path.draft_tokens = "<b>", [["<b>"] * len(path.tokens)]
    assert "<b>" not in views.finished([path], 1.0, True) + views.side_by_side({"<b>": path})


def test_every_rank_of_expert_has_a_column(bundled):
    paths = views.write_by_expert(*bundled, PROMPT, 2)
    assert list(paths)[:2] == ["Likeliest expert of every token", "Second expert of every token"]
    for experts in zip(*(path.experts for path in paths.values()), strict=False):
        assert len(set(experts)) == len(paths) == 4
    assert views.side_by_side(paths).count("<h3>") == 4


def test_bad_input_is_named(bundled, make_model):
    with pytest.raises(ValueError, match="prompt: must not be empty"):
        next(views.write_live(*bundled, " ", 3, 0, 1))
    with pytest.raises(ValueError, match="prompt"):  # of `generate`, in its own thread
        list(views.write_live(*bundled, "apple " * 400, 3, 0, 1))
    with pytest.raises(ValueError, match="seed: must be a number"):  # a field that was emptied
        next(views.write_live(*bundled, PROMPT, 3, None, 1))
    with pytest.raises(ValueError, match="this model has one expert"):
        views.write_by_expert(make_model(num_experts=1), bundled[1], PROMPT, 3)


def test_times_are_those_of_both_models(make_model, monkeypatch):
    monkeypatch.setattr(views, "LENGTHS", (4, 16))
    results = views.measure(make_model(), steps=2, repeats=1)
    names = {"YAN, 1 step", "YAN, 2 steps", "YAN, 3 steps", "AR decoder"}
    assert {(row["model"], row["length"]) for row in results} == {(name, n) for name in names for n in (4, 16)}
    (axes,) = views.timing_figure(results).axes
    assert {line.get_label() for line in axes.get_lines()} == names


@pytest.fixture
def space(tmp_path):
    """The files of the Space, put together as docs/guides/demo.md says, and the address of its running app."""
    pytest.importorskip("gradio")
    guide = (ROOT / "docs" / "guides" / "demo.md").read_text(encoding="utf-8")
    commands = guide.split("## On the hub")[1].split("```bash\n")[1].split("```")[0]
    subprocess.run(["bash", "-ec", commands], cwd=ROOT, env={**os.environ, "SPACE": str(tmp_path)}, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment |= {"GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=environment, **settings) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("".join(lines))
        yield address[0]
        process.terminate()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_every_tab_works_in_a_browser_and_nothing_is_fetched_from_elsewhere(space, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    pictures = Path(os.environ.get("YAN_SCREENSHOTS", tmp_path))
    gaps = "He loosed <mask>, and forgave <mask> the debt."
    tabs = {"Write": "Write", "By expert": "Write with every expert", "Path": "Draw the path", "Time": "Measure"}
    shown = {"Write": "h3", "By expert": ".columns", "Path": "img", "Time": "table"}
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.set_default_timeout(240_000)
        asked, faults = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(space)
        page.get_by_text(gaps).click()
        playwright.expect(page.get_by_label("Prompt")).to_have_value(gaps)
        page.wait_for_load_state("networkidle")  # the server knows it, too
        for tab, button in tabs.items():
            page.get_by_role("tab", name=tab, exact=True).click()
            page.get_by_role("button", name=button, exact=True).click()
            if tab == "Write":  # the drafts come first
                page.get_by_text("Step 1 of 3").wait_for()
                assert not page.get_by_text("Drafts of text 1").is_visible()
            page.locator("[role=tabpanel]:visible").locator(shown[tab]).first.wait_for()
            page.screenshot(path=pictures / f"demo_{tab.lower().replace(' ', '_')}.png", full_page=True)
        browser.close()
    assert faults == []
    assert [url for url in asked if not url.startswith((space, "data:", "blob:"))] == []


@pytest.mark.slow
def test_the_command_serves_its_models_where_it_is_told(monkeypatch, capsys):
    page, launched = pytest.importorskip("modeling_yan.demo.page"), []
    monkeypatch.setattr(page, "build_demo", list)
    monkeypatch.setattr(page, "launch", lambda names, **options: launched.append((names, options)))
    assert main(["demo", bundled_models()[0], "--host", "127.0.0.2", "--port", "7861"]) == 0
    assert launched == [(["yan-transformer-tiny"], {"server_name": "127.0.0.2", "server_port": 7861})]
    assert capsys.readouterr().err == f"yan demo: loads {bundled_models()[0]}\n"


def test_models_of_one_name_are_told_apart(monkeypatch, tmp_path):
    page, launched = pytest.importorskip("modeling_yan.demo.page"), []
    monkeypatch.setattr(page, "build_demo", list)
    monkeypatch.setattr(page, "launch", lambda names, **options: launched.append(names))
    monkeypatch.setattr(demo, "load_model", lambda name, _: name)
    monkeypatch.chdir(bundled_models()[0])
    shutil.copytree(Path.cwd(), tmp_path / "copy" / Path.cwd().name)
    assert main(["demo", ".", str(tmp_path / "copy" / Path.cwd().name)]) == 0
    assert launched == [[".", str(tmp_path / "copy" / Path.cwd().name)]]


def test_what_the_command_lacks_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "modeling_yan.demo.page", None)
    assert main(["demo"]) == 2
    assert "needs gradio and matplotlib, pip install 'modeling-yan[demo]'" in capsys.readouterr().err
    monkeypatch.setattr(demo, "BUNDLED", tmp_path)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.startswith("yan demo: MODEL: must be given, the bundled models are in")
