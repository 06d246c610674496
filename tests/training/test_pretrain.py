"""The training script and its loop: both stages from a preset to a checkpoint that writes, and what stops a run."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from transformers import AutoTokenizer, pipeline

from modeling_yan import YanForAutoencoding, YanForFlowGeneration
from modeling_yan.data.rows import read_rows, write_rows
from modeling_yan.training import pretrain
from modeling_yan.training.loop import count_targets, load_training_rows, make_sampler
from modeling_yan.training.models import load_model
from modeling_yan.training.optimization import make_optimizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain.py"
PAIRS = [{"source": f"{name} is here. Where?", "target": "here"} for name in ("Mary", "John", "Ann", "Tom")]


class TestScript:
    @pytest.mark.slow
    def test_both_stages_lead_from_a_preset_to_text(self, arguments, variant, data, tmp_path, runs, command_line):
        # Stage one goes through the launcher in one variant, and without it in the other.
        launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        one, two = str(tmp_path / "one"), str(tmp_path / "two")
        first = arguments(output_dir=one, validation_file=[str(data / "pairs.jsonl")])
        runs.command(*launcher * (variant == "mamba"), SCRIPT, *command_line(first), home=tmp_path)
        second = arguments(stage="flow", config=one, output_dir=two, validation_file=[str(data / "pairs.jsonl")])
        runs.command(SCRIPT, *command_line(second), home=tmp_path)
        terms = {"loss", "ce_loss", "learning_rate", "grad_norm", "seconds", "tokens_per_second", "mfu"}
        self.check_log(runs, one, terms | {"latent_norm_loss"})
        flow_terms = {"nll_loss", "nll_loss_per_dim", "mse_loss", "gate_entropy", "load_balance_loss"}
        flow_terms |= {f"expert_usage/{k}" for k in range(4)}
        self.check_log(runs, two, terms | flow_terms)
        self.check_weights(runs, first, one, two)

        write = pipeline("text-generation", model=two)
        assert write.model.config.vocab_size == len(write.tokenizer) == 300
        assert write.tokenizer.model_max_length == write.model.config.max_prompt_length
        assert type(write.model) is YanForFlowGeneration
        prompts = [row["source"] for row in PAIRS[:2]]
        answers = write(prompts, batch_size=2)
        assert all(answer[0]["generated_text"].startswith(prompt) for answer, prompt in zip(answers, prompts))

    def check_log(self, runs, folder, terms):
        *steps, validation = runs.log(folder)
        assert [line["step"] for line in steps] == [1, 2, 3]
        assert all(set(line) == terms | {"step"} for line in steps)
        assert set(validation) == {"step", "pairs/loss", "pairs/tokens", "pairs/exact"}
        assert 0 <= validation["pairs/exact"] <= validation["pairs/tokens"] <= 1
        settings = json.loads((Path(folder) / "training_arguments.json").read_text())
        assert settings["step"] == settings["max_steps"] == 3

    def check_weights(self, runs, settings, one, two):
        """Stage one gave what it gives in this process; all but the flow is frozen, so stage two still has it."""
        learned = YanForAutoencoding.from_pretrained(one).state_dict()
        assert runs.equal(learned, runs.weights(two))
        settings.output_dir += "-here"
        pretrain(settings)
        assert runs.equal(learned, YanForAutoencoding.from_pretrained(settings.output_dir).state_dict())


class TestLearning:
    def test_stage_one_learns_to_restore_texts(self, arguments, runs):
        settings = arguments(max_steps=60, save_steps=60, logging_steps=10)
        pretrain(settings)
        first, *_, last = [line for line in runs.log(settings.output_dir) if "loss" in line]
        assert last["ce_loss"] < 0.5 * first["ce_loss"]

    @pytest.mark.slow
    def test_stage_two_learns_a_constant_answer(self, arguments, make_config, tmp_path, runs):
        write_rows(tmp_path / "constant.jsonl", PAIRS)
        sizes = {"num_encoder_layers": 1, "num_flow_layers": 1, "decoder_dropout": 0.0}
        make_config(**sizes, freeze_decoder=False, max_train_flow_steps=2).save_pretrained(tmp_path / "learner")
        options = {"config": str(tmp_path / "learner"), "train_file": [str(tmp_path / "constant.jsonl")]}
        settings = arguments(stage="flow", max_steps=60, save_steps=60, logging_steps=10, decay_steps=30, **options)
        pretrain(settings)
        first, *_, last = [line for line in runs.log(settings.output_dir) if "loss" in line]
        assert last["ce_loss"] < 0.5 * first["ce_loss"]
        assert last["nll_loss"] < 0.9 * first["nll_loss"]

    @pytest.mark.parametrize("stage", ["autoencoder", "flow"])
    def test_one_seed_gives_one_result(self, arguments, stage, runs):
        weights = []
        for name, seed in {"first": 0, "again": 0, "other": 1}.items():
            settings = arguments(stage=stage, seed=seed)
            settings.output_dir += name
            pretrain(settings)
            weights.append(load_model(stage, settings.output_dir, AutoTokenizer.from_pretrained(settings.tokenizer)))
        first, again, other = (model.state_dict() for model in weights)
        assert runs.equal(first, again)
        assert not runs.equal(first, other)

    def test_validating_and_saving_on_the_way_change_nothing(self, arguments, data, runs):
        weights = []
        for name, options in {
            "plain": {},
            "watched": {"save_steps": 1, "validation_file": [str(data / "pairs.jsonl")]},
        }.items():
            settings = arguments(stage="flow", **options)
            settings.output_dir += name
            pretrain(settings)
            weights.append(runs.weights(settings.output_dir))
        assert runs.equal(*weights)

    @pytest.mark.parametrize("stage", ["autoencoder", "flow"])
    def test_an_update_is_the_mean_over_all_tokens_of_its_batches(self, arguments, stage, tmp_path, runs):
        write_rows(tmp_path / "lengths.jsonl", [{"text": "went to " * n + "it."} for n in range(1, 12)])
        options = {"train_file": [str(tmp_path / "lengths.jsonl")], "per_device_train_batch_size": 1}
        settings = arguments(stage=stage, gradient_accumulation_steps=3, max_steps=1, max_grad_norm=1e9, **options)
        pretrain(settings)
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
        set_seed(settings.seed)
        model = load_model(stage, settings.config, tokenizer).train()
        optimizer, _ = make_optimizer(settings, model)
        rows = read_rows(settings.train_file[0])
        mixtures = [make_sampler(settings, rows, tokenizer, model.config, place, 3) for place in range(3)]
        steps = {"num_flow_steps": random.Random("0 steps 0").randint(1, 4)} if stage == "flow" else {}
        losses, counts = [], []
        for place, mixture in enumerate(mixtures):
            torch.manual_seed(random.Random(f"0 noise 0 {place}").getrandbits(63))
            losses.append(model(**mixture[0], **steps).loss)
            counts.append(count_targets(mixture[0]))
        assert stage == "flow" or len(set(counts)) > 1, "the weights should matter"
        loss = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
        loss.backward()
        (line,) = runs.log(settings.output_dir)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        optimizer.step()
        trained = load_model(stage, settings.output_dir, tokenizer).state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(trained[name], value, atol=1e-4, rtol=1e-3)

    def test_the_learning_rate_warms_up_stays_and_decays(self, arguments):
        settings = arguments(max_steps=8, warmup_steps=3, decay_steps=2, learning_rate=0.012)
        optimizer, scheduler = make_optimizer(settings, torch.nn.Linear(2, 2))
        rates = []
        for _ in range(8):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([0.004, 0.008, 0.012, 0.012, 0.012, 0.012, 0.012, 0.006])
        assert optimizer.param_groups[0]["lr"] == 0

    def test_the_learning_rate_falls_along_a_cosine(self, arguments):
        settings = arguments(max_steps=10, warmup_steps=2, learning_rate=1.0, lr_scheduler_type="cosine")
        _, scheduler = make_optimizer(settings, torch.nn.Linear(2, 2))
        factor = scheduler.lr_lambdas[0]
        assert [factor(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1, 1, 0.5, 0], abs=1e-12)

    def test_neither_biases_nor_norms_nor_embeddings_decay(self, arguments, make_model):
        model = make_model()
        optimizer, _ = make_optimizer(arguments(weight_decay=0.5), model)
        decayed, spared = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert len(decayed) + len(spared) == len(names)
        assert all("embeddings" not in names[p] and "bias" not in names[p] and "norm" not in names[p] for p in decayed)
        assert id(model.flow.modulation.proj.weight) in decayed

    def test_decay_leaves_what_is_no_weight_of_a_layer(self, arguments, make_model):
        model = make_model()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer, _ = make_optimizer(arguments(weight_decay=0.1, learning_rate=1e-3, warmup_steps=0), model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(10):
            optimizer.step()
        kinds = "A_log", ".D", "bias", "norm", "embeddings"
        kept = {name for name in before if any(kind in name for kind in kinds)}
        changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
        assert not changed & kept
        assert any("in_proj" in name or "q_proj" in name for name in changed)

    def test_a_pretrained_encoder_has_a_rate_of_its_own(self, arguments, make_model, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]
        transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
        transformers.BertModel(config).save_pretrained(tmp_path)
        settings = arguments(encoder_learning_rate=1e-5, learning_rate=1e-3, warmup_steps=0)
        for freeze in (False, True):
            fields = {"num_flow_layers": 1, "canvas_length": 4, "freeze_encoder": freeze}
            model = YanForFlowGeneration.from_encoder_pretrained(str(tmp_path), **fields)
            optimizer, _ = make_optimizer(settings, model)
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            own = {id(parameter) for parameter in model.model.encoder.parameters()}
            trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
            assert rates == {key: 1e-5 if key in own else 1e-3 for key in trained}
            assert set(rates.values()) == ({1e-3} if freeze else {1e-3, 1e-5})
        with pytest.raises(ValueError, match="encoder_learning_rate=1e-05: must be None without a pretrained encoder"):
            make_optimizer(arguments(encoder_learning_rate=1e-5), make_model())
        with pytest.raises(ValueError, match="encoder_learning_rate=-1"):
            arguments(encoder_learning_rate=-1)


class TestLoading:
    @pytest.fixture
    def variant(self):
        """Files know nothing of mixers."""
        return "both"

    def test_stage_two_starts_from_stage_one(self, arguments, data, runs):
        settings = arguments()
        pretrain(settings)
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
        second = load_model("flow", settings.output_dir, tokenizer)
        assert runs.equal(YanForAutoencoding.from_pretrained(settings.output_dir).state_dict(), second.state_dict())
        assert not second.model.norm.weight.requires_grad
        assert second.flow.norm.weight.requires_grad

    def test_a_preset_is_fitted_to_the_tokenizer(self, preset, data):
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        model = load_model("flow", str(preset), tokenizer)
        assert model.lm_head.out_features == model.config.vocab_size == len(tokenizer)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
            assert getattr(model.config, name) == getattr(tokenizer, name)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    def test_fields_of_a_checkpoint_are_overridden(self, make_model, data, tmp_path):
        make_model(vocab_size=300).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        changes = "mask_ratio=0.5,max_span_len=2,freeze_encoder=true,train_expert_choice=argmax"
        config = load_model("flow", str(tmp_path), tokenizer, config_overrides=changes).config
        assert (config.mask_ratio, config.max_span_len, config.train_expert_choice) == (0.5, 2, "argmax")
        assert config.freeze_encoder is True

    def test_a_field_that_is_none_by_default_is_overridden(self, preset, data):
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        model = load_model("flow", str(preset), tokenizer, config_overrides="moe_intermediate_size=7")
        assert model.config.moe_intermediate_size == model.flow.experts.heads.up_proj.shape[1] == 7

    @pytest.mark.parametrize(("own", "expected"), [(8, 12), (5, 5)])
    def test_another_canvas_is_filled_unless_fewer_tokens_were_asked_for(
        self, make_model, data, tmp_path, own, expected
    ):
        model = make_model(vocab_size=300)
        model.generation_config.max_new_tokens = own
        model.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        wider = load_model("flow", str(tmp_path), tokenizer, config_overrides="canvas_length=12")
        assert wider.generation_config.max_new_tokens == expected

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ("masks=0.5", "masks"),
            ("mask_ratio=many", "many"),
            ("mask_ratio", "must be name=value"),
            ("flow_sigma=-1", "flow_sigma=-1.0: must be greater than 0"),
        ],
    )
    def test_wrong_overrides(self, preset, data, changes, reason):
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        with pytest.raises(ValueError, match=reason):
            load_model("flow", str(preset), tokenizer, config_overrides=changes)

    def test_a_tokenizer_with_more_tokens_than_the_checkpoint(self, make_model, data, tmp_path):
        make_model(vocab_size=299).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"300 tokens.*does not fit the checkpoint.*vocab_size=299"):
            load_model("flow", str(tmp_path), AutoTokenizer.from_pretrained(data / "tokenizer"))

    def test_a_tokenizer_with_other_special_tokens_than_the_checkpoint(self, make_model, data, tmp_path):
        make_model(vocab_size=300, eos_token_id=7).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="does not fit the checkpoint"):
            load_model("flow", str(tmp_path), AutoTokenizer.from_pretrained(data / "tokenizer"))

    @pytest.mark.parametrize("name", ["pad", "eos", "mask"])
    def test_a_tokenizer_without_a_special_token(self, preset, data, name):
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        setattr(tokenizer, f"{name}_token", None)
        with pytest.raises(ValueError, match=f"the tokenizer has no {name}_token_id"):
            load_model("flow", str(preset), tokenizer)

    def test_a_folder_that_is_not_there(self, data, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            load_model("flow", str(tmp_path / "nowhere"), AutoTokenizer.from_pretrained(data / "tokenizer"))


class TestRefusals:
    @pytest.mark.parametrize("task", ["pairs", "pairs=much"])
    def test_a_task_without_weight(self, arguments, task):
        with pytest.raises(ValueError, match="every entry must be TASK=WEIGHT"):
            pretrain(arguments(tasks=[task]))

    def test_an_unknown_task(self, arguments):
        with pytest.raises(ValueError, match="no rows for the task translation"):
            pretrain(arguments(tasks=["translation=1"]))

    def test_a_task_that_one_of_the_files_lacks(self, arguments, tmp_path):
        settings = arguments(stage="flow")
        lacking = [str(tmp_path / "held-out.jsonl")]
        write_rows(lacking[0], [{"text": "The cat sat on the mat."}])
        settings.tasks = ["pairs=1"]
        for names in ({"train_file": lacking}, {"validation_file": lacking}):
            with pytest.raises(ValueError, match=r"for the task pairs: .*held-out\.jsonl and stage='flow' allow"):
                pretrain(replace(settings, **names))

    def test_files_of_both_kinds_and_patterns(self, data, arguments, tmp_path):
        (tmp_path / "more.txt").write_text("The dog slept.\nIt was dark.\n")
        write_rows(tmp_path / "pairs[1].jsonl", [{"source": "Where?", "target": "here"}])
        files = [str(tmp_path / "pairs[1].jsonl"), str(tmp_path / "mor*.txt"), str(data / "texts.*")]
        for names, number in ((files, 23), (files[::2], 21)):
            rows = load_training_rows(arguments(), names, [])
            assert [len([row for row in rows if row.get(kind)]) for kind in ("text", "target")] == [number - 1, 1]
        streamed = list(load_training_rows(arguments(streaming=True), files, []))
        assert len(streamed) == 23
        with pytest.raises(FileNotFoundError, match=r"none\*\.jsonl: no such file"):
            load_training_rows(arguments(), ["none*.jsonl"], [])

    def test_a_file_without_rows(self, arguments, tmp_path):
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(ValueError, match=r"empty\.jsonl.*no rows"):
            pretrain(arguments(train_file=[str(tmp_path / "empty.jsonl")]))

    def test_an_unknown_stage(self, arguments):
        with pytest.raises((ValueError, KeyError), match="both"):
            pretrain(arguments(stage="both"))


class TestFailures:
    @pytest.fixture
    def variant(self):
        """Files know nothing of mixers."""
        return "both"

    @pytest.fixture
    def fail_at_call(self, monkeypatch):
        """Function that makes a method raise, or do something else, at its n-th call."""

        def install(owner, method, number, failure):
            original, calls = getattr(owner, method), []

            def wrapped(self, *args, **kwargs):
                calls.append(method)
                return (failure if len(calls) == number else original)(self, *args, **kwargs)

            monkeypatch.setattr(owner, method, wrapped)

        return install

    def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(self, arguments, fail_at_call, runs):
        forward = YanForAutoencoding.forward

        def broken(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.loss = output.loss * float("nan")
            return output

        fail_at_call(YanForAutoencoding, "forward", 3, broken)
        settings = arguments(max_steps=5, save_steps=2)
        with pytest.raises(FloatingPointError, match="update 3: the loss is nan"):
            pretrain(settings)
        self.check_resuming(runs, settings, saved=["checkpoint-2"])

    def test_a_save_that_is_cut_off_leaves_the_checkpoint_before_it_whole(self, arguments, fail_at_call, runs):
        def cut_off(self, folder, *args, **kwargs):
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError("no space left on device")

        fail_at_call(YanForAutoencoding, "save_pretrained", 2, cut_off)
        settings = arguments(max_steps=5, save_steps=2)
        with pytest.raises(
            OSError, match=r"checkpoint-4 could not be written \(no space left.*checkpoint-2 is the last"
        ):
            pretrain(settings)
        self.check_resuming(runs, settings, saved=["checkpoint-2"])

    def check_resuming(self, runs, settings, saved):
        """Only whole checkpoints are there, and from them the run ends as one that was never broken."""
        folder = Path(settings.output_dir)
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == saved
        assert runs.equal(runs.weights(folder / saved[-1]), runs.weights(folder / saved[-1]))
        AcceleratorState._reset_state(True)
        pretrain(replace(settings, resume=True))
        AcceleratorState._reset_state(True)
        unbroken = replace(settings, output_dir=settings.output_dir + "-unbroken")
        pretrain(unbroken)
        assert runs.equal(runs.weights(folder), runs.weights(unbroken.output_dir))
        ends = [[line.get("loss") for line in runs.log(run.output_dir)] for run in (settings, unbroken)]
        assert ends[0] == ends[1]
