"""Reading a canvas off as a chain: sums and maxima over all paths against counting every path."""

from itertools import pairwise, product

import pytest
import torch

from modeling_yan import YanForFlowGeneration
from modeling_yan.chains_yan import best_path, log_partition, path_score

NUM_CANDIDATES = 3


def random_chain(length, batch_size=2):
    torch.manual_seed(length)
    shape = (batch_size, length - 1, NUM_CANDIDATES, NUM_CANDIDATES)
    return 2 * torch.randn(batch_size, length, NUM_CANDIDATES), 2 * torch.randn(shape)


def all_scores(emissions, transitions):
    """Every path, and its score (paths, B), added up token by token."""
    paths = list(product(range(NUM_CANDIDATES), repeat=emissions.shape[1]))
    scores = [
        sum(emissions[:, place, token] for place, token in enumerate(path))
        + sum(transitions[:, place, a, b] for place, (a, b) in enumerate(pairwise(path)))
        for path in paths
    ]
    return paths, torch.stack(scores)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 8])
def test_sums_and_best_paths_are_those_of_counting_every_path(length):
    emissions, transitions = random_chain(length)
    paths, scores = all_scores(emissions, transitions)
    torch.testing.assert_close(log_partition(emissions, transitions), scores.logsumexp(0))
    assert best_path(emissions, transitions).tolist() == [list(paths[best]) for best in scores.argmax(0)]
    for index in (0, len(paths) // 2, -1):
        path = torch.tensor(paths[index]).expand(len(emissions), -1)
        torch.testing.assert_close(path_score(emissions, transitions, path), scores[index])


@pytest.mark.parametrize("length", [1, 4, 7])
def test_the_gradient_of_the_sum_is_the_probability_of_each_token(length):
    emissions, transitions = random_chain(length)
    emissions.requires_grad_()
    log_partition(emissions, transitions).sum().backward()
    paths, scores = all_scores(emissions.detach(), transitions)
    weights = scores.softmax(0)
    expected = torch.zeros_like(emissions)
    for path, weight in zip(paths, weights, strict=True):
        for place, token in enumerate(path):
            expected[:, place, token] += weight
    torch.testing.assert_close(emissions.grad, expected)


def test_a_long_chain_keeps_its_scores():
    """The filling up to a power of two counts for nothing, in the sum and in the gradient."""
    emissions, transitions = random_chain(130)
    transitions.requires_grad_()
    alpha = emissions[:, 0]
    for place in range(129):
        alpha = (alpha.unsqueeze(-1) + transitions[:, place]).logsumexp(1) + emissions[:, place + 1]
    (expected,) = torch.autograd.grad(alpha.logsumexp(-1).sum(), transitions)
    total = log_partition(emissions, transitions)
    torch.testing.assert_close(total, alpha.logsumexp(-1))
    (gradient,) = torch.autograd.grad(total.sum(), transitions)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    model = YanForFlowGeneration(make_config(crf_rank=4, crf_candidates=5)).eval()
    with torch.no_grad():
        model.transitions.to_proj.weight.normal_()
        model.transitions.gate.weight.normal_()
    return model


def test_the_loss_is_the_likelihood_among_all_texts(model):
    """Counted over every text; pairs of which one is no candidate have no score."""
    size, length = 8, 3
    logits, latents = torch.randn(2, length, size), torch.randn(2, length, 32)
    targets = torch.stack([logits[0].argmax(-1), logits[1].argmin(-1)])  # candidates, and none
    targets[1, 1] = logits[1, 1].argmax(-1)
    embedding = torch.nn.Embedding.from_pretrained(torch.randn(size, 32))
    is_candidate = torch.zeros_like(logits).scatter(-1, logits.topk(5, dim=-1).indices, 1.0)
    states = model.transitions.norm(embedding.weight)
    gates = 1 + model.transitions.gate(latents).unsqueeze(-2)  # (2, 3, 1, R)
    tables = (model.transitions.from_proj(states) * gates) @ model.transitions.to_proj(states).T  # (2, 3, V, V)
    tables = tables[:, :-1] * is_candidate[:, :-1, :, None] * is_candidate[:, 1:, None]
    expected = 0.0
    for row in range(2):
        scores = {
            path: sum(logits[row, place, token] for place, token in enumerate(path))
            + sum(tables[row, place, a, b] for place, (a, b) in enumerate(pairwise(path)))
            for path in product(range(size), repeat=length)
        }
        expected -= scores[tuple(targets[row].tolist())] - torch.stack(list(scores.values())).logsumexp(0)
        of_candidates = {
            path: score
            for path, score in scores.items()
            if all(is_candidate[row, place, token] for place, token in enumerate(path))
        }
        best = max(of_candidates, key=of_candidates.get)
        assert model.transitions.most_likely(embedding, logits, latents)[row].tolist() == list(best)
        for eos in best:  # as an end, it is followed by itself alone
            ended = [path for path in of_candidates if all(b == eos for a, b in pairwise(path) if a == eos)]
            text = model.transitions.most_likely(embedding, logits, latents, [eos])[row].tolist()
            assert text == list(max(ended, key=of_candidates.get))
    torch.testing.assert_close(model.transitions.loss(embedding, logits, latents, targets), expected / 6)


@pytest.mark.parametrize("num_candidates", [5, 64])
def test_without_scores_the_loss_is_the_cross_entropy_of_the_tokens(make_model, num_candidates):
    """Also where all of the vocabulary are candidates, and for targets that are none."""
    model = make_model(crf_rank=4, crf_candidates=num_candidates)
    terms = model(torch.randint(10, 60, (4, 6)), labels=torch.randint(10, 60, (4, 8)))
    torch.testing.assert_close(terms.crf_loss, terms.ce_loss)


def test_projections_of_candidates_and_of_the_vocabulary_agree(model):
    """Many candidates are looked up in the projected vocabulary."""
    embedding, transitions = model.model.embeddings.word_embeddings, model.transitions
    candidates = torch.randint(0, model.config.vocab_size, (4, 8, 5))
    assert candidates.numel() > model.config.vocab_size
    latents = torch.randn(4, 8, 32)
    few = torch.cat(
        [transitions.scores(embedding, candidates[row, None, :2], latents[row, None, :2]) for row in range(4)]
    )
    torch.testing.assert_close(transitions.scores(embedding, candidates, latents)[:, :1], few)


def test_a_fresh_model_reads_every_token_by_itself_and_the_option_turns_chains_off(make_config, model):
    prompts = torch.randint(10, 60, (3, 6))
    options = {"max_new_tokens": 8, "canvas_length": 8, "return_prompt": False}
    by_token = model.generate(prompts, crf_decoding=False, min_new_tokens=8, **options)
    output = model(prompts, canvas_length=8)
    without_eos = output.logits
    without_eos[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(by_token, without_eos.argmax(-1))
    chain = model.generate(prompts, min_new_tokens=8, **options)
    assert torch.equal(chain, model.most_likely(without_eos, output.latents))
    assert not torch.equal(chain, by_token)

    fresh = YanForFlowGeneration(make_config(crf_rank=4)).eval()
    output = fresh(prompts, canvas_length=8)
    assert torch.equal(fresh.most_likely(output.logits, output.latents, ()), output.logits.argmax(-1))


def test_forbidden_tokens_are_in_no_chain(model):
    prompts = torch.randint(10, 60, (3, 6))
    allowed = [7, 11, 13]  # fewer than the candidates
    forbidden = [token for token in range(model.config.vocab_size) if token not in allowed]
    tokens = model.generate(prompts, max_new_tokens=8, suppress_tokens=forbidden, return_prompt=False)
    assert set(tokens.unique().tolist()) <= set(allowed)


def test_rows_read_off_in_parts_or_alone_give_the_same_text(model):
    prompts = torch.randint(10, 60, (4, 6))
    together = model.generate(prompts, max_new_tokens=8)
    alone = [model.generate(prompts[row : row + 1], max_new_tokens=8)[0] for row in range(4)]
    for row in range(4):
        width = len(alone[row])
        assert torch.equal(together[row, :width], alone[row])


def test_chains_learn_names_that_tokens_by_themselves_mix(make_config):
    """Two names of two tokens, equally likely: by itself every token is a coin's throw, as a chain never mixed."""
    torch.manual_seed(0)
    model = YanForFlowGeneration(make_config(crf_rank=4, canvas_length=4))
    names = torch.tensor([[20, 30], [21, 31]])
    embedding = model.model.embeddings.word_embeddings
    optimizer = torch.optim.Adam(model.transitions.parameters(), lr=0.05)
    logits, latents = torch.full((2, 2, model.config.vocab_size), -5.0), torch.zeros(2, 2, 32)
    logits[:, 0, names[:, 0]] = logits[:, 1, names[:, 1]] = 0.0
    for _ in range(60):
        loss = model.transitions.loss(embedding, logits, latents, names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() / 2, abs=0.03)  # one choice for two tokens
    logits[0, 0, 20] += 1.0
    logits[1, 0, 21] += 1.0
    assert torch.equal(model.most_likely(logits, latents), names)


@pytest.mark.parametrize("changes", [{"crf_rank": -1}, {"crf_candidates": 0}, {"crf_weight": -1}])
def test_numbers_out_of_range_are_refused(make_config, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_config(**changes)


def test_the_chain_trains_the_model_with_its_transitions(make_config):
    trained = {"freeze_encoder": False, "freeze_embeddings": False}
    plain, chained = (YanForFlowGeneration(make_config(crf_rank=rank, **trained)).eval() for rank in (0, 4))
    chained.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(chained.transitions.to_proj.weight)
    ids = torch.randint(10, 60, (2, 6))
    gradients = []
    for model in (plain, chained):
        model(ids, labels=ids.flip(1)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    same = {name: torch.allclose(gradients[1].pop(name), gradient) for name, gradient in gradients[0].items()}
    differing = [name for name, is_same in same.items() if not is_same]
    parts = {".".join(name.split(".")[:2]) for name in differing}
    assert parts >= {"model.layers", "model.embeddings", "flow.layers", "flow.experts"}
    assert {name.split(".")[0] for name in gradients[1]} == {"transitions"}
    assert all(gradient.any() for gradient in gradients[1].values())


def test_the_transitions_of_a_finished_model_learn_alone(make_config):
    frozen = {f"freeze_{part}": True for part in ("encoder", "decoder", "embeddings", "flow")}
    model = YanForFlowGeneration(make_config(crf_rank=4, **frozen)).train()
    ids = torch.randint(10, 60, (2, 6))
    model(ids, labels=ids.flip(1)).loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"transitions"}


def test_half_precision_trains_and_writes(model):
    model = model.to(torch.bfloat16).train()
    ids = torch.randint(10, 60, (2, 6))
    output = model(ids, labels=ids.flip(1))
    assert output.crf_loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.transitions.parameters())
    assert model.eval().generate(ids, max_new_tokens=8, min_new_tokens=8).shape == (2, 14)
