"""The command `yan`: what it prints, where it prints it, and the exit codes."""

import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging

import modeling_yan
from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration
from modeling_yan.commands import build_parser, main
from modeling_yan.data import train_tokenizer, write_rows

ROOT = Path(__file__).parents[1]
SENTENCES = ["Mary went to the kitchen.", "Where is the apple?", "The apple is in the garden."]
STEPS = ("--steps", "2")
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
SIZES |= {"num_decoder_layers": 1, "max_position_embeddings": 32, "canvas_length": 8, "num_experts": 2}
COMMANDS = "generate fill chat train finetune evaluate benchmark export serve visualize demo info completion".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random model whose text depends on the prompt, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=300)
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    }
    model = YanForFlowGeneration(YanConfig(vocab_size=len(tokenizer), initializer_range=0.3, **SIZES, **ids))
    torch.nn.init.normal_(model.flow.modulation.proj.weight, std=0.1)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    model.lm_head.bias.data[[not (text.isascii() and text.isprintable()) for text in texts]] = -1e4
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    card = "---\nlicense: mit\n---\n\n# A model\n\nPrompts: plain questions.\n"
    (path / "README.md").write_text(card)
    return str(path)


@pytest.fixture
def yan(capsys):
    """Function from words to the exit code, the lines of stdout and those of stderr."""

    def run(*words):
        capsys.readouterr()  # what was printed before
        code = main(list(map(str, words)))
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def type_in(monkeypatch):
    """Function that puts a text on stdin."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def run_command(*words, **settings):
    """`python -m modeling_yan` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "modeling_yan", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **settings)


def run_late(body):
    """A process that runs lines of Python with the command's `main`, which has loaded nothing yet."""
    script = "import sys; sys.orig_argv = ['python', '/bin/yan']; from modeling_yan.commands import info, main\n"
    settings = {"env": {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script + body], **settings)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["generate", "--help"], ["completion", "bash"], ["generate", "--num", "0"]]
)
def test_help_and_version_come_without_torch(words):
    process = run_late(f"main({words}); print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))")
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("words", "is_command"),
    [
        (["python", "/venv/bin/yan", "--help"], True),
        (["python", "-m", "modeling_yan", "info"], True),
        (["python", "-m", "modeling_yan.data.tokenizer"], False),
        (["python", "yan.py"], False),
        (["python"], False),
    ],
)
def test_only_the_command_itself_loads_the_classes_late(words, is_command):
    assert modeling_yan._is_command(words) == is_command


def test_the_classes_are_there_when_they_are_asked_for_late():
    assert modeling_yan.__getattr__("YanConfig") is YanConfig
    with pytest.raises(AttributeError, match="no attribute 'Yen'"):
        modeling_yan.__getattr__("Yen")


def test_every_command_has_help_with_examples(yan):
    assert yan()[0] == 0
    listed = " ".join(yan("--help")[1])
    for name in COMMANDS:
        assert f" {name} " in listed
        code, lines, _ = yan(name, "--help")
        assert code == 0
        assert f"yan {name}" in "\n".join(lines[lines.index("examples:") :])


def test_the_version_is_the_packages(yan):
    assert yan("--version") == (0, [f"yan {modeling_yan.__version__}"], [])


def test_the_module_is_the_command_and_ends_with_its_code():
    result = run_command("generate", "MODEL", "--num", "none")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "yan generate: argument --num: 'none': must be a whole number of at least 1 (see yan generate --help)\n"
    )


def test_a_prompt_gets_the_same_text_each_time_and_a_seed_draws_others(yan, folder):
    code, (text,), errors = yan("generate", folder, SENTENCES[0], *STEPS)
    assert (code, errors) == (0, [])
    assert text
    assert yan("generate", folder, *STEPS, SENTENCES[0])[1] == [text]  # texts may follow options
    drawn = yan("generate", folder, SENTENCES[0], "--num", 3, "--seed", 5)[1]
    assert len(set(drawn)) > 1
    assert yan("generate", folder, SENTENCES[0], "--num", 3, "--seed", 5)[1] == drawn
    assert yan("generate", folder, SENTENCES[0], "--num", 3, "--seed", 6)[1] != drawn
    (warm,) = yan("generate", folder, SENTENCES[0], "--seed", 5, "--temperature", 3)[1]
    assert warm not in (text, drawn[0])


def test_generate_says_what_the_model_does(yan, folder):
    model = YanForFlowGeneration.from_pretrained(folder)
    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=300)
    sequences = model.generate(**tokenizer(SENTENCES[0], return_tensors="pt"), num_flow_steps=2, return_prompt=False)
    assert yan("generate", folder, SENTENCES[0], *STEPS)[1] == [
        tokenizer.decode(sequences[0], skip_special_tokens=True)
    ]


def test_lines_of_stdin_are_prompts(yan, folder, type_in):
    expected = [yan("generate", folder, sentence, *STEPS)[1][0] for sentence in SENTENCES]
    type_in("\n".join(SENTENCES) + "\n")
    assert yan("generate", folder, *STEPS) == (0, expected, [])


def test_lines_of_other_systems_are_the_same_prompts(yan, folder, type_in):
    texts = []
    for end in ("\n", "\r\n"):
        type_in(f"ab cd{end}ef{end}")
        texts.append(yan("generate", folder)[1])
    assert texts[0] == texts[1]


def test_bytes_that_are_no_text_are_refused(yan, folder, type_in):
    type_in("caf\udce9\n")
    code, _, errors = yan("generate", folder)
    assert code == 2
    assert "must be in UTF-8" in errors[0]


def test_a_stream_shows_the_draft_of_every_step(yan, folder):
    text = yan("generate", folder, SENTENCES[0], *STEPS, "--max_new_tokens", 8)[1]
    code, lines, drafts = yan("generate", folder, SENTENCES[0], *STEPS, "--max_new_tokens", 8, "--stream")
    assert (code, lines) == (0, text)
    assert [line.split()[:2] for line in drafts] == [["step", "1"], ["step", "2"]]
    assert drafts[-1] == f"step 2  {text[0]}"


def test_fill_is_that_of_the_model(yan, folder):
    model = YanForFlowGeneration.from_pretrained(folder)
    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=300)
    text = "Mary <mask>."
    expected = model.fill(tokenizer, text, max_gap_tokens=2, num_flow_steps=2).text
    assert yan("fill", folder, text, "--max_gap_tokens", 2, *STEPS) == (0, [expected], [])
    code, lines, (error,) = yan("fill", folder, "Mary.")
    assert (code, lines) == (2, [])
    assert error == "yan fill: text='Mary.': must be a string with at least one <mask>"


def test_the_commands_of_the_readme_run(yan, tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("From the shell:\n")[1]
    lines = section.split("```bash\n")[1].split("```")[0].splitlines()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    answered, filled = [yan(*shlex.split(line)[1:]) for line in lines]
    assert (answered[0], filled[0]) == (0, 0)
    assert answered[1] == ["The apple is in the kitchen."]
    assert filled[1] == ["There was nothing to be done."]


def test_a_chat_answers_each_line_and_outlives_a_line_that_is_too_long(yan, folder, type_in, tmp_path):
    expected = yan("generate", folder, SENTENCES[0], *STEPS)[1]
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    type_in(f"{SENTENCES[0]}\n\n{'x' * 99}\n{SENTENCES[0]}\nexit\n{SENTENCES[0]}\n")
    code, lines, errors = yan("chat", tmp_path / "plain", *STEPS)
    assert (code, lines) == (0, expected * 2)
    assert "no chat template" in errors[0]
    assert errors[1].startswith("yan chat: the prompt has ")
    type_in(f"Where\udcff\n{SENTENCES[0]}\n")
    code, lines, errors = yan("chat", folder, *STEPS)
    assert (code, lines) == (0, expected)
    assert errors == ["yan chat: text 'Where\\udcff': must be in UTF-8"]


def test_a_chat_with_a_template_has_what_was_said_before_as_far_as_it_fits(
    yan, folder, type_in, tmp_path, monkeypatch
):
    shutil.copytree(folder, tmp_path / "chat")
    template = "{% for message in messages %}{{ message.role[0] }}{{ message.content }}{% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    prompts = []

    def write(self, text, add_special_tokens=True):
        prompts.append((text, add_special_tokens))
        return ["Yes"]

    monkeypatch.setattr("modeling_yan.commands.writing.Writer.__call__", write)
    type_in("One\nTwo\n" + "x" * 26 + "\n")
    assert yan("chat", tmp_path / "chat") == (0, ["Yes"] * 3, [])
    assert prompts == [("uOne", False), ("uOneaYesuTwo", False), ("u" + "x" * 26, False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "/no/folder", "a"],
            "MODEL='/no/folder': must be a folder with a config.json, or a model on the hub",
        ),
        (
            ["generate", "{folder}", "a", "--temperature", "-1"],
            "temperature=-1.0: must be a finite number of at least 0",
        ),
        (["generate", "{folder}", "x" * 40], "the prompt has "),
        (["generate", "{folder}", "a", "--device", "nowhere"], "device='nowhere': "),
        (["generate", "{folder}", "a", "--colour", "red"], "no such argument as --colour red"),
        (["info", "{damaged}"], "is not a valid JSON file"),
        (["info", "{other}"], "MODEL='{other}': its model_type='gpt2' must be 'yan'"),
        (["generate", "{stage_one}", "a"], "MODEL='{stage_one}': has no weights for flow."),
        (["visualize", "{folder}", "a", "b", "--output", "x"], "text=['a', 'b']: must be one prompt"),
        (["export", "{folder}", "--output", "a.onnx"], "output='a.onnx': must end in .pt2"),
        (["evaluate", "{folder}", "--data", "none.jsonl", "--output", "x"], "none.jsonl"),
        (["train", "--recipe", "none.yaml"], "[Errno 2] No such file or directory: 'none.yaml'"),
        (["train", "--recipe", "{bad}"], "{bad}: must be YAML"),
        (["finetune", "--model", "{folder}"], "--train_file, or --dataset: must be given"),
        (["demo", "/no/folder"], "MODEL='/no/folder': must be a folder with a config.json"),
        (["benchmark", "{folder}", "--prompt_length", "99"], "prompt_length=99: must be 1 to 32"),
        (["completion", "fish"], "argument shell: invalid choice: 'fish'"),
    ],
)
def test_bad_input_is_one_line_and_the_code_2(yan, folder, tmp_path, words, message):
    other, stage_one, bad = tmp_path / "other", tmp_path / "stage-one", tmp_path / "bad.yaml"
    damaged = tmp_path / "damaged"
    for folder_of_config, content in ((other, '{"model_type": "gpt2"}'), (damaged, "{")):
        folder_of_config.mkdir()
        (folder_of_config / "config.json").write_text(content)
    bad.write_text("a: [")
    if "{stage_one}" in words:
        shutil.copytree(folder, stage_one)
        YanForAutoencoding.from_pretrained(folder).save_pretrained(stage_one)
    names = {"folder": folder, "other": other, "stage_one": stage_one, "bad": bad, "damaged": damaged}
    code, lines, errors = yan(*(word.format(**names) for word in words))
    assert (code, lines) == (2, [])
    assert len(errors) == 1
    assert errors[0].startswith(f"yan {words[0]}: ")
    assert message.format(**names) in errors[0]


def test_a_terminal_without_a_prompt_is_not_waited_for(yan, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert yan("generate", folder) == (2, [], ["yan generate: text: must be given, or come as lines on stdin"])


def test_debug_shows_the_traceback(yan, folder):
    code, _, errors = yan("generate", folder, "a", "--temperature", "-1", "--debug")
    assert code == 2
    assert "Traceback (most recent call last):" in errors
    assert errors[-1] == "ValueError: temperature=-1.0: must be a finite number of at least 0"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, []),
        (RuntimeError("two\n  lines"), 1, ["yan info: RuntimeError: two lines"]),
        (ValueError("x " * 999), 2, [f"yan info: {'x ' * 235}... (all of it with --debug)"]),
    ],
)
def test_the_exit_code_says_what_ended_a_command(yan, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("modeling_yan.commands.info.prepare_library", fail)
    found, _, errors = yan("info", "MODEL")
    assert (found, [line[:480] for line in errors]) == (code, [entry[:480] for entry in line])


def test_ctrl_c_ends_a_process_quietly():
    process = run_late(
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "info.prepare_library = lambda **_: print('ready', flush=True) or time.sleep(60)\n"
        "sys.exit(main(['info', 'MODEL']))"
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize("words", [["--help"], ["completion", "bash"]])
def test_a_reader_that_goes_away_ends_the_command_quietly(words):
    process = run_late(f"sys.stdin.readline()\nsys.exit(main({words}))")
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""


def test_info_has_sizes_prompt_form_licence_and_versions(yan, folder):
    facts = json.loads("\n".join(yan("info", folder, "--json")[1]))
    model = YanForFlowGeneration.from_pretrained(folder)
    assert facts["parameters"]["all"] == model.num_parameters()
    assert facts["parameters"]["flow"] == sum(parameter.numel() for parameter in model.flow.parameters())
    assert (facts["licence"], facts["prompt form"]) == ("mit", "plain questions.")
    assert facts["versions"]["torch"] == torch.__version__
    lines = yan("info", folder)[1]
    assert any(line.split() == ["licence", "mit"] for line in lines)


@pytest.mark.parametrize("name", ["yan-transformer-tiny", "yan-mamba-tiny"])
def test_info_has_the_prompt_form_of_a_bundled_model(yan, name):
    facts = json.loads("\n".join(yan("info", ROOT / "examples" / "checkpoints" / name, "--json")[1]))
    assert facts["prompt form"].startswith("plain text, of three kinds. A story")
    assert facts["prompt form"].count(". ") >= 2  # the whole paragraph


def test_info_without_a_card_says_so(yan, folder, tmp_path):
    shutil.copy(Path(folder, "config.json"), tmp_path)
    assert json.loads("\n".join(yan("info", tmp_path, "--json")[1]))["licence"] == "unknown, there is no model card"


def test_evaluate_writes_its_report(yan, folder, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [{"source": sentence, "target": "Yes."} for sentence in SENTENCES])
    words = ["--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "report", "--seeds", 1, "--max_new_tokens", 8]
    code, lines, _ = yan("evaluate", folder, *words, "--metrics", "exact_match")
    assert code == 0
    assert "exact_match" in "\n".join(lines)
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["num_rows"] == 3


def test_benchmark_prints_a_table_and_writes_json_of_an_untrained_preset_too(yan, folder, tmp_path):
    words = ["--lengths", 4, 8, "--steps", 1, "--repeats", 1, "--beside_ar", "--output", tmp_path / "a" / "speed.json"]
    code, lines, errors = yan("benchmark", folder, *words)
    assert (code, errors) == (0, [])
    assert [line.split(" | ")[1:3] for line in lines[-4:]] == [
        [str(length), name] for length in (4, 8) for name in ("YAN, 1 step", "AR decoder")
    ]
    report = json.loads((tmp_path / "a" / "speed.json").read_text())
    assert [row["length"] for row in report["results"]] == [4, 4, 8, 8]
    shutil.copy(Path(folder, "config.json"), tmp_path)
    assert yan("benchmark", tmp_path, "--lengths", 4, "--repeats", 1, "--untrained")[0] == 0
    assert yan("benchmark", tmp_path, "--lengths", 4)[0] == 2


def test_export_writes_a_program(yan, folder, tmp_path):
    file, words = tmp_path / "yan.pt2", ["--batch_size", "any", "--prompt_length", "8", "--num_flow_steps", "1"]
    code, (line,), _ = yan("export", folder, "--output", file, *words)
    assert (code, line.split(":")[0]) == (0, str(file))
    program = torch.export.load(file).module()
    for ids in (torch.full((1, 8), 5), torch.full((3, 8), 5)):
        assert program(ids, torch.ones_like(ids)).shape == (len(ids), 8)


def test_train_and_finetune_go_through_to_an_adapter_that_writes(yan, folder, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"source": sentence, "target": "Yes."} for sentence in SENTENCES])
    rows = ["--train_file", tmp_path / "rows.jsonl", "--validation_file", tmp_path / "rows.jsonl"]
    words = ["--stage", "flow", "--config", folder, "--tokenizer", folder, "--use_cpu", "True", "--max_steps", 1]
    words += ["--per_device_train_batch_size", 2, "--max_source_length", 16, "--report_to", "none"]
    assert yan("train", *words, *rows, "--output_dir", tmp_path / "trained")[0] == 0
    base = os.path.relpath(tmp_path / "trained")  # of which the adapter keeps the whole path
    words = ["--model", base, "--use_cpu", "--max_steps", 1, "--report_to", "none", "--lora"]
    words += ["--save_strategy", "no", "--output_dir", tmp_path / "adapter"]
    code, lines, _ = yan("finetune", *words, *rows)
    assert code == 0
    assert any(line.startswith("eval_loss") for line in lines)
    assert yan("generate", tmp_path / "adapter", SENTENCES[0])[0] == 0
    shutil.rmtree(tmp_path / "trained")
    code, _, errors = yan("generate", tmp_path / "adapter", SENTENCES[0])
    assert code == 2
    assert (
        f"is an adapter of '{tmp_path / 'trained'}', which must be a folder here or a model on the hub" in errors[-1]
    )


def test_the_shells_completions_know_every_command_and_its_options(yan):
    script = "\n".join(yan("completion", "bash")[1])

    def complete(*words):
        line = " ".join(f"'{word}'" for word in words)
        ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _yan; echo ${{COMPREPLY[*]}}"
        return subprocess.run(
            ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True
        ).stdout.split()

    assert set(COMMANDS) <= set(complete("yan", ""))
    assert complete("yan", "vis") == ["visualize"]
    assert complete("yan", "generate", "--st") == ["--steps", "--stream"]
    assert complete("yan", "generate", "") == []  # files


def test_visualize_draws_a_picture_and_writes_a_page_that_needs_no_other_file(yan, folder, tmp_path, drawings):
    code, lines, _ = yan("visualize", folder, "a <b> $x_1$", *STEPS, "--output", tmp_path)
    assert (code, lines) == (0, [str(tmp_path / "path.png"), str(tmp_path / "path.html")])
    path, _, usage, straightness, *_ = drawings["path.png"]
    assert len(path) == sum(usage[0]) == len(straightness[0]) > 1  # tokens
    page = (tmp_path / "path.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; $x_1$" in page
    assert page.count("<td>step ") == 2
    assert "src=" not in page.replace('src="data:', "")


def test_a_path_has_the_points_of_the_trajectory_and_its_straightness(folder):
    from modeling_yan.commands.loading import load_model, load_tokenizer
    from modeling_yan.visualization import follow

    path = follow(load_model(folder, "cpu"), load_tokenizer(folder), SENTENCES[0], 3)
    assert path.points.shape == (len(path.tokens), 4, 2)
    assert len(path.drafts) == 3
    assert path.drafts[-1] == path.text
    assert path.draft_tokens[-1] == path.tokens
    assert 1 >= path.straightness.max() >= path.straightness.min() > 0
    assert path.gate.argmax(1).tolist() == path.experts
    assert 1 >= sum(path.shares) > 0
    straight = follow(load_model(folder, "cpu"), load_tokenizer(folder), SENTENCES[0], 1)
    assert np.allclose(straight.straightness, 1)


def test_the_parser_takes_no_abbreviation():
    assert build_parser().parse_known_args(["generate", "M", "--stre"])[1] == ["--stre"]


def test_a_server_on_a_port_that_is_taken(yan, folder):
    pytest.importorskip("litserve")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = yan("serve", folder, "--port", port)
    assert (code, errors[-1]) == (
        2,
        f"yan serve: host=127.0.0.1, port={port}: must be free to listen on (Address already in use)",
    )


def test_a_server_without_its_packages_says_what_to_install(yan, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "litserve", None)
    monkeypatch.delitem(sys.modules, "modeling_yan.serving.server", raising=False)
    code, _, errors = yan("serve", folder)
    assert code == 2
    assert "pip install 'modeling-yan[serve]'" in errors[-1]


@pytest.mark.parametrize("words", [["--port", "80"], ["--host", "example.org"], ["--replicas", "0"]])
def test_a_server_that_cannot_be_is_refused(yan, folder, words):
    assert yan("serve", folder, *words)[0] == 2


def test_a_broken_pipe_of_something_else_is_a_fault(yan, folder, monkeypatch):
    def break_pipe(*_):
        raise BrokenPipeError(32, "the pipe of a worker broke")

    monkeypatch.setattr("modeling_yan.commands.loading.load_any_config", break_pipe)
    code, _, errors = yan("info", folder)
    assert code == 1
    assert "the pipe of a worker broke" in errors[-1]
