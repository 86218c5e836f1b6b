"""Tests of diffurec.py, in its order, and then of prepare_data.py.

Each compares with something independent: numbers worked out by hand, a plain and slow version
written from the paper, brute force, sampling. DIFFUREC_THOROUGH=1 asks for many more examples.
"""

import ast
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
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffurec
import prepare_data

# On small tensors two threads only wait for each other, beside another program for minutes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that are started here
SCRIPT = Path(diffurec.__file__)
SCHEDULES = ("truncated_linear", "linear", "cosine", "sqrt")
# tmp_path is shared by the examples of one test: each overwrites what the last one wrote
property_test = settings(
    max_examples=2000 if os.environ.get("DIFFUREC_THOROUGH") else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def config(**changes):
    """Small, exact (float32) and without dropout."""
    small = {"steps": 4, "hidden": 8, "heads": 2, "blocks": 2, "precision": "float32"}
    small |= {"dropout": 0.0, "embedding_dropout": 0.0, "max_len": 6, "batch_size": 8}
    return diffurec.Config(**(small | changes))


def model_of(n_items=12, seed=0, **changes):
    """A model whose LayerNorms and biases are random too, or some mistakes would not show."""
    torch.manual_seed(seed)
    model = diffurec.DiffuRec(n_items, config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def write_users(path, users):
    Path(path).write_text("".join(" ".join(map(str, user)) + "\n" for user in users))


def sequences_of(users):
    """What load_sequences makes of users, lists of item ids."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        write_users(file.name, users)
        return diffurec.load_sequences(file.name)


def random_users(seed, count=20, items=30, shortest=3, longest=9):
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [[draw.randint(1, items) for _ in range(length)] for length in lengths]


def padded(*histories):
    """The histories as the rows of one batch, padded on the left."""
    longest = max(map(len, histories))
    return torch.tensor([[0] * (longest - len(history)) + history for history in histories])


HISTORIES = ([3], [5, 1, 5, 7], [12, 2], [1, 2, 3, 4, 5, 6])
TARGETS = torch.tensor([9, 10, 3, 11])


# ------------------------------------------------------------------------------------ 1. settings
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (True, "32", 32.0, None, math.nan, np.int64(32), 0, -1)),
        *(("lr", value) for value in (False, "0.1", math.nan, math.inf, -0.1, np.float64(0.1))),
        *(("dropout", value) for value in (1, 1.0, -0.1)),
        *(("seed", value) for value in (-1, 10**30)),
        *(("schedule", value) for value in ("round", 1, ["linear"])),
        *(("hidden", value) for value in (9, 10)),  # no multiples of 4 heads
    ],
)
def test_settings_of_a_wrong_type_or_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .* but must be .*$"):
        diffurec.Config(**{name: value})


# ------------------------------------------------------------------------------- 2. noise schedule
@pytest.mark.parametrize(
    ("name", "steps", "values"),
    [
        ("truncated_linear", 32, {1: 0.01953125 + 0.01, 2: 0.0390625 + 0.005, 32: 0.6253125}),
        # The saw-tooth of Eq. 14: from s = 4 on the value is above 1 and is multiplied by 0.1.
        ("truncated_linear", 8, {1: 0.3225, 3: 0.9375 + 0.01 / 3, 4: 0.12525, 8: 0.250125}),
        ("truncated_linear", 2, {1: 0.501, 2: 0.999}),  # 5.01 and 10.005, truncated: 1.0005
        ("linear", 1000, {1: 0.0001, 1000: 0.02}),
        ("linear", 10, {1: 0.01, 10: 0.999}),
        # Alpha-bar at u = 1/2: cos(0.508/1.008 * 90 degrees)^2 = 0.493767, at u = 0: 0.999845.
        ("cosine", 2, {1: 1 - 0.4937668 / 0.9998446, 2: 0.999}),
        # At u = 0: 1 - 0.01, at 1/4: 1 - 0.5000999900, at 1/2: 1 - 0.7071774883.
        ("sqrt", 4, {1: 1 - 0.49990001 / 0.99, 2: 1 - 0.2928225117 / 0.49990001, 4: 0.999}),
    ],
)
def test_schedule_has_the_values_worked_out_by_hand(name, steps, values):
    betas = diffurec.beta_schedule(name, steps)
    assert len(betas) == steps
    for s, value in values.items():
        assert betas[s - 1] == pytest.approx(value, rel=1e-6)  # the digits written above


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_steps_has_finite_coefficients_and_betas_within_0_and_1(name):
    for steps in range(1, 1001):
        betas = np.asarray(diffurec.beta_schedule(name, steps))
        assert betas.shape == (steps,)
        assert 0 < betas.min() <= betas.max() < 1
        if steps < 40 or steps > 998:
            buffers = [*diffurec.Diffusion(name, steps).buffers()]
            assert all(b.isfinite().all() and b.dtype == torch.float32 for b in buffers)


# ------------------------------------------------------------------------------------ 3. diffusion
@pytest.mark.parametrize("name", SCHEDULES)
def test_q_sample_is_s_plus_1_steps_of_equation_1(name):
    """Mean and variance against sampling, both of q_sample and of the chain of single steps."""
    steps, n = 8, 100_000
    torch.manual_seed(0)
    diffusion = diffurec.Diffusion(name, steps)
    start = torch.tensor([[2.0, -0.5]]).expand(n, 2)
    chain, product = start, 1.0
    for s, beta in enumerate(diffurec.beta_schedule(name, steps)):
        chain = math.sqrt(1 - beta) * chain + math.sqrt(beta) * torch.randn(n, 2)
        product *= 1 - beta
        at_once = diffusion.q_sample(start, torch.full((n,), s), torch.randn(n, 2))
        mean, variance = math.sqrt(product) * start[0], 1 - product
        for sample in (chain, at_once):  # within five standard errors
            assert ((sample.mean(0) - mean).abs() < 5 * math.sqrt(variance / n)).all()
            assert ((sample.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all()


@pytest.mark.parametrize("steps", [2, 8, 32])
@pytest.mark.parametrize("name", SCHEDULES)
def test_q_posterior_is_bayes_rule(name, steps):
    """On a grid of x_{s-1}: q(x_{s-1} | x_start) q(x_s | x_{s-1}), normalised numerically."""
    diffusion, betas = diffurec.Diffusion(name, steps), diffurec.beta_schedule(name, steps)
    grid = np.linspace(-10, 10, 100_001)
    x_start, x_s = 1.3, -0.7
    for s in {1, steps // 2, steps - 1}:
        product = np.prod(1 - betas[:s])
        log_prior = -((grid - math.sqrt(product) * x_start) ** 2) / (2 * (1 - product))
        log_likelihood = -((x_s - math.sqrt(1 - betas[s]) * grid) ** 2) / (2 * betas[s])
        weights = np.exp(log_prior + log_likelihood - (log_prior + log_likelihood).max())
        weights /= weights.sum()
        mean = (weights * grid).sum()
        variance = (weights * (grid - mean) ** 2).sum()
        x = torch.tensor([[[x_start]], [[x_s]]])
        got = diffusion.q_posterior(*x, torch.tensor([s]))
        assert got[0].item() == pytest.approx(mean, rel=1e-5, abs=1e-6)  # float32
        assert got[1].item() == pytest.approx(variance, rel=1e-5)


# --------------------------------------------------------------------------------- 4. approximator
def plain_step_embedding(s, dim):
    """PE(s, 2i) = sin(s / 10000^(2i/dim)), PE(s, 2i+1) = cos(the same)."""
    angles = [s / 10_000 ** (2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)])


@pytest.mark.parametrize(("delta_is", "variance"), [("variance", 0.04), ("std", 0.0016)])
def test_lambda_has_the_mean_and_the_variance_of_each_reading(delta_is, variance):
    """Where e is 0 and x + d is 1, z is lambda itself: an approximator that returns z shows it."""
    model = model_of(delta=0.04, delta_is=delta_is)
    model.approximator.forward = lambda z, mask: z
    batch, length = 2000, 5
    n, s = batch * length * 8, torch.arange(batch) % 4
    x = 1 - diffurec.step_embedding(s, 8)
    z = model.approximate(torch.zeros(batch, length, 8), None, x, s).double()
    assert abs(z.mean().item() - 0.04) < 5 * math.sqrt(variance / n)
    assert abs(z.var().item() / variance - 1) < 5 * math.sqrt(2 / n)


def plain_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm.weight + norm.bias


def plain_attention(block, x, real):
    """softmax(QKᵀ / √d)V, head by head; `real` are the positions that hold an item."""
    d = x.shape[-1]
    weights = block.query_key_value.weight.split(d)
    biases = block.query_key_value.bias.split(d)
    query, key, value = (x @ w.T + b for w, b in zip(weights, biases))
    size, heads = d // block.heads, []
    for part in (slice(h * size, (h + 1) * size) for h in range(block.heads)):
        powers = (query[:, part] @ key[real][:, part].T / math.sqrt(size)).exp()
        heads.append(powers / powers.sum(1, keepdim=True) @ value[real][:, part])
    return torch.cat(heads, 1) @ block.output.weight.T + block.output.bias


def plain_transformer(transformer, z, mask):
    """Every position in every block, one history after another."""
    result = []
    for x, real in zip(z, mask):
        real = real.nonzero()[:, 0].tolist()
        for block in transformer.blocks:
            x = x + plain_attention(block, plain_norm(x, block.norm), real)
            norm, expand, _, contract = block.feed_forward
            inner = (plain_norm(x, norm) @ expand.weight.T + expand.bias).clamp(min=0)
            x = x + inner @ contract.weight.T + contract.bias
        result.append(plain_norm(x[-1], transformer.norm))
    return torch.stack(result)


def plain_gru(approximator, z, mask):
    gru, result = approximator.gru, []
    for x, real in zip(z, mask):
        state = torch.zeros(z.shape[-1])
        for item in x[real]:
            from_item = (gru.weight_ih_l0 @ item + gru.bias_ih_l0).chunk(3)
            from_state = (gru.weight_hh_l0 @ state + gru.bias_hh_l0).chunk(3)
            reset, update = ((a + b).sigmoid() for a, b in zip(from_item[:2], from_state[:2]))
            new = (from_item[2] + reset * from_state[2]).tanh()
            state = (1 - update) * new + update * state
        result.append(state)
    return torch.stack(result)


PLAIN = {"transformer": plain_transformer, "gru": plain_gru}


def test_matrices_begin_xavier_normal_and_embeddings_as_asked_for():
    torch.manual_seed(0)
    blocks = diffurec.Transformer(config(hidden=64)).blocks
    matrices = [block.output.weight for block in blocks]
    matrices += [block.feed_forward[layer].weight for block in blocks for layer in (1, 3)]
    matrices += [matrix for block in blocks for matrix in block.query_key_value.weight.split(64)]
    table = diffurec.DiffuRec(500, config(embedding_std=0.25)).item_embeddings.weight
    assert len(matrices) == 12
    assert not table[0].any()
    for matrix in (*matrices, table[1:]):
        n, std = matrix.numel(), math.sqrt(2 / sum(matrix.shape)) if matrix.shape[0] < 500 else 0.25
        assert abs(matrix.std().item() / std - 1) < 5 / math.sqrt(2 * n)  # five standard errors
        assert abs(matrix.mean().item()) < 5 * std / math.sqrt(n)
        assert matrix.abs().max() > 3 * std  # normal: uniform ends at 1.73


def test_embeddings_pass_dropout_before_their_layer_norm():
    torch.manual_seed(0)
    model = diffurec.DiffuRec(300, config(hidden=64, embedding_dropout=0.5))
    rows = model.embed(torch.arange(1, 301)[None])[0].double()
    assert rows.mean(1).abs().max() < 1e-5
    assert (rows.square().mean(1) - 1).abs().max() < 5e-3  # its epsilon beside 0.25² / (1 - 0.5)
    dropped = (rows == rows.mode(1).values[:, None]).double().mean().item()
    assert abs(dropped - 0.5) < 5 * 0.5 / math.sqrt(rows.numel())


@pytest.mark.parametrize("silent", ["output", "feed_forward.3"])
def test_both_sublayers_of_a_block_have_dropout(silent):
    """With one of them silent the other's still shows."""
    block = diffurec.TransformerBlock(config(dropout=0.5))
    for parameter in block.get_submodule(silent).parameters():
        torch.nn.init.zeros_(parameter)
    z, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    assert not torch.equal(block(z, mask), block(z, mask))


# ------------------------------------------------------------------------------------- 5. DiffuRec
def plain_approximate(model, history, x, s):
    """Eq. 13 and 12 as they stand; s is a step for each history. Draws lambda."""
    options, e = model.config, model.item_embeddings.weight[history]
    e = plain_norm(e, model.embedding_norm)
    noise = torch.randn(*history.shape, options.hidden)
    z = torch.zeros_like(e)
    for b, n in itertools.product(*map(range, history.shape)):
        lambda_ = options.delta + math.sqrt(options.delta) * noise[b, n]
        step = plain_step_embedding(s[b], options.hidden)
        z[b, n] = e[b, n] + lambda_ * (x[b] + step)
    return PLAIN[options.approximator](model.approximator, z, history > 0)


def plain_algorithm_1(model, history):
    """With alpha-bar for the paper's alpha, but sqrt(alpha_s) before x_s, as Bayes' rule has it."""
    betas = diffurec.beta_schedule(model.config.schedule, model.config.steps)

    def bar(s):  # of s + 1 steps
        return math.prod(1 - beta for beta in betas[: s + 1])

    x = torch.randn(len(history), model.config.hidden)
    for s in range(model.config.steps - 1, -1, -1):
        x_hat = plain_approximate(model, history, x, [s] * len(history))
        mean = math.sqrt(bar(s - 1)) * betas[s] / (1 - bar(s)) * x_hat
        mean = mean + math.sqrt(1 - betas[s]) * (1 - bar(s - 1)) / (1 - bar(s)) * x
        variance = (1 - bar(s - 1)) / (1 - bar(s)) * betas[s]
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
        bar = math.prod(1 - beta for beta in betas[: step + 1])
        x_s.append(math.sqrt(bar) * table[item] + math.sqrt(1 - bar) * row)
    powers = (plain_approximate(model, history, x_s, s) @ table[1:].T).exp()
    likelihoods = powers[range(len(target)), target - 1] / powers.sum(1)
    return -likelihoods.log().mean()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("approximator", PLAIN)
def test_reverse_is_algorithm_1_with_the_same_noise_and_never_has_dropout(approximator, schedule):
    dropouts = {"dropout": 0.5, "embedding_dropout": 0.5}
    model = model_of(approximator=approximator, schedule=schedule, delta=0.2, steps=5, **dropouts)
    history = padded(*HISTORIES)
    with torch.no_grad():
        torch.manual_seed(3)
        want = plain_algorithm_1(model, history)
        torch.manual_seed(3)
        # float32, five times through the approximator
        torch.testing.assert_close(model.reverse(history), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("approximator", PLAIN)
def test_forward_is_algorithm_2_with_the_same_noise_and_so_are_all_gradients(approximator):
    model = model_of(approximator=approximator, delta=0.2).eval()  # at 0 too dropout draws numbers
    history, gradients = padded(*HISTORIES), []
    for loss_of in (plain_algorithm_2, diffurec.DiffuRec.forward):
        model.zero_grad()
        torch.manual_seed(4)
        loss = loss_of(model, history, TARGETS)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for want, got in zip(*gradients):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)  # float32
    assert not model.item_embeddings.weight.grad[0].any()  # padding is no item


@pytest.mark.parametrize("approximator", PLAIN)
def test_batch_mates_and_padding_change_nobodys_result(approximator):
    """With delta = 0, without which batches of two sizes would draw different noise."""
    model = model_of(approximator=approximator, delta=0.0, hidden=16)
    mates = [[*history] for history in HISTORIES] + [[7] * 40]
    together = model.reverse(padded(*mates))
    for row, history in zip(together, mates):
        # float32 sums in blocks of another size
        torch.testing.assert_close(model.reverse(padded(history))[0], row, rtol=1e-4, atol=1e-5)
        more = [0] * 30 + history
        torch.testing.assert_close(model.reverse(padded(more))[0], row, rtol=1e-4, atol=1e-5)


def test_column_j_of_the_scores_is_item_j_plus_1():
    x_0 = torch.randn(5, 8)
    for rounding in ("inner_product", "r_star"):
        model = model_of(n_items=7, rounding=rounding)
        table, scores = model.item_embeddings.weight.tolist(), model.scores(x_0)
        assert scores.shape == (5, 7)
        for (b, x), j in itertools.product(enumerate(x_0.tolist()), range(7)):
            e = table[j + 1]
            want = sum(p * q for p, q in zip(x, e))  # Eq. 20
            if rounding == "r_star":  # Eq. 21
                x_norm, e_norm = math.hypot(*x), math.hypot(*e)
                want = -sum((p / x_norm - q / e_norm) ** 2 for p, q in zip(x, e))
            assert scores[b, j].item() == pytest.approx(want, abs=1e-5)  # float32


def test_recommend_gives_the_best_items_and_reads_the_last_max_len():
    model = model_of(n_items=12, delta=0.0)
    history = torch.tensor([[9, 9, 1, 2, 3, 4, 5, 6], [0, 0, 0, 8, 8, 2, 1, 1]])
    items, scores = model.recommend(history, 12)
    want = model.scores(model.reverse(history[:, -6:]))
    for row, values, all_values in zip(items, scores, want):
        assert sorted(row.tolist()) == list(range(1, 13))
        for order in (all_values.sort(descending=True)[0], all_values[row - 1]):
            torch.testing.assert_close(values, order)
    assert torch.equal(model.recommend(history, 3)[0], items[:, :3])


@pytest.mark.parametrize(
    ("history", "k"),
    [
        *((torch.tensor(rows), 3) for rows in ([[1, 0]], [[1, 0, 2]], [[0, 0]], [[1, 2], [0, 0]])),
        *((torch.tensor(rows), 3) for rows in ([[1, 13]], [[-1, 2]], [1, 2, 3], [[[1]]], 1)),
        *((torch.zeros(shape, dtype=torch.long), 3) for shape in ((0, 3), (2, 0), (0,))),
        *((torch.ones(1, 2, dtype=dtype), 3) for dtype in (torch.int32, torch.float, torch.bool)),
        *((torch.tensor([[1, 2]]), k) for k in (0, 13, -1)),
    ],
)
def test_recommend_refuses_what_is_no_history(history, k):
    with pytest.raises(ValueError, match="^(history|item ids).*$"):
        model_of(n_items=12).recommend(history, k)


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_state_is_left_and_answers_repeat_themselves(training, tmp_path):
    model = model_of(n_items=30, delta=0.9, dropout=0.5, embedding_dropout=0.5).train(training)
    sequences, history = sequences_of(random_users(3)), torch.tensor([[1, 2, 3]])
    state = {"config": dataclasses.asdict(model.config), "n_items": 30, "events": []}
    diffurec.save_run(tmp_path, state | {"best_weights": model.state_dict()})
    before, results = torch.get_rng_state(), []
    for _ in range(2):
        items, scores = model.recommend(history, 9)
        loaded, _ = diffurec.load_checkpoint(tmp_path / "checkpoint.pt")
        both = [diffurec.evaluate(m, sequences, "test") for m in (model, loaded)]
        assert both[0] == both[1]
        results.append((items.tolist(), scores.tolist(), both))
        assert torch.equal(before, torch.get_rng_state())
        assert all(module.training == training for module in model.modules())
    assert results[0] == results[1]
    model.config.seed += 1
    assert model.recommend(history, 9)[1].tolist() != results[0][1]


@pytest.mark.parametrize("approximator", PLAIN)
def test_bfloat16_comes_close_to_float32(approximator):
    """Rounding to 8 bits is 0.4 % of each product; six such products in a row and their sums."""
    history, losses = padded(*HISTORIES), {}
    for name in ("float32", "bfloat16", "whole model"):
        precision = "bfloat16" if name == "bfloat16" else "float32"
        # without noise: in another type it is drawn otherwise
        model = model_of(approximator=approximator, hidden=32, precision=precision, delta=0.0)
        model = model.bfloat16() if name == "whole model" else model
        losses[name] = model(history, TARGETS)
        losses[name].backward()
        assert losses[name].dtype == torch.float32
        _, scores = model.recommend(history, 3)
        assert scores.isfinite().all()
        assert scores.dtype == (torch.bfloat16 if name == "whole model" else torch.float32)
        assert diffurec.evaluate(model, sequences_of([[1, 2, 3, 12]]), "test")["HR@20"] == 1
    exact, *others = (loss.item() for loss in losses.values())
    assert exact not in others
    assert others == pytest.approx([exact] * 2, rel=0.03)


def test_compiled_forward_is_the_eager_one():
    """In one graph; "auto" asks the machine for its units, which a compiler cannot follow."""
    model, losses = model_of(precision="auto", delta=0.5).eval(), []
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for forward in (model, compiled):
        torch.manual_seed(1)
        losses.append(forward(padded(*HISTORIES), TARGETS).item())
    assert losses[0] == losses[1]


# ----------------------------------------------------------------------------------------- 6. data
MANY = [*range(1, 1001)]
SEQUENCE_FILES = {  # by line
    b"1 2 3\r\n4 5 6 7\r\n": {1: [1, 2, 3], 2: [4, 5, 6, 7]},
    b"\xef\xbb\xbf1\t2   3 \n 4 5 6\n": {1: [1, 2, 3], 2: [4, 5, 6]},
    b"7 7 7\n\n1 9\n \n\n3 2 1\n\n": {1: [7, 7, 7], 3: [1, 9], 6: [3, 2, 1]},
    b"3 2 1 100000 5\n": {1: [3, 2, 1, 100_000, 5]},
    b"000000000000000000000000000000012 2 3\n": {1: [12, 2, 3]},
    " ".join(map(str, [*MANY, 100_100])).encode(): {1: [*MANY, 100_100]},
}
NOT_SEQUENCES = {
    b"": r"x\.txt: no line has three items",
    b"1 2\n3 4\n5\n": r"x\.txt: no line has three items",
    b"1 2 3\n1 two 3\n": r"x\.txt:2: 'two' is not an item id; .*python prepare_data.py NAME --raw",
    b"1 2 3\r\n\r\n1 -2 3\n": r"x\.txt:3: '-2'",
    b"1 2 3\n1 0 3\n": r"x\.txt:2: '0' is not an item id; add 1 to every id",
    "1 2 3\n1 ٢ 3\n".encode(): r"x\.txt:2: '٢'",
    "1 2 3".encode("utf-16"): r"x\.txt:1: ",
    b"1 2 3\n1 2 10000000\n": r"x\.txt:2: '10000000'",
    b"user\titem\n1\t2\n": r"x\.txt:1: 'user'.*python prepare_data.py NAME --raw",
    b"1 2 3 " + b"x" * 1000: r"x\.txt:1: 'x{40}' is",
    b"1 2 3\n100001\n": r"x\.txt: ids go up to 100,001",
    " ".join(map(str, [*MANY, 100_101])).encode(): "ids go up to 100,101",
}


@pytest.mark.parametrize("data", [*SEQUENCE_FILES, *NOT_SEQUENCES])
def test_sequence_file_is_read_or_refused_with_its_line(tmp_path, data):
    (tmp_path / "x.txt").write_bytes(data)
    if data in NOT_SEQUENCES:
        with pytest.raises(ValueError, match=f"{NOT_SEQUENCES[data]}.*$"):
            diffurec.load_sequences(tmp_path / "x.txt")
        return
    sequences, users = diffurec.load_sequences(tmp_path / "x.txt"), SEQUENCE_FILES[data]
    kept = {line: items for line, items in users.items() if len(items) >= 3}
    assert (sequences.lines.tolist(), sequences.n_users) == (list(kept), len(kept))
    assert sequences.n_items == max(map(max, users.values()))
    bounds = itertools.pairwise(sequences.offsets.tolist())
    assert [sequences.items[a:b].tolist() for a, b in bounds] == list(kept.values())
    assert sequences.items.dtype == sequences.offsets.dtype == sequences.lines.dtype == np.int64


def test_fingerprint_tells_sequences_apart():
    different = [
        [[1, 2, 3], [4, 5, 6, 7]],
        [[1, 2, 3, 4], [5, 6, 7]],  # only where one user ends is different
        [[1, 2, 3, 4, 5, 6, 7]],
        [[4, 5, 6, 7], [1, 2, 3]],
        [[1, 3, 2], [4, 5, 6, 7]],
        [[1, 2, 3], [4, 5, 6, 7], [8]],  # one item more, if only in a line that is left out
        [[], [1, 2, 3], [4, 5, 6, 7]],  # --recommend 1 would be another user
    ]
    assert len({sequences_of(users).fingerprint for users in different}) == len(different)


USERS = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=9), min_size=1, max_size=12)


def unpadded(batches, batch_size):
    """(history, target) of all batches; the padding is on the left and none is needless."""
    for history, target in batches:
        assert history.dtype == target.dtype == torch.int64
        assert len(history) == len(target) <= batch_size
        assert (history[:, 0] > 0).any()
        for row, item in zip(history.tolist(), target.tolist(), strict=True):
            assert row == sorted(row, key=bool)
            yield tuple(filter(None, row)), item


@property_test
@given(USERS, st.integers(1, 8), st.integers(1, 90), st.integers(0, 99))
def test_every_prefix_is_trained_on_and_every_user_scored_once(users, max_len, batch_size, seed):
    sequences, rng = sequences_of(users), np.random.default_rng(seed)
    got = unpadded(diffurec.train_batches(sequences, max_len, batch_size, rng), batch_size)
    prefixes = [(user[:n], user[n]) for user in users for n in range(1, len(user) - 2)]
    want = [(tuple(prefix[-max_len:]), item) for prefix, item in prefixes]
    assert sorted(got) == sorted(want)
    for split, held_out in (("validation", 2), ("test", 1)):
        got = unpadded(diffurec.eval_batches(sequences, split, max_len, batch_size), batch_size)
        want = [(tuple(user[:-held_out][-max_len:]), user[-held_out]) for user in users]
        assert list(got) == sorted(want, key=lambda pair: len(pair[0]))  # the shortest first


def test_training_batches_are_shuffled_by_the_generator_alone_and_of_like_length():
    sequences = sequences_of(random_users(2, count=60))

    def epoch(rng):
        batches = diffurec.train_batches(sequences, 5, 7, rng)
        return [[(*row, item) for row, item in zip(*map(torch.Tensor.tolist, b))] for b in batches]

    rng = np.random.default_rng(0)
    first, second, again = epoch(rng), epoch(rng), epoch(np.random.default_rng(0))
    assert first == again != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}  # mates
    lengths = [[len(row) - row.count(0) for row in batch] for batch in first]
    longest = [max(batch) for batch in lengths]
    assert longest != sorted(longest)  # short and long histories in any order
    spans = sorted((min(batch), max(batch)) for batch in lengths)
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))


# ----------------------------------------------------------------------------------- 7. evaluation
def plain_rank(scores, target):
    """1 and all other items that are not below the target."""
    own = scores[target - 1]
    return 1 + sum(score >= own for item, score in enumerate(scores, 1) if item != target)


def plain_metrics(ranks, suffix=""):
    result = {}
    for k in (5, 10, 20):
        within = [rank for rank in ranks if rank <= k]
        result[f"HR@{k}{suffix}"] = len(within) / len(ranks)
        result[f"NDCG@{k}{suffix}"] = sum(1 / math.log2(rank + 1) for rank in within) / len(ranks)
    return result


def plain_both(pairs):
    """The metrics of (rank of all items, rank without the history's) pairs."""
    both, without = zip(*pairs)
    return plain_metrics(both) | plain_metrics(without, " without history")


def read_ranks(folder):
    lines = Path(folder, "ranks.txt").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]


@property_test
@given(st.data())
def test_ranks_and_metrics_against_brute_force(data):
    """On scores of few and of many different values."""
    width, height = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    floats = st.floats(-1024, 1024, width=32)
    values = data.draw(st.sampled_from([st.integers(0, 3), floats, st.just(7)]))
    row = st.lists(values, min_size=width, max_size=width)
    scores = data.draw(st.lists(row, min_size=height, max_size=height))
    target = data.draw(st.lists(st.integers(1, width), min_size=height, max_size=height))
    got = diffurec.ranks(torch.tensor(scores, dtype=torch.float32), torch.tensor(target))
    want = [plain_rank(*pair) for pair in zip(scores, target)]
    assert got.tolist() == want
    assert diffurec.metrics(got) == pytest.approx(plain_metrics(want), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 3])  # the target's, another's
def test_score_that_is_not_finite_has_no_rank(value, column):
    scores = torch.arange(5.0)[None].index_fill(1, torch.tensor(column), value)
    with pytest.raises(FloatingPointError):
        diffurec.ranks(scores, torch.tensor([1]))


@pytest.mark.parametrize(("split", "held_out"), [("validation", 2), ("test", 1)])
def test_evaluate_is_brute_force_in_both_rankings(split, held_out, tmp_path):
    """Of 30 items a history may hold the target, and may be twice as long as what is read of it."""
    model, users = model_of(n_items=30, delta=0.5), random_users(3, count=90, longest=14)
    got = diffurec.evaluate(model, sequences_of(users), split, 16, tmp_path / "ranks.txt")
    pairs = {}
    torch.manual_seed(model.config.seed)
    by_length = sorted(range(90), key=lambda user: len(users[user]))
    for first in range(0, 90, 16):
        batch = by_length[first : first + 16]
        history = padded(*(users[user][:-held_out] for user in batch))[:, -6:]
        for user, scores in zip(batch, model.scores(model.reverse(history)).tolist()):
            target = users[user][-held_out]
            of_all = plain_rank(scores, target)
            for item in users[user][:-held_out]:  # the whole history, the older part too
                scores[item - 1] = -math.inf
            pairs[user] = (of_all, plain_rank(scores, target))
            if target in users[user][:-held_out]:
                assert pairs[user][1] == 30  # the last
    assert got == pytest.approx(plain_both(pairs.values()), rel=1e-12)
    assert read_ranks(tmp_path) == [pairs[user] for user in range(90)]  # in the data's order


@property_test
@given(users=USERS)
def test_popularity_against_brute_force(users):
    counts = collections.Counter(item for user in users for item in user[:-2])
    scores = [counts[item] for item in range(1, max(map(max, users)) + 1)]
    want = plain_metrics([plain_rank(scores, user[-1]) for user in users])
    assert diffurec.popularity(sequences_of(users)) == pytest.approx(want, rel=1e-12)


# ------------------------------------------------------------------------------------- 8. training
def test_train_epoch_is_adam_on_the_loss_of_each_batch():
    """Adam written out, on the batches and with the random numbers that the epoch used."""
    model, plain = (model_of(n_items=30, approximator="gru").eval() for _ in range(2))
    calls, original = [], model.forward

    def forward(history, target):
        model.eval()  # at 0 too dropout draws numbers
        calls.append((torch.get_rng_state(), history, target))
        return original(history, target)

    model.forward = forward
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    loss = diffurec.train_epoch(model, sequences_of(random_users(4)), optimizer, 1)

    losses, moments = [], [[torch.zeros_like(p)] * 2 for p in plain.parameters()]
    for t, (state, history, target) in enumerate(calls, 1):
        torch.set_rng_state(state)
        plain.zero_grad()
        losses.append(plain(history, target))
        losses[-1].backward()
        for p, moment in zip(plain.parameters(), moments):
            moment[0] = 0.9 * moment[0] + 0.1 * p.grad
            moment[1] = 0.999 * moment[1] + 0.001 * p.grad**2
            root = (moment[1] / (1 - 0.999**t)).sqrt() + 1e-8
            p.data -= 0.01 * moment[0] / (1 - 0.9**t) / root
    sizes = [len(target) for _, _, target in calls]
    assert loss == pytest.approx(np.average([x.item() for x in losses], weights=sizes), rel=1e-4)
    for got, want in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)  # 0.01 a step


def test_random_numbers_of_an_epoch_follow_from_its_number_and_the_seed():
    """Were they the same in two epochs or for two seeds, resumed runs would still look right."""
    sequences, seen = sequences_of(random_users(4)), []
    for seed, epoch in [(1, 1), (1, 2), (2, 1), (1, 1)]:
        model = model_of(n_items=30, delta=0.5)
        model.config.seed = seed
        optimizer = torch.optim.Adam(model.parameters())
        model.diffusion.q_sample = lambda x, s, noise: seen[-1].append(noise.sum().item()) or x
        seen.append([])
        seen[-1].append(diffurec.train_epoch(model, sequences, optimizer, epoch))
        assert model.training
    assert seen[0] == seen[3]
    assert len({batches[0] for batches in seen}) == len({batches[-1] for batches in seen}) == 3


# ----------------------------------------------------------------------------- 9. the command line
TINY = ["--hidden=8", "--heads=2", "--blocks=1", "--steps=2", "--batch-size=16", "--eval-every=1"]


class Cli:
    """`diffurec.py` in the process of the test: cli(...) -> status; .out and .err of the last."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *arguments):
        self.capsys.readouterr()
        status = diffurec.main([str(argument) for argument in arguments])
        self.out, self.err = self.capsys.readouterr()
        return status

    def train(self, *arguments, data="x.txt", epochs=2):
        assert self("--data", data, *TINY, "--epochs", epochs, *arguments) == 0
        assert self.err == ""

    def refused(self, *arguments):
        """The one line on standard error, after which no file is other than before."""
        before = snapshot(".")
        assert self(*arguments) == 2
        assert snapshot(".") == before
        assert re.fullmatch(r"diffurec\.py: .+\n", self.err)
        return self.err


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """In a folder that holds x.txt, of whose 21 users the second is too short."""
    monkeypatch.chdir(tmp_path)
    users = [[5, 6, 7, 8, 9], [1, 2], *random_users(7, count=18, shortest=4), [30, 29, 28]]
    write_users("x.txt", users)
    return Cli(capsys)


def snapshot(folder):
    paths = [path for path in Path(folder).rglob("*") if not path.name.startswith("lock")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def events_of(folder, kind=None):
    """The events of log.jsonl, or those of a kind, without what no two runs have alike."""
    events = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    events = [{k: v for k, v in event.items() if k != "seconds"} for event in events]
    return [event for event in events if kind in (None, event["event"])]


def checkpoint_of(folder, *arguments, **changes):
    return diffurec.load_checkpoint(Path(folder, "checkpoint.pt"), *arguments, **changes)


def assert_same_run(one, other):
    assert events_of(one) == events_of(other)
    assert read_ranks(one) == read_ranks(other)
    for weights in ("weights", "best_weights"):
        models = [checkpoint_of(folder, weights)[0].state_dict() for folder in (one, other)]
        assert all(map(torch.equal, *(model.values() for model in models)))


def assert_row(out, label, *events, suffix=""):
    """The rows of a table that begin with label have these events' six numbers, in %."""
    rows = [line.removeprefix(label) for line in out.splitlines() if line.startswith(label + " ")]
    want = [[f"{100 * event[name + suffix]:.2f}" for name in diffurec.METRICS] for event in events]
    assert [row.split() for row in rows] == want


def test_best_epoch_is_kept_and_scored_and_its_ranks_written(cli):
    """A large learning rate makes the validations go up and down."""
    cli.train("--lr", 0.3, "--patience", 99, "--eval-every", 2, epochs=11)
    validations, test = events_of("runs/x-1", "validation"), events_of("runs/x-1")[-1]
    assert [event["epoch"] for event in validations] == [2, 4, 6, 8, 10, 11]
    best = max(validations, key=lambda event: event["NDCG@10"])  # the first of equals
    assert test["epoch"] == best["epoch"] < 11
    model, state = checkpoint_of("runs/x-1")
    assert (state["epoch"], state["best_epoch"]) == (11, test["epoch"])
    for event, split in ((best, "validation"), (test, "test")):
        result = diffurec.evaluate(model, diffurec.load_sequences("x.txt"), split)
        assert result.items() <= event.items()
    of_ranks = plain_both(read_ranks("runs/x-1"))
    assert of_ranks == pytest.approx({name: test[name] for name in of_ranks}, rel=1e-12)
    last = checkpoint_of("runs/x-1", "weights")[0].item_embeddings.weight
    assert not torch.equal(model.item_embeddings.weight, last)


def test_early_stopping_after_patience_validations_without_progress(cli, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", itertools.count(step=60).__next__)  # a minute each
    cli.train("--lr", 0, "--patience", 3, "--eval-every", 2, epochs=50)  # nothing ever changes
    assert re.findall(r"about (\d+) min left", cli.out)[:2] == ["49", "72"]  # 1 * 49, 3 / 2 * 48
    assert "a larger --patience would go on" in cli.out
    epochs = [event.get("epoch") for event in events_of("runs/x-1") if "loss" not in event]
    assert epochs == [None, 2, 4, 6, 8, None, 2]
    for more in (["--epochs", 60], ["--patience", 4]):  # the first ends again, at once
        assert cli("--data", "x.txt", "--resume", *more) == 0
    assert re.findall(r"about (\d+) min left", cli.out) == ["74", "75"]  # 13 / 9 * 51, 15 / 10 * 50


def test_loss_that_is_not_finite_is_status_1_and_keeps_the_last_good_checkpoint(cli, monkeypatch):
    original = diffurec.train_epoch
    cli.train("--out", "whole", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(diffurec, "train_epoch", lambda *a: original(*a) if a[3] < 3 else math.nan)
        assert cli("--data", "x.txt", *TINY, "--epochs", 3) == 1
    assert re.fullmatch(r"diffurec\.py: epoch 3.* --lr\n", cli.err)
    assert checkpoint_of("runs/x-1")[1]["epoch"] == 2
    assert cli("--data", "x.txt", *TINY, "--resume", "--out", "runs/x-1") == 0
    assert_same_run("runs/x-1", "whole")


def test_run_stopped_at_any_replacement_of_a_file_goes_on_as_if_it_had_not_been(cli, monkeypatch):
    """Every file is written by replacing it: stop before and after each of these moments."""
    arguments = ["--data", "x.txt", *TINY, "--epochs", 3, "--eval-every", 2, "--out"]
    assert cli(*arguments, "whole") == 0
    replace = os.replace
    for limit, when in itertools.product(range(100), ("before", "after")):
        folder, count = f"stopped-{limit}-{when}", itertools.count()

        def stop(source, target, when=when, limit=limit, count=count):
            number = next(count)
            if number < limit or when == "after":
                replace(source, target)
            if number == limit:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            status = cli(*arguments, folder)
        if status == 0:
            assert limit == 8  # two for each epoch, and two at the end
            return
        assert status == 130
        assert re.fullmatch(r"diffurec\.py: .*--resume.*\n", cli.err)
        began = Path(folder, "log.jsonl").exists()  # if not, there is no run yet
        if began and not checkpoint_of(folder, "weights")[1]["best_epoch"]:
            assert "no validation yet" in cli.refused(*arguments[:2], "--out", folder, "--evaluate")
        again = ["--data", "x.txt", "--resume", "--out"] if began else arguments
        assert cli(*again, folder) == 0, cli.err
        assert_same_run("whole", folder)
        assert len(snapshot(folder)) == 3  # checkpoint.pt, log.jsonl, ranks.txt


def test_living_run_is_locked_and_a_killed_one_goes_on_to_the_same_end(cli):
    arguments = ["--data", "x.txt", *TINY, "--epochs", "30", "--patience", "30"]
    assert cli(*arguments, "--out", "whole") == 0
    command = [sys.executable, SCRIPT, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while not process.stdout.readline().startswith("epoch 3"):
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)  # so that nothing changes but by the others
        os.waitpid(process.pid, os.WUNTRACED)
        for what in (["--resume"], ["--evaluate"], ["--resume", "--out", "runs/x-1"]):
            assert "another program" in cli.refused("--data", "x.txt", *what)
    finally:
        process.kill()
    process.communicate()
    assert not events_of("runs/x-1", "test")
    assert cli("--data", "x.txt", "--resume") == 0
    assert_same_run("whole", "runs/x-1")


def test_runs_are_found_by_their_data_and_of_several_the_newest(cli):
    Path("b").mkdir()
    write_users("b/x.txt", random_users(8))
    for data in ("x.txt", "x.txt", "b/x.txt"):
        cli.train(data=data, epochs=1)
    assert sorted(os.listdir("runs")) == ["x-1", "x-2", "x-3"]
    os.rename("x.txt", "renamed.txt")
    before = [events_of(f"runs/x-{number}") for number in (1, 2, 3)]
    for newest, data in ((1, "renamed.txt"), (2, "renamed.txt"), (3, "b/x.txt")):
        for number, when in ((1, 1e9), (2, 1e9), (3, 3e9), (newest, 2e9)):
            os.utime(f"runs/x-{number}/log.jsonl", (when, when))
        assert cli("--data", data, "--resume") == 0
        assert f"runs/x-{newest}," in cli.out and "--resume" not in cli.out
    assert [events_of(f"runs/x-{number}") for number in (1, 2, 3)] == before  # all at their end
    write_users("x.txt", random_users(9))  # other data under the old name
    for out in ([], ["--out", "runs/x-1"]):
        assert "train one first" in cli.refused("--data", "x.txt", "--evaluate", *out)
    cli.train("--out", "whole", data="b/x.txt", epochs=2)
    assert cli("--data", "b/x.txt", "--out", "runs/x-3", "--resume", "--epochs", 2) == 0
    assert events_of("runs/x-3")[1:] == events_of("whole")[1:]
    assert checkpoint_of("runs/x-3")[1]["config"] == checkpoint_of("whole")[1]["config"]
    assert events_of("runs/x-3")[0]["config"]["epochs"] == 1  # the start stays as it was


def test_evaluate_adds_its_figures_to_the_log_and_changes_no_setting(cli):
    cli.train("--delta", 0.5)
    before, ranks = events_of("runs/x-1"), read_ranks("runs/x-1")
    assert cli("--data", "x.txt", "--evaluate") == 0
    assert cli("--data", "x.txt", "--evaluate", "--rounding", "r_star") == 0
    events = events_of("runs/x-1")
    assert (events[: len(before)], read_ranks("runs/x-1")) == (before, ranks)
    added = events[len(before) :]
    best = max(events_of("runs/x-1", "validation"), key=lambda event: event["NDCG@10"])
    for event, old in zip(added, (best, before[-1])):
        assert event.items() >= {name: old[name] for name in old if "@" in name}.items()
    model, _ = checkpoint_of("runs/x-1", rounding="r_star")
    sequences = diffurec.load_sequences("x.txt")
    assert [event["split"] for event in added] == ["validation", "test"] * 2
    for event in added[2:]:
        figures = diffurec.evaluate(model, sequences, event["split"])
        assert event.items() >= (figures | {"rounding": "r_star"}).items()
    assert_row(cli.out, "all items", *added[2:])
    assert_row(cli.out, "without the history's items", *added[2:], suffix=" without history")


class Touch:
    """Opened as a pickle, it makes the file `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_broken_or_foreign_checkpoint_is_refused_and_runs_nothing(cli):
    cli.train(epochs=1)
    path, buffer = Path("runs/x-1/checkpoint.pt"), io.BytesIO()
    content = path.read_bytes()
    torch.save({"config": {}, "weights": {}, "epoch": Touch()}, buffer)
    flipped = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    for data in (b"", content[:-100], flipped, content + b"\n", buffer.getvalue()):
        path.write_bytes(data)
        for what in (["--evaluate"], ["--resume"], ["--recommend", 1]):
            assert str(path) in cli.refused("--data", "x.txt", *what)
    path.write_bytes(data + hashlib.sha256(data).digest())
    with pytest.raises(pickle.UnpicklingError):
        diffurec.load_checkpoint(path)
    assert not Path("executed").exists()


def test_no_argument_but_settings_trains_on_the_toy(cli):
    assert (cli(*TINY, "--epochs", 2, "--batch-size", 512), cli.err) == (0, "")
    events = [json.loads(line) for line in Path("runs/toy-1/log.jsonl").read_text().splitlines()]
    kinds = ["start", *["epoch", "validation"] * 2, "popularity", "ceiling", "test"]
    assert [event["event"] for event in events] == kinds
    want = diffurec.Config(hidden=8, heads=2, blocks=1, steps=2, eval_every=1, epochs=2)
    want.embedding_std = 0.1  # the toy's own, not given
    assert (events[0]["data"], events[0]["config"]) == ("toy", dataclasses.asdict(want))
    names = set(diffurec.METRICS)
    both = names | {f"{name} without history" for name in names}
    start, epoch = {"data", "fingerprint", "config"}, {"epoch", "seconds"}
    keys = [start, *[epoch | {"loss"}, epoch | both] * 2, names, names, epoch | both]
    assert [event.keys() - {"event"} for event in events] == keys
    assert f"loss {events[3]['loss']:.4f}" in cli.out
    assert_row(cli.out, "all items", events[-1])
    assert_row(cli.out, "ceiling, all items", events[-2])
    # who knows the ring ranks by probability: the place j steps on is the j-th best
    weights = [prepare_data.TOY_DECAY**j for j in range(1, prepare_data.TOY_STRIDE + 1)]
    for k in (5, 10, 20):
        gains = [weight / math.log2(j + 1) for j, weight in enumerate(weights[:k], 1)]
        assert events[-2][f"HR@{k}"] == pytest.approx(sum(weights[:k]) / sum(weights), abs=5e-7)
        assert events[-2][f"NDCG@{k}"] == pytest.approx(sum(gains) / sum(weights), abs=5e-7)
    assert cli(*cli.out.splitlines()[-1].removeprefix("next: python diffurec.py ").split()) == 0


def test_table_2_and_own_settings_belong_to_the_counts_not_to_the_name(cli, monkeypatch):
    rows = {  # as printed in the paper, with Table 1's counts
        (22363, 12101, 198502): (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566),
        (19412, 11924, 167597): (5.5650, 7.4587, 9.8417, 4.1667, 4.7724, 5.3684),
        (6040, 3416, 999611): (17.9659, 26.2647, 36.7870, 12.1150, 14.7909, 17.4386),
        (281428, 13044, 3485022): (6.6742, 10.7520, 16.6507, 4.2902, 5.5981, 7.0810),
    }
    assert rows.items() <= diffurec.TABLE_2.items()
    assert diffurec.METRICS == ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")
    assert diffurec.DATASET_SETTINGS[6040, 3416, 999611] == {"max_len": 200}
    assert diffurec.DATASET_SETTINGS[2000, 200, 20001] == {"epochs": 12, "embedding_std": 0.1}
    os.mkdir("data")
    for name in ("beauty", "toy", "ml-1m"):
        shutil.copy("x.txt", f"data/{name}.txt")
        cli.train(data=name, epochs=1)
        assert not re.search("Table 2|ceiling", cli.out)
        start = events_of(f"runs/{name}-1")[0]["config"]
        assert (start["max_len"], start["embedding_std"]) == (50, 0.25)
    counts = (20, 30, len(Path("x.txt").read_text().split()) - 2)
    monkeypatch.setitem(diffurec.TABLE_2, counts, (1.25, 2.5, 3, 4, 5, 6.75))
    monkeypatch.setitem(diffurec.DATASET_SETTINGS, counts, {"max_len": 200})
    cli.train("--seed", 2, epochs=1)
    assert re.search(r"Table 2, all items +1.25 +2.50 +3.00 +4.00 +5.00 +6.75\n", cli.out)
    assert events_of("runs/x-1")[0]["config"]["max_len"] == 200
    cli.train("--max-len", 7, epochs=1)
    assert events_of("runs/x-2")[0]["config"]["max_len"] == 7


def test_recommend_shows_titles_the_models_items_and_what_100_reversals_reach(cli):
    titles = "".join(f"the title of {n}\x85\n" for n in range(1, 31))  # \x85 ends no line here
    Path("x.items.txt").write_text(titles, "utf-8-sig")
    cli.train("--delta", 0.5, "--max-len", 3)
    before = snapshot(".")
    assert cli("--data", "x.txt", "--recommend", 1) == 0
    shown = re.findall(r"(\d+)  the title of (\d+)", cli.out)
    model, _ = checkpoint_of("runs/x-1")
    want = model.recommend(torch.tensor([[5, 6, 7, 8, 9]]), 10)[0][0].tolist()
    assert shown == [(str(number), str(number)) for number in (5, 6, 7, 8, 9, *want)]
    assert 20 < int(re.search(r"(\d+) different items in their top 20", cli.out)[1]) <= 30
    lines = cli.out.splitlines()[:-1]  # the reversals are random
    assert cli("--data", "x.txt", "--history", 5, 6, 7, 8, 9) == 0
    assert cli.out.splitlines()[:-1] == lines
    assert cli("--data", "x.txt", "--recommend", 3) == 0  # the second of those who are kept
    last = random_users(7, count=18, shortest=4)[0][-1]
    assert re.search(rf" {last}  the title of {last}\x85?\n\n    item  next", cli.out)
    assert snapshot(".") == before


WRONG = {  # the arguments, and what is told
    "--data=": "''",
    "--data Beauty": r"did you mean beauty\b",
    "--data ml1m": r"did you mean ml-1m\b",
    "--data amazon-beauty": r"did you mean beauty\b",
    **dict.fromkeys(["--data table.txt", "--data first.txt"], "NAME --raw .*txt.*--not-a-table"),
    "--data three.txt": "no user has four items",
    "--data log.csv": "python prepare_data.py NAME --raw log.csv",
    "--steps 0": "steps is 0",
    "--hidden 9 --heads 3": "hidden is 9",
    **dict.fromkeys(["--device quantum", "--device cuda:99"], "leave --device out"),
    "--data nope.csv": "nope.csv: no such file",
    **{given: f"{given}.*--help" for given in ("--colour red", "--res")},
    **{f"--out {name}": f"{name} is a file or a broken link" for name in ("x.txt", "dangling")},
    "--out x.txt/run": "x.txt",
    "--out run": "run holds a run; --resume it",
    "--resume --out nowhere": "in nowhere; train one first",
    **dict.fromkeys(["--resume", "--evaluate", "--history 1", "--recommend 1"], "train one first"),
    **{f"--out run --recommend {user}": f"recommend {user}" for user in (0, 2, 22)},
    "--out run --recommend Zoe": "recommend: invalid int value: 'Zoe'",
    "--out run --history": "--history: expected",
    **{f"--out run --history {x}": "ids go from 1 to 30" for x in ("31", "0", "0 7", "-4", 10**20)},
    **{f"--out run --resume {given}": "leave it" for given in ("--lr 1", "--rounding r_star")},
    **{f"--out run --evaluate {given}": "leave it" for given in ("--steps 3", "--epochs 2")},
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_one_line_that_says_what_to_type_and_change_nothing(cli, arguments):
    write_users("three.txt", [[1, 2, 3], [3, 2, 1]])
    write_users("table.txt", [[n % 7 + 1, n, n] for n in range(1, 13)])
    write_users("first.txt", [[n, 5, 6, 7, *[8] * (n % 3)] for n in range(1, 13)])
    Path("log.csv").write_text("user,item,time\n1,2,3\n")
    Path("dangling").symlink_to("nowhere")
    if "run" in arguments:
        cli.train("--out", "run", epochs=1)
    data = [] if "--data" in arguments else ["--data", "x.txt"]
    assert re.search(WRONG[arguments], cli.refused(*data, *arguments.split()))


@pytest.mark.parametrize(
    ("arguments", "users"),
    [
        ("--lr=1000000000", ["1 2 3 4 5 6 7 8 9"] * 30),
        ("--batch-size=1 --max-len=1 --approximator=gru --precision=bfloat16", ["1 2 3 4"]),
        ("--batch-size=99999 --max-len=99999 --rounding=r_star --embedding-std=0", ["1 1 1 1"]),
        ("--hidden=2 --heads=1 --steps=1 --schedule=cosine", ["1 2 3 4"] * 30),
        ("--dropout=0.99 --embedding-dropout=0.99 --delta-is=std", ["1 2 3", "4 4 4 4"]),
        ("--steps=500 --delta=5 --embedding-std=100", ["100000 1 2 3"]),
    ],
)
def test_extremes_give_finite_numbers_or_a_clear_stop(cli, arguments, users):
    Path("x.txt").write_text("\n".join(users))
    data = ["--data", "x.txt", "--not-a-table"]
    status = cli(*data, *TINY, "--epochs", 1, *arguments.split())
    assert status == ("--lr" in arguments), cli.err
    assert re.fullmatch("diffurec.py: .*finite.*\n" if status else "", cli.err)
    for event in events_of("runs/x-1") if status == 0 else ():
        assert all(math.isfinite(value) for value in event.values() if isinstance(value, float))
    assert status or cli(*data, "--recommend", len(users)) == cli(*data, "--evaluate") == 0


def run_python(code, *options, returncode=0, **more):
    """The lines that a program prints, and what it says on standard error."""
    command = [sys.executable, "-c", textwrap.dedent(code), *options]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)} | more.pop("env", {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, **more)
    assert done.returncode == returncode, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_import_changes_nothing_in_the_process(cli):
    code = """
        import os, random, signal, sys, warnings, numpy, torch
        def state():
            yield dict(os.environ), sys.path[:], sys.excepthook, signal.getsignal(signal.SIGINT)
            yield list(warnings.filters), numpy.geterr(), random.getstate()
            yield str(numpy.random.get_state()), torch.get_rng_state().tolist()
            yield torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
        before = list(state())
        import diffurec
        changed = [pair for pair in zip(before, state()) if pair[0] != pair[1]]
        print("prepare_data" in sys.modules, os.listdir(), changed)
    """
    os.remove("x.txt")
    assert run_python(code) == (["False [] []"], "")


def test_copied_alone_it_works_on_files_and_on_a_terminal_that_cannot_show_titles(cli):
    shutil.copy(SCRIPT, "diffurec.py")
    Path("x.items.txt").write_text("商品\n" * 30, "utf-8")
    commands = [f"--data x.txt {' '.join(TINY)} --epochs 1", "--data x.txt --resume --epochs 2"]
    commands += ["--data x.txt --evaluate", "--data x.txt --recommend 1", "--data beauty"]
    env = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PYTHONPATH": ""}
    for words in commands:
        command = [sys.executable, "diffurec.py", *words.split()]
        done = subprocess.run(command, capture_output=True, check=False, env=os.environ | env)
        assert done.returncode == (2 if "beauty" in words else 0), done.stderr
        assert done.stdout.count(b"  ??") == (15 if "recommend" in words else 0)
    assert re.fullmatch(rb"diffurec\.py: .*prepare_data\.py.*\n", done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory needs Linux")
def test_memory_that_runs_out_is_one_line(cli):
    """1.3 million ids times 128 numbers are 0.7 GB, 0.3 more than there is."""
    write_users("big.txt", [[9, *range(1 + n, 100 * 13_000 + n, 100 * 13)] for n in range(13)])
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20, before[1]))
    status = cli("--data", "big.txt")
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert status == 2 and re.fullmatch(r"diffurec\.py: out of memory.*--hidden.*\n", cli.err)


@pytest.mark.parametrize("arguments", [["--help"], ["--data", "x.txt", *TINY, "--epochs", "3"]])
def test_closed_pipe_ends_quietly(cli, arguments):
    read, write = os.pipe()
    os.close(read)
    command, env = [sys.executable, SCRIPT, *arguments], os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, env=env)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_older_python_is_told_so_in_one_line():
    """The guard stands before the imports, and older versions can parse the whole file."""
    ast.parse(SCRIPT.read_text("utf-8"), feature_version=(3, 8))
    code = "import sys, runpy; sys.version_info = (3, 10, 9); runpy.run_path(sys.argv[1])"
    assert "3.11 or newer" in run_python(code, str(SCRIPT), returncode=1)[1]


# ------------------------------------------------------------------------------------------- CUDA
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("auto", 0.03)])
@pytest.mark.parametrize("approximator", PLAIN)
def test_gpu_comes_close_to_the_cpu(cli, approximator, precision, tolerance):
    """Without noise, of which a GPU draws other: delta = 0, and no dropout."""
    history, sequences = padded(*HISTORIES), sequences_of(random_users(2, count=60))
    draws = [(np.random.default_rng(1), device) for device in ("cpu", "cuda")]
    both = (diffurec.train_batches(sequences, 5, 7, *draw) for draw in draws)
    for cpu, gpu in zip(*both, strict=True):
        assert all(b.is_cuda and torch.equal(a, b.cpu()) for a, b in zip(cpu, gpu, strict=True))
    model = model_of(hidden=32, delta=0.0, approximator=approximator)
    want, x_0 = model(history, TARGETS).item(), model.reverse(history)
    model.config.precision = precision
    model.cuda()
    assert model(history.cuda(), TARGETS.cuda()).item() == pytest.approx(want, rel=tolerance)
    assert (model.reverse(history.cuda()).cpu() - x_0).norm() < tolerance * x_0.norm()
    before = torch.cuda.get_rng_state()
    items, _ = model.recommend(history.cuda(), 3)
    assert torch.equal(items, model.recommend(history.cuda(), 3)[0])
    assert torch.equal(torch.cuda.get_rng_state(), before)
    cli.train("--device", "cuda", "--approximator", approximator)
    for device, what in itertools.product(("cuda", "cpu"), ("--evaluate", "--history=1")):
        assert cli("--data", "x.txt", what, "--device", device) == 0


# =================================================================================================
# prepare_data.py
PREPARE_SCRIPT = Path(prepare_data.__file__)


def run_prepare(*arguments, cwd, **options):
    """The command in a process of its own."""
    command = [sys.executable, str(PREPARE_SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, timeout=60, check=False, **options)


def file_lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_toy_files_are_those_of_the_first_edition(tmp_path):
    """On them the README's figures were measured."""
    prepare_data.prepare("toy", tmp_path)
    data = (tmp_path / "toy.txt").read_bytes()
    assert (
        hashlib.sha256(data).hexdigest()
        == "cdb62666e110d2ba9fda60399a2d649bab207ac3770ce10087abb6f31e8dabb6"
    )
    lines = [" ".join(map(str, user)) + "\n" for user in prepare_data.make_toy()]
    assert "".join(lines).encode() == data
    assert len(file_lines(tmp_path / "toy.items.txt")) == prepare_data.TOY_ITEMS
    assert len(file_lines(tmp_path / "toy.users.txt")) == prepare_data.TOY_USERS


# --------------------------------------------------------- what prepare makes of a list of actions
def plain_prepare(actions, core=1, once=False):
    """{user: items}, in order, of (user, item, time) actions; the K-core one by one."""
    order = dict.fromkeys(user for user, _, _ in actions)  # as the raw file first names them
    if not once:
        actions = list(dict.fromkeys(actions))
    while True:
        users = collections.Counter(user for user, _, _ in actions)
        items = collections.Counter(item for _, item, _ in actions)
        kept = [a for a in actions if users[a[0]] >= core and items[a[1]] >= core]
        if kept == actions:
            break
        actions = kept
    result = {}
    for user in order:
        mine = sorted((a for a in actions if a[0] == user), key=lambda a: a[2])
        sequence = [item for _, item, _ in mine]
        if sequence:
            result[user] = list(dict.fromkeys(sequence)) if once else sequence
    return result


def prepared(folder, name):
    """{user: items} as the three files tell it, names in place of numbers."""
    items, users = (file_lines(folder / f"{name}.{kind}.txt") for kind in ("items", "users"))
    lines = file_lines(folder / f"{name}.txt")
    assert len(users) == len(lines)
    numbers = [[int(number) for number in line.split()] for line in lines]
    assert {number for line in numbers for number in line} == set(range(1, len(items) + 1))
    return {user: [items[n - 1] for n in line] for user, line in zip(users, numbers)}


def check_prepared(folder, name, raw, actions, core=None, once=False):
    """Prepare and compare, order of users and items included; too little left must be an error."""
    default = 5 if name in prepare_data.TABLE_1 else 1
    want = plain_prepare(actions, core or default, once)
    if max(map(len, want.values()), default=0) < 3:
        with pytest.raises(ValueError, match="no user with 3 actions"):
            prepare_data.prepare(name, folder, raw, core)
        return
    assert prepare_data.prepare(name, folder, raw, core) == folder / f"{name}.txt"
    assert list(prepared(folder, name).items()) == list(want.items())
    left = {item for items in want.values() for item in items}
    in_order = dict.fromkeys(item for _, item, _ in actions if item in left)
    assert file_lines(folder / f"{name}.items.txt") == list(in_order)


@property_test
@given(
    actions=st.lists(
        st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdefg"), st.integers(0, 5)),
        min_size=1,
        max_size=60,
    ),
    core=st.integers(1, 5),
)
def test_core_order_repeats_and_numbers_against_brute_force(tmp_path, actions, core):
    raw = tmp_path / "log.csv"
    raw.write_text("".join(f"{user},{item},{when}\n" for user, item, when in actions))
    check_prepared(tmp_path, "own", raw, actions, core)


def test_report_says_what_was_read_and_dropped(tmp_path, capsys):
    """By hand: one row lacks its user, one repeats, v and z and then w leave with the 2-core."""
    rows = ["u,a,3", "v,w,1", "v,z,1", "u,b,3", "w,b,109", "u,a,1", "w,a,109", "u,a,3", "w,b,200"]
    padding = [f"u,{item},{50 + n}" for n in range(60) for item in "ab"]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *rows, ",a,7", *padding]))
    prepare_data.prepare("own", tmp_path, tmp_path / "log.csv", core=2)
    out = capsys.readouterr().out
    assert "columns: user, item, time" in out
    assert "read 130 rows in 131 lines; dropped 1 without a user, an item or a time" in out
    assert "dropped 1 exact repeats" in out
    assert "dropped 1 users and 2 items outside the 2-core, 2 rows in all" in out
    # u: a1, a3, b3, and 60 times a and b; w: b109, a109, b200; 124 neighbours
    assert "62 of 124 neighbouring actions of a user have the same time" in out
    assert "  warning" not in out
    assert f"{tmp_path / 'own.txt'}: 2 sequences, 2 items, 126 actions" in out
    assert "Table 1" not in out


@pytest.mark.parametrize(
    ("times", "warned"),
    [
        (["5.0", "4.0", "5.0", "5.0", "5.0", "5.0"], True),  # a rating
        (["1.30006E+09"] * 5 + ["1.30007E+09"], True),
        (["2020-01-01"] * 4 + ["2020-01-02"] * 2, True),
        (["1", "2", "2", "3", "4", "5"], False),
    ],
)
def test_warning_where_most_neighbours_have_the_same_time(tmp_path, capsys, times, warned):
    lines = [f"u,i{number},{when}\n" for number, when in enumerate(times)]
    (tmp_path / "log.csv").write_text("".join(lines))
    prepare_data.prepare("own", tmp_path, tmp_path / "log.csv")
    assert ("  warning: most" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(("missing", "right"), [(1, True), (2, True), (3, False)])
def test_at_most_one_row_in_a_hundred_may_lack_something(tmp_path, missing, right):
    lines = [f"u,i{n % 9},{n}" for n in range(200 - missing)]
    lines[7:7] = ["u,NULL,5", ",i1,5", "u,i1,\\N"][:missing]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *lines]))
    if right:
        prepare_data.prepare("own", tmp_path, tmp_path / "log.csv")
        assert len(prepared(tmp_path, "own")["u"]) == 200 - missing
    else:
        with pytest.raises(ValueError, match=r"log\.csv:9: 3 of 200 rows lack"):
            prepare_data.prepare("own", tmp_path, tmp_path / "log.csv")


# -------------------------------------------------------------------------------- the raw formats
def five_core():
    """Random (user, item, day) actions, several of which leave with the 5-core, without repeats."""
    draw = random.Random(5)
    users, items = [f"U{i}" for i in range(40)], [f"I{i}" for i in range(30)]
    chosen = zip(draw.choices(users, range(1, 41), k=700), draw.choices(items, range(1, 31), k=700))
    return list(dict.fromkeys((user, item, draw.randrange(30)) for user, item in chosen))


def day_in_2017(day):
    return f"2017-{day // 28 + 1:02}-{day % 28 + 1:02}"


def json_file(actions, keys=("reviewerID", "asin", "unixReviewTime"), more=()):
    """JSON lines with these keys, beside others that are only text."""
    lines = []
    for user, item, when in actions:
        review = dict(zip(keys, (user, item, when))) | {"reviewText": '"asin": "no"', "overall": 5}
        lines.append(json.dumps(review | dict(more)) + "\n")
    return "".join(lines).encode()


def steam_file(actions):
    """Python literals as in the real file, with texts that look like fields."""
    texts = ["it's", 'say "x"', "a\\b", "'username': 'z', u'product_id': u'1'", "☠\n"]
    lines = []
    for number, (user, item, day) in enumerate(actions):
        fields = [
            f"u'text': u{texts[number % 5]!a}",
            f"u'username': u{user!a}",
            f"'product_id': '{item}'",
            f"u'date': u'{day_in_2017(day)}'",
            "u'hours': -1.5",
            "u'early_access': False",
            "u'compensation': None",
        ]
        if number % 11 == 0:
            fields.append("u'odd': [1, u'username']")
        at = number % len(fields)
        lines.append("{" + ", ".join(fields[at:] + fields[:at]) + "}\n")
    return "".join(lines).encode("ascii")


def movielens_zip(path, ratings, movies):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-1m/README", "no ratings.dat")
        archive.writestr("ml-1m/movies.dat", movies)
        archive.writestr("ml-1m/ratings.dat", ratings)


@pytest.mark.parametrize("packed", [gzip.compress, bytes])
@pytest.mark.parametrize("name", ["beauty", "own"])
@pytest.mark.parametrize(
    ("keys", "more"),
    [
        (("reviewerID", "asin", "unixReviewTime"), {"reviewTime": "09 1, 2016"}),  # 2014, 2018
        (("user_id", "parent_asin", "timestamp"), {"asin": "variant"}),  # 2023
        (("user_id", "business_id", "date"), {"review_id": "x"}),  # Yelp
    ],
)
def test_json_lines(tmp_path, packed, name, keys, more):
    actions = five_core()
    if keys[2] == "date":
        actions = [(user, item, f"{day_in_2017(day)} 22:09:11") for user, item, day in actions]
    (tmp_path / "raw").write_bytes(packed(json_file(actions, keys, more)))
    check_prepared(tmp_path, name, tmp_path / "raw", actions)


@pytest.mark.parametrize("packed", [gzip.compress, bytes])
def test_steam(tmp_path, packed, capsys):
    actions = [(f"{user} 'x' \"☠\"", item, day) for user, item, day in five_core()]
    actions += actions[:50]  # they count in the core, and then only the first stays
    nobody = b"{u'product_id': u'7', u'date': u'2017-01-01', u'text': u'x'}\n"
    (tmp_path / "raw").write_bytes(packed(steam_file(actions) + nobody))
    check_prepared(tmp_path, "steam", tmp_path / "raw", actions, once=True)
    after = sum(map(len, plain_prepare(actions, 5, once=True).values()))
    out = capsys.readouterr().out
    assert "dropped 1 without a user, an item or a time" in out
    assert f" {after:,} actions\nTable 1: 281,428 sequences, 13,044 items, 3,485,022 actions" in out


def test_odd_steam_lines_are_read_as_python_reads_them():
    rest = "'product_id': '1', 'date': '2017-01-01'"
    for line in (
        f"{{'username': 'a', {rest}, 'username': 'b'}}",
        f"{{'username': 'a', {rest}, 'user\\x6eame': 'b'}}",
        f"{{'username': 'a' 'b', {rest}}}",
        f"{{'x': [{{'username': 'z', 'y': 1}}], 'username': r'\\b', {rest}}}",
    ):
        assert prepare_data.parse_steam(line)["username"] == ast.literal_eval(line)["username"]


STEAM = "{'username': 'a', 'product_id': '1', 'date': '2017-01-01'}"
JSON = '{"reviewerID": "a", "asin": "b", "unixReviewTime": 1}'
BAD_OBJECTS = [
    (STEAM, "__import__('os').system('touch RAN')"),
    (STEAM, STEAM.replace("'a'", "__import__('os').system('touch RAN')")),
    (STEAM, STEAM.replace("}", ", 'x': open('RAN', 'w')}")),
    (STEAM, STEAM + " or open('RAN', 'w')"),
    (STEAM, STEAM.replace("'a'", "os")),
    (STEAM, STEAM.replace("'a'", "'\\x'")),
    (STEAM, STEAM.replace("01-01", "13-01")),
    (STEAM, STEAM[:-1]),
    (STEAM, "(" + STEAM[1:]),
    (STEAM, "['username', 'product_id', 'date']"),
    (STEAM, "[" * 5000),
    (STEAM, "-" * 100_000 + "1"),
    (STEAM, "{'username': '" + "\\'" * 100_000),
    (JSON, "[1, 2]"),
    (JSON, "null"),
    (JSON, "[" * 100_000),
    (JSON, JSON[:-1]),
    (JSON, JSON.replace(": 1", ': "soon"')),
    (JSON, JSON.replace(": 1", ": -Infinity")),
    (JSON, JSON.replace(": 1", ": " + "1" * 5000)),
    (JSON, JSON.replace(": 1", ': "2017-01-01"')),
]


@pytest.mark.parametrize(("good", "line"), BAD_OBJECTS, ids=lambda line: line[-30:])
def test_object_that_is_code_or_broken_is_refused_and_not_run(tmp_path, good, line):
    line = line.replace("RAN", str(tmp_path / "ran"))
    (tmp_path / "raw").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=r"raw:2: ") as caught:
        prepare_data.prepare("own", tmp_path / "data", tmp_path / "raw")
    assert len(str(caught.value)) < 300
    assert os.listdir(tmp_path) == ["raw"]


def test_movielens_zip_and_ratings_file_with_and_without_titles(tmp_path):
    numbers = [(user[1:], item[1:], time) for user, item, time in five_core()]
    ratings = "".join(f"{u}::{i}::{t % 10 / 2}::{t}\n" for u, i, t in numbers)  # half stars
    movies = "".join(f"{i}::Amélie :: part {i} (2001)::Drama|War\r\n" for i in range(1, 30))
    title = {str(i): f"Amélie :: part {i} (2001)" for i in range(1, 30)}
    named = [(user, title.get(item, item), time) for user, item, time in numbers]
    (tmp_path / "in").mkdir()
    raw = tmp_path / "in" / "anything"
    movielens_zip(raw, ratings, movies.encode("latin-1"))
    check_prepared(tmp_path, "ml-1m", raw, named)
    check_prepared(tmp_path, "own", raw, named)
    raw.write_text(ratings)
    check_prepared(tmp_path, "ml-1m", raw, numbers)
    (tmp_path / "in" / "movies.dat").write_bytes(movies.encode("latin-1"))
    check_prepared(tmp_path, "ml-1m", raw, named)


# ------------------------------------------------------------------------------------------ tables
HOURS = [("u 1", "a", 5), ("u 1", "b,c", 3), ('u"2', "a", 1), ("u 1", "d", 3), ('u"2', "ü", 2)]
HOURS += [(user, item, hour + 6) for user, item, hour in HOURS]


def table(header, time_of=str, separator=",", end="\n", order=(0, 1, 2), extra=False):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end)
    rows = [(user, item, time_of(hour)) for user, item, hour in HOURS]
    for number, row in enumerate([header, *rows] if header else rows):
        fields = [row[column] for column in order]
        writer.writerow(["x\ny, z, w, v" if number else "note", *fields] if extra else fields)
    return out.getvalue()


def tab_table(header, *columns):
    """As Hive and MySQL write it: the quotation mark is a letter like any other."""
    rows = [header, *((user, item, str(hour)) for user, item, hour in HOURS)]
    more = ['"Best of', "note", 'the end"', '"Mad Dog" Muller']
    lines = ["\t".join([row[c] for c in columns] + [more[n % 4]]) for n, row in enumerate(rows)]
    return "\n".join(lines) + "\n"


def iso_hour(hour, zone=""):
    return f"2020-02-28T{hour:02}:30:00{zone}"


SPRING = {1: "01:00", 2: "01:30", 3: "02:30", 5: "03:00"}  # local clocks jumped from 2:00 to 3:00
RECBOLE = ("user_id:token", "item_id:token", "timestamp:float")
TABLES = {
    "no header": table(None),
    "header": table(("user", "item", "timestamp"), order=(2, 0, 1)),
    "other names": table(("UserId", "product-id", "Time"), order=(1, 2, 0), extra=True),
    "H&M": table(("customer_id", "article_id", "t_dat"), lambda hour: f"2020-02-{hour:02}"),
    "RetailRocket": table(("visitorid", "itemid", "event_time"), lambda h: f"{iso_hour(h)} UTC"),
    "sessions": table(("Session ID", "Item.ID", "Timestamp"), order=(0, 2, 1)),
    "tabs": tab_table(("userid", "itemid", "ts"), 2, 0, 1),
    "RecBole": tab_table(RECBOLE, 0, 1, 2),
    "semicolons": table(("user", "item", "date"), separator=";"),
    "CRLF": table(("user", "item", "date"), end="\r\n"),
    "byte-order mark": "\ufeff" + table(("user", "item", "timestamp")),
    "ISO 8601 in UTC": table(None, lambda hour: iso_hour(hour, "+00:00")),
    "ISO 8601 in two zones": table(  # 05:30 in one is 01:30 in the other
        None, lambda hour: iso_hour(hour, "+02:00") if hour % 2 else iso_hour(hour - 1, "+01:00")
    ),
    "summer time": table(None, lambda h: f"2021-03-{28 + h // 6} {SPRING.get(h % 6, '04:00')}"),
    "empty lines": "\n\n" + table(None).replace("\n", "\n\n"),
    "spaces": table(None, lambda hour: f" {hour} "),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(tmp_path, name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        for packed in (bytes, gzip.compress):
            (tmp_path / "log").write_bytes(packed(TABLES[name].encode()))
            check_prepared(tmp_path, "own", tmp_path / "log", HOURS)
    time.tzset()


def test_columns_of_spaces_and_pairs(tmp_path):
    """User, item, rating and day with a header; and user and item in the order of time."""
    rows = [("7", "30", 1), ("9", "10", 2), ("7", "20", 2), ("7", "30", 3), ("9", "30", 1)]
    raw = tmp_path / "log"
    lines = [f"{user} {item} 5 {day}\n" for user, item, day in rows]
    raw.write_text("user item rating timestamp\n" + "".join(lines))
    check_prepared(tmp_path, "own", raw, rows)
    raw.write_text("".join(f"{user} {item} {day}\n" for user, item, day in rows))
    check_prepared(tmp_path, "own", raw, rows)
    in_order = [(user, item, number) for number, (user, item, _) in enumerate(rows)]
    for header in ("", "user item\n"):
        raw.write_text(header + "".join(f"{user} {item}\n" for user, item, _ in rows))
        check_prepared(tmp_path, "own", raw, in_order)


BAD_TABLES = [
    ("", "the file is empty"),
    ("user,item,timestamp\n", "no user"),
    ("u,a,1\nu,b\n", ":2: 2 columns, but 3"),
    ("u,a,4.0,1\nu,b,5.0,2\n", ": 4 columns and no header; .*user,item,rating,timestamp"),
    ("1\t2\t4\t1\n1\t3\t5\t2\n", ": 4 columns and no header; .*user,item,rating,timestamp"),
    ("user,item,timestamp\nu,a,1\nuser,item,timestamp\n", ":3: .*timestamp"),
    ("user,item,rating\nu,a,1\n", ":1: no columns for the timestamp among user, item, rating"),
    ("user,item,date,time\nu,a,1,2\n", ":1: 2 columns for the timestamp among"),
    ("who,what,when\nu,a,1\n", ":1: no columns for the user among who, what, when"),
    ('{"user": "u", "time": 1}\n', ":1: no columns for the item among user, time"),
    ("user,item,time\nu,b,\n", ":2: 1 of 1 rows lack"),
    ("u,a,1\nu,b,yesterday\n", ":2: .*yesterday"),
    ("u,a,1\nu,b,-inf\n", ":2: .*inf"),
    ("u,a,2020-01-01\nu,b,5\n", ":2: .*a number"),
    ("u,a,2020-01-01\nu,b,2020-01-01T00:00Z\n", ":2: .*with a time zone"),
    ('u,a,1\n"u"x,b,2\n', ":2: "),
    ('u,a,1\n"u,b,2\nu,c,3\n', ":3: "),
    ("u,a,1\ru,b,2\r", "new-line"),
    ('user,item,time,x\nu,a,1,"A\nu,b,2,x\nu,c,3,A"\n', ":4: a quotation mark is open"),
    (b"u,a,1\nu,\xff,2\n", ":2: not UTF-8"),
    ("u,a,1\n".encode("utf-16"), "not UTF-8"),
    (b"BZh9", "bzip2.*bunzip2"),
    (b"\xfd7zXZ\x00", "xz.*unxz"),
    (b"PAR1\x15", "Parquet.*read_parquet"),
    (b"\x80\x04\x95", "pickle.*text, user first"),
    (b'[\n{"user": 1}]', "JSON array.*jq"),
    (b"a.csv" + bytes(507), "archive"),
    (b"PK\x03\x04\xff", "damaged"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TABLES)
def test_broken_table_is_refused_in_one_line(tmp_path, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "log.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"log\.csv.*{message}") as caught:
        prepare_data.prepare("own", tmp_path / "data", tmp_path / "log.csv")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 350
    assert os.listdir(tmp_path) == ["log.csv"]


def test_names_with_newlines_and_controls_stay_on_one_line(tmp_path):
    names = ["a\nb", "c\r\nd", "e\u2028f\x85g", "\x1b[31mred", "tab\there"]
    out = io.StringIO()
    rows = [(name, name, n) for name in names for n in range(3)]
    csv.writer(out).writerows([("user", "item", "time"), *rows])
    (tmp_path / "log.csv").write_text(out.getvalue(), encoding="utf-8", newline="")
    prepare_data.prepare("own", tmp_path, tmp_path / "log.csv")
    for kind in ("items", "users"):
        got = file_lines(tmp_path / f"own.{kind}.txt")
        assert got == ["a b", "c  d", "e f g", " [31mred", "tab here"]
    half = [{"user": "\ud83d", "item": "\ud83d\ude00", "time": n} for n in range(3)]
    (tmp_path / "raw").write_text("\n".join(map(json.dumps, half)))
    prepare_data.prepare("own", tmp_path, tmp_path / "raw")  # half an emoji, a whole one
    assert prepared(tmp_path, "own") == {"?": ["\U0001f600"] * 3}


def plain_table(data):
    """A table by position or with the header user,item,timestamp; None where it is broken."""
    missing = {"", "\\N", "NULL", "null", "NaN", "nan", "NA", "None", "none"}
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
        lines = [line for line in text.split("\n") if line.strip()]
        if "\t" in lines[0]:
            rows = [line.rstrip("\r").split("\t") for line in lines]
        else:
            file = io.StringIO(text, newline="\n")  # lines end at \n, as in csv's own files
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (UnicodeDecodeError, csv.Error, IndexError):
        return None

    actions, kinds = [], set()
    for row in rows[1:] if rows[0] == ["user", "item", "timestamp"] else rows:
        fields = [field.strip() for field in row]
        if len(fields) != 3 or missing & set(fields):
            return None
        try:
            moment = None
            value = float(fields[2])
            if not abs(value) < float("inf"):
                return None
        except ValueError:
            try:
                moment = datetime.fromisoformat(fields[2])
            except ValueError:
                return None
            value = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        kinds.add(moment and moment.tzinfo is None)
        actions.append((*fields[:2], value))
    return actions if len(kinds) == 1 else None


@st.composite
def spoilt(draw, contents, splice):
    """One of the contents with a few bytes changed, removed, doubled or spliced in."""
    data = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 4))
        new = st.one_of(st.binary(max_size=3), st.sampled_from(splice), st.just(data[at:][:9]))
        data = data[:at] + draw(new) + data[at + length :]
    return data


@property_test
@given(
    data=spoilt(
        [
            b"user,item,timestamp\nu,a,3\nu,b,1\nv,a,2\nu,c,2\n",
            b'u,a,30\n"u",b,10\nv,"a",20\nu,c,20\n',
            b'u\t"a\t2020-01-01\nu\tb"\t2020-01-03\nv\ta\t2020-01-02\nu\tc\t2020-01-01',
            b"u,a,2020-01-01T10:00+01:00\nu,b,2020-01-01T09:30Z\nu,c,2020-01-01T00:00Z\n",
        ],
        splice=(b"\n", b"\r", b"\t", b'"', b",", b"1", b"e", b"\xff", b"\x00", b" ", b".5"),
    )
)
def test_spoilt_table_is_read_as_a_plain_reader_reads_it_or_refused(tmp_path, data):
    raw = tmp_path / "log"
    raw.write_bytes(data)
    first = data.split(b"\n")[0]
    actions = plain_table(data)
    try:
        prepare_data.prepare("own", tmp_path, raw)
    except ValueError as error:
        assert "\n" not in str(error)
        if actions and max(map(len, plain_prepare(actions).values())) >= 3:  # refused, but why?
            assert re.search(rb"[;|\t\0]", first) or not re.search(rb"(^|[,\t])\W?\d", first)
        return
    if actions is None:  # another header, or another separator
        assert re.search(rb"[;|]", data) or b"user" in data
        return
    clean = functools.partial(re.sub, r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ")
    want = {clean(u): [clean(i) for i in items] for u, items in plain_prepare(actions).items()}
    assert prepared(tmp_path, "own") == want


# ------------------------------------------------------------------------------ finished sequences
def test_user_first_sequences_keep_their_item_numbers(tmp_path, capsys):
    raw = tmp_path / "anything"
    raw.write_text("1 5 9 5\r\n2 7 300 8\t4\n\n3 1 1 1 1 1")
    for stale in ("own.items.txt", "own.users.txt"):
        (tmp_path / stale).write_text("the names of an earlier preparation\n")
    prepare_data.prepare("own", tmp_path, raw)
    assert (tmp_path / "own.txt").read_bytes() == b"5 9 5\n7 300 8 4\n1 1 1 1 1\n"
    assert sorted(os.listdir(tmp_path)) == ["anything", "own.txt"]
    assert "3 sequences, 7 items, 12 actions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--core"):
        prepare_data.prepare("own", tmp_path, raw, core=2)

    raw.write_text("3 5 9 5\n20 7 300\n")  # user numbers that the lines do not give
    prepare_data.prepare("own", tmp_path, raw)
    assert file_lines(tmp_path / "own.users.txt") == ["3", "20"]
    assert not (tmp_path / "own.items.txt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 1 2\n4 1 2 3\n9 9 9 9 9\n", "--data FILE.*sort it"),
        ("1 2 3\n1 4 5 6\n2 2 2 2\n", "--data FILE"),
        ("1 2 3 4 5\n1 2 3 4 5\n", "--data FILE.*needs a header"),
        ("1 2 3 4\n2 4 0 6 7\n", "raw:2: item numbers go from 1 to 9,999,999"),
        ("1 2 3 4\n2 10000000 4 6 7\n", "raw:2: item numbers"),
        ("1 2\n2 3\n4 4 4\n", "no user with 3 actions"),
        ("2 1\n" + "".join(f"{n} 1 2 3\n" for n in [*range(3, 300), 7]), "raw:299: user 7 after"),
    ],
)
def test_other_lines_of_numbers_are_refused(tmp_path, text, message):
    (tmp_path / "raw").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare_data.prepare("own", tmp_path / "data", tmp_path / "raw")
    assert os.listdir(tmp_path) == ["raw"]


# ----------------------------------------------------------------------------------------- download
class PrepareHandler(http.server.BaseHTTPRequestHandler):
    """Serves server.content, spoilt as server.how says (see `serve_raw`)."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        how, content = server.how, server.content
        server.ranges.append(self.headers.get("Range"))
        if how == "404":
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if how == "no ranges":
            start = 0
        elif start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(200 if how == "no ranges" else 206)
        if how != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = min(server.piece, len(body)) if how == "cut" else len(body)
        self.wfile.write(body[:sent])


@pytest.fixture
def serve_raw(monkeypatch):
    """serve_raw(content, how, piece) -> the server; `url` is where it is."""
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def start(content, how="", piece=0):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PrepareHandler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            server.content, server.how, server.piece = content, how, piece
            server.ranges = []
            server.url = f"http://127.0.0.1:{server.server_port}/some/raw.gz"
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            return server

        yield start


RAW_BYTES = random.Random(2).randbytes(500_000)
RAW_SHA256 = hashlib.sha256(RAW_BYTES).hexdigest()


def folder_bytes(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("how", ["", "no ranges", "no length"])
@pytest.mark.parametrize("have", [0, 1, 250_000, 499_999, 500_000])
def test_download_from_any_part(tmp_path, serve_raw, how, have):
    server = serve_raw(RAW_BYTES, how)
    (tmp_path / "raw.gz.part").write_bytes(RAW_BYTES[:have])
    path = prepare_data.download(server.url, RAW_SHA256, tmp_path)
    assert path == tmp_path / "raw.gz"
    assert folder_bytes(tmp_path) == {"raw.gz": RAW_BYTES}
    assert server.ranges[0] == f"bytes={have}-"
    requests = len(server.ranges)
    assert prepare_data.download(server.url, RAW_SHA256, tmp_path) == path  # it is there
    assert len(server.ranges) == requests


def test_download_that_is_cut_off_goes_on_where_it_stopped(tmp_path, serve_raw):
    server = serve_raw(RAW_BYTES, "cut", piece=200_000)
    for stop in (200_000, 400_000):
        with pytest.raises(OSError, match="cut off, .* run again, .*NAME --raw FILE") as caught:
            prepare_data.download(server.url, RAW_SHA256, tmp_path)
        assert "\n" not in str(caught.value)
        assert folder_bytes(tmp_path) == {"raw.gz.part": RAW_BYTES[:stop]}
    prepare_data.download(server.url, RAW_SHA256, tmp_path)
    assert folder_bytes(tmp_path) == {"raw.gz": RAW_BYTES}
    assert server.ranges == ["bytes=0-", "bytes=200000-", "bytes=400000-"]


def test_checksums(tmp_path, serve_raw, monkeypatch):
    server = serve_raw(RAW_BYTES[:-1] + b"?")
    for digest in (RAW_SHA256, prepare_data.ML_1M_MD5):
        with pytest.raises(ValueError, match="wrong, so it was removed; run again"):
            prepare_data.download(server.url, digest, tmp_path / "x")
        assert folder_bytes(tmp_path / "x") == {}
    server.content = RAW_BYTES
    monkeypatch.setattr(prepare_data, "ML_1M_MD5", hashlib.md5(RAW_BYTES).hexdigest())
    for digest in (RAW_SHA256, prepare_data.ML_1M_MD5, None):
        prepare_data.download(server.url, digest, tmp_path / str(digest))
        assert folder_bytes(tmp_path / str(digest)) == {"raw.gz": RAW_BYTES}


def test_no_server_and_no_file_are_one_line_that_says_what_to_do(tmp_path, serve_raw):
    server = serve_raw(RAW_BYTES, "404")
    (tmp_path / "raw.gz.part").write_bytes(RAW_BYTES[:9])
    with pytest.raises(OSError, match="Not Found; .*--raw"):
        prepare_data.download(server.url, None, tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="refused; .*--raw") as caught:
        prepare_data.download(server.url, None, tmp_path)
    assert "\n" not in str(caught.value)
    assert folder_bytes(tmp_path) == {"raw.gz.part": RAW_BYTES[:9]}


def test_gzip_that_is_cut_off_or_has_a_wrong_checksum(tmp_path):
    data = gzip.compress(json_file(five_core()))
    wrong_crc = data[:-8] + bytes(4) + data[-4:]
    for broken in (data[:-1], data[:-8], data[: len(data) // 2], data[:10], data[:3], wrong_crc):
        (tmp_path / "x.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.gz(:\d+)?: damaged or cut off .*; remove it"):
            prepare_data.prepare("own", tmp_path / "data", tmp_path / "x.gz")
    movielens_zip(tmp_path / "x.gz", "1::2::3::4\n" * 5, "")
    data = bytearray((tmp_path / "x.gz").read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for at in re.finditer(re.escape(signature), bytes(data)):
            data[at.start() + flags] |= 1  # "encrypted"
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.gz: .*encrypted"):
        prepare_data.prepare("own", tmp_path / "data", tmp_path / "x.gz")
    assert os.listdir(tmp_path) == ["x.gz"]


def file_limit(limit):
    """What a full disk does: writing a file fails after so many bytes (a preexec_fn)."""
    resource = pytest.importorskip("resource")
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))


# --------------------------------------------------------------------------- the command, and kills
def test_beauty_as_published_and_from_reviews(tmp_path, serve_raw, monkeypatch, capsys):
    """The published file numbers items otherwise; one tie and one other order are turned around."""
    count = collections.Counter()
    actions = []
    for user, item, _ in five_core():  # the times are 0, 1, 1, 2, 2, ... for each user
        count[user] += 1
        actions.append((user, item, count[user] // 2))
    users = list(plain_prepare(actions, 5).values())
    random.Random(3).shuffle(users)
    numbers = {item: str(n) for n, item in enumerate(sorted({i for s in users for i in s}), 1)}
    lines = [[numbers[item] for item in user] for user in users]
    tie, order = [line for line in lines if len(set(line)) >= 12][:2]
    tie[1], tie[2] = tie[2], tie[1]
    order[0], order[5] = order[5], order[0]
    text = "".join(f"{n} {' '.join(line)}\n" for n, line in enumerate(lines, 1)).encode()

    published = serve_raw(text).url.replace("raw.gz", "Beauty.txt")
    reviews = serve_raw(gzip.compress(json_file(actions))).url
    digest = hashlib.sha256(text).hexdigest()
    monkeypatch.setitem(prepare_data.DATASETS, "beauty", (published, digest))
    monkeypatch.setitem(prepare_data.REVIEWS, "beauty", (reviews, None))
    n_actions = sum(map(len, users))
    counts = f"{len(users)} sequences, {len(numbers)} items, {n_actions} actions\nTable 1: 22,363"
    assert prepare_data.main(["beauty", "--data-dir", str(tmp_path)]) == 0
    assert file_lines(tmp_path / "beauty.txt") == [" ".join(line) for line in lines]
    assert not (tmp_path / "beauty.items.txt").exists()
    assert counts in capsys.readouterr().out

    assert prepare_data.main(["beauty", "--reviews", "--data-dir", str(tmp_path)]) == 0
    assert prepared(tmp_path, "beauty") == plain_prepare(actions, 5)
    out = capsys.readouterr().out
    assert counts in out
    assert f"{len(users) - 2} of {len(users)} users' sequences are also in" in out
    assert f"; {len(users) - 1} up to the order of ties" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ml1m"], "did you mean ml-1m"),
        (["Beauty"], "did you mean beauty"),
        (["netflix"], "there are beauty, toys, ml-1m, steam, toy; or prepare data of"),
        (["../x", "--raw", "log.csv"], "no name for a dataset"),
        (["beauty.items", "--raw", "log.csv"], "no name for a dataset"),
        (["own", "--raw", "missing.csv"], "missing.csv"),
        (["own", "beauty", "--raw", "log.csv"], "--raw is one file for one NAME"),
        (["own", "--raw", "log.csv", "--core", "9"], "no user with 3 actions"),
        (["toy", "--raw", "log.csv"], "the toy data"),
        (["toy", "--core", "5"], "the toy data"),
        (["own", "--raw", "log.csv", "--core", "0"], "--core is 1"),
        (["ml-1m", "--reviews"], "--reviews goes with beauty or toys"),
        (["beauty", "--reviews", "--raw", "log.csv"], "without --raw"),
        (["own", "--raw", "log.csv", "--data-dir", "log.csv"], "log.csv"),
        ([], "NAME"),
    ],
)
def test_wrong_prepare_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text("u,a,1\nu,b,2\nu,c,3\n")
    assert prepare_data.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare_data.py: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert os.listdir(tmp_path) == ["log.csv"]


def test_output_in_another_encoding_and_to_a_closed_pipe(tmp_path):
    table = "用户,item,time,user\nx,商品,1,😀\nx,b,2,😀\nx,c,3,😀\n"
    (tmp_path / "log.csv").write_text(table, "utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    environment["PYTHONUNBUFFERED"] = ""
    done = run_prepare("own", "--raw", "log.csv", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert prepared(tmp_path / "data", "own") == {"😀": ["商品", "b", "c"]}
    (tmp_path / "log.csv").write_text("用户,item,time\nx,y,1\n", "utf-8")
    done = run_prepare("own", "--raw", "log.csv", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"??, item, time" in done.stderr

    for arguments in (["--help"], ["toy"]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, str(PREPARE_SCRIPT), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=write, stderr=-1, check=False
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def many_rows(seed):
    draw = random.Random(seed)
    return "".join(f"u{draw.randrange(500)},i{draw.randrange(300)},{n}\n" for n in range(8000))


def own_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("own*.txt")}


def test_files_are_replaced_only_when_whole_and_the_sequences_last(tmp_path, monkeypatch):
    """Stop at each replacement in turn, which is where a kill could show."""
    (tmp_path / "log.csv").write_text(many_rows(0))
    replace, order = os.replace, []

    def stop_at(limit, source, target):
        if len(order) == limit:
            raise KeyboardInterrupt
        assert len(list(target.parent.glob("*.tmp"))) + len(order) == 3  # all are written
        order.append(target.name)
        replace(source, target)

    for limit in range(4):
        order.clear()
        folder = tmp_path / str(limit)
        monkeypatch.setattr(os, "replace", functools.partial(stop_at, limit))
        arguments = ["own", "--raw", str(tmp_path / "log.csv"), "--data-dir", str(folder)]
        assert prepare_data.main(arguments) == (0 if limit == 3 else 130)
        assert order == ["own.items.txt", "own.users.txt", "own.txt"][:limit]
        assert sorted(os.listdir(folder)) == sorted(order)


def test_full_disk_is_one_line_and_leaves_the_old_files(tmp_path):
    """The limits: the names do not fit; they do, the sequences don't."""
    (tmp_path / "log.csv").write_text(many_rows(0))
    assert run_prepare("own", "--raw", "log.csv", cwd=tmp_path).returncode == 0
    before = own_files(tmp_path / "data")
    (tmp_path / "log.csv").write_text(many_rows(1))
    for limit in (1000, 10_000):
        limits = {"preexec_fn": file_limit(limit)}
        done = run_prepare("own", "--raw", "log.csv", cwd=tmp_path, **limits)
        assert done.returncode == 2
        assert done.stderr.startswith(b"prepare_data.py: error: ")
        assert done.stderr.count(b"\n") == 1
        assert own_files(tmp_path / "data") == before
        assert sorted(os.listdir(tmp_path / "data")) == sorted(before)
