"""Tests of diffurec.py and prepare_data.py, in the order of the files.

Each compares with something independent: numbers worked out by hand, a plain and slow
version written from the paper, brute force. `pytest -q -k NAME` grades your own version of
a function: it needs nothing that stands later in diffurec.py, and says which equation is
not met. NAME is beta_schedule, q_sample, q_posterior, step_embedding, attention
(TransformerBlock.forward), gru (GRU.forward), approximate, forward, reverse, scores,
recommend, load_sequences, train_batches, eval_batches, ranks, metrics or evaluate. No other
test has one of these words in its name.
"""

import collections
import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffurec
import prepare_data

# On small tensors two threads only wait for each other, beside other programs long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that are started here
SCHEDULES = ("truncated_linear", "linear", "cosine", "sqrt")
property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# The names of the rows are others, since -k gru would choose a row called gru.
both_approximators = pytest.mark.parametrize(
    "approximator", ["transformer", "gru"], ids=["transformer", "recurrent"]
)


def config(**changes):
    """Small, exact (float32) and without dropout."""
    small = {"steps": 4, "hidden": 8, "heads": 2, "blocks": 2, "precision": "float32"}
    small |= {"dropout": 0.0, "embedding_dropout": 0.0, "max_len": 6, "batch_size": 8}
    return diffurec.Config(**(small | changes))


def randomised(module):
    """With LayerNorms and biases that are random too, or some mistakes would not show."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def model_of(n_items=12, **changes):
    torch.manual_seed(0)
    return randomised(diffurec.DiffuRec(n_items, config(**changes)))


def text_of(users):
    return "".join(" ".join(map(str, user)) + "\n" for user in users)


def sequences_of(users):
    """What load_sequences makes of users, lists of item ids."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.txt").write_text(text_of(users))
        return diffurec.load_sequences(Path(folder, "x.txt"))


def random_users(seed, count=20, shortest=3, longest=9):
    """Users of 30 items, each of which the first one has."""
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(count - 1)]
    return [[*range(30, 0, -1)], *(draw.choices(range(1, 31), k=length) for length in lengths)]


def padded(*histories):
    """The histories as the rows of one batch, padded on the left."""
    longest = max(map(len, histories))
    return torch.tensor([[0] * (longest - len(history)) + history for history in histories])


def close(got, want, equation, rtol=1e-4, atol=1e-5):
    """The tolerances are those of a few sums and products in float32."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m: f"{equation}\n{m}")


HISTORIES = ([3], [5, 1, 5, 7], [12, 2], [1, 2, 3, 4, 5, 6])
TARGETS = torch.tensor([9, 10, 3, 11])


# ---- 1. Settings --------------------------------------------------------------------------------
def test_settings_have_the_papers_values_and_are_refused_out_of_range():
    """§5.3; schedule, approximator and rounding are those of Table 3's last row."""
    paper = {"lr": 0.001, "batch_size": 512, "dropout": 0.1, "hidden": 128, "blocks": 4, "heads": 4}
    paper |= {"delta": 0.001, "steps": 32, "max_len": 50, "schedule": "truncated_linear"}
    paper |= {"approximator": "transformer", "rounding": "inner_product"}
    assert paper.items() <= dataclasses.asdict(diffurec.Config()).items()
    wrong = {"seed": -1, "hidden": 130}  # no multiple of 4 heads
    wrong |= dict.fromkeys(("epochs", "eval_every", "patience", "batch_size", "steps"), 0)
    wrong |= {"lr": math.nan, "delta": -0.1, "embedding_std": math.inf, "embedding_dropout": 1}
    wrong |= dict.fromkeys(("schedule", "approximator", "rounding", "precision"), "round")
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^{name}\b.* {value}\b"):
            diffurec.Config(**{name: value})


# ---- 2. Noise schedule --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "steps", "values"),
    [
        ("truncated_linear", 32, {1: 0.01953125 + 0.01, 2: 0.0390625 + 0.005, 32: 0.6253125}),
        # The saw-tooth of Eq. 14: from s = 4 on the value is above 1, and times 0.1.
        ("truncated_linear", 8, {1: 0.3225, 3: 0.9375 + 0.01 / 3, 4: 0.12525, 8: 0.250125}),
        ("truncated_linear", 2, {1: 0.501, 2: 0.999}),  # 5.01 and 10.005, truncated: 1.0005
        ("linear", 1000, {1: 0.0001, 1000: 0.02}),
        ("linear", 10, {1: 0.01, 10: 0.999}),
        # ᾱ at u = 1/2: cos(0.508/1.008 * 90 degrees)² = 0.493767, at u = 0: 0.999845.
        ("cosine", 2, {1: 1 - 0.4937668 / 0.9998446, 2: 0.999}),
        # At u = 0: 1 - 0.01, at 1/4: 1 - 0.5000999900, at 1/2: 1 - 0.7071774883.
        ("sqrt", 4, {1: 1 - 0.49990001 / 0.99, 2: 1 - 0.2928225117 / 0.49990001, 4: 0.999}),
    ],
)
def test_beta_schedule_has_the_values_worked_out_by_hand(name, steps, values):
    betas = diffurec.beta_schedule(name, steps)
    for s, value in values.items():  # with the digits written above
        assert betas[s - 1] == pytest.approx(value, rel=1e-6), f"Eq. 14, §5.5: β_{s}, {name}"


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_schedule_has_float64_within_0_and_1_for_every_number_of_steps(name):
    for steps in range(1, 1001):
        betas = diffurec.beta_schedule(name, steps)
        assert (betas.shape, betas.dtype) == ((steps,), np.float64), f"§4.3: β_1..β_{steps}, {name}"
        assert 0 < betas.min() <= betas.max() < 1, f"Eq. 1: a variance; {name}, {steps} steps"


# ---- 3. Diffusion -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
def test_q_sample_is_s_plus_1_steps_of_equation_1(name):
    """Each step multiplies all by √(1 - β) and adds noise of the variance β."""
    x_start, noise = torch.randn(2, 8, 3)
    share, variance, want = 1.0, 0.0, []
    for row, beta in enumerate(diffurec.beta_schedule(name, 8)):
        share *= math.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
        want.append(share * x_start[row] + math.sqrt(variance) * noise[row])
    s = torch.tensor([7, 0, 3, 3, 1, 6])
    x_s = diffurec.Diffusion(name, 8).q_sample(x_start[s], s, noise[s])
    close(x_s, torch.stack(want)[s], f"Eq. 2: √ᾱ_s x_start + √(1 - ᾱ_s) ε, {name}")


def alpha_bar(betas, s):
    """ᾱ of Eq. 3 after s steps; before the first, s = 0, it is 1."""
    return math.prod(1 - beta for beta in betas[:s])


@pytest.mark.parametrize("steps", [2, 8, 32])
@pytest.mark.parametrize("name", SCHEDULES)
def test_q_posterior_is_bayes_rule(name, steps):
    """On a grid of x_{s-1}: q(x_{s-1} | x_start) q(x_s | x_{s-1}), normalised."""
    betas = diffurec.beta_schedule(name, steps)
    grid = np.linspace(-10, 10, 100_001)
    x_start, x_s = torch.randn(2, steps, 1)  # float32, as the tolerance is
    s = torch.arange(steps).flip(0)  # the last row has index 0
    mean, variance = diffurec.Diffusion(name, steps).q_posterior(x_start, x_s, s)
    for row, index in enumerate(s.tolist()[:-1]):
        bar = alpha_bar(betas, index)
        log = -((grid - math.sqrt(bar) * x_start[row].item()) ** 2) / (2 * (1 - bar))
        log -= (x_s[row].item() - math.sqrt(1 - betas[index]) * grid) ** 2 / (2 * betas[index])
        weights = np.exp(log - log.max())
        want = np.average(grid, weights=weights)
        want_variance = np.average((grid - want) ** 2, weights=weights)
        assert mean[row].item() == pytest.approx(want, rel=1e-5, abs=2e-6), f"Eq. 4, 5: {index=}"
        assert variance[row].item() == pytest.approx(want_variance, rel=1e-5), f"Eq. 6: {index=}"
    close(mean[-1], x_start[-1], "Eq. 5: at index 0 the mean is x_start")
    assert variance[-1] == 0, "Eq. 6: at index 0 the variance is 0"


# ---- 4. Approximator ----------------------------------------------------------------------------
def plain_step_embedding(s, dim):
    """PE(s, 2i) = sin(s / 10000^(2i/dim)), PE(s, 2i+1) = cos(the same)."""
    angles = [s / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)])


def test_step_embedding_is_the_sinusoids_of_the_transformers_paper():
    for dim in (2, 8, 128):
        want = torch.stack([plain_step_embedding(s, dim) for s in range(32)])
        close(diffurec.step_embedding(torch.arange(32), dim), want, "Eq. 13: d, by §3.5 of [37]")


def plain_block(block, x, real):
    """One history (L, d), in which `real` are the positions of items, head by head."""
    query, key, value = block.query_key_value(block.norm(x)).chunk(3, dim=1)
    size = query.shape[1] // block.heads
    heads = []
    for part in (slice(h * size, (h + 1) * size) for h in range(block.heads)):
        powers = (query[:, part] @ key[real][:, part].T / math.sqrt(size)).exp()
        heads.append(powers / powers.sum(1, keepdim=True) @ value[real][:, part])
    x = x + block.output(torch.cat(heads, 1))
    norm, expand, _, contract = block.feed_forward
    return x + contract(expand(norm(x)).clamp(min=0))


def plain_transformer(transformer, x, real):
    """Every position in every block."""
    for block in transformer.blocks:
        x = plain_block(block, x, real)
    return transformer.norm(x[-1])


PLAIN = {
    "transformer": plain_transformer,
    "gru": lambda approximator, x, real: approximator.gru(x[real][None])[0][0, -1],  # PyTorch's own
}
MASK = padded(*HISTORIES) > 0


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_that_of_the_transformers_paper_and_sees_no_padding(heads):
    torch.manual_seed(0)
    block = randomised(diffurec.TransformerBlock(config(heads=heads)))
    z = torch.randn(*MASK.shape, 8)
    got, last = block(z, MASK), block(z, MASK, last_only=True)
    equation = "§4.2, [37]: softmax(QKᵀ / √d_k) V of the real positions, then ReLU's network"
    for row, real in enumerate(MASK):  # what stands at padding is nobody's business
        want = plain_block(block, z[row], real)
        close(got[row][real], want[real], equation)
        close(last[row], want[-1:], f"{equation}; last_only")


@pytest.mark.parametrize("silent", ["output", "feed_forward.3"], ids=["first", "second"])
def test_attention_and_the_network_after_it_have_dropout(silent):
    """With one of them silent the other's still shows."""
    block = diffurec.TransformerBlock(config(dropout=0.5))
    for parameter in block.get_submodule(silent).parameters():
        torch.nn.init.zeros_(parameter)
    z = torch.randn(*MASK.shape, 8)
    assert not torch.equal(block(z, MASK), block(z, MASK)), "§4.2, [37]: dropout of each sublayer"


def test_gru_is_the_state_after_the_last_item_and_padding_does_not_move_it():
    approximator, z = diffurec.GRU(config()), torch.randn(*MASK.shape, 8)
    want = torch.stack([PLAIN["gru"](approximator, *row) for row in zip(z, MASK)])
    close(approximator(z, MASK), want, "§5.5, w GRU: the state after the last item")


def test_matrices_begin_xavier_normal_and_embeddings_as_asked_for():
    torch.manual_seed(0)
    model = diffurec.DiffuRec(500, config(hidden=64, embedding_std=0.25))
    wanted = [(model.item_embeddings.weight[1:], 0.25)]
    for block in model.approximator.blocks:
        layers = (block.output, block.feed_forward[1], block.feed_forward[3])
        matrices = [layer.weight for layer in layers] + [*block.query_key_value.weight.split(64)]
        wanted += [(matrix, math.sqrt(2 / sum(matrix.shape))) for matrix in matrices]
    for matrix, std in wanted:
        assert matrix.std().item() / std == pytest.approx(1, abs=5 / math.sqrt(2 * matrix.numel()))
        assert matrix.abs().max() > 3 * std  # normal: uniform ends at 1.73


# ---- 5. DiffuRec --------------------------------------------------------------------------------
def plain_approximate(model, history, x, s):
    """Eq. 13 and 12 as they stand; s is a step for each history. Draws λ."""
    delta, d = model.config.delta, model.config.hidden
    e = model.embedding_norm(model.item_embeddings.weight[history])
    noise = torch.randn_like(e)
    z = torch.zeros_like(e)
    for b, n in itertools.product(*map(range, history.shape)):
        lambda_ = delta + math.sqrt(delta) * noise[b, n]
        z[b, n] = e[b, n] + lambda_ * (x[b] + plain_step_embedding(s[b], d))
    plain = PLAIN[model.config.approximator]
    return torch.stack([plain(model.approximator, *row) for row in zip(z, history > 0)])


def plain_algorithm_1(model, history):
    """With ᾱ for the paper's α, but √α_s before x_s, as Bayes' rule has it."""
    betas = diffurec.beta_schedule(model.config.schedule, model.config.steps)
    x = torch.randn(len(history), model.config.hidden)
    for s in range(model.config.steps - 1, -1, -1):
        before, after = alpha_bar(betas, s), alpha_bar(betas, s + 1)
        x_hat = plain_approximate(model, history, x, [s] * len(history))
        mean = math.sqrt(before) * betas[s] / (1 - after) * x_hat
        mean = mean + math.sqrt(1 - betas[s]) * (1 - before) / (1 - after) * x
        variance = (1 - before) / (1 - after) * betas[s]
        x = mean + math.sqrt(variance) * torch.randn_like(x)
    return x


def plain_algorithm_2(model, history, target):
    """The loss of lines 10 to 14."""
    table = model.item_embeddings.weight
    betas = diffurec.beta_schedule(model.config.schedule, model.config.steps)
    s = torch.randint(model.config.steps, target.shape).tolist()
    noise = torch.randn(len(target), model.config.hidden)
    x_s = []
    for row, step, item in zip(noise, s, target.tolist()):
        bar = alpha_bar(betas, step + 1)
        x_s.append(math.sqrt(bar) * table[item] + math.sqrt(1 - bar) * row)
    powers = (plain_approximate(model, history, x_s, s) @ table[1:].T).exp()
    likelihoods = powers[range(len(target)), target - 1] / powers.sum(1)
    return -likelihoods.log().mean()


def test_embeddings_pass_dropout_before_their_layer_norm():
    torch.manual_seed(0)
    model = diffurec.DiffuRec(300, config(hidden=64, embedding_dropout=0.5))
    rows = model.embed(torch.arange(1, 301)[None])[0].double()
    assert (rows.square().mean(1) - 1).abs().max() < 5e-3  # its epsilon beside 0.25² / (1 - 0.5)
    dropped = (rows == rows.mode(1).values[:, None]).double().mean().item()
    assert abs(dropped - 0.5) < 5 * 0.5 / math.sqrt(rows.numel())  # five standard errors


@both_approximators
def test_approximate_is_equations_13_and_12_with_the_same_lambda(approximator):
    model = model_of(approximator=approximator, delta=0.2)
    history, x_s, steps = padded(*HISTORIES), torch.randn(4, 8), [3, 0, 1, 2]
    torch.manual_seed(3)
    want = plain_approximate(model, history, x_s, steps)
    generator, e = torch.Generator().manual_seed(3), model.embed(history)
    got = model.approximate(e, history != 0, x_s, torch.tensor(steps), generator)
    close(got, want, "Eq. 13, z_i = e_i + λ_i (x_s + d), λ ~ N(δ, δ), and Eq. 12", rtol=1e-3)


@both_approximators
def test_forward_is_algorithm_2_with_the_same_noise_and_so_are_all_gradients(approximator):
    """Random numbers are drawn in the order of the algorithm: s, then ε, then λ."""
    model = model_of(approximator=approximator, delta=0.2).eval()  # at 0 too dropout draws numbers
    results = []
    for loss_of in (plain_algorithm_2, diffurec.DiffuRec.forward):
        model.zero_grad()
        torch.manual_seed(4)
        loss = loss_of(model, padded(*HISTORIES), TARGETS)
        loss.backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        results.append({"the loss": loss.detach()} | gradients)
    for name, want in results[0].items():
        close(results[1][name], want, f"Algorithm 2, Eq. 9, 13, 12, 18, 19: {name}", rtol=1e-3)
    assert not model.item_embeddings.weight.grad[0].any(), "Eq. 18: padding is no item"


def test_parts_have_together_the_loss_of_the_batch_and_no_needless_padding(monkeypatch):
    model, history, losses = model_of(delta=0.2), padded(*sorted(HISTORIES * 16, key=len)), []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, generator: x.zero_())  # λ = δ
    shapes = [tuple(h.shape) for (h,) in diffurec.split_batch(history)]
    assert shapes == [(32, 2), (16, 4), (8, 6), (4, 6), (4, 6)]
    for split_batch in (diffurec.split_batch, lambda *batch: [batch]):
        monkeypatch.setattr(diffurec, "split_batch", split_batch)
        torch.manual_seed(4)
        losses.append(model(history, torch.arange(64) % 12 + 1))
    close(*losses, "Eq. 18, 19: the mean over the samples of all parts")


@both_approximators
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reverse_is_algorithm_1_with_the_same_noise_and_never_has_dropout(schedule, approximator):
    """No batch mates, no padding have a part in a result. Of eight items six are read."""
    changes = {"dropout": 0.5, "embedding_dropout": 0.5, "delta": 0.2, "steps": 5}
    model = model_of(approximator=approximator, schedule=schedule, **changes)
    history = padded(*HISTORIES, [7, 8, 6, 5, 4, 3, 2, 1])
    torch.manual_seed(3)
    want = plain_algorithm_1(model, history[:, -6:]).detach()
    got = model.reverse(history, torch.Generator().manual_seed(3))
    close(got, want, "Algorithm 1, lines 9 to 14, Eq. 10, 16, 17", rtol=1e-3, atol=1e-4)  # 5 steps
    assert model.training, "the model's mode is the caller's"


@pytest.mark.parametrize("rounding", ["inner_product", "r_star"])
def test_scores_are_equation_20_or_21_and_column_j_is_item_j_plus_1(rounding):
    model, x_0 = model_of(n_items=7, rounding=rounding), torch.randn(5, 8)
    x, e = x_0[:, None], model.item_embeddings.weight[None, 1:]
    want, equation = (x * e).sum(-1), "Eq. 20"
    if rounding == "r_star":
        difference = x / x.norm(dim=-1, keepdim=True) - e / e.norm(dim=-1, keepdim=True)
        want, equation = -(difference**2).sum(-1), "Eq. 21, minus the squared distance"
    close(model.scores(x_0), want, f"{equation}: column j is for item j + 1, and none for padding")


def test_recommend_gives_the_best_items_best_first_and_refuses_what_is_no_history():
    model = model_of(delta=0.5, seed=5)
    history = torch.tensor([[9, 9, 1, 2, 3, 4, 5, 6], [0, 0, 0, 8, 8, 2, 1, 1]])
    before = torch.get_rng_state()
    items, scores = model.recommend(history, 12)
    assert torch.equal(before, torch.get_rng_state()), "the random state is the caller's"
    all_scores = model.scores(model.reverse(history, torch.Generator().manual_seed(5)))
    for row, values, want in zip(items, scores, all_scores):
        assert sorted(row.tolist()) == [*range(1, 13)], "Eq. 11: column j is for item j + 1"
        close(values, want.sort(descending=True)[0], "Eq. 11: the best first; the seed's noise")
        close(values, want[row - 1], "Eq. 11: each item with its own score")
    assert torch.equal(model.recommend(history, 3)[0], items[:, :3]), "Eq. 11: the k best"
    for rows in ([[1, 0]], [[1, 0, 2]], [[0, 0]], [[1, 2], [0, 0]], [[1, 13]], [[-1, 2]]):
        with pytest.raises(ValueError, match="^history: .* 1 to 12.*$"):
            model.recommend(torch.tensor(rows), 3)


@both_approximators
def test_other_number_formats_come_close_to_float32(approximator, monkeypatch):
    """By autocast, as on a processor that has bfloat16, and of the whole model."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    changes = {"approximator": approximator, "hidden": 32, "delta": 0.0}  # in all the same noise
    others = [(model_of(**changes, precision="auto"), 0.03), (model_of(**changes).bfloat16(), 0.03)]
    want = model_of(**changes)(padded(*HISTORIES), TARGETS).item()
    # 8 bits of bfloat16 are 0.4 % of each product; there are six in a row, and their sums
    for model, tolerance in (*others, (model_of(**changes).double(), 1e-5)):
        loss = model(padded(*HISTORIES), TARGETS)
        loss.backward()
        assert loss.item() == pytest.approx(want, rel=tolerance)
        assert tolerance < 0.01 or loss.item() != want
        assert model.recommend(padded(*HISTORIES), 3)[1].isfinite().all()


# ---- 6. Data ------------------------------------------------------------------------------------
GOOD_FILES = {  # a file, and its lines
    b"3 2 1 4": [[3, 2, 1, 4]],
    b"1 2 3\r\n 4 5   6 7 \r\n \n\n": [[1, 2, 3], [4, 5, 6, 7]],
    b"7\n1 9\n3 2 1 8 4\n6 5\n9 9 9\n": [[7], [1, 9], [3, 2, 1, 8, 4], [6, 5], [9, 9, 9]],
    "".join(f"{n} 1 2 3\n" for n in range(1, 10)).encode(): [[n, 1, 2, 3] for n in range(1, 10)],
}
BAD_LINES = [b"1 0 3", b"3 2 0 0", b"1 -2 3", b"1 2.0 3", b"", b"3\t4 1", b"01 2", b"1,2", b"one"]
BAD_LINES += [b"1 2 1234567890", "1 ٢ 3".encode(), b"\xef\xbb\xbf1 2", b"\x1f\x8b\x08\x00\x03"]
BAD_FILES = {b"1 2 3 4\n" + line + b"\n4 3 2 1": ":2: " for line in BAD_LINES} | {
    b"": ":1: ",
    b"1 2 3 4\n2 6 3\n": r":2: .*\b6\b.*\b5\b",  # six is the fifth id
    b"1 2 3\n3 2 1\n1\n": ": no line has four items",
    "".join(f"{n} 1 2 3\n" for n in range(1, 11)).encode(): ":1: ",
}


@pytest.mark.parametrize("content", GOOD_FILES)
def test_load_sequences_reads_the_lines_with_three_items_or_more(tmp_path, content):
    (tmp_path / "x.txt").write_bytes(content)
    sequences, lines = diffurec.load_sequences(tmp_path / "x.txt"), GOOD_FILES[content]
    kept = {number: line for number, line in enumerate(lines, 1) if len(line) >= 3}
    bounds = itertools.pairwise(sequences.offsets.tolist())
    users = [sequences.items[start:end].tolist() for start, end in bounds]
    assert users == [*kept.values()], "§5.1: the items of each user who is kept"
    assert sequences.lines.tolist() == [*kept], "the numbers of their lines in the file"
    got = (sequences.n_users, sequences.n_left_out, sequences.n_items, sequences.digest)
    want = (len(kept), len(lines) - len(kept), max(map(max, lines)))
    assert got == (*want, hashlib.sha256(content).hexdigest()), "users, left out, items, digest"


@pytest.mark.parametrize("content", BAD_FILES)
def test_load_sequences_refuses_with_file_and_line_and_what_to_type(tmp_path, content):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    hint = f"; .*python prepare_data.py NAME --raw {path}$"
    with pytest.raises(ValueError, match=f"^{path}{BAD_FILES[content]}.*{hint}"):
        diffurec.load_sequences(path)


USERS = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=12), max_size=8)
ALL_ITEMS = [*range(1, 10)]  # of one more user, so that no id is missing


def unpadded(batches, batch_size):
    """(history, target) of all batches; padding is on the left and none is needless."""
    for history, target in batches:
        assert history.dtype == target.dtype == torch.int64
        assert len(history) == len(target) <= batch_size, "§5.3: the batch size"
        assert (history[:, 0] > 0).any(), "the longest history of a batch has no padding"
        for row, item in zip(history.tolist(), target.tolist(), strict=True):
            assert row == sorted(row, key=bool), "padding is on the left"
            yield tuple(filter(None, row)), item


@property_test
@given(USERS, st.integers(1, 8), st.integers(1, 90), st.integers(0, 99))
def test_train_batches_have_every_prefix_of_the_training_parts_once(users, max_len, size, seed):
    users, rng = [ALL_ITEMS, *users], np.random.default_rng(seed)
    got = unpadded(diffurec.train_batches(sequences_of(users), max_len, size, rng), size)
    prefixes = [(user[:n], user[n]) for user in users for n in range(1, len(user) - 2)]
    want = sorted((tuple(prefix[-max_len:]), item) for prefix, item in prefixes)
    assert sorted(got) == want, "§5.1: all but the last two items are targets of what is before"


def test_train_batches_are_random_samples_by_the_generator_alone_the_shortest_first():
    sequences, rng, epochs = sequences_of(random_users(2, count=60)), np.random.default_rng(0), []
    for each in (rng, rng, np.random.default_rng(0)):
        epoch = diffurec.train_batches(sequences, 5, 7, each)
        epochs.append([[*unpadded([batch], 7)] for batch in epoch])
    mates = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    assert epochs[0] == epochs[2] and len(mates[0] & mates[1]) < 3, "other mates, by rng alone"
    lengths = [[len(history) for history, _ in batch] for batch in epochs[0]]
    assert lengths == [*map(sorted, lengths)], "the shortest history of a batch first"
    assert np.mean([len({*batch}) > 2 for batch in lengths]) > 0.8, "all lengths share a batch"


@pytest.mark.parametrize(("split", "held_out"), [("validation", 2), ("test", 1)])
@property_test
@given(users=USERS, size=st.integers(1, 9))
def test_eval_batches_have_every_user_once_uncut_the_shortest_first(split, held_out, users, size):
    users = [ALL_ITEMS, *users]
    got = unpadded(diffurec.eval_batches(sequences_of(users), split, size), size)
    want = [(tuple(user[:-held_out]), user[-held_out]) for user in users]
    assert [*got] == sorted(want, key=lambda pair: len(pair[0])), f"§5.1: the {split} item"


# ---- 7. Evaluation ------------------------------------------------------------------------------
def plain_rank(scores, target):
    """1 and all other items that are not below the target."""
    own = scores[target - 1]
    return 1 + sum(score >= own for item, score in enumerate(scores, 1) if item != target)


def plain_metrics(all_ranks):
    totals = {}
    for k in (5, 10, 20):
        gains = [1 / math.log2(rank + 1) for rank in all_ranks if rank <= k]
        totals |= {f"HR@{k}": len(gains), f"NDCG@{k}": sum(gains)}
    return {name: pytest.approx(total / len(all_ranks), 1e-12) for name, total in totals.items()}


@property_test
@given(st.integers(0, 10**9))
def test_ranks_against_brute_force(seed):
    """On scores of few and of many different values."""
    draw = random.Random(seed)
    width, height = draw.randint(1, 40), draw.randint(1, 9)
    values = draw.choice([range(4), range(7, 8), range(-1000, 1000)])
    scores = [[float(draw.choice(values)) for _ in range(width)] for _ in range(height)]
    target = [draw.randint(1, width) for _ in range(height)]
    got = diffurec.ranks(torch.tensor(scores), torch.tensor(target))
    want = [plain_rank(*pair) for pair in zip(scores, target)]
    assert got.tolist() == want, "§5.1: the place among all items, from 1; ties count against it"


def test_ranks_refuse_a_score_that_is_not_finite():
    for value, column in itertools.product((math.nan, math.inf, -math.inf), (0, 3)):
        scores = torch.arange(5.0)[None].index_fill(1, torch.tensor(column), value)
        with pytest.raises(FloatingPointError, match="finite"):
            diffurec.ranks(scores, torch.tensor([1]))  # the target's or another's


@property_test
@given(st.lists(st.integers(1, 25), min_size=1))
def test_metrics_against_brute_force(rank):
    message = "§5.1: HR@K, the share of ranks up to K, and NDCG@K, 1 / log2(rank + 1) of these"
    assert diffurec.metrics(torch.tensor(rank)) == plain_metrics(rank), message


@pytest.mark.parametrize(("split", "held_out"), [("validation", 2), ("test", 1)])
def test_evaluate_is_brute_force_in_both_rankings(split, held_out, tmp_path):
    """A history may hold the target, and may be longer than what is read of it."""
    model, users = model_of(n_items=30, delta=0.5, seed=5), random_users(3, 90, 2, 14)
    kept = {number: user for number, user in enumerate(users, 1) if len(user) > 2}
    before = torch.get_rng_state()
    got = diffurec.evaluate(model, sequences_of(users), split, 16, tmp_path / "file")
    assert torch.equal(before, torch.get_rng_state()), "the random state is the caller's"
    pairs = {}
    torch.manual_seed(5)
    by_length = sorted(kept, key=lambda number: len(kept[number]))
    for numbers in (by_length[first : first + 16] for first in range(0, len(kept), 16)):
        histories = [kept[number][:-held_out] for number in numbers]
        all_scores = model.scores(model.reverse(padded(*histories))).tolist()
        for number, history, scores in zip(numbers, histories, all_scores):
            target = kept[number][-held_out]
            rank = plain_rank(scores, target)
            for item in history:  # the whole one, what is not read too
                scores[item - 1] = -math.inf
            pairs[number] = (rank, plain_rank(scores, target))
            assert target not in history or pairs[number][1] == 30  # the last
    of_all, without = map(plain_metrics, zip(*pairs.values()))
    assert got == {"all items": of_all, "without the history's items": without}, "§5.1: rankings"
    lines = "".join("{} {} {}\n".format(number, *pairs[number]) for number in kept)
    assert (tmp_path / "file").read_text() == lines, "a user's line in the data, and the two ranks"


# ---- 8. Training --------------------------------------------------------------------------------
def test_train_epoch_is_a_step_of_adam_for_each_batch():
    """The same again, with the batches and the random numbers that the epoch used."""
    model, twin = (model_of(n_items=30, delta=0.5, dropout=0.5) for _ in range(2))
    adam, twins_adam = (torch.optim.Adam(each.parameters(), lr=0.01) for each in (model, twin))
    calls, losses, forward = [], [], model.forward
    model.forward = lambda *batch: calls.append((torch.get_rng_state(), batch)) or forward(*batch)
    mean_loss = diffurec.train_epoch(model, sequences_of(random_users(4)), adam, 1)
    for state, batch in calls:
        torch.set_rng_state(state)
        twins_adam.zero_grad()
        loss = twin(*batch)
        loss.backward()
        twins_adam.step()
        losses.extend([loss.item()] * len(batch[1]))
    assert mean_loss == pytest.approx(np.mean(losses), rel=1e-5)  # float32
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_random_numbers_of_an_epoch_follow_from_its_number_and_the_seed():
    """Were they the same in two epochs or for two seeds, nobody would see it."""
    model, seen = model_of(n_items=30), []
    adam, forward = torch.optim.Adam(model.parameters()), model.forward
    model.forward = lambda *batch: seen[-1].append((torch.rand(()), str(batch))) or forward(*batch)
    for model.config.seed, epoch in ((1, 1), (1, 2), (2, 1), (1, 1)):
        seen.append([])
        diffurec.train_epoch(model, sequences_of(random_users(4)), adam, epoch)
    for firsts in zip(*(epoch[0] for epoch in seen)):  # the first noises, the first batches
        assert firsts[0] == firsts[3]
        assert len({str(first) for first in firsts}) == 3


@both_approximators
def test_nothing_waits_for_the_host_or_mixes_devices(approximator, monkeypatch):
    """On the meta device, whose tensors have no values: what asks for one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    item, waits = torch.Tensor.item, []
    counted = {True: lambda x: waits.append(x) or 0.0, False: item}
    monkeypatch.setattr(torch.Tensor, "item", lambda x: counted[x.is_meta](x))
    model = model_of(n_items=30, approximator=approximator, dropout=0.1, batch_size=64).to("meta")
    sequences = sequences_of(random_users(4))
    diffurec.train_epoch(model, sequences, torch.optim.Adam(model.parameters()), 1)
    assert len(waits) == 1  # for the mean loss, at the end
    for history, target in diffurec.eval_batches(sequences, "test", 8, "meta"):
        assert model.scores(model.reverse(history)).is_meta


# ---- 9. Command line ----------------------------------------------------------------------------
TINY = ["--hidden=8", "--blocks=1", "--steps=2", "--batch-size=16", "--eval-every=1", "--epochs=2"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(...) -> what is printed or, with status 2, the line on standard error."""
    monkeypatch.chdir(tmp_path)
    first, *others = random_users(7)  # and a line that is too short
    Path("x.txt").write_text(text_of([first, [1, 2], *others]))

    def run(*arguments, status=0):
        assert diffurec.main(["--data", "x.txt", *map(str, arguments)]) == status
        out, err = capsys.readouterr()
        assert re.fullmatch(r"diffurec\.py: .+\n" if status else "", err)
        return err if status else out

    return run


def snapshot():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def log_of(folder):
    """The lines of the epochs, of which the later counts, and those of the scores."""
    events = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    epochs = {event["epoch"]: event for event in events if "loss" in event}
    return epochs, [event for event in events if "split" in event]


def state_of(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def assert_same_run(*folders):
    """Losses, weights, ranks, metrics, settings are equal to the last bit."""
    tensors, others = [], []
    for folder in folders:
        state, (epochs, scores) = state_of(folder), log_of(folder)
        moments = state.pop("optimizer")["state"]
        tensors.append([moments, state.pop("weights"), state.pop("best_weights")])
        others.append([state, epochs, scores[-1], Path(folder, "ranks.txt").read_bytes()])
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert others[0] == others[1]


def test_best_epoch_is_the_one_that_is_kept_and_scored(cli):
    """A large learning rate makes the validations go up and down."""
    flags = ["--lr=0.2", "--lr-decay-epoch=10", "--patience=99", "--eval-every=2", "--epochs=11"]
    out = cli(*TINY, *flags)
    assert "20 users, 30 items" in out and "; 1 line" in out
    epochs, (test,) = log_of("runs/x")
    ndcg = {n: event["all items"]["NDCG@10"] for n, event in epochs.items() if "all items" in event}
    best = max(ndcg, key=ndcg.get)
    assert [*ndcg] == [2, 4, 6, 8, 10, 11] and best < 11
    before = torch.get_rng_state()
    model, state = diffurec.load_checkpoint("runs/x/checkpoint.pt")
    assert torch.equal(before, torch.get_rng_state())
    rate = state["optimizer"]["param_groups"][0]["lr"]
    assert (state["epoch"], state["best_epoch"], rate) == (11, best, 0.02)
    sequences = diffurec.load_sequences("x.txt")
    assert diffurec.evaluate(model, sequences, "validation").items() <= epochs[best].items()
    results = diffurec.evaluate(model, sequences, "test", ranks_file="again")
    assert test == results | {"split": "test", "epoch": best}
    assert Path("again").read_bytes() == Path("runs/x/ranks.txt").read_bytes()
    assert re.search("test .*HR@5 +HR@10 +HR@20 +NDCG@5 +NDCG@10 +NDCG@20\n", out)
    for label, row in results.items():
        assert re.search(label + "".join(rf" +{100 * value:.2f}" for value in row.values()), out)


def test_early_stopping_after_patience_validations_without_progress(cli):
    assert "--patience" in cli(*TINY, "--lr=0", "--patience=3", "--eval-every=2", "--epochs=50")
    for flag, last in ("--epochs=60", 8), ("--patience=4", 10):  # the first stops at once
        cli("--resume", flag)
        epochs, scores = log_of("runs/x")
        assert (max(epochs), scores[-1]["epoch"]) == (last, 2)


def test_weights_that_are_not_finite_stop_a_run_at_its_last_good_checkpoint(cli):
    cli(*TINY, "--out=whole", "--epochs=4", "--eval-every=2", "--lr-decay-epoch=4")
    assert state_of("whole")["optimizer"]["param_groups"][0]["lr"] == 0.001
    cli(*TINY, "--eval-every=2", "--lr-decay-epoch=4")
    assert re.search("epoch 3.*finite.*--lr", cli("--resume", "--epochs=4", "--lr=1e9", status=2))
    assert state_of("runs/x")["epoch"] == 2
    cli("--resume", "--lr=0.001")
    assert_same_run("runs/x", "whole")


def test_run_stopped_at_any_moment_goes_on_as_if_it_had_not_been(cli, monkeypatch):
    """Before each batch, validation, log line, save, replacement and ranks.txt."""
    monkeypatch.setattr(diffurec, "open", open, raising=False)
    moments = [(diffurec.F, "cross_entropy"), (diffurec, "evaluate"), (diffurec, "open")]
    moments += [(torch, "save"), (os, "replace"), (np, "savetxt")]
    numbers = [itertools.count(1)]  # of the moments that come; at 0 it is stopped

    def stop_or(function, *arguments, **options):
        if next(numbers[0]) == 0:
            if function.__name__ == "save":
                Path(arguments[1]).write_bytes(b"half a file")
            raise KeyboardInterrupt
        return function(*arguments, **options)

    for owner, name in moments:
        monkeypatch.setattr(owner, name, functools.partial(stop_or, getattr(owner, name)))
    arguments = [*TINY, "--epochs=3", "--eval-every=2", "--out"]
    cli(*arguments, "whole")
    for number in range(1, next(numbers[0])):
        numbers[0] = itertools.count(1 - number)
        folder = f"stopped-{number}"
        assert "--resume" in cli(*arguments, folder, status=2)
        begun = Path(folder, "checkpoint.pt").exists()
        assert begun or number < 3  # before the first save and replacement
        cli(*(["--resume", "--out"] if begun else arguments), folder)
        assert_same_run("whole", folder)
    assert number > 20


def test_copied_alone_and_killed_it_goes_on_and_shows_what_a_terminal_can_of_titles(cli):
    """By programs of their own, on a terminal that knows no Chinese."""
    Path("diffurec.py").write_bytes(Path(diffurec.__file__).read_bytes())
    Path("x.items.txt").write_text("商品\n" * 30, "utf-8")
    arguments = [*TINY, "--epochs=30", "--patience=30"]
    cli(*arguments, "--out=whole")
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONPATH": ""}
    command = [sys.executable, "diffurec.py", "--data", "x.txt"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, env=env) as process:
        while not process.stdout.readline().startswith(b"epoch 3"):
            assert process.poll() is None
        process.kill()
    assert state_of("runs/x")["epoch"] < 30
    cli("--resume")
    assert_same_run("whole", "runs/x")
    assert subprocess.check_output([*command, "--recommend", "1"], env=env).count(b" ??") == 10


@pytest.mark.parametrize("changes", [{"rounding": "r_star"}, {"steps": 3}, {"seed": 7, "delta": 1}])
def test_settings_given_replace_those_of_a_run_that_is_scored(cli, capsys, changes):
    """Only the log changes; where it cannot be written, the figures are seen."""
    Path("x.items.txt").write_text("".join(f"title {n}\x85\n" for n in range(1, 31)), "utf-8")
    cli(*TINY, "--max-len=3")
    before, log = snapshot(), Path("runs/x/log.jsonl")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    shown, out = cli("--recommend", 5, 6, 7, 8, *flags), cli("--evaluate", *flags)
    assert snapshot() == before | {str(log): log.read_bytes()}
    model, state = diffurec.load_checkpoint("runs/x/checkpoint.pt", **changes)
    items = model.recommend(torch.tensor([[6, 7, 8]]), 10)[0][0].tolist()
    assert shown.endswith("".join(f"{n:8} title {n}\x85\n" for n in items))  # \x85 ends no line
    _, (_, *scores) = log_of("runs/x")
    for split, event in zip(("validation", "test"), scores, strict=True):
        results = diffurec.evaluate(model, diffurec.load_sequences("x.txt"), split)
        assert event == {"split": split, "epoch": state["best_epoch"]} | results
    log.unlink()
    log.mkdir()
    assert diffurec.main(["--data", "x.txt", "--evaluate", *flags]) == 0
    seen = capsys.readouterr()
    assert (seen.out, seen.err.count("\n"), seen.err.count("log.jsonl")) == (out, 2, 2)


def test_damaged_or_foreign_checkpoint_is_refused_and_runs_nothing(cli):
    cli(*TINY)
    path = Path("runs/x/checkpoint.pt")
    whole = path.read_bytes()
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    damaged = [b"", b"a text\n", whole[:-100], flipped]
    harmful = type("Pickle", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    for foreign in ({"weights": torch.ones(2)}, {"config": harmful}):
        torch.save(foreign, path)
        damaged.append(path.read_bytes())
    for content, flag in itertools.product(damaged, ("--evaluate", "--resume", "--recommend=1")):
        path.write_bytes(content)
        assert str(path) in cli(flag, status=2)
    assert not Path("executed").exists()


def test_table_2_and_own_settings_belong_to_the_counts_not_to_the_name(cli, monkeypatch):
    cli("--data=toy", *TINY, "--batch-size=512", "--epochs=1")
    assert state_of("runs/toy")["config"]["embedding_std"] == 0.1
    assert diffurec.TABLE_2 == {  # as printed in the paper, with Table 1's counts
        (22363, 12101, 198502): (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566),
        (19412, 11924, 167597): (5.5650, 7.4587, 9.8417, 4.1667, 4.7724, 5.3684),
        (6040, 3416, 999611): (17.9659, 26.2647, 36.7870, 12.1150, 14.7909, 17.4386),
        (281428, 13044, 3485022): (6.6742, 10.7520, 16.6507, 4.2902, 5.5981, 7.0810),
    }
    assert diffurec.DATASET_SETTINGS[6040, 3416, 999611] == {"max_len": 200}
    Path("data/ml-1m.txt").write_text(Path("x.txt").read_text())
    assert "Table 2" not in cli("--data=ml-1m", *TINY)
    assert state_of("runs/ml-1m")["config"]["max_len"] == 50
    counts = (20, 30, len(Path("x.txt").read_text().split()) - 2)
    monkeypatch.setitem(diffurec.TABLE_2, counts, (1.25, 2.5, 3, 4, 5, 6.75))
    monkeypatch.setitem(diffurec.DATASET_SETTINGS, counts, {"max_len": 200})
    assert re.search(r"Table 2.* 1.25 +2.50 +3.00 +4.00 +5.00 +6.75\n$", cli(*TINY))
    cli(*TINY, "--out=run-7", "--max-len=7")
    assert [state_of(run)["config"]["max_len"] for run in ("runs/x", "run-7")] == [200, 7]


WRONG = {  # the arguments, and what is told
    "--colour red": "--colour red.*--help",
    "--resume --out nowhere": "nowhere",
    "--data nope.csv": "nope.csv",
    "--data log.csv": "log.csv:1: .*python prepare_data.py NAME --raw log.csv",
    "--out x.txt/run": "x.txt",
    "--out run": "run.*--resume.*--out",
    "--out run --data other.txt --resume": "run .*other.txt",
    "--out run --recommend 7 31": "1 to 30",
    "--out run --evaluate --hidden 16": "'hidden': 16",
}


@pytest.mark.parametrize("arguments", WRONG, ids=itertools.count())  # not names, as for -k gru
def test_wrong_arguments_are_one_line_that_says_what_to_type_and_change_nothing(cli, arguments):
    Path("log.csv").write_text("user,item,time\n1,2,3\n")
    Path("other.txt").write_text(Path("x.txt").read_text() + "\n")
    if "run" in arguments:
        cli(*TINY, "--out=run")
    before = snapshot()
    assert re.search(WRONG[arguments], cli(*arguments.split(), status=2))
    assert snapshot() == before


def test_live_line_is_overwritten_on_a_terminal_and_written_to_nothing_else(cli, monkeypatch):
    assert "\r" not in cli(*TINY)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = r"epoch (.): 0%\r(epoch \1: \d+%\r)+epoch \1 of 2  loss .*"  # each over the one before
    assert len(re.findall(line, cli(*TINY, "--out=run"))) == 2


def test_import_changes_nothing_in_the_process(tmp_path):
    code = """if True:
        import os, random, signal, sys, warnings, numpy, torch
        def state():
            yield dict(os.environ), sys.path[:], sys.excepthook, signal.getsignal(signal.SIGINT)
            yield list(warnings.filters), numpy.geterr(), random.getstate(), os.listdir()
            yield str(numpy.random.get_state()), torch.get_rng_state().tolist()
            yield torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
        before = list(state())
        import diffurec
        assert before == list(state()) and "prepare_data" not in sys.modules
    """
    env = os.environ | {"PYTHONPATH": str(Path(diffurec.__file__).parent)}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, stderr=subprocess.STDOUT, cwd=tmp_path, env=env) == b""


# ---- CUDA ---------------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("auto", 0.03)])
@both_approximators
def test_gpu_comes_close_to_the_cpu(cli, approximator, precision, tolerance):
    """Without noise, of which a GPU draws other: delta = 0, and no dropout."""
    history = padded(*HISTORIES)
    model = model_of(hidden=32, delta=0.0, approximator=approximator)
    want, x_0 = model(history, TARGETS).item(), model.reverse(history)
    model.config.precision = precision
    model.cuda()
    assert model(history.cuda(), TARGETS.cuda()).item() == pytest.approx(want, rel=tolerance)
    assert (model.reverse(history.cuda()).cpu() - x_0).norm() < tolerance * x_0.norm()
    cli(*TINY, "--device=cuda", "--approximator", approximator)


# ============================================================================== prepare_data.py
PREPARE_SCRIPT = Path(prepare_data.__file__)


def file_lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_toy_is_that_of_the_first_edition(tmp_path):
    """On it the README's figures were measured."""
    data = prepare_data.prepare("toy", tmp_path).read_bytes()
    assert hashlib.sha256(data).hexdigest().startswith("cdb62666e110d2ba9fda60399a2d649b")
    lines = [" ".join(map(str, user)) + "\n" for user in prepare_data.make_toy()]
    assert "".join(lines).encode() == data
    assert len(file_lines(tmp_path / "toy.items.txt")) == prepare_data.TOY_ITEMS


def plain_prepare(actions, core=1, once=False):
    """{user: items}, in order, of (user, item, time) actions; the K-core one by one."""
    order = dict.fromkeys(user for user, _, _ in actions)  # as the raw file first names them
    kept = actions if once else list(dict.fromkeys(actions))
    before = None
    while kept != before:
        before = kept
        users = collections.Counter(user for user, _, _ in kept)
        items = collections.Counter(item for _, item, _ in kept)
        kept = [a for a in kept if users[a[0]] >= core and items[a[1]] >= core]
    result = {}
    for user in order:
        mine = sorted((a for a in kept if a[0] == user), key=lambda a: a[2])
        sequence = [item for _, item, _ in mine]
        result[user] = list(dict.fromkeys(sequence)) if once else sequence
    return {user: sequence for user, sequence in result.items() if sequence}


def prepared(folder, name="own"):
    """{user: items} by name, from files as diffurec.py wants them: no gaps, nothing like users."""
    numbers = [list(map(int, line.split(" "))) for line in file_lines(folder / f"{name}.txt")]
    n_items = max(map(max, numbers))
    assert {number for line in numbers for number in line} == set(range(1, n_items + 1))
    for lines in (numbers, [line for line in numbers if len(line) >= 3]):
        first = [line[0] for line in lines]
        assert len(first) < 10 or first != sorted(set(first))
    names = []
    for kind, length in (("items", n_items), ("users", len(numbers))):
        path = folder / f"{name}.{kind}.txt"
        names.append(file_lines(path) if path.exists() else [str(n + 1) for n in range(length)])
        assert len(names[-1]) == length
    return {user: [names[0][n - 1] for n in line] for user, line in zip(names[1], numbers)}


def check_prepared(folder, name, raw, actions, core=None, once=False):
    """Prepare and compare, order of users and items included; too little left is an error."""
    default = 5 if name in prepare_data.TABLE_1 else 1
    want = plain_prepare(actions, core or default, once)
    if max(map(len, want.values()), default=0) < 3:
        with pytest.raises(ValueError, match="no user with 3 actions"):
            prepare_data.prepare(name, folder, raw, core)
        return
    assert prepare_data.prepare(name, folder, raw, core) == folder / f"{name}.txt"
    assert list(prepared(folder, name).items()) == list(want.items())
    left = {item for items in want.values() for item in items}
    in_order = [*dict.fromkeys(item for _, item, _ in actions if item in left)]
    assert file_lines(folder / f"{name}.items.txt") in (in_order, in_order[::-1])


def test_report_says_what_was_read_and_dropped(tmp_path, capsys):
    """By hand: one row lacks its user, one repeats, v and z and then w leave with the 2-core."""
    rows = ["u,a,3", "v,w,1", "v,z,1", "u,b,3", "w,b,109", "u,a,1", "w,a,109", "u,a,3", "w,b,200"]
    more = [f"u,{item},{50 + n}" for n in range(60) for item in "ab"]
    (tmp_path / "log").write_text("\n".join(["user,item,time", *rows, ",a,7", *more]))
    prepare_data.prepare("own", tmp_path, tmp_path / "log", core=2)
    out = capsys.readouterr().out
    assert re.sub(rf"{tmp_path}/(own.txt|log): ", "", out) == (
        "  columns: user, item, time\nread 130 rows; left out 1 without user, item or time\n"
        "  dropped 1 exact repeats (same user, item and time)\n  kept 126 rows in the 2-core\n"
        "  62 of 124 neighbouring actions of a user have the same time\n"
        "2 sequences, 2 items, 126 actions\n"
    )


def test_steam(tmp_path, capsys):
    """Python literals, in any order of keys, with escapes and texts that look like fields."""
    draw = random.Random(5)
    actions = [(f"U{n} 'x' \"☠\\", f"{draw.randrange(1, n + 2)}", n % 28) for n in range(30)] * 2
    actions += [(u, f"{draw.randrange(25)}", draw.randrange(28)) for u, _, _ in actions * 9]
    texts = ["it's", 'say "x"', "a\\b", "'username': 'z', u'product_id': u'1'", "☠\n"]
    lines = ["{u'username': u'plain', u'product_id': u'1', u'date': u'2017-03-09'}"]
    for n, (user, item, day) in enumerate(actions):
        fields = [f"u'text': u{texts[n % 5]!a}", f"u'username': u{user!a}", "u'hours': -1.5"]
        fields += [f"'product_id': '{item}'", f"u'date': u'2017-03-{day + 1:02}'"]
        fields += ["u'odd': [1, u'username']", f"'user_id': '{n}'"] if n % 11 == 1 else []
        lines.append("{" + ", ".join(fields[n % 5 :] + fields[: n % 5]) + "}")
    lines.append("{'product_id': '1', 'username': 'a' 'b', 'date': '2017-03-09'}")
    lines.append("{u'product_id': u'7', u'date': u'2017-01-01', u'text': u'no user'}\n")
    (tmp_path / "raw").write_bytes(gzip.compress("\n".join(lines).encode("ascii")))
    check_prepared(tmp_path, "steam", tmp_path / "raw", actions, once=True)
    after = sum(map(len, plain_prepare(actions, 5, once=True).values()))
    out = capsys.readouterr().out
    assert f"read {len(lines)} rows; left out 1 without user" in out
    assert f" {after:,} actions\nTable 1: 281,428 sequences, 13,044 items, 3,485,022 actions" in out


def test_movielens_zip_and_ratings_file_with_and_without_titles(tmp_path):
    actions = [(f"{n % 5}", f"{n % 7}", n // 4) for n in range(90)]
    ratings = "".join(f"{u}::{i}::{t % 10 / 2}::{t}\n" for u, i, t in actions)  # half stars
    movies = "".join(f"{n}::Amélie :: {n} (2001)::Drama|War\r\n" for n in range(9))
    named = [(user, f"Amélie :: {item} (2001)", time) for user, item, time in actions]
    raw = tmp_path / "anything"
    raw.write_text(ratings)
    check_prepared(tmp_path, "own", raw, actions)
    beside = tmp_path / "movies.dat"
    beside.write_bytes(movies.encode("latin-1"))
    check_prepared(tmp_path, "ml-1m", raw, named)
    with zipfile.ZipFile(raw, "w") as archive:
        archive.write(beside, "ml-1m/movies.dat")
        archive.writestr("ml-1m/ratings.dat", ratings)
    beside.unlink()
    check_prepared(tmp_path, "ml-1m", raw, named)


def log(header, row="u,{},{}", times=(3, 1, 2)):
    """The items a, b and c of one user; b comes first, and then c."""
    lines = [row.format(*action) for action in zip("abc", times)]
    return "\n".join([header, *lines] if header else lines)


BCA = {"u": ["b", "c", "a"]}
A = {"1": ["7", "300", "8"], "2": ["5", "7", "5", "300"]}  # by user or, without users, by line
B = {"3": A["1"], "20": A["2"]}
ALIKE = {str(n): [str(n % 7 + 10 * m) for m in (5, 6, 7)] for n in range(1, 13)}
LARGE = {"1": [f"{10**17}", "5", "6"], "2": ["5", f"{10**17 + 1}", "6", "5"]}
PAIRS = {"7": ["3", "2", "3"], "9": ["1", "3"]}
# Nobody's first item is another's: the first numbers rise, but must not look like users' numbers.
NEW = {str(n): [f"{2 * n - 1}", f"{2 * n}", *["1"] * (n % 3)] for n in range(1, 16)}
FILES = {  # what each holds
    log(""): BCA,
    log("x,Time,UserId,item-id", '"x\ny, z",{1},u,{0}'): BCA,
    log("date,visitorid,itemid", "2020-02-28 {1} UTC,u,{0}", ("11:30", "09:30", "10:30")): BCA,
    log("user_id:token\ttimestamp:float\tx\titem_id:token", 'u\t{1}\t"Mad" Mul"\t{0}'): BCA,
    log("user_id,video_id,date,time_ms", "u,{},20220408,{}"): BCA,  # KuaiRand
    log("", '{{"reviewerID": "u", "asin": "{}", "unixReviewTime": {}, "image": [1]}}'): BCA,
    log("", '{{"user_id": "u", "asin": "x", "parent_asin": "{}", "timestamp": {}}}'): BCA,
    log("", '{{"user_id": "u", "business_id": "{}", "date": "2017-02-0{} 22:09:11"}}'): BCA,
    log("", "{{'reviewerID': 'u', 'asin': '{}', 'unixReviewTime': {}}}"): BCA,
    log('"user";"price";"item";"timestamp"', 'u;3,5;"{}";{}'): BCA,
    log("user,item,timestamp\r", "u,{},{}\r"): BCA,
    log("\ufeffuser,item,timestamp", "\ufeffu,{},{}"): BCA,
    log("\n\nuser item rating timestamp\n", "  u {} 5  {} \n"): BCA,
    log("", times=("1.6000003E+09", "1.6000001e9", "1600000200.5")): BCA,
    log("", times=("2020-01-01T03:30Z", "2020-01-01T04:30+04:00", "2020-01-01T04+02:00")): BCA,
    log("", times=("2021-03-28 03:00", "2021-03-28 01:30", "2021-03-28 02:30")): BCA,  # summer
    log("", '"u ""1"", ü",{},{}'): {'u "1", ü': BCA["u"]},
    "7\t300  8 \r\n\n5 7 5 300": A,
    "3 7 300 8\n20\t5 7 5 300\n": B,
    "user_id:token\titem_id_list:token_seq\n3\t7 300 8\n20\t5 7 5 300": B,
    "user items\n3 7\n20 5 7\n3 300 8\n20 5 300": B,  # a user of two lines
    "items\nB1 0X 12.0\nB1 B1 Z\n": {"1": ["B1", "0X", "12.0"], "2": ["B1", "B1", "Z"]},
    "\n".join(" ".join(items) for items in LARGE.values()): LARGE,
    "\n".join(" ".join([user, *items]) for user, items in ALIKE.items()): ALIKE,
    "\n".join(" ".join([user, *items]) for user, items in NEW.items()): NEW,
    "\n".join(f"{user},{item}" for user, items in NEW.items() for item in items): NEW,
    "7 3\n9 1\n7 2\n7 3\n9 3\n": PAIRS,
    "item,user\n3,7\n1,9\n2,7\n3,7\n3,9\n": PAIRS,
    "7 3 1\n9 3 2\n7 3 3\n9 1 1\n7 2 2\n": PAIRS,
}


@pytest.mark.parametrize("text", FILES)
def test_tables_sequences_and_pairs(tmp_path, monkeypatch, text):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")  # at 2:00 summer time begins
        time.tzset()
        for packed in (bytes, gzip.compress):
            (tmp_path / "raw").write_bytes(packed(text.encode()))
            prepare_data.prepare("own", tmp_path, tmp_path / "raw")
            assert prepared(tmp_path) == FILES[text]
    time.tzset()


def test_published_numbers_stay_and_other_ids_are_numbered_as_they_come(tmp_path, capsys):
    (tmp_path / "own.items.txt").write_text("the names of an earlier preparation\n")
    for text, first, lines, names in (
        ("1 3 2 3\n2 4 1\n3 1 1 1 1 1", "the user", "3 2 3\n4 1\n1 1 1 1 1\n", None),
        ("90 20 90\n40 90\n10 10 10", "an item", "1 2 1\n3 1\n4 4 4\n", b"90\n20\n40\n10\n"),
    ):
        (tmp_path / "raw").write_text(text)
        prepare_data.prepare("own", tmp_path, tmp_path / "raw")
        files = folder_bytes(tmp_path)
        assert (files["own.txt"], files.get("own.items.txt")) == (lines.encode(), names)
        assert f"a line begins with {first}" in capsys.readouterr().out


# --------------------------------------------------------------------------------- what is refused
REVIEW = "{'username': 'a', 'product_id': '1', 'date': '2017-01-01'}\n"
CODE = REVIEW.replace("'a'", "__import__('os').system('touch RAN')")
HEADER = "user,item,timestamp\n"
FIVE = "".join(f"{n // 4 + 1}\t{n % 9 + 1}\t{n % 3}\t{n % 2}\t{n + 1}\n" for n in range(40))
MIXED = [
    (f"u,a,1600000000{one}\nu,b,1600000001{other}\n", "raw:2: the time 1600000001")
    for one, other in itertools.permutations(("", "000", "000000", "000000000"), 2)
]
REFUSED = [  # a file, and what is said of it: its line, the reason, what to type
    *MIXED,
    ("", "raw: the file is empty"),
    (HEADER, "raw: no user with 3 actions"),
    (FIVE, r"raw:1: 5 columns .*'user\\titem\\tx\\tx\\ttimestamp\\n'; .*'items\\n'"),
    ("1 55 60 3\n2 60 55 4\n", "raw:1: 4 columns and no header"),  # 3, 4: no items
    ('1,"5,6,7"\n2,"5,7"\n', "raw:1: a list where an item belongs"),
    ("5 6 7 0\n8 9 5 6\n", "raw:1: .*0 is nearly always padding, remove it; if 0 is an item, give"),
    *((f"5 6 7\n8 {word} 9 5\n", f"raw:2: {word} is nearly") for word in ("0", "-1")),
    *((f"items\n8 {word} 9 5\n", f"raw:2: {word} is nearly") for word in ("0.0", "nan")),
    ("5 6 7\n8 9\n" * 101 + "5 x 7\n", "raw:203: 'x' is no item's number"),
    ('{"user": 1, "item": [5, 6], "time": 2}\n', "raw:1: a list; write an object for each"),
    ('{"who": 1, "what": 5}\n', "raw:1: no columns for the user .* user, userid, reviewerid"),
    (HEADER.replace("user", "item"), "raw:1: no columns for the user in item, item"),
    ("u,a,1\nu,b\n", "raw:2: 2 columns, but 3"),
    (HEADER + "u,a,1\nu,b,\nu,c,2\n", "raw: .* timestamp is empty in 1 of 3 rows; remove those"),
    (HEADER + "u,a,1\n" + "u,b,\n" * 9, "raw: .* timestamp is empty in 9 of 10 rows; drop it, and"),
    *((f"u,a,1\nu,b,{when}\n", "raw:2: write") for when in ("-inf", "1_0", "28.02.20")),
    ("u,a,2020-01-01\nu,b,2020-01-01T00:00Z\n", "raw:2: .*with a time zone"),
    (HEADER + 'u,a,1\n"u"x,b,2\n', "raw:3: a quotation mark"),
    (HEADER + 'u,a,1\n"u,b,2\nu,c,3\n', "raw:4: a quotation mark"),
    *((REVIEW + bad, "raw:2: neither") for bad in (CODE, "[" * 5000, "null")),
    *((data, "raw: no text; unpack it") for data in (b"BZh9", b"a.csv" + bytes(507), b"\x80\4")),
    (b"PK\x03\x04\xff", "raw: damaged"),
    (gzip.compress(HEADER.encode() * 99)[:-9], "raw(:[0-9]+)?: damaged or cut off"),
    ("<html>", "raw: a web page"),
]


WRONG_COMMANDS = [
    ("ml1m", "no dataset 'ml1m'; did you mean ml-1m?"),
    ("Beauty", "no dataset 'Beauty'; did you mean beauty?"),
    ("netflix", "no dataset .* data of your own: python prepare_data.py netflix --raw FILE"),
    ("../x --raw raw", "'../x': no such file, and no name"),
    ("own --raw missing.csv", "--raw missing.csv: there is no such file"),
    ("own --raw .", "--raw .: there is no such file"),
    ("own beauty --raw raw", "--raw is one file for one NAME"),
    ("own --raw raw --core 9", "raw: no user with 3 actions"),
    ("toy --raw raw", "the toy data are made here; leave out --raw"),
    ("own --raw raw --data-dir raw", ".*raw"),
    ("", ".*NAME"),
]


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        *(("own --raw raw --data-dir .", *refused) for refused in REFUSED),
        *((command, log(""), message) for command, message in WRONG_COMMANDS),
    ],
)
def test_refusal_is_one_line_and_changes_nothing(
    tmp_path, monkeypatch, capsys, command, content, message
):
    monkeypatch.chdir(tmp_path)
    Path("raw").write_bytes(content.encode() if isinstance(content, str) else content)
    Path("own.txt").write_text("1 2 3\n")
    before = folder_bytes(tmp_path)
    assert prepare_data.main(command.split()) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"prepare_data\.py: {message}.*\n", error), error
    assert folder_bytes(tmp_path) == before and sorted(os.listdir()) == ["own.txt", "raw"]


ARRAY = [{"user": "u", "item": "abc"[n], "timestamp": (3, 1, 2)[n]} for n in range(3)]
LISTS = {"1": ["4", "5", "6"], "2": ["5", "6", "7", "8"]}
WORKS = [  # a file, and what it holds once the last command of its refusal was typed
    ("[4, 5, 6]\n[5, 6, 7, 8]\n", LISTS),
    ("[[4, 5, 6], [5, 6, 7, 8]]", LISTS),
    ("4,5,6\n5,6,7,8\n", LISTS),
    ("5 6 7 8\n4 5 7 6\n", {"1": LISTS["2"], "2": ["4", "5", "7", "6"]}),
    (json.dumps(ARRAY, indent=1), BCA),
    (log(HEADER.strip()).replace("u,", "ü,").encode("utf-16"), {"ü": BCA["u"]}),
    (log(HEADER.strip()).replace("u,", "ü,").encode("latin-1"), {"ü": BCA["u"]}),
    (log("").replace("\n", "\r"), BCA),
]


@pytest.mark.parametrize(("content", "want"), WORKS)
def test_what_a_refusal_says_to_type_works(tmp_path, monkeypatch, capsys, content, want):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for packed in (bytes, gzip.compress):
        Path("raw").write_bytes(packed(content.encode() if isinstance(content, str) else content))
        assert prepare_data.main(["own", "--raw", "raw"]) == 2
        commands = re.findall(r"\(printf [^)]*\) > NEW|gzip .*? > NEW", capsys.readouterr().err)
        subprocess.run(["bash", "-ec", commands[-1]], check=True)
        assert prepare_data.main(["own", "--raw", "NEW"]) == 0
        assert prepared(Path("data")) == want


# ------------------------------------------------------------------- beside a plain, slow reader
def plain_table(data):
    """The actions of a CSV with the header user,item,timestamp; None if it is odd."""
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode(), ""), strict=True) if row]
        actions = [(user.strip(), item.strip(), float(when)) for user, item, when in rows[1:]]
    except (ValueError, csv.Error):
        return None
    odd = any("" in (user, item) or not abs(when) < 1e11 for user, item, when in actions)
    return None if odd or rows[0] != ["user", "item", "timestamp"] else actions


ACTION = st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdefg"), st.integers(0, 5))
SPLICE = st.binary(max_size=3) | st.sampled_from([b"\n", b"\r", b"\t", b'"', b",", b"\xff", b"\0"])


@property_test
@given(st.lists(ACTION, min_size=1, max_size=60), st.integers(1, 5), st.data())
def test_spoilt_log_is_read_as_a_plain_reader_reads_it_or_refused(tmp_path, actions, core, draw):
    """Of random actions, with a few bytes replaced in every other file."""
    rows = [("user", "item", "timestamp"), *actions]
    data = "".join(f'{u},"{i}",{t}\n' for u, i, t in rows).encode()
    for _ in range(draw.draw(st.sampled_from([0, 0, 1, 2, 3]))):
        at = draw.draw(st.integers(0, len(data)))
        data = data[:at] + draw.draw(SPLICE) + data[at + draw.draw(st.integers(0, 4)) :]
    (tmp_path / "log").write_bytes(data)
    plain = plain_table(data)
    if plain is not None:
        check_prepared(tmp_path, "own", tmp_path / "log", plain, core)
        return
    with contextlib.suppress(ValueError):
        prepare_data.prepare("own", tmp_path, tmp_path / "log", core)


class PrepareHandler(http.server.BaseHTTPRequestHandler):
    """Serves `content`, whatever is asked, but `missing` of the bytes that it announces."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200 if self.server.content else 404)
        length = len(self.server.content) + self.server.missing
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(self.server.content)


def test_published_files_are_fetched_once_and_checked(tmp_path, monkeypatch, capsys):
    users = [" ".join(map(str, range(1, n))) for n in range(4, 9)]
    text = "".join(f"{n} {user}\n" for n, user in enumerate(users, 1)).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PrepareHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    known = {"beauty": hashlib.sha256(text).hexdigest(), "ml-1m": prepare_data.ML_1M_MD5}
    for name, digest in known.items():
        url = f"http://127.0.0.1:{server.server_port}/{name}.txt"
        monkeypatch.setitem(prepare_data.DATASETS, name, (url, digest))

    command = ["--data-dir", str(tmp_path / "data"), *known]
    for content, missing, message in (
        (b"", 0, "Not Found; run again, or get the file and: python prepare_data.py NAME --raw"),
        (text, 7, "incomplete"),
        (text[1:], 0, "beauty.txt: its sha256 is not the one published; run again"),
        (text, 0, "ml-1m.txt: its md5 is not the one published"),
    ):
        server.content, server.missing, server.asked = content, missing, []
        assert prepare_data.main(command) == 2
        out, error = capsys.readouterr()
        assert f"{message}" in error.splitlines()[-1]
        assert (tmp_path / "data" / "beauty.txt").exists() == ("md5" in message)
    assert prepare_data.main(command[:-1]) == 0  # it is there
    assert server.asked == ["/beauty.txt", "/ml-1m.txt"]
    assert file_lines(tmp_path / "data" / "beauty.txt") == users
    assert "5 sequences, 7 items, 25 actions\nTable 1: 22,363 sequences, 12,101 items" in out
    server.shutdown()


def test_names_a_terminal_cannot_show_and_a_notebooks_output(tmp_path, monkeypatch):
    names = ["a\nb", "c\r\nd", "e\u2028f\x85g", "\x1b[31mred", "商品", "\ud83d", "\ud83d\ude00"]
    rows = [{"user": "😀", "item": name, "time:时": n} for n, name in enumerate(names)]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, str(PREPARE_SCRIPT), "own", "--raw", "log"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    clean = ["a b", "c  d", "e f g", " [31mred", "商品", "?", "😀"]
    assert prepared(tmp_path / "data") == {"😀": clean}
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "toy", "--data-dir", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", type("Output", (), {"write": len, "flush": id})())
    with pytest.raises(SystemExit, match="^0$"):  # as %run does it
        runpy.run_path(str(PREPARE_SCRIPT), run_name="__main__")


def test_files_are_replaced_when_all_are_whole_and_the_sequences_last(tmp_path, monkeypatch):
    """Stopped at each replacement in turn, which is where a kill could show."""
    (tmp_path / "log").write_text(log(""))
    replace = os.replace

    def stop_at_the_last(source, target):
        replaced = len(folder_bytes(Path(target).parent))
        assert len(folder_bytes(Path(source).parent)) + replaced == 3
        if replaced == limit:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_last)
    for limit in range(4):
        command = ["own", "--raw", str(tmp_path / "log"), "--data-dir", str(tmp_path / str(limit))]
        assert prepare_data.main(command) == (0 if limit == 3 else 2)
        files = ["own.items.txt", "own.users.txt", "own.txt"][:limit]
        assert sorted(os.listdir(tmp_path / str(limit))) == sorted(files)
