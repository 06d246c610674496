"""What `generate` promises: what it costs, what it returns, and what its result depends on."""

import pytest
import torch
from generating import new_tokens, num_calls, recorded_calls
from torch import nn
from transformers import GenerationConfig

from modeling_yan import YanForFlowGeneration, YanGenerationOutput, decoding_yan, expert_heads_yan
from modeling_yan.flow_matching_yan import hashed_uniform

CANVAS, POSITIONS, VOCABULARY, EXPERTS, HIDDEN = 8, 48, 64, 4, 32
PAD, EOS = 0, 2


@pytest.fixture
def model(make_lively_model) -> YanForFlowGeneration:
    return make_lively_model()


def write_eos_at(model, *places):
    """Make EOS the winner at these places of every canvas, and only there."""

    def raise_eos(module, args, logits):
        logits = logits.clone()
        logits[..., EOS] = -1e4
        logits[:, list(places), EOS] = 1e4
        return logits

    model.lm_head.register_forward_hook(raise_eos)


def end_rows_at(model, ends, token=EOS):
    """Make the token the winner from one place of each row's canvas on; nowhere if that is beyond the canvas."""

    def raise_token(module, args, logits):
        logits = logits.clone()
        for row, end in zip(logits, ends):
            row[end:, token] = 1e4
        return logits

    model.lm_head.register_forward_hook(raise_token)


class TestCost:
    @pytest.mark.parametrize("num_steps", [1, 3, 5])
    def test_n_steps_cost_n_trunk_passes_a_canvas(self, model, prompts, num_steps):
        options = {"num_flow_steps": num_steps, "max_new_tokens": 2 * CANVAS}
        with recorded_calls(model.flow.norm) as calls:
            output = model.generate(prompts, return_dict_in_generate=True, **options)
        assert len(calls) == 2 * num_steps
        assert output.num_trunk_passes == len(calls)

    def test_the_prompt_is_encoded_and_projected_once_a_canvas(self, model, prompts):
        attentions = [layer.cross_attention for layer in model.flow.layers]
        once = [model.model.norm, model.flow.modulation.proj]
        once += [projection for attention in attentions for projection in (attention.k_proj, attention.v_proj)]
        with recorded_calls(*once) as calls:
            model.generate(prompts, num_flow_steps=4, max_new_tokens=3 * CANVAS)
        assert [num_calls(calls, module) for module in once] == [3] * len(once)

    def test_several_sequences_share_one_encoding(self, model, prompts):
        with recorded_calls(model.model.norm) as calls:
            model.generate(prompts, do_sample=True, num_return_sequences=3)
        assert [len(states) for _, (states,) in calls] == [len(prompts)]

    def test_each_token_passes_through_its_own_expert_only(self, model, prompts, monkeypatch):
        seen, compute = [], expert_heads_yan.one_head
        monkeypatch.setattr(
            expert_heads_yan, "one_head", lambda tokens, *args: seen.append(len(tokens)) or compute(tokens, *args)
        )
        model.flow.gate.expert_proj.weight.data.zero_()  # all are equally probable
        output = model.generate(prompts, num_flow_steps=3, expert_choice="sample", return_dict_in_generate=True)
        (experts,) = output.experts
        assert len(experts.unique()) > 1
        assert seen == 3 * experts.flatten().bincount(minlength=EXPERTS).tolist()

    def test_the_gate_costs_no_pass_of_its_own(self, model, prompts):
        with recorded_calls(model.flow.gate, model.flow.norm) as calls:
            model.generate(prompts, num_flow_steps=3)
        assert [module is model.flow.gate for module, _ in calls] == [False, True, False, False]


class TestEqualsTheModel:
    @pytest.mark.parametrize("num_steps", [1, 3])
    def test_the_tokens_are_those_of_forward_without_labels(self, model, prompts, num_steps):
        logits = model(prompts, num_flow_steps=num_steps).logits
        assert torch.equal(new_tokens(model, prompts, num_flow_steps=num_steps), logits.argmax(-1))

    def test_also_with_padding(self, model, prompts):
        mask = torch.ones_like(prompts)
        mask[0, :3] = mask[1, 4:] = 0
        expected = model(prompts, attention_mask=mask).logits.argmax(-1)
        assert torch.equal(new_tokens(model, prompts, attention_mask=mask), expected)

    def test_the_default_number_of_steps_is_the_configs(self, make_lively_model, prompts):
        model = make_lively_model(num_flow_steps=2)
        assert torch.equal(new_tokens(model, prompts), new_tokens(model, prompts, num_flow_steps=2))
        assert not torch.equal(new_tokens(model, prompts), new_tokens(model, prompts, num_flow_steps=5))

    def test_the_prompt_comes_first_and_untouched(self, model, prompts):
        mask = torch.ones_like(prompts)
        prompts[:2, :3], mask[:2, :3] = PAD, 0
        given = prompts.clone()
        output = model.generate(prompts, attention_mask=mask)
        assert torch.equal(output[:, :7], given)
        assert torch.equal(prompts, given)
        assert torch.equal(output[:, 7:], new_tokens(model, prompts, attention_mask=mask))

    def test_a_step_goes_along_the_velocity_at_its_begin(self, model, prompts):
        output = model.generate(prompts, num_flow_steps=2, return_dict_in_generate=True)
        start, middle, end = output.trajectory[0].unbind(1)
        condition = model.condition(model.model(prompts).last_hidden_state, canvas_length=CANVAS)
        velocity = model.velocity_field(condition, CANVAS, 2)
        assert torch.allclose(middle, start + velocity(start, 0.0) / 2, atol=1e-5)
        assert torch.allclose(end, middle + velocity(middle, 0.5) / 2, atol=1e-5)


class TestLength:
    @pytest.mark.parametrize("length", [1, CANVAS - 1, CANVAS, CANVAS + 1, 4 * CANVAS + 3])
    def test_max_new_tokens_may_have_any_size(self, model, prompts, length):
        tokens = new_tokens(model, prompts, max_new_tokens=length)
        assert tokens.shape == (len(prompts), length)
        assert torch.equal(tokens[:, :CANVAS], new_tokens(model, prompts)[:, :length])

    def test_max_length_counts_the_prompt(self, model, prompts):
        assert torch.equal(model.generate(prompts, max_length=7 + 11), model.generate(prompts, max_new_tokens=11))

    def test_a_passed_configs_max_length_beats_the_models_max_new_tokens(self, model, prompts):
        output = model.generate(prompts, generation_config=GenerationConfig(max_length=7 + 11))
        assert output.shape[1] == 7 + 11

    def test_the_canvas_may_be_chosen(self, model, prompts):
        tokens = new_tokens(model, prompts, canvas_length=12, max_new_tokens=12)
        assert torch.equal(tokens, model(prompts, canvas_length=12).logits.argmax(-1))

    def test_the_second_canvas_continues_the_first(self, model, prompts):
        tokens = new_tokens(model, prompts, max_new_tokens=2 * CANVAS)
        continued = torch.cat([prompts, tokens[:, :CANVAS]], dim=1)
        # The second canvas starts from the noise of the next seed.
        assert torch.equal(tokens[:, CANVAS:], new_tokens(model, continued, seed=1))
        other = continued.clone()
        other[:, 7:] = other[:, 7:].roll(1, 0)
        assert not torch.equal(tokens[:, CANVAS:], new_tokens(model, other, seed=1))

    def test_beyond_the_positions_the_context_slides(self, model, prompts):
        tokens = new_tokens(model, prompts, max_new_tokens=7 * CANVAS)
        assert tokens.shape == (len(prompts), 7 * CANVAS)
        whole = torch.cat([prompts, tokens], dim=1)
        for index in range(4, 7):
            context = whole[:, : 7 + index * CANVAS][:, -POSITIONS:]
            expected = new_tokens(model, context, seed=index)
            assert torch.equal(tokens[:, index * CANVAS :][:, :CANVAS], expected)

    def test_a_prompt_that_fills_all_positions_is_continued(self, model):
        prompt = torch.arange(4, 4 + POSITIONS).unsqueeze(0)
        tokens = new_tokens(model, prompt, max_new_tokens=2 * CANVAS)
        context = torch.cat([prompt, tokens[:, :CANVAS]], dim=1)[:, -POSITIONS:]
        assert torch.equal(tokens[:, CANVAS:], new_tokens(model, context, seed=1))


class TestEndOfText:
    def test_text_is_cut_at_the_first_eos_where_that_is_asked_for(self, model, prompts):
        free = new_tokens(model, prompts)
        write_eos_at(model, 3, 5)
        tokens = new_tokens(model, prompts, max_new_tokens=4 * CANVAS, eos_strategy="first")
        assert torch.equal(tokens[:, :3], free[:, :3])
        assert tokens[:, 3:].tolist() == [[EOS]] * len(prompts)

    def test_an_eos_that_is_not_followed_by_the_fill_ends_no_text(self, model, prompts):
        free = new_tokens(model, prompts)
        write_eos_at(model, 3, *range(6, CANVAS))
        tokens = new_tokens(model, prompts)
        assert torch.equal(tokens[:, [0, 1, 2, 4, 5]], free[:, [0, 1, 2, 4, 5]])
        assert tokens[:, 6:].tolist() == [[EOS]] * len(prompts)
        assert (tokens[:, :6] != EOS).all()

    def test_a_row_that_ended_is_padded_while_others_go_on(self, model, prompts):
        ends = torch.tensor([0, 2, 4, 6, 8, 8])  # 8: no EOS in the canvas
        end_rows_at(model, ends)
        tokens = new_tokens(model, prompts, max_new_tokens=2 * CANVAS)
        assert tokens.shape == (6, 2 * CANVAS)
        for row, end in zip(tokens, ends):
            is_pad = torch.arange(2 * CANVAS) > (end if end < CANVAS else 2 * CANVAS)
            assert torch.equal(row == PAD, is_pad)
            assert (row == EOS).sum() == (end < CANVAS)

    def test_min_new_tokens_forbids_eos_up_to_there(self, model, prompts):
        write_eos_at(model, *range(CANVAS))
        tokens = new_tokens(model, prompts, min_new_tokens=CANVAS + 3, max_new_tokens=4 * CANVAS)
        assert tokens.shape[1] == CANVAS + 4
        assert (tokens == EOS).nonzero()[:, 1].tolist() == [CANVAS + 3] * len(prompts)

    @pytest.mark.parametrize("return_prompt", [True, False])
    def test_what_is_cut_to_the_longest_text_can_be_viewed_as_any_tensor(self, model, prompts, return_prompt):
        end_rows_at(model, torch.tensor([0, 1, 2, 1, 0, 3]))
        sequences = model.generate(prompts, return_prompt=return_prompt)
        assert sequences.shape[1] == 4 + 7 * return_prompt
        assert len(sequences.view(-1)) == sequences.numel()

    def test_min_length_counts_the_prompt(self, model, prompts):
        write_eos_at(model, *range(CANVAS))
        assert torch.equal(model.generate(prompts, min_length=7 + 3), model.generate(prompts, min_new_tokens=3))

    def test_any_id_of_an_eos_list_ends_a_text(self, model, prompts):
        free = new_tokens(model, prompts)
        stops = [int(free[0, -1]), int(free[1, -1]), EOS]
        model.lm_head.bias.data[stops] = -1e4
        free = new_tokens(model, prompts)
        end_rows_at(model, [2, CANVAS, CANVAS, CANVAS, CANVAS, CANVAS], stops[0])
        end_rows_at(model, [CANVAS, 4, CANVAS, CANVAS, CANVAS, CANVAS], stops[1])
        tokens = new_tokens(model, prompts, eos_token_id=stops)
        for row, free_row, (end, stop) in zip(tokens, free, [(2, stops[0]), (4, stops[1])]):
            assert row.tolist() == [*free_row[:end].tolist(), stop] + [PAD] * (CANVAS - end - 1)
        assert torch.equal(tokens[2:], free[2:])

    def test_suppressed_tokens_are_replaced_by_the_next_best(self, model, prompts):
        logits = model(prompts).logits
        banned = logits.argmax(-1).unique().tolist()[:2]
        logits[..., banned] = -torch.inf
        assert torch.equal(new_tokens(model, prompts, suppress_tokens=banned), logits.argmax(-1))

    def test_tokens_per_forward_counts_each_rows_tokens_with_its_eos(self, model, prompts):
        ends = torch.tensor([0, 2, 4, 6, 7, 8])
        end_rows_at(model, ends)
        output = model.generate(prompts, num_flow_steps=2, return_dict_in_generate=True)
        assert output.tokens_per_forward.tolist() == [0.5, 1.5, 2.5, 3.5, 4.0, 4.0]


class TestIndependence:
    """`do_sample=False`: a prompt's result depends on nothing but the prompt."""

    @pytest.fixture
    def rows(self, prompts) -> list[torch.LongTensor]:
        """Prompts of several lengths."""
        return [row[: 2 + index] for index, row in enumerate(prompts)]

    @pytest.fixture
    def alone(self, model, rows) -> list[list[int]]:
        return [new_tokens(model, row.unsqueeze(0), max_new_tokens=20)[0].tolist() for row in rows]

    def test_repeated_calls_agree_and_prompts_matter(self, model, rows, alone):
        again = [new_tokens(model, row.unsqueeze(0), max_new_tokens=20)[0].tolist() for row in rows]
        assert again == alone
        assert len({tuple(tokens) for tokens in alone}) > len(rows) // 2  # short prompts may have one answer

    @pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
    def test_neither_batch_mates_nor_padding_matter(self, model, rows, alone, side):
        ids, mask = torch.full((len(rows), 12), 9), torch.zeros(len(rows), 12, dtype=torch.long)
        for index, row in enumerate(rows):
            places = {
                "left": torch.arange(12 - len(row), 12),
                "right": torch.arange(len(row)),
                "both": torch.arange(2, 2 + len(row)),
                "holes": torch.randperm(12)[: len(row)].sort().values,
            }[side]
            ids[index, places], mask[index, places] = row, 1
        tokens = new_tokens(model, ids, attention_mask=mask, max_new_tokens=20)
        assert tokens.tolist() == alone

    def test_nor_the_order_and_size_of_the_batch(self, model, prompts):
        whole = new_tokens(model, prompts, max_new_tokens=20)
        for picked in ([3], [5, 0], [4, 4, 2, 1]):
            assert torch.equal(new_tokens(model, prompts[picked], max_new_tokens=20), whole[picked])

    def test_nor_a_mate_that_ends_early(self, model, prompts):
        whole = new_tokens(model, prompts, max_new_tokens=20)
        end_rows_at(model, [3, CANVAS])
        tokens = new_tokens(model, prompts[:2], max_new_tokens=20)
        assert (tokens[0, 4:] == PAD).all()
        assert torch.equal(tokens[1], whole[1])

    @pytest.mark.parametrize("expert_choice", ["argmax", "sample", "mixture"])
    def test_whatever_the_choice_of_experts(self, model, prompts, expert_choice):
        whole = new_tokens(model, prompts, expert_choice=expert_choice)
        assert torch.equal(new_tokens(model, prompts[3:], expert_choice=expert_choice), whole[3:])

    def test_the_global_random_state_is_neither_used_nor_changed(self, model, prompts):
        state = torch.get_rng_state()
        first = new_tokens(model, prompts)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(6)
        assert torch.equal(new_tokens(model, prompts), first)


class TestSampling:
    def test_a_seed_repeats_and_another_one_differs(self, model, prompts):
        options = {"do_sample": True, "max_new_tokens": 2 * CANVAS}
        first = new_tokens(model, prompts, seed=3, **options)
        assert torch.equal(new_tokens(model, prompts, seed=3, **options), first)
        assert not torch.equal(new_tokens(model, prompts, seed=4, **options), first)

    def test_a_generator_repeats(self, model, prompts):
        def draw(seed):
            return new_tokens(model, prompts, do_sample=True, generator=torch.Generator().manual_seed(seed))

        assert torch.equal(draw(3), draw(3))
        assert not torch.equal(draw(3), draw(4))

    def test_the_global_seed_repeats(self, model, prompts):
        def draw(seed):
            torch.manual_seed(seed)
            return new_tokens(model, prompts, do_sample=True)

        assert torch.equal(draw(3), draw(3))
        assert not torch.equal(draw(3), draw(4))

    def test_without_a_seed_every_call_differs(self, model, prompts):
        draws = [new_tokens(model, prompts, do_sample=True) for _ in range(2)]
        assert not torch.equal(*draws)

    def test_rows_get_noise_of_their_own(self, model, prompts):
        output = model.generate(prompts[:1].repeat(2, 1), do_sample=True, seed=1, return_dict_in_generate=True)
        start = output.trajectory[0][:, 0]
        assert not torch.isclose(start[0], start[1]).any()

    def test_the_temperature_scales_the_start_noise(self, model, prompts):
        def start(**options):
            output = model.generate(prompts, do_sample=True, seed=1, return_dict_in_generate=True, **options)
            return output.trajectory[0][:, 0]

        assert torch.equal(start(temperature=0.5), 0.5 * start())

    def test_temperature_zero_starts_at_the_origin(self, model, prompts, monkeypatch):
        tokens = [new_tokens(model, prompts, do_sample=True, temperature=0.0, seed=seed) for seed in (1, 2)]
        monkeypatch.setattr(model, "start_noise", lambda shape, like, seed=0: like.new_zeros(*shape, HIDDEN))
        assert torch.equal(tokens[0], model(prompts).logits.argmax(-1))
        assert torch.equal(tokens[0], tokens[1])

    def test_several_sequences_come_in_repeat_interleave_order(self, model, prompts):
        options = {"do_sample": True, "seed": 5, "max_new_tokens": 12}
        output = model.generate(prompts, num_return_sequences=3, **options)
        assert torch.equal(output, model.generate(prompts.repeat_interleave(3, 0), **options))
        assert torch.equal(output[:, :7], prompts.repeat_interleave(3, 0))
        assert not torch.equal(output[0], output[1])


class TestExperts:
    def test_argmax_takes_the_gates_favourite(self, model, prompts):
        output = model.generate(prompts, return_dict_in_generate=True)
        assert torch.equal(output.experts[0], output.gate[0].argmax(-1))

    def test_a_sample_follows_the_gate(self, model):
        prompts = torch.randint(4, VOCABULARY, (200, 3))
        options = {"do_sample": True, "seed": 2, "num_flow_steps": 1}
        output = model.generate(prompts, expert_choice="sample", return_dict_in_generate=True, **options)
        usage = nn.functional.one_hot(output.experts[0], EXPERTS).float().mean((0, 1))
        assert torch.allclose(usage, output.gate[0].mean((0, 1)), atol=0.06)  # 4 sigma at 1,600 draws, at most
        assert not torch.equal(output.experts[0], output.gate[0].argmax(-1))

    def test_a_sample_is_not_a_function_of_the_start_noise(self, model, prompts):
        output = model.generate(prompts, expert_choice="sample", do_sample=True, seed=3, return_dict_in_generate=True)
        uniform = hashed_uniform(3, output.gate[0].shape)  # what the noise of seed 3 is made of
        from_noise = (output.gate[0].log() - torch.log(-torch.log(uniform))).argmax(-1)
        assert not torch.equal(output.experts[0], from_noise)

    def test_a_samples_seed_repeats(self, model, prompts):
        options = {"do_sample": True, "expert_choice": "sample"}
        assert torch.equal(
            new_tokens(model, prompts, seed=3, **options), new_tokens(model, prompts, seed=3, **options)
        )

    def test_the_mixture_moves_along_the_weighted_mean_of_all_experts(self, model, prompts):
        output = model.generate(prompts, expert_choice="mixture", num_flow_steps=1, return_dict_in_generate=True)
        assert output.experts is None
        start, end = output.trajectory[0].unbind(1)
        condition = model.condition(model.model(prompts).last_hidden_state, canvas_length=CANVAS)
        modulation = model.flow.modulation(torch.zeros(1))
        states = model.flow.trunk(start, model._positions(CANVAS), modulation, condition)
        expected = (model.flow.velocities(states, start) * output.gate[0].unsqueeze(-1)).sum(-2)
        assert torch.allclose(end - start, expected, atol=1e-4)

    @pytest.mark.parametrize("scope", ["token", "sequence"])
    def test_ranked_sequences_have_one_expert_after_the_other(self, make_lively_model, prompts, scope):
        model = make_lively_model(expert_scope=scope)
        options = {"expert_choice": "ranked", "num_return_sequences": 3, "return_dict_in_generate": True}
        output = model.generate(prompts, **options)
        order = output.gate[0].argsort(-1, descending=True)[::3]  # the gate is the same for all sequences of a prompt
        for rank in range(3):
            assert torch.equal(output.experts[0][rank::3], order[..., rank])
        plain = model.generate(prompts, expert_choice="argmax")
        if scope == "token":
            assert torch.equal(output.sequences[::3], plain)
        else:  # of the experts, the one that writes the most probable text
            ranked = output.sequences[:, : plain.shape[1]].unflatten(0, (-1, 3))
            assert (ranked == plain.unsqueeze(1)).all(-1).any(-1).all()
        assert not torch.equal(output.sequences[::3], output.sequences[1::3])
        assert torch.equal(model.generate(prompts[3:], **options).sequences, output.sequences[9:])

    def test_ranks_are_kept_from_canvas_to_canvas(self, model, prompts):
        options = {"expert_choice": "ranked", "min_new_tokens": 2 * CANVAS, "max_new_tokens": 2 * CANVAS}
        together = model.generate(prompts, num_return_sequences=2, return_dict_in_generate=True, **options)
        for canvas, experts, gate in zip(range(2), together.experts, together.gate, strict=True):
            order = gate.argsort(-1, descending=True)
            assert torch.equal(experts[0::2], order[0::2, :, 0]), canvas
            assert torch.equal(experts[1::2], order[1::2, :, 1]), canvas

    def test_one_expert_needs_no_choice(self, make_lively_model, prompts):
        model = make_lively_model(num_experts=1)
        tokens = [new_tokens(model, prompts, expert_choice=choice) for choice in ("argmax", "mixture")]
        assert torch.equal(*tokens)


class TestOutput:
    def test_fields_and_shapes(self, model, prompts):
        options = {"num_flow_steps": 3, "max_new_tokens": CANVAS + 2, "do_sample": True, "num_return_sequences": 2}
        output = model.generate(prompts, return_dict_in_generate=True, **options)
        assert isinstance(output, YanGenerationOutput)
        assert output.sequences.shape == (12, 7 + CANVAS + 2)
        assert output.num_trunk_passes == 6
        assert output.tokens_per_forward.tolist() == pytest.approx([(CANVAS + 2) / 6] * 12)
        assert [path.shape for path in output.trajectory] == [(12, 4, CANVAS, HIDDEN)] * 2
        assert [experts.shape for experts in output.experts] == [(12, CANVAS)] * 2
        assert [gate.shape for gate in output.gate] == [(12, CANVAS, EXPERTS)] * 2
        assert all(torch.allclose(gate.sum(-1), torch.ones(12, CANVAS)) for gate in output.gate)

    def test_the_sequences_are_those_of_a_plain_call(self, model, prompts):
        output = model.generate(prompts, return_dict_in_generate=True, max_new_tokens=20)
        assert torch.equal(output.sequences, model.generate(prompts, max_new_tokens=20))

    def test_the_trajectory_leads_from_the_start_noise_to_the_tokens(self, model, prompts):
        output = model.generate(prompts, return_dict_in_generate=True, max_new_tokens=2 * CANVAS)
        for index, path in enumerate(output.trajectory):
            noise = model.start_noise((1, CANVAS), path, seed=index)
            assert torch.equal(path[:, 0], noise.expand_as(path[:, 0]))
            tokens = output.sequences[:, 7 + index * CANVAS :][:, :CANVAS]
            assert torch.equal(model.decode(path[:, -1]).argmax(-1), tokens)

    def test_logits_in_parts_give_the_same_tokens(self, model, prompts, monkeypatch):
        whole, widths = model.generate(prompts), []
        model.lm_head.register_forward_hook(lambda _, args, output: widths.append(len(output)))
        monkeypatch.setattr(decoding_yan, "MAX_LOGITS_CPU", 2 * CANVAS * VOCABULARY)
        assert torch.equal(model.generate(prompts), whole)
        assert widths == [2, 2, 2]

    def test_without_the_prompt(self, model, prompts):
        assert torch.equal(model.generate(prompts, return_prompt=False), model.generate(prompts)[:, 7:])

    def test_half_precision_writes_text(self, model, prompts):
        output = model.to(torch.bfloat16).generate(prompts, return_dict_in_generate=True)
        assert output.trajectory[0].dtype == torch.bfloat16
        assert output.sequences.shape == (6, 7 + CANVAS)
