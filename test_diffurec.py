"""Tests of diffurec.py, in its order, and then of prepare_data.py.

Each compares with something independent: numbers worked out by hand, a plain and slow version
written from the paper, brute force, sampling. DIFFUREC_THOROUGH=1 asks for many more mutations and
kills, and for the toy run with its defaults.
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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
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
THOROUGH = bool(os.environ.get("DIFFUREC_THOROUGH"))
# tmp_path may be shared by the examples of one test: each overwrites what the last one wrote
property_test = settings(
    max_examples=2000 if THOROUGH else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MODEL_SCRIPT = Path(diffurec.__file__)
SCRIPT = Path(prepare_data.__file__)
SCHEDULES = ("truncated_linear", "linear", "cosine", "sqrt")


@st.composite
def mutated(draw, contents, splice=(b"\n", b"\r", b"\t", b'"', b"0", b"-", b"\xff", b"\x00")):
    """One of the contents with a few bytes changed, removed, doubled or spliced in."""
    data = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 4))
        new = draw(
            st.one_of(st.binary(max_size=3), st.sampled_from(splice), st.just(data[at:][:9]))
        )
        data = data[:at] + new + data[at + length :]
    return data


# =================================================================================================
# diffurec.py
# =================================================================================================


def config(**changes):
    """Small, exact (float32) and without dropout."""
    small = {"steps": 4, "hidden": 8, "heads": 2, "blocks": 2, "precision": "float32"}
    small |= {"dropout": 0.0, "embedding_dropout": 0.0, "max_len": 6, "batch_size": 8}
    return diffurec.Config(**(small | changes))


def sequences_of(users):
    """What load_sequences makes of users, lists of item ids."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(" ".join(map(str, user)) + "\n" for user in users)
        file.flush()
        return prepare_data.load_sequences(file.name)


def random_users(seed, count=20, items=30, shortest=3, longest=9):
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [[draw.randint(1, items) for _ in range(length)] for length in lengths]


def model_of(n_items=12, seed=0, **changes):
    """A model whose LayerNorms and biases are random too, or some mistakes would not show."""
    torch.manual_seed(seed)
    model = diffurec.DiffuRec(n_items, config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def padded(*histories):
    """The histories as the rows of one batch, padded on the left."""
    longest = max(map(len, histories))
    return torch.tensor([[0] * (longest - len(history)) + history for history in histories])


HISTORIES = ([3], [5, 1, 5, 7], [12, 2], [1, 2, 3, 4, 5, 6])

# ----------------------------------------------------------------------------- the noise schedule


@pytest.mark.parametrize(
    ("name", "steps", "values"),
    [
        ("truncated_linear", 32, {1: 0.01953125 + 0.01, 2: 0.0390625 + 0.005, 32: 0.6253125}),
        # The saw-tooth of Eq. 14: from s = 4 on the value is above 1 and is multiplied by 0.1.
        (
            "truncated_linear",
            8,
            {1: 0.3225, 2: 0.63, 3: 0.9375 + 0.01 / 3, 4: 0.12525, 8: 0.250125},
        ),
        ("truncated_linear", 2, {1: 0.501, 2: 0.999}),  # 5.01 and 10.005, truncated: 1.0005
        ("truncated_linear", 1, {1: 0.999}),
        ("linear", 1000, {1: 0.0001, 1000: 0.02}),
        ("linear", 100, {1: 0.001, 100: 0.2}),
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


def test_only_short_truncated_linear_schedules_are_truncated():
    """At t = 32 Eq. 14 rises to its end; at 16 it falls once, where 20 s / t^2 passes 1."""
    assert (np.diff(diffurec.beta_schedule("truncated_linear", 32)[1:]) > 0).all()
    falls = np.flatnonzero(np.diff(diffurec.beta_schedule("truncated_linear", 16)[1:]) < 0)
    assert falls.tolist() == [10]  # from s = 12 (0.9383) to s = 13 (1.0164, hence 0.1016)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_steps_has_finite_coefficients_and_betas_within_0_and_1(name):
    for steps in range(1, 1001):
        betas = np.asarray(diffurec.beta_schedule(name, steps))
        assert betas.shape == (steps,)
        assert betas.dtype == np.float64
        assert (betas > 0).all()
        assert (betas < 1).all()
        if steps < 40 or steps % 60 == 0 or steps > 998:
            for key, buffer in diffurec.Diffusion(name, steps).named_buffers():
                assert buffer.isfinite().all(), (key, steps)
                assert buffer.shape == (steps,)
                assert buffer.dtype == torch.float32


# ---------------------------------------------------------------------------------- the diffusion


@pytest.mark.parametrize("name", SCHEDULES)
def test_alphas_cumprod_is_the_running_product(name):
    diffusion, product = diffurec.Diffusion(name, 8), 1.0
    for beta, got in zip(diffurec.beta_schedule(name, 8), diffusion.alphas_cumprod.tolist()):
        product *= 1 - beta
        assert got == pytest.approx(product, rel=1e-6)  # float32


@pytest.mark.parametrize("name", SCHEDULES)
def test_q_sample_is_s_plus_1_steps_of_equation_1(name):
    """Mean and variance against sampling, both of q_sample and of the chain of single steps."""
    steps, n = 8, 200_000
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


def test_q_sample_takes_each_sample_at_its_own_step():
    diffusion = diffurec.Diffusion("linear", 50)
    start, noise, s = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([49, 0, 7])
    for i, step in enumerate(s.tolist()):
        product = np.prod(1 - diffurec.beta_schedule("linear", 50)[: step + 1])
        want = math.sqrt(product) * start[i] + math.sqrt(1 - product) * noise[i]
        torch.testing.assert_close(diffusion.q_sample(start, s, noise)[i], want)


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
        got = diffusion.q_posterior(
            torch.tensor([[x_start]]), torch.tensor([[x_s]]), torch.tensor([s])
        )
        assert got[0].item() == pytest.approx(mean, rel=1e-5, abs=1e-6)  # float32
        assert got[1].item() == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_last_step_of_the_reversal_is_x_start_without_noise(name):
    x_start, x_s = torch.randn(5, 3), torch.randn(5, 3)
    diffusion = diffurec.Diffusion(name, 32)
    mean, variance = diffusion.q_posterior(x_start, x_s, torch.zeros(5, dtype=torch.long))
    assert torch.equal(mean, x_start)
    assert not variance.any()


# ------------------------------------------------------------------------------- the approximator


def plain_step_embedding(s, dim):
    """PE(s, 2i) = sin(s / 10000^(2i/dim)), PE(s, 2i+1) = cos(the same)."""
    row = []
    for i in range(dim // 2):
        angle = s / 10_000 ** (2 * i / dim)
        row += [math.sin(angle), math.cos(angle)]
    return torch.tensor(row)


def test_step_embedding_is_attention_is_all_you_needs():
    steps = torch.tensor([0, 1, 31, 999])
    want = torch.stack([plain_step_embedding(s, 16) for s in steps.tolist()])
    # an angle of 999 in float32 is known to 6e-5
    torch.testing.assert_close(diffurec.step_embedding(steps, 16), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("delta_is", "variance"), [("variance", 0.04), ("std", 0.0016)])
def test_lambda_has_the_mean_and_the_variance_of_each_reading(delta_is, variance):
    """Where e is 0 and x + d is 1, z is lambda itself: an approximator that returns z shows it."""
    model = model_of(delta=0.04, delta_is=delta_is)
    model.approximator.forward = lambda z, mask: z
    batch, length = 2000, 5
    n = batch * length * 8
    s = torch.arange(batch) % 4
    x = 1 - diffurec.step_embedding(s, 8)
    z = model.approximate(torch.zeros(batch, length, 8), None, x, s).double()
    assert abs(z.mean().item() - 0.04) < 5 * math.sqrt(variance / n)
    assert abs(z.var().item() / variance - 1) < 5 * math.sqrt(2 / n)
    # one draw for each element: no position and no coordinate knows of another
    correlation = np.corrcoef(z.flatten(1).T) - np.eye(length * 8)
    assert np.abs(correlation).max() < 6 / math.sqrt(batch)  # of 780 pairs
    model.config.delta = 0.0
    e = torch.randn(batch, length, 8)
    assert torch.equal(model.approximate(e, None, x, s), e)


def plain_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm.weight + norm.bias


def plain_attention(block, x, real):
    """Each position and head by itself; `real` are the positions that hold an item."""
    d = x.shape[-1]
    weights = block.query_key_value.weight.split(d)
    biases = block.query_key_value.bias.split(d)
    query, key, value = (x @ w.T + b for w, b in zip(weights, biases))
    size, rows = d // block.heads, []
    for i in range(len(x)):
        row = []
        for part in (slice(h * size, (h + 1) * size) for h in range(block.heads)):
            powers = [(query[i, part] @ key[j, part] / math.sqrt(size)).exp() for j in real]
            row.append(sum(p * value[j, part] for p, j in zip(powers, real)) / sum(powers))
        rows.append(torch.cat(row))
    return torch.stack(rows) @ block.output.weight.T + block.output.bias


def plain_transformer(transformer, z, mask):
    """Every position in every block, one history after another."""
    result = []
    for x, real in zip(z, mask):
        real = real.nonzero()[:, 0].tolist()
        for block in transformer.blocks:
            x = x + plain_attention(block, plain_norm(x, block.attention_norm), real)
            inner = plain_norm(x, block.feed_forward_norm) @ block.expand.weight.T
            inner = (inner + block.expand.bias).clamp(min=0)
            x = x + inner @ block.contract.weight.T + block.contract.bias
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


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("approximator", PLAIN)
def test_approximator_is_the_plain_one(approximator, blocks):
    model = model_of(approximator=approximator, blocks=blocks, hidden=16, heads=4).eval()
    mask = padded(*HISTORIES) > 0
    z = torch.randn(*mask.shape, 16)
    want = PLAIN[approximator](model.approximator, z, mask)
    # float32 sums of 64 terms in another order
    torch.testing.assert_close(model.approximator(z, mask), want, rtol=1e-4, atol=1e-5)


def test_matrices_begin_xavier_normal():
    def spread(matrix):  # relative to Xavier's, and in its standard errors
        rows, columns = matrix.shape
        n = matrix.numel()
        ratio = matrix.std().item() / math.sqrt(2 / (rows + columns))
        return (ratio - 1) * math.sqrt(2 * n), abs(
            matrix.mean().item() / matrix.std().item()
        ) * n**0.5

    torch.manual_seed(0)
    d = 64
    blocks = diffurec.Transformer(config(hidden=d)).blocks
    matrices = [m for b in blocks for m in (b.output.weight, b.expand.weight, b.contract.weight)]
    matrices += [matrix for b in blocks for matrix in b.query_key_value.weight.split(d)]
    gru = diffurec.GRU(config(hidden=d)).gru
    matrices += [*gru.weight_ih_l0.split(d), *gru.weight_hh_l0.split(d)]
    assert len(matrices) == 18
    for matrix in matrices:
        deviation, mean = spread(matrix)
        assert abs(deviation) < 5
        assert mean < 5
        assert matrix.abs().max() > 3 * matrix.std()  # normal: uniform ends at 1.73


def test_embeddings_begin_with_the_standard_deviation_asked_for():
    model = diffurec.DiffuRec(500, config(embedding_std=0.25))
    values = model.item_embeddings.weight[1:]
    assert values.std().item() / 0.25 - 1 == pytest.approx(0, abs=5 / math.sqrt(2 * values.numel()))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout, n = diffurec.Dropout(p), 401 * 1003  # no multiple of four
    x = torch.full((401, 1003), 3.0, requires_grad=True)
    got = dropout(x)
    kept = got != 0
    share = math.sqrt(p * (1 - p))  # standard deviation of one
    assert abs(1 - p - kept.double().mean().item()) < 5 * share / math.sqrt(n)
    torch.testing.assert_close(got[kept], torch.full_like(got[kept], 3 / (1 - p)))
    flat = kept.flatten()
    for lane in range(4):  # four elements share one random word
        lane_share = flat[lane::4].double().mean().item()
        assert abs(1 - p - lane_share) < 5 * share / math.sqrt(n / 4)
    for distance in (1, 2, 3, 4, 1003):  # each element for itself
        pairs = np.corrcoef(flat[distance:], flat[:-distance])[0, 1]
        assert abs(pairs) < 5 / math.sqrt(n)
    got.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - p))
    assert not torch.equal(dropout(x) != 0, kept)


def test_embeddings_pass_dropout_before_their_layer_norm():
    torch.manual_seed(0)
    model = diffurec.DiffuRec(300, config(hidden=64, embedding_dropout=0.5))
    rows = model.embed(torch.arange(1, 301)[None])[0].double()
    assert rows.mean(1).abs().max() < 1e-5
    assert (rows.square().mean(1) - 1).abs().max() < 5e-3  # its epsilon beside 0.1² / (1 - 0.5)
    dropped = (rows == rows.mode(1).values[:, None]).double().mean().item()
    assert abs(dropped - 0.5) < 5 * 0.5 / math.sqrt(rows.numel())


def test_dropout_is_nothing_in_eval_mode_or_at_0():
    x = torch.randn(7, 9)
    assert torch.equal(diffurec.Dropout(0.0)(x), x)
    assert torch.equal(diffurec.Dropout(0.9).eval()(x), x)
    model = model_of(dropout=0.5, embedding_dropout=0.5, delta=0.0)
    history = padded(*HISTORIES)
    assert not torch.equal(model.reverse(history), model.reverse(history))
    model.eval()
    assert torch.equal(model.reverse(history), model.reverse(history))


@pytest.mark.parametrize("where", ["dropout", "embedding_dropout"])
def test_each_dropout_is_applied(where):
    model, history = model_of(**{where: 0.5}, delta=0.0), padded(*HISTORIES)
    assert not torch.equal(model.reverse(history), model.reverse(history))


@pytest.mark.parametrize("silent", ["output", "contract"])
def test_both_sublayers_of_a_block_have_dropout(silent):
    """With one of them silent the other's still shows."""
    block = diffurec.TransformerBlock(config(dropout=0.5))
    torch.nn.init.zeros_(getattr(block, silent).weight)
    torch.nn.init.zeros_(getattr(block, silent).bias)
    z, mask = torch.randn(2, 5, 8), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert not torch.equal(block(z, mask, 5), block(z, mask, 5))


# ---------------------------------------------------------------------------------------- DiffuRec


def plain_approximate(model, history, x, s):
    """Eq. 13 and 12 as they stand; s is a step for each history. Draws lambda."""
    settings_, e = model.config, model.item_embeddings.weight[history]
    e = plain_norm(e, model.embedding_norm)
    deviation = math.sqrt(settings_.delta)
    noise = torch.randn(*history.shape, settings_.hidden)
    z = torch.zeros_like(e)
    for b, n in itertools.product(*map(range, history.shape)):
        lambda_ = settings_.delta + deviation * noise[b, n]
        step = plain_step_embedding(s[b], settings_.hidden)
        z[b, n] = e[b, n] + lambda_ * (x[b] + step)
    return PLAIN[settings_.approximator](model.approximator, z, history > 0)


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
    table, betas = (
        model.item_embeddings.weight,
        diffurec.beta_schedule(model.config.schedule, model.config.steps),
    )
    s = torch.randint(model.config.steps, target.shape).tolist()
    noise = torch.randn(len(target), model.config.hidden)
    x_s = []
    for row, step, item in zip(noise, s, target.tolist()):
        bar = math.prod(1 - beta for beta in betas[: step + 1])
        x_s.append(math.sqrt(bar) * table[item] + math.sqrt(1 - bar) * row)
    x_hat, losses = plain_approximate(model, history, x_s, s), []
    for row, item in zip(x_hat, target.tolist()):
        products = [row @ table[i] for i in range(1, len(table))]
        losses.append(-(products[item - 1].exp() / sum(p.exp() for p in products)).log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("approximator", PLAIN)
def test_reverse_is_algorithm_1_with_the_same_noise(approximator, schedule):
    model = model_of(approximator=approximator, schedule=schedule, delta=0.2, steps=5).eval()
    history = padded(*HISTORIES)
    with torch.no_grad():
        torch.manual_seed(3)
        want = plain_algorithm_1(model, history)
        torch.manual_seed(3)
        # float32, five times through the approximator
        torch.testing.assert_close(model.reverse(history), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("approximator", PLAIN)
def test_forward_is_algorithm_2_with_the_same_noise_and_so_are_all_gradients(approximator):
    model = model_of(approximator=approximator, delta=0.2)
    history, target = padded(*HISTORIES), torch.tensor([9, 10, 3, 11])
    gradients = []
    for loss_of in (plain_algorithm_2, diffurec.DiffuRec.forward):
        model.zero_grad()
        torch.manual_seed(4)
        loss = loss_of(model, history, target)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for want, got in zip(*gradients):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)  # float32
    assert not model.item_embeddings.weight.grad[0].any()  # padding is no item


def test_steps_of_training_are_uniform():
    model, seen = model_of(steps=4), collections.Counter()
    original = model.diffusion.q_sample

    def q_sample(x_start, s, noise):
        seen.update(s.tolist())
        return original(x_start, s, noise)

    model.diffusion.q_sample = q_sample
    n = 4000
    with torch.no_grad():
        model(torch.ones(n, 1, dtype=torch.long), torch.ones(n, dtype=torch.long))
    assert sorted(seen) == [0, 1, 2, 3]
    assert all(abs(count - n / 4) < 5 * math.sqrt(n * 3 / 16) for count in seen.values())


@pytest.mark.parametrize("approximator", PLAIN)
def test_batch_mates_and_padding_change_nobodys_result(approximator):
    """With delta = 0, without which batches of two sizes would draw different noise."""
    model = model_of(approximator=approximator, delta=0.0, hidden=16).eval()
    mates = [[*history] for history in HISTORIES] + [[7] * 40]
    together = model.reverse(padded(*mates))
    for row, history in zip(together, mates):
        # float32 sums in blocks of another size
        torch.testing.assert_close(model.reverse(padded(history))[0], row, rtol=1e-4, atol=1e-5)
        more = [0] * 30 + history
        torch.testing.assert_close(model.reverse(padded(more))[0], row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("approximator", PLAIN)
def test_order_of_a_history_counts(approximator):
    """Without positions the Transformer still knows which item is the last."""
    model = model_of(approximator=approximator, delta=0.0).eval()
    there, back = model.reverse(torch.tensor([[1, 2, 3], [3, 2, 1]]))
    assert not torch.allclose(there, back, atol=1e-3)


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
    model = model_of(n_items=12, delta=0.0).train()
    history = torch.tensor([[9, 9, 1, 2, 3, 4, 5, 6], [0, 0, 0, 8, 8, 2, 1, 1]])
    items, scores = model.recommend(history, 12)
    assert not model.training
    want = model.scores(model.reverse(history[:, -6:]))
    for row, values, all_values in zip(items, scores, want):
        assert sorted(row.tolist()) == list(range(1, 13))
        torch.testing.assert_close(values, all_values.sort(descending=True)[0])
        torch.testing.assert_close(values, all_values[row - 1])
    assert torch.equal(model.recommend(history, 3)[0], items[:, :3])


@pytest.mark.parametrize(
    ("history", "k"),
    [
        ([[1, 0]], 3),
        ([[1, 0, 2]], 3),
        ([[0, 0]], 3),
        ([[1, 2], [0, 0]], 3),
        ([[1, 13]], 3),
        ([[-1, 2]], 3),
        ([[1, 2]], 0),
        ([[1, 2]], 13),
    ],
)
def test_recommend_refuses_what_is_no_history(history, k):
    with pytest.raises(ValueError):
        model_of(n_items=12).recommend(torch.tensor(history), k)


# -------------------------------------------------------------------------------------- the data


users_strategy = st.lists(
    st.lists(st.integers(1, 9), min_size=3, max_size=9), min_size=1, max_size=12
).filter(lambda users: any(len(user) > 3 for user in users))


def unpadded(batches, batch_size):
    """[(history, target)] of all batches; the padding is on the left and none is needless."""
    pairs = []
    for history, target in batches:
        assert history.dtype == target.dtype == torch.int64
        assert history.shape[:1] == target.shape
        assert 1 <= len(target) <= batch_size
        assert (history[:, 0] > 0).any()
        for row, item in zip(history.tolist(), target.tolist()):
            items = [i for i in row if i]
            assert row == [0] * (len(row) - len(items)) + items
            pairs.append((tuple(items), item))
    return pairs


@property_test
@given(
    users=users_strategy,
    max_len=st.integers(1, 8),
    batch_size=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_every_prefix_is_trained_on_once_and_every_user_scored_once(
    users, max_len, batch_size, seed
):
    sequences = sequences_of(users)
    rng = np.random.default_rng(seed)
    got = unpadded(diffurec.train_batches(sequences, max_len, batch_size, rng), batch_size)
    want = [
        (tuple(user[:n][-max_len:]), user[n]) for user in users for n in range(1, len(user) - 2)
    ]
    assert sorted(got) == sorted(want)
    assert sequences.n_samples == len(want)
    for split, held_out in (("validation", 2), ("test", 1)):
        got = unpadded(diffurec.eval_batches(sequences, split, max_len, batch_size), batch_size)
        want = [(tuple(user[:-held_out][-max_len:]), user[-held_out]) for user in users]
        assert sorted(got) == sorted(want)


def epoch_of(users, seed, batch_size=7):
    rng = np.random.default_rng(seed)
    batches = diffurec.train_batches(sequences_of(users), 5, batch_size, rng)
    return [(history.tolist(), target.tolist()) for history, target in batches]


def test_last_two_items_of_a_user_are_in_no_training_batch():
    users = random_users(1)
    other = [[*user[:-2], 31 - user[-1], 31 - user[-2]] for user in users]
    users, other = ([*some, [30, 30, 30]] for some in (users, other))  # the same n_items
    assert epoch_of(users, 0) == epoch_of(other, 0)


def test_last_item_is_in_no_validation_batch():
    users = random_users(1)
    other = [[*user[:-1], 31 - user[-1]] for user in users]
    batches = [
        [t.tolist() for pair in diffurec.eval_batches(sequences_of(some), "validation", 5, 7)
         for t in pair]
        for some in (users, other)
    ]  # fmt: skip
    assert batches[0] == batches[1]


def test_training_batches_are_shuffled_by_the_generator_alone():
    users = random_users(2, count=60)
    assert epoch_of(users, 0) == epoch_of(users, 0) != epoch_of(users, 1)
    rng = np.random.default_rng(0)
    epochs = [
        [h.shape[1] for h, _ in diffurec.train_batches(sequences_of(users), 9, 7, rng)]
        for _ in range(2)
    ]
    assert epochs[0] != epochs[1]  # one generator, two epochs
    assert epochs[0] != sorted(epochs[0])  # short and long histories in any order
    mates = [
        {frozenset(zip(map(tuple, h), t)) for h, t in epoch_of(users, seed)} for seed in (0, 1)
    ]
    assert mates[0] != mates[1]  # not only the order of the batches


def test_training_batches_hold_histories_of_like_length():
    users = random_users(2, count=60)
    batches = [[len(h) - h.count(0) for h in history] for history, _ in epoch_of(users, 0)]
    spans = sorted((min(lengths), max(lengths)) for lengths in batches)
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))


# ------------------------------------------------------------------------------------ evaluation


def plain_rank(scores, target):
    """1 and all other items that are not below the target."""
    own = scores[target - 1]
    return 1 + sum(score >= own for item, score in enumerate(scores, 1) if item != target)


def plain_metrics(ranks):
    result = {}
    for k in (5, 10, 20):
        within = [rank for rank in ranks if rank <= k]
        result[f"HR@{k}"] = len(within) / len(ranks)
        result[f"NDCG@{k}"] = sum(1 / math.log2(rank + 1) for rank in within) / len(ranks)
    return result


@property_test
@given(st.data())
def test_ranks_and_metrics_against_brute_force(data):
    """On scores of few and of many different values."""
    width, height = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    values = data.draw(
        st.sampled_from([st.integers(0, 3), st.floats(-1024, 1024, width=32), st.just(7)])
    )
    row = st.lists(values, min_size=width, max_size=width)
    scores = data.draw(st.lists(row, min_size=height, max_size=height))
    target = data.draw(st.lists(st.integers(1, width), min_size=height, max_size=height))
    got = diffurec.ranks(torch.tensor(scores, dtype=torch.float32), torch.tensor(target))
    want = [plain_rank(*pair) for pair in zip(scores, target)]
    assert got.tolist() == want
    # the logarithms are float32
    assert diffurec.metrics(got) == pytest.approx(plain_metrics(want), rel=2e-7)


def test_metrics_worked_out_by_hand():
    got = diffurec.metrics(torch.tensor([1, 5, 6, 20, 21]))
    assert got["HR@5"] == pytest.approx(2 / 5)
    assert got["HR@10"] == pytest.approx(3 / 5)
    assert got["HR@20"] == pytest.approx(4 / 5)
    assert got["NDCG@5"] == pytest.approx((1 + 0.386852807) / 5)  # 1 / log2(6)
    assert got["NDCG@10"] == pytest.approx((1.386852807 + 0.356207187) / 5)  # 1 / log2(7)
    assert got["NDCG@20"] == pytest.approx((1.386852807 + 0.356207187 + 0.227670249) / 5)


@pytest.mark.parametrize("value", [0.0, 7.0, -1e30])
def test_equal_scores_are_all_misses(value):
    rank = diffurec.ranks(torch.full((3, 21), value), torch.tensor([1, 21, 7]))
    assert rank.tolist() == [21, 21, 21]
    assert not any(diffurec.metrics(rank).values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_has_no_rank(value):
    for column in (0, 3):  # the target's, another's
        scores = torch.arange(15.0).reshape(3, 5)
        scores[1, column] = value
        with pytest.raises(FloatingPointError):
            diffurec.ranks(scores, torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("rounding", ["inner_product", "r_star"])
def test_untrained_model_scores_like_chance(rounding):
    """The targets know nothing of the histories, so each is a hit with probability K / n_items."""
    draw, n, items = random.Random(5), 1000, 200
    users = [[draw.randint(1, items) for _ in range(5)] for _ in range(n)] + [[items] * 3]
    torch.manual_seed(0)
    model = diffurec.DiffuRec(items, config(rounding=rounding))
    got = diffurec.evaluate(model, sequences_of(users), "test")
    for k in (5, 10, 20):
        p = k / items
        assert abs(got[f"HR@{k}"] - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("exclude_history", [False, True])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_is_brute_force_over_eval_batches_and_repeats(split, exclude_history):
    evaluate = functools.partial(diffurec.evaluate, exclude_history=exclude_history)
    model, sequences = model_of(n_items=30, delta=0.5), sequences_of(random_users(3, count=90))
    model.train()
    state = torch.get_rng_state()
    got = evaluate(model, sequences, split, batch_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    torch.rand(5)
    assert evaluate(model, sequences, split, batch_size=16) == got
    ranks = []
    torch.manual_seed(model.config.seed)
    with torch.no_grad():
        for history, target in diffurec.eval_batches(sequences, split, 6, 16):
            scores = model.scores(model.reverse(history)).tolist()
            for row, items in zip(scores, history.tolist() if exclude_history else ()):
                for item in filter(None, items):
                    row[item - 1] = -math.inf
            ranks += map(plain_rank, scores, target.tolist())
    assert got == pytest.approx(plain_metrics(ranks), rel=2e-7)  # the logarithms are float32
    model.config.seed += 1
    assert evaluate(model, sequences, split, batch_size=16) != got


@property_test
@given(users=users_strategy)
def test_popularity_against_brute_force(users):
    counts = collections.Counter(item for user in users for item in user[:-2])
    scores = [counts[item] for item in range(1, max(map(max, users)) + 1)]
    want = plain_metrics([plain_rank(scores, user[-1]) for user in users])
    # the logarithms are float32
    assert diffurec.popularity(sequences_of(users)) == pytest.approx(want, rel=2e-7)


# -------------------------------------------------------------------------------------- training


def test_bfloat16_comes_close_to_float32():
    """Rounding to 8 bits is 0.4 % of each product; six such products in a row and their sums."""
    history, target = padded(*HISTORIES), torch.tensor([9, 10, 3, 11])
    for approximator in PLAIN:
        losses = {}
        for precision in ("float32", "bfloat16"):
            model = model_of(approximator=approximator, hidden=32, precision=precision)
            assert model.bfloat16 == (precision == "bfloat16")
            torch.manual_seed(1)
            losses[precision] = model(history, target)
            losses[precision].backward()
            torch.manual_seed(1)
            x_0 = model.reverse(history)
            assert losses[precision].dtype == model.scores(x_0).dtype == torch.float32
        assert losses["float32"] != losses["bfloat16"]
        assert losses["bfloat16"].item() == pytest.approx(losses["float32"].item(), rel=0.03)


# A tiny model, and a number of epochs that takes no second
TINY = [
    "--hidden",
    "8",
    "--heads",
    "2",
    "--blocks",
    "1",
    "--steps",
    "2",
    "--batch-size",
    "16",
    "--eval-every",
    "1",
]


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
        status = self("--data", data, *TINY, "--epochs", epochs, *arguments)
        assert (status, self.err) == (0, "")

    def refused(self, *arguments):
        """The one line on standard error, after which no file is other than before."""
        before = snapshot(".")
        assert self(*arguments) == 2
        assert snapshot(".") == before
        assert self.err.startswith("diffurec.py: error: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """In a folder that holds x.txt, whose first two users of 20 are known."""
    monkeypatch.chdir(tmp_path)
    users = [[5, 6, 7, 8, 9], [1, 2], *random_users(7, count=18, shortest=4), [30, 29, 28]]
    Path("x.txt").write_text("".join(" ".join(map(str, user)) + "\n" for user in users))
    return Cli(capsys)


def snapshot(folder):
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def events_of(folder, seconds=False):
    """The events of log.jsonl, without what no two runs have alike unless asked for."""
    events = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for event in () if seconds else events:
        event.pop("seconds", None)
    return events


def weights_of(path):
    return diffurec.load_checkpoint(Path(path))["model"].state_dict()


def assert_same_run(one, other):
    assert events_of(one) == events_of(other)
    for name in ("best.pt", "last.pt"):
        one_weights, other_weights = weights_of(Path(one, name)), weights_of(Path(other, name))
        assert all(torch.equal(one_weights[key], other_weights[key]) for key in one_weights)


def test_training_overfits_a_handful_of_sequences(cli):
    """Every item has one successor, so the loss can go to 0 and each prefix to its next item."""
    users = [[*range(first, first + 8)] for first in (1, 9, 17, 25)]
    Path("few.txt").write_text("".join(" ".join(map(str, user)) + "\n" for user in users))
    settings_ = "--hidden 16 --heads 2 --blocks 2 --steps 4 --lr 0.01 --dropout 0 --batch-size 8"
    settings_ += " --embedding-dropout 0 --epochs 60 --eval-every 60 --data few.txt"
    assert cli(*settings_.split()) == 0
    losses = [event["loss"] for event in events_of("runs/few") if event["event"] == "epoch"]
    assert losses[0] == pytest.approx(math.log(32), rel=0.3)  # nothing learnt
    assert losses[-1] < 0.05
    model = diffurec.load_checkpoint(Path("runs/few/last.pt"))["model"]
    for user in users:
        for n in range(1, 6):
            assert model.recommend(torch.tensor([user[:n]]), 1)[0].tolist() == [[user[n]]]


# ------------------------------------------------------------------------------------ checkpoints


@functools.cache
def saved():
    """A small model, its data and the bytes of its checkpoint."""
    model, sequences = model_of(n_items=9, blocks=1), sequences_of([[1, 2, 3, 9]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "best.pt")
        diffurec.save_checkpoint(path, model, sequences, epoch=3)
        return model, sequences, path.read_bytes()


def test_checkpoint_comes_back_as_it_was(tmp_path):
    model, sequences, content = saved()
    (tmp_path / "best.pt").write_bytes(content)
    checkpoint = diffurec.load_checkpoint(tmp_path / "best.pt", sequences)
    assert checkpoint["epoch"] == 3
    assert checkpoint["model"].config == model.config
    assert checkpoint["model"].n_items == 9
    assert not checkpoint["model"].training
    want, got = model.state_dict(), checkpoint["model"].state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(want[key], got[key]) for key in want)
    diffurec.save_checkpoint(tmp_path / "again.pt", model, sequences, epoch=3)
    assert sorted(os.listdir(tmp_path)) == ["again.pt", "best.pt"]


def test_checkpoint_of_other_data_is_refused(tmp_path):
    (tmp_path / "best.pt").write_bytes(saved()[2])
    for users in ([[1, 2, 9, 3]], [[1, 2, 3], [9, 1, 2]], [[1, 2, 3, 9, 9]]):
        with pytest.raises(ValueError, match="other data"):
            diffurec.load_checkpoint(tmp_path / "best.pt", sequences_of(users))


def load_or_refuse(path, model):
    """A checkpoint is loaded with all its weights as they were, or is a ValueError of one line."""
    try:
        got = diffurec.load_checkpoint(path)["model"]
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return False
    assert got.config == model.config
    assert all(map(torch.equal, model.state_dict().values(), got.state_dict().values()))
    return True


def test_truncated_checkpoint_is_refused(tmp_path):
    model, _, content = saved()
    path = tmp_path / "best.pt"
    places = range(len(content)) if THOROUGH else range(0, len(content), len(content) // 60)
    for length in (*places, *range(len(content) - 30, len(content))):
        path.write_bytes(content[:length])
        assert not load_or_refuse(path, model)


@property_test
@given(data=st.data())
def test_mutated_checkpoint_is_loaded_right_or_refused(tmp_path, data):
    model, _, content = saved()
    path = tmp_path / "best.pt"
    path.write_bytes(data.draw(mutated([content])))
    load_or_refuse(path, model)


@property_test
@given(data=st.data())
def test_mutated_directory_of_a_checkpoint_is_loaded_right_or_refused(tmp_path, data):
    """Mutated where a zip file says what it holds: no checksum covers that."""
    model, _, content = saved()
    at = content.index(b"PK\x01\x02")
    path = tmp_path / "best.pt"
    path.write_bytes(content[:at] + data.draw(mutated([content[at:]])))
    load_or_refuse(path, model)


class Touch:
    """What pickle runs when it loads one of these: it makes the file `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def foreign_files():
    """Files that are no checkpoint of this program, by name."""

    def torch_saved(content, **options):
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        return buffer.getvalue()

    def rezipped(content, method=zipfile.ZIP_STORED, replace=None):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                data = replace if replace and name.endswith("data.pkl") else old.read(name)
                new.writestr(name, data, method)
        return buffer.getvalue()

    checkpoint = torch.load(io.BytesIO(saved()[2]), weights_only=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("holiday.jpg", b"\xff\xd8")
    tensors = torch_saved({"a": torch.zeros(2)})
    return {
        "empty": b"",
        "text": b"1 2 3\n",
        "zeros": bytes(1000),
        "a pickle that runs": pickle.dumps(Touch()),
        "a saved pickle that runs": torch_saved(Touch()),
        "a saved pickle that runs, in a checkpoint": torch_saved(checkpoint | {"epoch": Touch()}),
        "an old saved pickle that runs": torch_saved(Touch(), _use_new_zipfile_serialization=False),
        "another zip": packed.getvalue(),
        "a zip without a member": b"PK\x05\x06" + bytes(18),
        "compressed": rezipped(tensors, zipfile.ZIP_DEFLATED),
        "pickle of nothing": rezipped(tensors, replace=b""),
        "pickle of noise": rezipped(tensors, replace=b"\x80\x02}q\x00(X"),
        "pickle of a recursion": rezipped(tensors, replace=b"\x80\x02" + b"(" * 10_000 + b"."),
        "pickle of an unknown memo": rezipped(tensors, replace=b"\x80\x02h\x07."),
        "pickle that pops nothing": rezipped(tensors, replace=b"\x80\x02000."),
        "a saved tensor": torch_saved(torch.zeros(3)),
        "a saved list": torch_saved([1, 2]),
        "a saved number": torch_saved(3),
        "nothing saved": torch_saved(None),
        "another dict": torch_saved({"state_dict": {"weight": torch.zeros(2)}}),
        "another dict, old": torch_saved({"a": 1}, _use_new_zipfile_serialization=False),
        "the same, saved by another program": torch_saved(checkpoint),
    }


@pytest.mark.parametrize("name", foreign_files())
def test_foreign_checkpoint_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path("best.pt")
    path.write_bytes(foreign_files()[name])
    assert not load_or_refuse(path, saved()[0])
    assert os.listdir() == ["best.pt"]


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": Touch()},
        {"n_items": 8},
        {"n_items": "many"},
        {"n_items": -3},
        {"n_items": 1 << 60},
        {"config": {}},
        {"config": [1]},
        {"config": {"colour": "red"}},
        {"config": {"hidden": -8}},
        {"config": {"heads": 3}},
        {"config": {"hidden": "wide"}},
        {"config": {"blocks": 10**30}},
    ],
    ids=str,
)
def test_checkpoint_of_another_model_is_refused_and_runs_nothing(tmp_path, monkeypatch, state):
    """What somebody's changed version of this program might save."""
    monkeypatch.chdir(tmp_path)
    model, sequences, _ = saved()
    diffurec.save_checkpoint(Path("best.pt"), model, sequences, **state)
    assert not load_or_refuse(Path("best.pt"), model)
    assert os.listdir() == ["best.pt"]


def test_checkpoint_that_is_missing_or_a_folder(tmp_path):
    for path in (tmp_path / "x.pt", tmp_path):
        with pytest.raises(OSError):
            diffurec.load_checkpoint(path)


# ----------------------------------------------------------------------------------- command line


def printed(out, label):
    """The six numbers of a table's row that begins with label, in %."""
    row = next(line for line in out.splitlines() if line.startswith(label + " "))
    return [float(word) for word in row.removeprefix(label).split()]


def test_help_tells_what_the_datasets_set_differently():
    for name, settings_ in diffurec.DATASET_SETTINGS.items():
        for key, value in settings_.items():
            told = diffurec.Config.__dataclass_fields__[key].metadata["help"]
            assert f"{name}: {value}" in told


def test_no_argument_but_settings_trains_on_the_toy(cli):
    assert cli(*TINY, "--epochs", 2, "--batch-size", 512) == 0
    assert cli.err == ""
    assert sorted(os.listdir("runs/toy")) == ["best.pt", "last.pt", "log.jsonl"]
    assert Path("data/toy.txt").exists()
    events = events_of("runs/toy", seconds=True)
    assert [event["event"] for event in events] == (
        ["start", *["epoch", "validation"] * 2, "popularity", "ceiling", "test"]
    )
    start, epochs = events[0], [event for event in events if event["event"] == "epoch"]
    given_ = {"hidden": 8, "heads": 2, "blocks": 1, "steps": 2, "eval_every": 1, "epochs": 2}
    assert start["data"] == "toy"
    given_ |= {"embedding_std": 0.1}  # the toy's own, not given
    assert start["config"] == dataclasses.asdict(diffurec.Config(**given_))
    for number, event in enumerate(epochs, 1):
        assert list(event) == ["event", "epoch", "loss", "seconds"]
        assert event["epoch"] == number
        assert 0 < event["loss"] < 2 * math.log(200)
        assert f"loss {event['loss']:.4f}" in cli.out
    metrics = set(prepare_data.METRICS)
    for event in events:
        if event["event"] in ("popularity", "ceiling"):
            assert set(event) == {"event"} | metrics
        if event["event"] in ("validation", "test"):
            assert set(event) == {"event", "epoch", "seconds"} | metrics
        assert all(0 <= event.get(metric, 0) <= 1 for metric in metrics)
        assert event.get("seconds", 1) > 0
    ceiling = next(event for event in events if event["event"] == "ceiling")
    assert {key: ceiling[key] for key in metrics} == prepare_data.toy_ceiling()
    best = max((e for e in events if e["event"] == "validation"), key=lambda e: e["NDCG@10"])
    assert events[-1]["epoch"] == best["epoch"]
    for label, event in (("DiffuRec", events[-1]), ("popularity", events[-3])):
        want = [100 * event[metric] for metric in prepare_data.METRICS]
        assert printed(cli.out, label) == pytest.approx(want, abs=6e-5)  # four digits
    assert "ceiling" in cli.out


@pytest.mark.skipif(not THOROUGH, reason="about a minute; DIFFUREC_THOROUGH asks for it")
def test_default_run_comes_near_the_toys_ceiling(cli):
    assert cli() == 0
    result = {event["event"]: event["HR@10"] for event in events_of("runs/toy")[-3:]}
    assert result["test"] > 0.8 * result["ceiling"]
    assert result["popularity"] < 0.3 * result["ceiling"]


def test_header_counts_what_there_is_and_what_is_left_out(cli):
    cli.train()
    assert "20 users, 30 items" in cli.out
    actions = len(Path("x.txt").read_text().split()) - 2
    assert f"{actions:,} actions" in cli.out
    skipped = [line for line in cli.out.splitlines() if "skipped" in line]
    assert len(skipped) == 1
    assert re.search(r"(?<![\d,])1(?![\d,])", skipped[0])  # the user of two items


def test_known_dataset_is_shown_beside_table_2(cli):
    Path("data").mkdir()
    shutil.copy("x.txt", "data/beauty.txt")
    cli.train(data="beauty")
    assert "5.5758" in cli.out  # HR@5, as the paper prints it
    assert "4.7494" in cli.out
    result = events_of("runs/beauty")[-1]
    paper = (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566)
    want = [100 * 100 * result[m] / p for m, p in zip(prepare_data.METRICS, paper)]
    assert printed(cli.out, "ratio to Table 2, in %") == pytest.approx(want, abs=6e-5)


def test_missing_dataset_is_prepared_first(cli, serve, monkeypatch):
    actions = [(f"u{u}", f"i{(u + n) % 9}", n) for u in range(9) for n in range(6)]
    server = serve(gzip.compress(amazon_file(actions)))
    fake = prepare_data.Dataset(server.url, prepare_data.parse_amazon)
    monkeypatch.setitem(prepare_data.DATASETS, "beauty", fake)
    assert cli("--data", "beauty", "--data-dir", "d", *TINY, "--epochs", 1) == 0
    assert "preparing" in cli.out
    assert Path("d/beauty.txt").read_text().count("\n") == 9
    assert events_of("runs/beauty")[-1]["event"] == "test"


def test_max_len_comes_with_ml_1m(cli):
    shutil.copy("x.txt", "ml-1m.txt")
    cli.train(data="ml-1m.txt")
    assert events_of("runs/ml-1m")[0]["config"]["max_len"] == 200
    cli.train("--max-len", 7, data="ml-1m.txt")
    assert events_of("runs/ml-1m-2")[0]["config"]["max_len"] == 7
    cli.train()
    assert events_of("runs/x")[0]["config"]["max_len"] == 50


def test_each_run_has_a_folder_of_its_own(cli):
    for folder in ("runs/x", "runs/x-2", "runs/x-3"):
        before = snapshot("runs")
        cli.train(epochs=1)
        after = snapshot("runs")
        assert before.items() <= after.items()
        assert {path for path in after if path not in before} - {"runs"} == (
            {folder, *(f"{folder}/{name}" for name in ("best.pt", "last.pt", "log.jsonl"))}
        )
    cli.train("--out", "else/where", epochs=1)
    assert sorted(os.listdir("else/where")) == ["best.pt", "last.pt", "log.jsonl"]
    assert "holds a run" in cli.refused("--data", "x.txt", *TINY, "--out", "else/where")
    Path("empty").mkdir()
    cli.train("--out", "empty", epochs=1)
    assert "empty" in cli.out


def test_runs_started_in_the_same_moment_get_different_folders(cli):
    """Threads for the folders, many at once; two processes for the whole."""
    folders, barrier = [], threading.Barrier(16)

    def start():
        barrier.wait()
        folders.append(diffurec.run_folder("x", None, new=True))

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, folders)) == sorted(["runs/x", *(f"runs/x-{n}" for n in range(2, 17))])
    shutil.copy("x.txt", "y.txt")
    processes = [start_training("--data", "y.txt", "--epochs", 2) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert sorted(folder for folder in os.listdir("runs") if folder[0] == "y") == ["y", "y-2"]
    assert_same_run("runs/y", "runs/y-2")


def test_same_seed_gives_the_same_log_but_for_the_seconds(cli):
    cli.train()
    torch.rand(3)
    cli.train()
    cli.train("--seed", 2)
    assert_same_run("runs/x", "runs/x-2")
    assert events_of("runs/x")[1]["loss"] != events_of("runs/x-3")[1]["loss"]


def test_noise_of_training_follows_from_seed_and_epoch(cli, monkeypatch):
    """Were it the same in two epochs or for two seeds, resumed runs would still look right."""
    original, states = diffurec.train_batches, []

    def train_batches(sequences, max_len, batch_size, rng):
        states.append((torch.get_rng_state().numpy().tobytes(), rng.bit_generator.state["state"]))
        return original(sequences, max_len, batch_size, rng)

    monkeypatch.setattr(diffurec, "train_batches", train_batches)
    cli.train("--seed", 1, 2, epochs=2)
    assert len({torchs for torchs, _ in states}) == 4
    assert len({str(numpys) for _, numpys in states}) == 4


def test_several_seeds_end_with_mean_and_standard_deviation(cli):
    cli.train("--seed", 4, 2, 3)
    results = []
    for folder, seed in (("runs/x", 4), ("runs/x-2", 2), ("runs/x-3", 3)):
        events = events_of(folder)
        assert events[0]["config"]["seed"] == seed
        results.append([100 * events[-1][metric] for metric in prepare_data.METRICS])
    columns = list(zip(*results))
    for label, of in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        want = [of(column) for column in columns]
        assert printed(cli.out, label) == pytest.approx(want, abs=6e-5)  # four digits
    cli.train("--seed", 2)
    assert_same_run("runs/x-2", "runs/x-4")  # a run does not depend on those before it
    cli.train("--seed", 1, 2, "--out", "two", epochs=1)
    assert sorted(os.listdir("two")) == ["seed-1", "seed-2"]


def test_early_stopping_after_patience_validations_without_progress(cli):
    """With learning rate 0 every validation is the same, so none after the first is better."""
    cli.train("--lr", 0, "--patience", 3, "--eval-every", 2, epochs=50)
    events = events_of("runs/x")
    assert [e["epoch"] for e in events if e["event"] == "validation"] == [2, 4, 6, 8]
    assert events[-1]["epoch"] == 2
    assert events[-1]["event"] == "test"
    validations = [e for e in events if e["event"] == "validation"]
    assert len({validation["NDCG@10"] for validation in validations}) == 1


def test_validation_also_after_the_last_epoch(cli):
    cli.train("--eval-every", 2, epochs=3)
    validations = [e["epoch"] for e in events_of("runs/x") if e["event"] == "validation"]
    assert validations == [2, 3]


def test_best_epoch_is_kept_and_scored(cli):
    """A large learning rate makes the validations go up and down."""
    cli.train("--lr", 0.3, "--patience", 99, epochs=12)
    events = events_of("runs/x")
    validations = [event for event in events if event["event"] == "validation"]
    best = max(validations, key=lambda event: event["NDCG@10"])  # the first of equals
    assert events[-1]["epoch"] == best["epoch"] < 12
    checkpoint = diffurec.load_checkpoint(Path("runs/x/best.pt"))
    assert checkpoint["epoch"] == best["epoch"]
    for event, split in ((best, "validation"), (events[-1], "test")):
        sequences = prepare_data.load_sequences("x.txt")
        got = diffurec.evaluate(checkpoint["model"], sequences, split, batch_size=16)
        assert got == {metric: event[metric] for metric in prepare_data.METRICS}


# ------------------------------------------------------------------------- interrupted, and resumed


def start_training(*arguments, **options):
    """`diffurec.py` in a process of its own, in the folder of the test."""
    command = [sys.executable, str(MODEL_SCRIPT), *TINY, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(pipes | options))


def wait_for_epoch(process, folder, epoch):
    """Until the log tells of that epoch."""
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(FileNotFoundError):
            if events_of(folder)[-1:] and events_of(folder)[-1].get("epoch", 0) >= epoch:
                return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_run_stopped_at_any_replacement_of_a_file_goes_on_as_if_it_had_not_been(cli, monkeypatch):
    """Every file is written by replacing it: stop before and after each of these moments."""
    arguments = ["--data", "x.txt", *TINY, "--epochs", 3, "--eval-every", 2]
    assert cli(*arguments) == 0
    replace = os.replace
    for limit in range(100):
        for when in ("before", "after"):
            folder, done = f"stopped-{limit}-{when}", []

            def stop(source, target, when=when, limit=limit, done=done):
                done.append(target)
                if len(done) <= limit or when == "after":
                    replace(source, target)
                if len(done) == limit + 1:
                    raise KeyboardInterrupt

            monkeypatch.setattr(os, "replace", stop)
            status = cli(*arguments, "--out", folder)
            monkeypatch.setattr(os, "replace", replace)
            if status == 0:
                assert limit >= 8  # the log at the start and the end, and two or three an epoch
                return
            assert status == 130
            assert cli.err.count("\n") == 1
            assert "--resume" in cli.err
            assert {path.suffix for path in Path(folder).iterdir()} <= {".pt", ".jsonl"}
            # before the first line of the log not even the settings are known: give them again
            again = arguments if not os.path.getsize(f"{folder}/log.jsonl") else arguments[:2]
            assert cli(*again, "--resume", "--out", folder) == 0
            assert_same_run("runs/x", folder)


def test_resume_starts_a_run_that_was_killed_before_its_first_save(cli):
    """Of a run that had got to its first line, to its first validation, and not even that far."""
    cli.train("--dropout", 0.3)
    lines = Path("runs/x/log.jsonl").read_text().splitlines(keepends=True)
    for number, again in ((1, []), (3, []), (0, [*TINY, "--epochs", 2, "--dropout", 0.3])):
        folder = Path(f"runs/x-{number + 2}")
        folder.mkdir()
        (folder / "log.jsonl").write_text("".join(lines[:number]))
        if number == 3:
            shutil.copy("runs/x/best.pt", folder)
        assert cli("--data", "x.txt", "--resume", *again) == 0
        assert_same_run("runs/x", folder)


def test_killed_runs_go_on_as_if_they_had_not_been(cli):
    """SIGKILL at random moments, of training and of the runs that resume it."""
    arguments = ["--data", "x.txt", "--epochs", 60, "--patience", 60]
    assert cli(*TINY, *arguments, "--out", "whole") == 0
    draw, sequences = random.Random(os.urandom(4)), prepare_data.load_sequences("x.txt")
    for attempt in range(30 if THOROUGH else 3):
        again = ["--resume"] if Path("killed/log.jsonl").exists() else []
        process = start_training(*arguments, *again, "--out", "killed")
        if attempt % 3:
            give_up = time.monotonic() + 60
            while not Path("killed/log.jsonl").exists() and time.monotonic() < give_up:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5))
        else:
            time.sleep(draw.uniform(0.5, 3))
        process.kill()
        assert "Traceback" not in process.communicate()[1]
        for path in Path("killed").glob("*.pt"):
            diffurec.load_checkpoint(path, sequences)
        if Path("killed/log.jsonl").exists():
            events_of("killed")
    again = ["--resume"] if Path("killed/log.jsonl").exists() else []
    assert cli(*TINY, *arguments, *again, "--out", "killed") == 0
    assert_same_run("whole", "killed")
    assert sorted(os.listdir("killed")) == ["best.pt", "last.pt", "log.jsonl"]


def test_run_killed_in_the_middle_is_resumed_to_the_same_end(cli):
    arguments = ["--data", "x.txt", "--epochs", 40, "--patience", 40]
    assert cli(*TINY, *arguments, "--out", "whole") == 0
    process = start_training(*arguments)
    wait_for_epoch(process, "runs/x", 3)
    process.kill()
    process.communicate()
    assert events_of("runs/x")[-1]["event"] != "test"
    assert cli("--data", "x.txt", "--resume") == 0
    assert_same_run("whole", "runs/x")


def test_ctrl_c_is_status_130_and_the_run_can_be_resumed(cli):
    arguments = ["--data", "x.txt", "--epochs", 40, "--patience", 40]
    assert cli(*TINY, *arguments, "--out", "whole") == 0
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not so in background
    process = start_training(*arguments, preexec_fn=listen)
    wait_for_epoch(process, "runs/x", 2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "--resume" in error
    assert cli("--data", "x.txt", "--resume") == 0
    assert_same_run("whole", "runs/x")


def test_message_takes_the_place_of_the_live_line(cli, monkeypatch):
    """At a terminal, interrupted while the line of an epoch stands there without its end."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(diffurec, "evaluate", interrupt)
    assert cli("--data", "x.txt", *TINY, "--epochs", 1) == 130
    *_, live_line, message = cli.err.split("\r\033[K")
    assert live_line == "" or "epoch 1" in live_line
    assert message.startswith("diffurec.py: stopped")


def test_resume_takes_the_newest_run_of_that_data(cli):
    for _ in range(2):
        cli.train(epochs=1)
    shutil.copy("x.txt", "y.txt")
    cli.train(data="y.txt", epochs=1)
    for folder, when in (("runs/x", 2e9), ("runs/x-2", 1e9), ("runs/y", 3e9)):
        os.utime(folder, (when, when))
    assert cli("--data", "x.txt", "--resume") == 0
    assert re.search(r"runs/x\b(?!-)", cli.out)
    assert "runs/x-2" not in cli.out


def test_resume_passes_over_a_folder_that_was_killed_before_it_had_a_log(cli):
    cli.train(epochs=1)
    Path("runs/x-2").mkdir()
    for what in ("--resume", "--evaluate"):
        assert cli("--data", "x.txt", what) == 0


def test_resume_clears_what_a_kill_left_half_written(cli):
    cli.train(epochs=1)
    before = snapshot("runs")
    Path("runs/x/last.pt.0123.tmp").write_bytes(b"PK")
    assert cli("--data", "x.txt", "--resume") == 0
    assert snapshot("runs") == before


def test_finished_run_is_not_extended(cli):
    """Its test split has been scored: more epochs would be chosen by somebody who has seen it."""
    cli.train(epochs=1)
    assert "--epochs" in cli.refused("--data", "x.txt", "--resume", "--epochs", 3)


def test_file_that_is_only_called_toy_has_no_ceiling(cli):
    Path("toy.txt").write_bytes(Path("x.txt").read_bytes())
    cli.train(data="toy.txt", epochs=1)
    assert "ceiling" not in cli.out
    assert "ceiling" not in {event["event"] for event in events_of("runs/toy")}


def test_resume_of_a_finished_run_says_so_and_changes_nothing(cli):
    cli.train()
    before = snapshot("runs")
    assert cli("--data", "x.txt", "--resume") == 0
    assert "finished" in cli.out
    assert snapshot("runs") == before
    assert "epoch 1 " not in cli.out


def test_more_epochs_for_a_run_that_was_stopped(cli, monkeypatch):
    cli.train(epochs=4)
    replace, done = os.replace, []

    def stop(source, target):
        done.append(replace(source, target))
        if len(done) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    assert cli("--data", "x.txt", *TINY, "--epochs", 2, "--out", "more") == 130
    monkeypatch.setattr(os, "replace", replace)
    assert cli("--data", "x.txt", "--resume", "--out", "more", "--epochs", 4) == 0
    assert_same_run("runs/x", "more")


def test_loss_that_is_not_finite_is_status_1_and_keeps_the_last_good_checkpoint(cli, monkeypatch):
    """From the third epoch on the loss overflows."""
    sequences, count = prepare_data.load_sequences("x.txt"), itertools.count(1)
    batches = math.ceil(sequences.n_samples / 16)
    forward = diffurec.DiffuRec.forward

    def overflow(model, history, target):
        factor = math.inf if next(count) > 2 * batches else 1
        return forward(model, history, target) * factor

    monkeypatch.setattr(diffurec.DiffuRec, "forward", overflow)
    assert cli("--data", "x.txt", *TINY, "--epochs", 5) == 1
    assert cli.err.startswith("diffurec.py: error: epoch 3")
    assert cli.err.count("\n") == 1
    for name in ("best.pt", "last.pt"):
        model = diffurec.load_checkpoint(Path("runs/x", name), sequences)["model"]
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert diffurec.load_checkpoint(Path("runs/x/last.pt"))["epoch"] == 2


def full_disk(megabytes):
    """A small file system of its own at ./small, where the system lets us."""
    Path("small").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", "small"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(cli):
    if not full_disk(1):
        pytest.skip("mounting a small file system needs to be root")
    try:
        arguments = ["--data", "x.txt", *TINY, "--hidden", 32, "--epochs", 3, "--patience", 3]
        assert cli(*arguments, "--out", "whole") == 0
        size = sum(path.stat().st_size for path in Path("whole").iterdir())
        # room for both checkpoints but not for a third, from which each is replaced
        Path("small/ballast").write_bytes(bytes((1 << 20) - size - 20_000))
        assert cli(*arguments, "--out", "small/run") == 2
        assert cli.err.startswith("diffurec.py: error: ")
        assert "space" in cli.err
        assert cli.err.count("\n") == 1
        names = sorted(os.listdir("small/run"))
        assert set(names) <= {"best.pt", "last.pt", "log.jsonl"}
        assert "best.pt" in names
        for name in set(names) - {"log.jsonl"}:
            diffurec.load_checkpoint(Path("small/run", name))
        Path("small/ballast").unlink()
        assert cli("--data", "x.txt", "--resume", "--out", "small/run") == 0
        assert_same_run("whole", "small/run")
    finally:
        subprocess.run(["umount", "small"], check=True)


# --------------------------------------------------------------------- with a run that is there


def test_evaluate_repeats_the_numbers_of_the_log(cli):
    cli.train("--delta", 0.5)
    before = snapshot("runs")
    outs = []
    for _ in range(2):
        assert cli("--data", "x.txt", "--evaluate") == 0
        outs.append(cli.out)
        events = events_of("runs/x")
        best = max((e for e in events if e["event"] == "validation"), key=lambda e: e["NDCG@10"])
        for split, event in (("validation", best), ("test", events[-1])):
            want = [100 * event[metric] for metric in prepare_data.METRICS]
            assert printed(cli.out, split) == pytest.approx(want, abs=6e-5)  # four digits
        assert cli.out.count("the history's items last") == 2
        assert re.search(r"reversal: [0-9.]+ ms", cli.out)
    assert snapshot("runs") == before
    assert cli("--data", "x.txt", "--evaluate", "--rounding", "r_star", "--seed", 9) == 0


def test_recommend_shows_history_titles_and_ten_items(cli):
    Path("x.items.txt").write_text("".join(f"the title of {n}\n" for n in range(1, 31)))
    cli.train("--max-len", 3)
    before = snapshot(".")
    assert cli("--data", "x.txt", "--recommend", 1) == 0
    lines = cli.out.splitlines()
    rows = [line for line in lines if "the title of" in line]
    ids = [int(re.search(r"\d+", row)[0]) for row in rows]
    assert all(f"the title of {number}" in row for number, row in zip(ids, rows))
    assert ids[:5] == [5, 6, 7, 8, 9]
    assert len(set(ids[5:])) == 10
    assert {n for n, row in zip(ids[5:], rows[5:]) if "in the history" in row} == (
        {5, 6, 7, 8, 9} & set(ids[5:])
    )
    assert cli("--data", "x.txt", "--history", 5, 6, 7, 8, 9) == 0
    assert cli.out.splitlines() == lines
    assert snapshot(".") == before
    Path("x.items.txt").unlink()
    assert cli("--data", "x.txt", "--recommend", 1) == 0
    assert [int(line.split()[0].strip("+")) for line in cli.out.splitlines()[:5]] == [5, 6, 7, 8, 9]


def test_recommendations_are_those_of_the_model_and_what_100_reversals_reach(cli):
    cli.train("--max-len", 3, "--delta", 0.5, "--seed", 2)
    history = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    assert cli("--data", "x.txt", "--history", *history) == 0
    model = diffurec.load_checkpoint(Path("runs/x/best.pt"))["model"]
    torch.manual_seed(model.config.seed)
    top = model.recommend(torch.tensor([history[-3:]] * 100), 20)[0]
    assert f"{len(set(top.flatten().tolist()))} different items" in cli.out
    torch.manual_seed(model.config.seed)
    with torch.no_grad():
        near = model.reverse(torch.tensor([history[-3:]] * 100))
        lines = [line.split() for line in Path("x.txt").read_text().splitlines()]
        users = [list(map(int, items)) for items in lines if len(items) >= 3]
        drawn = np.random.default_rng(model.config.seed).choice(len(users), 100)
        far = model.reverse(padded(*(users[user][:-1][-3:] for user in drawn)))
    means = [
        statistics.mean(math.dist(a, b) for a, b in itertools.combinations(x_0.tolist(), 2))
        for x_0 in (near, far)
    ]
    # the same reversals as those whose items are counted, to the three digits that are printed
    assert f"of their x_0 {means[0]:.3g}, of those of 100 random users {means[1]:.3g}\n" in cli.out
    assert re.findall(r"^ +(\d+) *$", cli.out, re.MULTILINE) == list(map(str, history[-10:]))
    shown = re.findall(r"^\+ *(\d+)(.*)$", cli.out, re.MULTILINE)
    assert [int(number) for number, _ in shown] == top[0, :10].tolist()
    assert [int(number) in history for number, _ in shown] == ["history" in n for _, n in shown]
    assert any("history" in note for _, note in shown)


def test_recommend_with_fewer_items_than_are_asked_for(cli):
    Path("x.txt").write_text("1 2 3 1 2 3 1\n3 2 1 3 2\n")
    cli.train()
    assert cli("--data", "x.txt", "--recommend", 2) == 0
    assert len(re.findall(r"^\+", cli.out, re.MULTILINE)) == 3


def test_the_readmes_lines_of_python(cli):
    cli.train("--out", "runs/toy")
    model = diffurec.load_checkpoint("runs/toy/best.pt")["model"]
    items, scores = model.recommend(torch.tensor([[5, 6, 7]]), k=10)
    assert items.shape == scores.shape == (1, 10)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.txt: the file holds no item ids"),
        (b" \n\n", "x.txt: the file holds no item ids"),
        (b"1 2 3 4\n1 2 three 4\n", "x.txt:2: 'three' is not an item id"),
        (b"1 2 3 4\n\n1 -2 3 4\n", "x.txt:3: '-2' is not an item id"),
        (b"1 2 0 4\n", "x.txt:1: '0' is not an item id"),
        (b"1 2 3 4\n1 2 3 4000000\n", "x.txt:2: item id 4,000,000, but only 5 different ids"),
        (
            b"%s 110200\n" % b" ".join(b"%d" % n for n in range(1, 1101)),
            "x.txt:1: item id 110,200, but only 1,101 different ids",
        ),
        (b"1 2 3 99999999999\n", "x.txt:1: '99999999999' is not an item id"),
        (b"1 2\n3\n", "x.txt: no user has 3 items or more"),
        (b"1 2 3\n4 5 6\n", "x.txt: no user has four items or more"),
    ],
)
@pytest.mark.parametrize("what", [TINY, ["--evaluate"], ["--resume"], ["--recommend", "1"]])
def test_bad_data_is_refused(cli, content, message, what):
    if what is not TINY:
        cli.train(epochs=1)
    Path("x.txt").write_bytes(content)
    assert message in cli.refused("--data", "x.txt", *what)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nothing", "nothing: neither a file nor one of toy, beauty, toys, ml-1m, steam"),
        ("--data missing.txt", "missing.txt"),
        ("--data .", ""),
        ("--data x.txt --steps 0", "--steps 0"),
        ("--data x.txt --steps 1001", "--steps 1001"),
        ("--data x.txt --steps 3.5", "--steps"),
        ("--data x.txt --steps", "--steps"),
        ("--data x.txt --schedule round", "--schedule round"),
        ("--data x.txt --delta -1", "--delta -1"),
        ("--data x.txt --delta nan", "--delta nan"),
        ("--data x.txt --delta inf", "--delta inf"),
        ("--data x.txt --approximator rnn", "--approximator rnn"),
        ("--data x.txt --rounding up", "--rounding up"),
        ("--data x.txt --hidden 0", "--hidden 0"),
        ("--data x.txt --hidden 10", "--hidden 10"),
        ("--data x.txt --hidden 9 --heads 3", "--hidden 9"),
        ("--data x.txt --heads 0", "--heads 0"),
        ("--data x.txt --blocks 0", "--blocks 0"),
        ("--data x.txt --dropout 1", "--dropout 1"),
        ("--data x.txt --dropout -0.1", "--dropout -0.1"),
        ("--data x.txt --max-len 0", "--max-len 0"),
        ("--data x.txt --batch-size 0", "--batch-size 0"),
        ("--data x.txt --lr -1", "--lr -1"),
        ("--data x.txt --lr nan", "--lr nan"),
        ("--data x.txt --epochs 0", "--epochs 0"),
        ("--data x.txt --eval-every 0", "--eval-every 0"),
        ("--data x.txt --patience 0", "--patience 0"),
        ("--data x.txt --precision int8", "--precision int8"),
        ("--data x.txt --seed -1", "--seed -1"),
        ("--data x.txt --seed 1 two", "--seed"),
        ("--data x.txt --seed 1 2 99999999999999999999", "--seed 99999999999999999999"),
        ("--data x.txt --seed", "--seed"),
        ("--data x.txt --device quantum", "--device quantum"),
        ("--data x.txt --device cuda:99", "--device cuda:99"),
        ("--data x.txt --device meta", "--device meta"),  # computes nothing
        ("--data x.txt --device hpu", "--device hpu"),  # is no part of PyTorch
        ("--data x.txt --colour red", "--colour"),
        ("x.txt", "x.txt"),
        ("--data x.txt --out x.txt", "x.txt"),
        ("--data x.txt --out x.txt/run", "x.txt"),
        ("--data x.txt --resume", "no run"),
        ("--data x.txt --evaluate", "no run"),
        ("--data x.txt --recommend 1", "no run"),
        ("--data x.txt --history 1 2", "no run"),
        ("--resume", "no run"),
        ("--data x.txt --resume --out nowhere", "no run"),
        ("--data x.txt --resume --evaluate", "--evaluate"),
        ("--data x.txt --recommend 1 --history 2", "--history"),
        ("--data x.txt --data-dir x.txt --data toy", "x.txt"),
    ],
)
def test_wrong_arguments_are_refused(cli, arguments, message):
    assert message in cli.refused(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recommend 0", "line 0"),
        ("--recommend -1", "-1"),
        ("--recommend 2", "line 2"),  # a user of two items
        ("--recommend 22", "line 22"),
        ("--recommend one", "--recommend"),
        ("--history 31", "--history"),
        ("--history 0", "--history"),
        ("--history 3 -4", "--history"),
        ("--history", "--history"),
        ("--history 99999999999999999999", "--history"),
        ("--resume --steps 3", "--steps"),
        ("--resume --lr 0.5", "--lr"),
        ("--resume --seed 1 2", "--seed"),
        ("--resume --seed 2", "--seed"),
        ("--evaluate --steps 3", "--steps"),
        ("--evaluate --hidden 16", "--hidden"),
        ("--evaluate --approximator gru", "--approximator"),
        ("--recommend 1 --max-len 3", "--max-len"),
        ("--evaluate --seed 1 2", "--seed"),
    ],
)
def test_wrong_arguments_for_a_run_are_refused(cli, arguments, message):
    cli.train(epochs=1)
    assert message in cli.refused("--data", "x.txt", *arguments.split())


def test_several_seeds_are_refused_before_the_first_of_them_trains(cli):
    cli.train("--out", "two/seed-2", epochs=1)
    arguments = ["--data", "x.txt", *TINY, "--epochs", 1, "--out"]
    assert "--out" in cli.refused(*arguments, "two", "--seed", 1, 2)
    assert "--seed" in cli.refused(*arguments, "three", "--seed", 3, 3)


def test_titles_that_are_no_text_are_refused(cli):
    cli.train(epochs=1)
    Path("x.items.txt").write_bytes(b"\xff\n")
    assert "x.items.txt" in cli.refused("--data", "x.txt", "--recommend", 1)


def test_run_of_other_data_is_refused(cli):
    cli.train("--out", "run", epochs=1)
    Path("y.txt").write_text("1 2 3 4\n30 2 1 4\n")
    for what in (["--evaluate"], ["--resume"], ["--recommend", 1], ["--history", 1]):
        assert "other data" in cli.refused("--data", "y.txt", "--out", "run", *what)
    Path("x.txt").write_text(Path("x.txt").read_text() + "1 2 3\n")
    for what in (["--evaluate"], ["--resume"]):
        assert "other data" in cli.refused("--data", "x.txt", "--out", "run", *what)


@pytest.mark.parametrize("what", [["--evaluate"], ["--resume"], ["--recommend", 1]])
def test_broken_checkpoint_of_a_run_is_refused(cli, what):
    cli.train(epochs=1)
    path = Path("runs/x", "last.pt" if what == ["--resume"] else "best.pt")
    content = path.read_bytes()
    for broken in (b"", content[: len(content) // 2], pickle.dumps(Touch()), b"PK" + content):
        path.write_bytes(broken)
        assert str(path) in cli.refused("--data", "x.txt", *what)


@pytest.mark.parametrize("text", ["{", "[]\n", "3\n", "{}\n", "\udcff"])
def test_broken_log_of_a_run_is_refused(cli, text):
    cli.train(epochs=1)
    Path("runs/x/log.jsonl").write_text(text, errors="surrogateescape")
    for what in ("--resume", "--evaluate"):
        assert "log.jsonl" in cli.refused("--data", "x.txt", what)


def test_no_network_is_one_line(cli, serve, monkeypatch):
    server = serve(b"")
    server.shutdown()
    server.server_close()
    fake = prepare_data.Dataset(server.url, prepare_data.parse_amazon)
    monkeypatch.setitem(prepare_data.DATASETS, "beauty", fake)
    assert cli("--data", "beauty") == 2
    assert cli.err.splitlines()[0] == f"downloading {server.url}"
    assert cli.err.splitlines()[1].startswith("diffurec.py: error: ")
    assert cli.err.count("\n") == 2
    assert not Path("runs").exists()


def test_script_gives_its_status_and_no_traceback(cli):
    process = start_training("--data", "nothing")
    out, error = process.communicate()
    assert (process.returncode, out, error.count("\n")) == (2, "", 1)
    assert not Path("runs").exists()


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        diffurec.main(["--help"])
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    flags = "steps schedule delta approximator rounding blocks heads hidden dropout max-len lr seed"
    flags += " batch-size epochs patience eval-every device data data-dir out resume evaluate"
    flags += " recommend history"
    for flag in flags.split():
        assert f"--{flag} " in page + " "
    for word in (*SCHEDULES, "beauty", "toys", "ml-1m", "steam", "toy", "gru", "r_star"):
        assert word in page


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "arguments",
    [
        "--lr 10",
        "--lr 1000",
        "--delta 5",
        "--delta 0",
        "--steps 1",
        "--steps 1000",
        "--blocks 3",
        "--heads 4",
        "--heads 8",
        "--batch-size 1",
        "--batch-size 1000000",
        "--max-len 1",
        "--max-len 100000",
        "--dropout 0.99 --embedding-dropout 0.99",
        "--embedding-std 0",
        "--embedding-std 100",
        "--hidden 2 --heads 1",
        "--approximator gru",
        "--approximator gru --max-len 1 --precision bfloat16",
        "--rounding r_star --embedding-std 0",
        "--schedule cosine --steps 1",
        "--schedule sqrt --steps 1",
        "--schedule linear --steps 1",
        "--precision bfloat16",
        "--delta-is std",
    ],
)
def test_extreme_settings_give_finite_numbers_or_a_clear_stop(cli, arguments):
    status = cli("--data", "x.txt", *TINY, "--epochs", 1, *arguments.split())
    events = events_of("runs/x")
    if status == 1:
        assert "--lr 1000" in arguments
        assert cli.err.count("\n") == 1
        assert "finite" in cli.err
        assert [event["event"] for event in events] == ["start"]
    else:
        assert (status, cli.err) == (0, "")
        assert events[-1]["event"] == "test"
        assert all(math.isfinite(v) for e in events for v in e.values() if isinstance(v, float))
        assert cli("--data", "x.txt", "--recommend", 1) == 0


@pytest.mark.parametrize(
    "users",
    [
        ["1 2 3 4"],  # one sample, of a history of length 1
        ["1 1 1 1"],  # one item
        ["1 2 3 4"] * 30,  # all alike
        ["1 2 3"] * 5 + ["4 4 4 4"],
        ["100000 1 2 3"],
        [" ".join(map(str, [*range(1, 50)] * 60))],  # 2,940 items
    ],
    ids=lambda users: f"{len(users)} of {users[-1][:12]}",
)
def test_extreme_data_give_finite_numbers(cli, users):
    Path("x.txt").write_text("\n".join(users))
    cli.train("--batch-size", 256, epochs=1)
    assert all(0 <= events_of("runs/x")[-1][metric] <= 1 for metric in prepare_data.METRICS)
    assert cli("--data", "x.txt", "--recommend", len(users)) == 0
    assert cli("--data", "x.txt", "--evaluate") == 0


# ------------------------------------------------------------------------------------------- GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
def test_gpu_computes_in_bfloat16_and_comes_close_to_the_cpu():
    """Without noise, of which a GPU draws other: delta = 0, and no dropout. 3 %: bfloat16."""
    history, target = padded(*HISTORIES), torch.tensor([9, 10, 3, 11])
    model = model_of(hidden=32, delta=0.0)
    want = model(history, target).item()
    model.config.precision = "auto"
    model.cuda()
    assert model.bfloat16
    assert model(history.cuda(), target.cuda()).item() == pytest.approx(want, rel=0.03)


@needs_gpu
@pytest.mark.parametrize("approximator", PLAIN)
def test_gpu_trains_evaluates_and_recommends(cli, approximator):
    cli.train("--device", "cuda", "--approximator", approximator)
    assert "cuda" in cli.out
    for device in ("cuda", "cpu"):
        assert cli("--data", "x.txt", "--evaluate", "--device", device) == 0
        assert cli("--data", "x.txt", "--recommend", 1, "--device", device) == 0


# =================================================================================================
# prepare_data.py
# =================================================================================================


# ------------------------------------------------------------------------------- the data format


def plain_reader(data):
    """The data format read byte by byte: [(line, ids)], or None where it is broken."""
    lines = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    users = [
        [word for word in line.replace(b"\t", b" ").split(b" ") if word]
        for line in (lines[:-1] if lines[-1] == b"" else lines)
    ]
    words = [word for user in users for word in user]
    if not words or any(set(word) - set(b"0123456789") for word in words):
        return None
    digits = [word.lstrip(b"0").decode() for word in words]
    if any(not 1 <= len(word) <= 7 for word in digits):
        return None
    ids = set(map(int, digits))
    if max(ids) > max(100_000, 100 * len(ids)) or max(map(len, users)) < 3:
        return None
    return [(line, [int(word) for word in user]) for line, user in enumerate(users, 1)]


def check_against_plain_reader(path, data):
    path.write_bytes(data)
    users = plain_reader(data)
    if users is None:
        with pytest.raises(ValueError) as caught:
            prepare_data.load_sequences(path)
        assert str(caught.value).startswith(f"{path}:")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(str(path)) + 200
        return
    sequences = prepare_data.load_sequences(path)
    kept = [(line, items) for line, items in users if len(items) >= 3]
    assert sequences.lines.tolist() == [line for line, _ in kept]
    assert sequences.n_users == len(kept)
    assert sequences.skipped == len(users) - len(kept)
    assert sequences.n_items == max(item for _, items in users for item in items)
    bounds = itertools.pairwise(sequences.offsets.tolist())
    assert [sequences.items[a:b].tolist() for a, b in bounds] == [items for _, items in kept]
    assert sequences.items.dtype == sequences.offsets.dtype == sequences.lines.dtype == np.int64


SEQUENCE_FILES = [
    b"1 2 3\n",
    b"1 2 3",
    b"1 2 3\r\n4 5 6 7\r\n",
    b"\xef\xbb\xbf1\t2   3 \n 4 5 6\n",
    b"7 7 7\n\n1 2\n\n\n3 2 1\n\n",
    b"1 2 3\n3 2 1 100000 5",
    b"1 2 3\n ",
    b"000000000000000000000000000000012 2 3\n",
    " ".join(map(str, range(1, 1200))).encode() + b" 110000\n",
]
NOT_SEQUENCES = [
    b"",
    b"\xef\xbb\xbf",
    b" \n\t\r\n",
    b"1 2\n3 4\n5\n",
    b"1\n",
    b"1 2 3\n1 two 3\n",
    b"1 2 3\n1 -2 3\n",
    b"1 2 3\n1 0 3\n",
    b"1 2 3\n1 +2 3\n",
    b"1 2 3\n1 2.0 3\n",
    b"1,2,3\n",
    b"1 2 3\r4 5 6\r",
    b"1 2 3\x0b4\n",
    b"1 2 3\x00\n",
    "1 2 3\n1 ٢ 3\n".encode(),
    "1 2 3".encode("utf-16"),
    b"1 2 3\n1 2 2147483649\n",
    b"1 2 3\n1 2 9223372036854775808\n",
    b"1 2 3\n1 2 18446744073709551617\n",
    b"1 2 3\n1 2 " + b"9" * 30 + b"\n",
    b"1 2 3\n1 2 10000000\n",
    b"1 2 3\n1 2 100001\n",
]


@pytest.mark.parametrize("data", SEQUENCE_FILES + NOT_SEQUENCES)
def test_sequence_file_is_read_as_a_plain_reader_reads_it(tmp_path, data):
    assert (plain_reader(data) is not None) == (data in SEQUENCE_FILES)
    check_against_plain_reader(tmp_path / "x.txt", data)


@property_test
@given(data=mutated(SEQUENCE_FILES + NOT_SEQUENCES))
def test_mutated_sequence_file_is_read_right_or_refused(tmp_path, data):
    check_against_plain_reader(tmp_path / "x.txt", data)


@property_test
@given(users=st.lists(st.lists(st.integers(1, 500), max_size=9), min_size=1, max_size=20))
def test_any_sequences_survive_being_written_and_read(tmp_path, users):
    data = "".join(" ".join(map(str, user)) + "\n" for user in users).encode()
    check_against_plain_reader(tmp_path / "x.txt", data)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"1 2 3\n\n4 x 5\n", 3),
        (b"1 2 3\r\n4 5 0\r\n", 2),
        (b"1 2 3\n4 5 100001\n1 1 1", 2),
        (b"1 2 3\n4 5 6\n7 8 10000000", 3),
        (b"1 2 3\n4 5\r6\n7 8 9\n", 2),
    ],
)
def test_broken_sequence_file_is_refused_with_its_line(tmp_path, data, line):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.txt:{line}: "):
        prepare_data.load_sequences(tmp_path / "x.txt")


def test_limits_of_the_largest_id(tmp_path):
    """1 in 100 ids must be used from 100,000 on, and 9,999,999 is the last."""
    path = tmp_path / "x.txt"
    many = " ".join(map(str, range(1, 101_000)))
    for largest, right in ((9_999_999, True), (10_000_000, False), (1 << 64, False)):
        path.write_text(f"1 2 3\n{many} {largest}\n")
        if right:
            assert prepare_data.load_sequences(path).n_items == largest
        else:
            with pytest.raises(ValueError, match=rf"x\.txt:2: '{largest}' is not an item id"):
                prepare_data.load_sequences(path)


def test_very_long_lines_of_a_sequence_file(tmp_path):
    path = tmp_path / "x.txt"
    check_against_plain_reader(path, b"1 2 3\n" + b"12 345 " * 50_000 + b"\n3 2 1")  # 100,000 items
    path.write_bytes(b"17 " * 3_333_334)  # ten million characters
    sequences = prepare_data.load_sequences(path)
    assert sequences.offsets.tolist() == [0, 3_333_334]
    assert set(sequences.items.tolist()) == {17}
    for data in (b"1" * 10_000_000, b"1 2 3 " + b"x" * 10_000_000, b"-" + b"7 " * 5_000_000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.txt:1: ") as caught:
            prepare_data.load_sequences(path)
        assert len(str(caught.value)) < 300


def test_sequence_file_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        prepare_data.load_sequences(tmp_path / "x.txt")
    with pytest.raises(OSError):
        prepare_data.load_sequences(tmp_path)


def test_names_are_read_by_line_and_only_from_utf8(tmp_path):
    path = tmp_path / "x.items.txt"
    path.write_bytes("\ufeffÄ b\r\n\n c \x85\u2028d\n".encode())
    assert prepare_data.load_names(path) == ["Ä b", "", " c \x85\u2028d"]
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"x\.items\.txt.*UTF-8"):
        prepare_data.load_names(path)


def test_tables_of_the_paper_are_complete_and_coherent():
    assert set(prepare_data.TABLE_1) == set(prepare_data.TABLE_2) == set(prepare_data.DATASETS)
    for name, (sequences, items, actions) in prepare_data.TABLE_1.items():
        assert actions >= 5 * max(sequences, items), name  # a 5-core
    for row in prepare_data.TABLE_2.values():
        assert list(row) == ["HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20"]
        values = list(row.values())
        for k in (3, 6):
            assert values[k - 3 : k] == sorted(values[k - 3 : k])
        assert all(ndcg < hit_rate for hit_rate, ndcg in zip(values[:3], values[3:]))


# ---------------------------------------------------------------------------------- the toy data


def test_toy_users_walk_around_the_ring_in_one_direction(tmp_path, capsys):
    path = prepare_data.prepare("toy", tmp_path)
    sequences = prepare_data.load_sequences(path)
    assert sequences.n_users == prepare_data.TOY_USERS
    assert sequences.n_items == prepare_data.TOY_ITEMS
    assert [" ".join(map(str, user)) for user in prepare_data.make_toy()] == (
        path.read_text().splitlines()
    )
    names = prepare_data.load_names(tmp_path / "toy.items.txt")
    place = [int(re.search(r"\d+", name)[0]) for name in names]
    assert sorted(place) == list(range(prepare_data.TOY_ITEMS))
    assert place != sorted(place)  # the ids tell nothing of the ring
    clockwise, strides = 0, collections.Counter()
    for user in prepare_data.make_toy():
        places = [place[item - 1] for item in user]
        forward = [(b - a) % prepare_data.TOY_ITEMS for a, b in itertools.pairwise(places)]
        backward = [prepare_data.TOY_ITEMS - step for step in forward]
        assert (max(forward) <= prepare_data.TOY_STRIDE) != (
            max(backward) <= prepare_data.TOY_STRIDE
        )
        clockwise += max(forward) <= prepare_data.TOY_STRIDE
        strides.update(min(forward, backward, key=max))
        assert prepare_data.TOY_SHORTEST <= len(user) <= prepare_data.TOY_LONGEST
    starts = {user[0] for user in prepare_data.make_toy()}
    assert len(starts) > 0.9 * prepare_data.TOY_ITEMS
    assert abs(clockwise - prepare_data.TOY_USERS / 2) < 3 * math.sqrt(prepare_data.TOY_USERS)
    weights = [prepare_data.TOY_DECAY**j for j in range(1, prepare_data.TOY_STRIDE + 1)]
    for j, weight in enumerate(weights, 1):
        share = weight / sum(weights)
        spread = math.sqrt(share * (1 - share) / strides.total())
        assert abs(strides[j] / strides.total() - share) < 5 * spread
    assert "200 items" in capsys.readouterr().out or prepare_data.TOY_ITEMS != 200


def test_toy_ceiling_is_what_the_best_recommender_reaches():
    """Monte Carlo: rank the strides by their probability and look up the one that comes."""
    draw = random.Random(1)
    strides = range(1, prepare_data.TOY_STRIDE + 1)
    weights = [prepare_data.TOY_DECAY**j for j in strides]
    ranking = sorted(strides, key=lambda j: -weights[j - 1])
    rank = {stride: place for place, stride in enumerate(ranking, 1)}
    samples = 200_000
    ranks = collections.Counter(rank[j] for j in draw.choices(strides, weights, k=samples))
    ceiling = prepare_data.toy_ceiling()
    assert list(ceiling) == list(prepare_data.METRICS)
    for k in (5, 10, 20):
        hits = sum(count for place, count in ranks.items() if place <= k)
        gain = sum(count / math.log2(place + 1) for place, count in ranks.items() if place <= k)
        assert ceiling[f"HR@{k}"] == pytest.approx(hits / samples, abs=5 / math.sqrt(samples))
        assert ceiling[f"NDCG@{k}"] == pytest.approx(gain / samples, abs=5 / math.sqrt(samples))


# --------------------------------------------------------- what prepare makes of a list of actions


def plain_prepare(actions, core=1, unique=False):
    """{user: items}, in order, of (user, item, time) actions; the K-core one by one."""
    order = dict.fromkeys(user for user, _, _ in actions)  # as the raw file first names them
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
            result[user] = list(dict.fromkeys(sequence)) if unique else sequence
    return result


def prepared(folder, name):
    """{user: items} as the three files tell it, names in place of numbers."""
    items, users = (
        prepare_data.load_names(folder / f"{name}.{kind}.txt") for kind in ("items", "users")
    )
    lines = (folder / f"{name}.txt").read_text().splitlines()
    assert len(users) == len(set(users)) == len(lines)
    assert len(items) == len(set(items))
    numbers = [[int(number) for number in line.split()] for line in lines]
    assert {number for line in numbers for number in line} == set(range(1, len(items) + 1))
    return {user: [items[n - 1] for n in line] for user, line in zip(users, numbers)}


def check_prepared(folder, name, raw, actions, core=None, unique=False):
    """Prepare and compare, order of the users included; too little left must be an error."""
    want = plain_prepare(actions, core or 1, unique)
    if max(map(len, want.values()), default=0) < 3:
        with pytest.raises(ValueError, match="no user"):
            prepare_data.prepare(name, folder, raw, core)
        return
    prepare_data.prepare(name, folder, raw, core)
    assert list(prepared(folder, name).items()) == list(want.items())
    left = {item for items in want.values() for item in items}
    in_order = dict.fromkeys(item for _, item, _ in actions if item in left)
    assert prepare_data.load_names(folder / f"{name}.items.txt") == list(in_order)


ACTIONS = [  # a 2-core is not the whole of it: z goes, then w, then everything of v
    ("u", "a", 3),
    ("v", "w", 1),
    ("v", "z", 1),
    ("u", "b", 3),
    ("w", "b", 9),
    ("u", "a", 1),
    ("w", "a", 9),
    ("u", "a", 3),
    ("w", "b", 2),
]


@property_test
@given(
    actions=st.lists(
        st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdefg"), st.integers(0, 5)),
        min_size=1,
        max_size=60,
    ),
    core=st.integers(1, 5),
)
def test_core_order_and_numbers_against_brute_force(tmp_path, actions, core):
    raw = tmp_path / "log.csv"
    raw.write_text("".join(f"{user},{item},{when}\n" for user, item, when in actions))
    check_prepared(tmp_path, "own", raw, actions, core)


def test_without_core_an_own_log_is_kept_whole(tmp_path):
    raw = tmp_path / "log.csv"
    raw.write_text("".join(f"{user},{item},{when}\n" for user, item, when in ACTIONS))
    check_prepared(tmp_path, "own", raw, ACTIONS)
    assert prepared(tmp_path, "own") == {
        "u": ["a", "a", "b", "a"],
        "v": ["w", "z"],
        "w": ["b", "b", "a"],
    }


# ------------------------------------------------------------------------------- the raw formats


def five_core():
    """Random (user, item, day) actions, several of which leave with the 5-core."""
    draw = random.Random(5)
    users, items = [f"U{i}" for i in range(40)], [f"I{i}" for i in range(30)]
    return [
        (draw.choice(users[: draw.randint(1, 40)]), draw.choice(items[: draw.randint(1, 30)]), d)
        for d in (draw.randint(0, 40) for _ in range(500))
    ]


def amazon_file(actions):
    return "".join(
        json.dumps({"reviewerName": 'é \\ "x"', "reviewerID": u, "asin": i, "unixReviewTime": t})
        + "\n"
        for u, i, t in actions
    ).encode()


def iso_day(day):
    return f"2017-{day // 28 + 1:02}-{day % 28 + 1:02}"


def steam_file(actions):
    """As Python 2 printed its dictionaries: u'...', either quote, escapes."""
    texts = ["'username': u'nobody'", "it's \"fun\", 'date': u'2001-01-01'}", "a\\b\n☠", ""]
    lines = []
    for number, (user, item, day) in enumerate(actions):
        text = ascii(texts[number % 4])
        fields = [
            f"u'text': u{text}",
            f"u'username': u{user!a}",
            f"'product_id': '{item}'",
            f"u'date': u'{iso_day(day)}'",
            "u'hours': -1.5",
            "u'early_access': False",
            "u'compensation': None",
        ]
        lines.append("{" + ", ".join(fields[number % 7 :] + fields[: number % 7]) + "}\n")
    return "".join(lines).encode("ascii")


def movielens_zip(path, ratings, movies, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("../../outside.txt", "a name that climbs out")
        archive.writestr("ml-1m/movies.dat", movies)
        archive.writestr("ml-1m/ratings.dat", ratings)


@pytest.mark.parametrize("packed", [gzip.compress, bytes])
@pytest.mark.parametrize("name", ["beauty", "toys"])
def test_amazon(tmp_path, packed, name, capsys):
    actions = five_core()
    (tmp_path / "raw").write_bytes(packed(amazon_file(actions)))
    check_prepared(tmp_path, name, tmp_path / "raw", actions, core=5)
    assert "Table 1" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [gzip.compress, bytes])
def test_steam(tmp_path, packed, capsys):
    actions = [(f"{user} 'x' \"☠\"", item, day) for user, item, day in five_core()]
    (tmp_path / "raw").write_bytes(packed(steam_file(actions)))
    check_prepared(tmp_path, "steam", tmp_path / "raw", actions, core=5, unique=True)
    before = sum(map(len, plain_prepare(actions, 5).values()))
    after = sum(map(len, plain_prepare(actions, 5, unique=True).values()))
    out = capsys.readouterr().out
    assert before > after
    assert f"{before:,} actions, {after:,} without repeated" in out
    assert f"{after - 3_485_022:+,}" in out  # Table 1


def test_movielens_zip_and_ratings_file_with_and_without_titles(tmp_path, capsys):
    numbers = [(user[1:], item[1:], time) for user, item, time in five_core()]
    ratings = "".join(f"{u}::{i}::{t % 5 + 1}::{t}\n" for u, i, t in numbers)
    movies = "".join(f"{i}::Amélie :: part {i} (2001)::Drama|War\r\n" for i in range(1, 30))
    title = {str(i): f"Amélie :: part {i} (2001)" for i in range(1, 30)}
    (tmp_path / "in").mkdir()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        movielens_zip(tmp_path / "in" / "x.zip", ratings, movies.encode("latin-1"), method)
        actions = [(user, title.get(item, item), time) for user, item, time in numbers]
        check_prepared(tmp_path, "ml-1m", tmp_path / "in" / "x.zip", actions, core=5)
    (tmp_path / "in" / "ratings.dat").write_text(ratings)
    check_prepared(tmp_path, "ml-1m", tmp_path / "in" / "ratings.dat", numbers, core=5)
    (tmp_path / "in" / "movies.dat").write_bytes(movies.encode("latin-1"))
    check_prepared(tmp_path, "ml-1m", tmp_path / "in" / "ratings.dat", actions, core=5)
    assert not list(tmp_path.parent.glob("outside*")) + list(tmp_path.rglob("outside*"))


@property_test
@given(
    review=st.fixed_dictionaries(
        {"username": st.text(), "product_id": st.text(), "date": st.dates().map(str)},
        optional={
            "text": st.text("'\"\\{}:, u'username'\n☠x"),
            "hours": st.floats(allow_nan=False, allow_infinity=False),
            "found_funny": st.integers(),
            "early_access": st.booleans(),
            "compensation": st.none(),
            "it's": st.lists(st.text(max_size=3), max_size=2),
        },
    ),
    shuffle=st.randoms(use_true_random=False),
    unicode_prefix=st.booleans(),
)
def test_steam_line_is_read_as_python_reads_it(review, shuffle, unicode_prefix):
    keys = list(review)
    shuffle.shuffle(keys)
    line = ascii({key: review[key] for key in keys}) + "\n"
    if unicode_prefix:  # as in the real file
        line = re.sub(r"(?<=[{ ])(?='[a-z_]+': )", "u", line)
    with contextlib.suppress(SyntaxError):  # a text may have got a prefix inside
        want = ast.literal_eval(line)
        assert prepare_data.parse_steam(line)[:2] == (want["username"], want["product_id"])


HOSTILE = [
    "__import__('os').system('touch {0}')",
    "{{'username': __import__('os').system('touch {0}'), 'product_id': '1', 'date': '2017-01-01'}}",
    "{{'username': 'a', 'product_id': '1', 'date': '2017-01-01', 'x': open('{0}', 'w')}}",
    "{{'username': 'a' if open('{0}', 'w') else 'b', 'product_id': '1', 'date': '2017-01-01'}}",
    "{{'username': 'a', 'product_id': '1', 'date': '2017-01-01'}} or open('{0}', 'w')",
    "{{'username': 'a', 'product_id': '1', 'date': '2017-01-01', 'x': os}}",
    "{{'username': 'a', 'product_id': '1'}}",
    "{{'username': 'a', 'product_id': '1', 'date': '2017-01-01', 'username': None}}",
    "{{" + "'username': 'a', " * 60 + "x",
    "{{'username': 'a', 'product_id': 1, 'date': '2017-01-01'}}",
    "{{'username': b'a', 'product_id': '1', 'date': '2017-01-01'}}",
    "{{'username': 'a', 'product_id': '1', 'date': '2017-13-01'}}",
    "{{'username': 'a', 'product_id': '1', 'date': None}}",
    "{{'username': 'a', 'product_id': '1', 'date': '2017-01-01'",
    "{{'username': '\\x', 'product_id': '1', 'date': '2017-01-01'}}",
    "['username', 'product_id', 'date']",
    "{{[]: 1}}",
    "9" * 5000,
    "[" * 5000,
    "-" * 100_000 + "1",
    "{{" * 3000,
    "",
    "\x00",
    "{{'username': '" + "\\\\'" * 100_000,
]


@pytest.mark.parametrize("line", HOSTILE, ids=lambda line: line[:30])
def test_steam_line_that_is_code_or_broken_is_refused_and_not_run(tmp_path, line):
    good = "{'username': 'a', 'product_id': '1', 'date': '2017-01-01'}\n"
    line = line.format(tmp_path / "ran")
    (tmp_path / "raw").write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=r"raw:2: not a line of steam_reviews"):
        prepare_data.prepare("steam", tmp_path / "data", tmp_path / "raw")
    assert os.listdir(tmp_path) == ["raw"]


def test_steam_names_given_twice_or_in_other_quotes_are_read_as_python_reads_them():
    for line in (
        "{'username': 'a', 'product_id': '1', 'date': '2017-01-01', 'username': 'b'}",
        "{'username': 'a', 'product_id': '1', 'date': '2017-01-01', \"username\": 'b'}",
        "{'username': 'a', 'product_id': '1', 'date': '2017-01-01', 'user\\x6eame': 'b'}",
        "{'username': 'a' 'b', 'product_id': '1', 'date': '2017-01-01'}",
        "{'x': {'username': 'z'}, 'username': r'\\b', 'product_id': '1', 'date': '2017-01-01'}",
    ):
        want = ast.literal_eval(line)
        assert prepare_data.parse_steam(line)[0] == want["username"]


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "{}",
        "null",
        '{"reviewerID": "a", "asin": "b"}',
        '{"reviewerID": 1, "asin": "b", "unixReviewTime": 1}',
        '{"reviewerID": "a", "asin": null, "unixReviewTime": 1}',
        '{"reviewerID": "a", "asin": "b", "unixReviewTime": "soon"}',
        '{"reviewerID": "a", "asin": "b", "unixReviewTime": NaN}',
        '{"reviewerID": "a", "asin": "b", "unixReviewTime": -Infinity}',
        '{"reviewerID": "a", "asin": "b", "unixReviewTime": 1' + "0" * 400 + "}",
        '{"reviewerID": "a", "asin": "b", "unixReviewTime": ' + "1" * 5000 + "}",
        '{"reviewerID": "a", "asin": "b", "unixReviewTime": 1',
        "[" * 100_000,
        "<!DOCTYPE html>",
        "",
    ],
    ids=lambda line: line[-30:],
)
def test_broken_amazon_line_is_refused(tmp_path, line):
    good = '{"reviewerID": "a", "asin": "b", "unixReviewTime": 1}\n'
    (tmp_path / "raw").write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=r"raw:2: not a line of reviews_Beauty"):
        prepare_data.prepare("beauty", tmp_path / "data", tmp_path / "raw")
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize(
    "line",
    [
        "1::2::3",
        "a::2::3::4",
        "1::2::3::-4",
        "1::2::3::4::5",
        "",
        "1::٢::3::4",
        "1::2::3::" + "9" * 400,
    ],
)
def test_broken_movielens_line_is_refused(tmp_path, line):
    (tmp_path / "ratings.dat").write_text(f"1::2::3::4\n{line}\n")
    with pytest.raises(ValueError, match=r"ratings\.dat:2: not a line of ml-1m"):
        prepare_data.prepare("ml-1m", tmp_path / "data", tmp_path / "ratings.dat")
    (tmp_path / "ratings.dat").write_text("1::2::3::4\n" * 5)
    (tmp_path / "movies.dat").write_text("1::Toy Story::Drama\n2:Heat\n")
    with pytest.raises(ValueError, match=r"movies\.dat:2: not MovieID"):
        prepare_data.prepare("ml-1m", tmp_path / "data", tmp_path / "ratings.dat")
    assert sorted(os.listdir(tmp_path)) == ["movies.dat", "ratings.dat"]


# -------------------------------------------------------------------------------- hostile archives


def test_zip_that_is_encrypted_or_lacks_a_member_or_is_not_deflated(tmp_path):
    ratings, movies = "1::2::3::4\n" * 5, "2::Heat::Drama\n"
    archive = tmp_path / "x.zip"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        movielens_zip(archive, ratings, movies, method)
        with pytest.raises(ValueError, match=r"x\.zip: "):
            prepare_data.prepare("ml-1m", tmp_path / "data", archive)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("ratings.dat", ratings)
    with pytest.raises(ValueError, match=r"x\.zip: .*ml-1m/ratings\.dat"):
        prepare_data.prepare("ml-1m", tmp_path / "data", archive)
    movielens_zip(archive, ratings, movies)
    data = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for at in re.finditer(re.escape(signature), bytes(data)):
            data[at.start() + flags] |= 1  # "encrypted"
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.zip: .*encrypted"):
        prepare_data.prepare("ml-1m", tmp_path / "data", archive)
    assert os.listdir(tmp_path) == ["x.zip"]


def test_bombs_stop_at_the_stated_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_LINE", 1000)
    monkeypatch.setattr(prepare_data, "MAX_UNPACKED", 50_000)
    line = amazon_file([("u", "i", 1)])
    for data, where in (
        (line + b"0" * 1_000_000, 2),
        (line + b" " * 1001, 2),
        (line * 10_000, 50_000 // len(line) + 1),
    ):
        (tmp_path / "bomb").write_bytes(gzip.compress(data))
        with pytest.raises(ValueError, match=rf"bomb:{where}: more than 1,000 bytes .* 50,000"):
            prepare_data.prepare("beauty", tmp_path / "data", tmp_path / "bomb")
    movielens_zip(tmp_path / "bomb", b"1::2::3::4\n" * 10_000, b"")
    with pytest.raises(ValueError, match="bomb:4546: more than"):
        prepare_data.prepare("ml-1m", tmp_path / "data", tmp_path / "bomb")


def test_bomb_without_a_newline_is_not_held_in_memory(tmp_path):
    (tmp_path / "bomb").write_bytes(gzip.compress(bytes(10_000_000)) * 30)
    tracemalloc.start()
    with pytest.raises(ValueError, match="bomb:1: more than"):
        prepare_data.prepare("own", tmp_path / "data", tmp_path / "bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * prepare_data.MAX_LINE


def test_gzip_that_is_cut_off_or_has_a_wrong_checksum(tmp_path):
    data = gzip.compress(amazon_file(five_core()))
    for broken in (data[:-1], data[:-8], data[: len(data) // 2], data[:10], data[:3]):
        (tmp_path / "x.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.gz: damaged"):
            prepare_data.prepare("beauty", tmp_path / "data", tmp_path / "x.gz")
    (tmp_path / "x.gz").write_bytes(data[:-8] + bytes(4) + data[-4:])
    with pytest.raises(ValueError, match=r"x\.gz: damaged.*CRC"):
        prepare_data.prepare("beauty", tmp_path / "data", tmp_path / "x.gz")
    assert os.listdir(tmp_path) == ["x.gz"]


@functools.cache
def archives():
    """name -> (a raw file, what it prepares to)."""
    actions = [("1", "2", 3), ("1", "3", 4), ("1", "4", 5)] * 5
    ratings = "".join(f"{u}::{i}::1::{t}\n" for u, i, t in actions)
    packed = io.BytesIO()
    movielens_zip(packed, ratings, "2::A::X\n3::B::X\n4::C::X\n")
    titles = {"1": ["A"] * 5 + ["B"] * 5 + ["C"] * 5}
    numbers = {"1": ["2"] * 5 + ["3"] * 5 + ["4"] * 5}
    return {
        "ml-1m": (packed.getvalue(), titles),
        "beauty": (gzip.compress(amazon_file(actions)), numbers),
    }


@property_test
@given(st.data())
def test_mutated_archive_is_read_right_or_refused(tmp_path, data):
    name = data.draw(st.sampled_from(["ml-1m", "beauty"]))
    content, want = archives()[name]
    (tmp_path / "raw").write_bytes(data.draw(mutated([content])))
    with contextlib.suppress(ValueError, OSError):
        prepare_data.prepare(name, tmp_path, tmp_path / "raw")
        assert prepared(tmp_path, name) == want


# ---------------------------------------------------------------------------------- own logs

HOURS = [("u 1", "a", 5), ("u 1", "b,c", 3), ('u"2', "a", 1), ("u 1", "d", 3), ('u"2', "ü", 2)] * 3


def log_text(header, time_of, delimiter=",", end="\n", order=(0, 1, 2), extra=False):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    rows = [(user, item, time_of(hour)) for user, item, hour in HOURS]
    if header:
        rows.insert(0, header)
    for number, row in enumerate(rows):
        fields = [row[column] for column in order]
        writer.writerow(["x\ny" if number else "note", *fields] if extra else fields)
    return out.getvalue()


def iso_hour(hour, zone=""):
    return f"2020-02-28T{hour:02}:30:00{zone}"


SPRING = {1: "01:00", 2: "01:30", 3: "02:30", 5: "03:00"}  # local clocks jumped from 2:00 to 3:00
RECBOLE = ("user_id:token", "item_id:token", "timestamp:float")
GOOD_LOGS = {
    "by position": log_text(None, str),
    "by header": log_text(("timestamp", "item", "user")[::-1], str, order=(2, 0, 1)),
    "other names": log_text(("UserId", "product-id", "Time"), str, order=(1, 2, 0), extra=True),
    "RecBole": log_text(RECBOLE, lambda hour: f"{hour}.0", "\t"),
    "RecBole, other order": log_text(RECBOLE, lambda hour: f"{hour}e9", "\t", order=(2, 1, 0)),
    "CRLF": log_text(("user", "item", "date"), str, end="\r\n"),
    "no last newline": log_text(None, str).rstrip("\n"),
    "byte-order mark": "\ufeff" + log_text(("user", "item", "timestamp"), str),
    "negative and fractional": log_text(None, lambda hour: f"{hour - 3.25}"),
    "ISO 8601": log_text(None, iso_hour),
    "ISO 8601 in UTC": log_text(None, lambda hour: iso_hour(hour, "+00:00")),
    "ISO 8601 in two zones": log_text(  # 05:30 in one is 01:30 in the other
        None, lambda hour: iso_hour(hour, "+02:00") if hour % 2 else iso_hour(hour - 1, "+01:00")
    ),
    "days": log_text(None, lambda hour: f"2020-02-{hour:02}"),
    "across a change to summer time": log_text(None, lambda hour: f"2021-03-28 {SPRING[hour]}"),
    "empty lines": "\n\n" + log_text(None, str).replace("\n", "\n\n"),
    "spaces": log_text(None, lambda hour: f" {hour} "),
}


@pytest.mark.parametrize("name", GOOD_LOGS)
def test_own_log(tmp_path, name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        for packed in (bytes, gzip.compress):
            (tmp_path / "log").write_bytes(packed(GOOD_LOGS[name].encode()))
            check_prepared(tmp_path, "own", tmp_path / "log", HOURS)
    time.tzset()


BAD_LOGS = [
    ("", "no user"),
    ("user,item,timestamp\n", "no user"),
    ("u,a,1\n", "no user"),
    ("u,a,1\nu,b\n", ":2: 2 columns"),
    ("u,a\nu,b\n", ":1: 2 columns"),
    ("u,a,4.0,1\nu,b,5.0,2\n", ":1: 4 columns instead of 3"),
    ("u,a,1\nu,b,2,3\n", ":2: 4 columns"),
    ("u;a;1\nu;b;2\n", ":1: 1 columns"),
    ("user,item,timestamp\nu,a,1\nuser,item,timestamp\n", ":3: .*timestamp"),
    ("user,item,rating\nu,a,1\n", ":1: a header needs"),
    ("user,item,date,time\nu,a,1,2\n", ":1: a header needs"),
    ("who,what,when\nu,a,1\n", ":1: .*when"),
    ("u,a,1\nu,b,\n", ":2: "),
    ("u,a,1\nu,,3\n", ":2: the user or the item is missing"),
    ("u,a,1\n ,b,3\n", ":2: the user or the item is missing"),
    ("u,a,1\nu,b,yesterday\n", ":2: .*yesterday"),
    ("u,a,1\nu,b,nan\n", ":2: .*nan"),
    ("u,a,1\nu,b,-inf\n", ":2: .*inf"),
    ("u,a,1\nu,b,1e999\n", ":2: .*1e999"),
    ("u,a,2020-01-01\nu,b,5\n", ":2: .*a number"),
    ("u,a,5\nu,b,2020-01-01\n", ":2: .*a date"),
    ("u,a,2020-01-01\nu,b,2020-01-01T00:00Z\n", ":2: .*with a time zone"),
    ("u,a,2020-02-30\n", ":1: "),
    ('u,a,1\n"u"x,b,2\n', ":2: "),
    ('u,a,1\n"u,b,2\nu,c,3\n', ":3: "),
    ("u,a,1\ru,b,2\r", ":1: "),
    (b"u,a,1\nu,\xff,2\n", ":2: not utf-8"),
    ("u,a,1\n".encode("utf-16"), ":1: not utf-8"),
    (b"PK\x03\x04\xff", ":1: "),
]


@pytest.mark.parametrize(("text", "message"), BAD_LOGS)
def test_broken_own_log_is_refused_with_its_line(tmp_path, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "log.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"log\.csv.*{message}") as caught:
        prepare_data.prepare("own", tmp_path / "data", tmp_path / "log.csv")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert os.listdir(tmp_path) == ["log.csv"]


def test_names_with_newlines_and_controls_stay_on_one_line(tmp_path):
    names = ["a\nb", "c\r\nd", "e\u2028f\x85g", "\x1b[31mred", "tab\there"]
    out = io.StringIO()
    csv.writer(out).writerows([(name, name, 1) for name in names for _ in range(3)])
    (tmp_path / "log.csv").write_text(out.getvalue(), encoding="utf-8", newline="")
    path = prepare_data.prepare("own", tmp_path, tmp_path / "log.csv")
    assert prepare_data.load_sequences(path).n_users == 5
    for kind in ("items", "users"):
        got = prepare_data.load_names(tmp_path / f"own.{kind}.txt")
        assert got == ["a b", "c  d", "e f g", " [31mred", "tab here"]
    pair = {"reviewerID": "\ud83d", "asin": "\ud83d\ude00", "unixReviewTime": 1}
    (tmp_path / "raw").write_text((json.dumps(pair) + "\n") * 5)
    prepare_data.prepare("beauty", tmp_path, tmp_path / "raw")  # half an emoji, a whole one
    assert prepared(tmp_path, "beauty") == {"?": ["\U0001f600"] * 5}


def test_own_log_with_a_very_long_field(tmp_path):
    long = "x" * 10_000_000
    (tmp_path / "log.csv").write_text(f'user,item,time,note\nu,a,1,"{long}"\nu,b,2,\nu,a,0,\n')
    prepare_data.prepare("own", tmp_path, tmp_path / "log.csv")
    assert prepared(tmp_path, "own") == {"u": ["a", "a", "b"]}
    (tmp_path / "log.csv").write_text(f"u,a,1\nu,b,2{long}{long}\n")
    with pytest.raises(ValueError, match=r"log\.csv:2: more than 16,777,216 bytes"):
        prepare_data.prepare("own", tmp_path, tmp_path / "log.csv")


def plain_log(data):
    """An own log by position or with the header user,item,timestamp; None where it is broken."""
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
        delimiter = "\t" if "\t" in text.split("\n")[0] else ","
        lines = io.StringIO(text, newline="\n")  # lines end at \n, as in csv's own files
        rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    except (UnicodeDecodeError, csv.Error):
        return None
    if rows and rows[0] == ["user", "item", "timestamp"]:
        rows = rows[1:]
    actions, zones = [], set()
    for row in rows:
        if len(row) != 3:
            return None
        user, item, when = (field.strip() for field in row[:3])
        try:
            value, zone = float(when), "number"
        except ValueError:
            try:
                moment = datetime.fromisoformat(when)
            except ValueError:
                return None
            zone = moment.tzinfo is None
            value = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        zones.add(zone)
        if not user or not item or not math.isfinite(value) or len(zones) > 1:
            return None
        actions.append((user, item, value))
    return actions


@property_test
@given(
    data=mutated(
        [
            b"user,item,timestamp\nu,a,3\nu,b,1\nv,a,2\nu,c,2\n",
            b'u,a,30\n"u",b,10\nv,"a",20\nu,c,20\n',
            b"u\ta\t2020-01-01\nu\tb\t2020-01-03\nv\ta\t2020-01-02\nu\tc\t2020-01-01",
            b"u,a,2020-01-01T10:00+01:00\nu,b,2020-01-01T09:30Z\nu,c,2020-01-01T00:00Z\n",
        ],
        splice=(b"\n", b"\r", b"\t", b'"', b",", b"1", b"e", b"\xff", b"\x00", b" ", b".5"),
    )
)
def test_mutated_own_log_is_read_right_or_refused(tmp_path, data):
    raw = tmp_path / "log"
    raw.write_bytes(data)
    actions = plain_log(data)
    # A header in the place of data is the one thing that the plain reader does not know.
    first = re.split("[\t,]", data.split(b"\n")[0].decode("utf-8", "replace"))
    with contextlib.suppress(ValueError):
        if prepare_data.header_columns(first) and first != ["user", "item", "timestamp"]:
            return
    if actions is None or max(map(len, plain_prepare(actions).values()), default=0) < 3:
        with pytest.raises(ValueError):
            prepare_data.prepare("own", tmp_path, raw)
        return
    try:
        prepare_data.prepare("own", tmp_path, raw)
    except ValueError as error:  # a header that lacks something
        assert "header" in str(error)
        return
    got = prepared(tmp_path, "own")
    want = plain_prepare(actions)
    clean = functools.partial(re.sub, r"[\x00-\x1f\x7f-\x9f]", " ")
    assert got == {clean(u): [clean(i) for i in items] for u, items in want.items()}


# ------------------------------------------------------------------------------------- download


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content, spoilt as server.script says (see `serve`)."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        how, content = server.how, server.content
        server.ranges.append(self.headers.get("Range"))
        if how == "redirect" and self.path != "/moved.gz":
            self.send_response(302)
            self.send_header("Location", "/moved.gz")
            self.end_headers()
            return
        if how in ("404", "503"):
            self.send_error(int(how))
            return
        if how == "html":
            content = b"<!DOCTYPE html><p>Please log in to the wireless network</p>" * 2000
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if how in ("no ranges", "html", "no ranges, cut"):
            start = 0
        elif start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        length = len(body) + {"too long": 1000, "too short": -1000}.get(how, 0)
        if how != "no length":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        sent = min(server.piece, len(body)) if how in ("cut", "no ranges, cut") else len(body)
        for at in range(0, sent, 50_000):
            if server.pause:
                time.sleep(server.pause)
            with contextlib.suppress(OSError):
                self.wfile.write(body[at : min(at + 50_000, sent)])
                self.wfile.flush()


@pytest.fixture
def serve(monkeypatch):
    """serve(content, how, piece, pause) -> the server; `url` is where it is."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(prepare_data, "PAUSE", 0)
    with contextlib.ExitStack() as stack:

        def start(content, how="", piece=0, pause=0):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            server.content, server.how, server.piece, server.pause = content, how, piece, pause
            server.ranges = []
            server.url = f"http://127.0.0.1:{server.server_port}/reviews.json.gz"
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            return server

        yield start


@functools.cache
def big_gzip():
    """About half a megabyte that no compression shortens, as lines of text."""
    draw = random.Random(2)
    return gzip.compress("".join(f"{draw.getrandbits(400):x}\n" for _ in range(10_000)).encode())


def raw_folder(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != ".lock"}


@pytest.mark.parametrize("how", ["", "no ranges", "no length", "redirect", "too long"])
def test_download(tmp_path, serve, how):
    server = serve(big_gzip(), how)
    path = prepare_data.download(server.url, tmp_path / "raw")
    assert raw_folder(tmp_path / "raw") == {path.name: big_gzip()}
    requests = len(server.ranges)
    assert prepare_data.download(server.url, tmp_path / "raw") == path  # it is there
    assert len(server.ranges) == requests


def test_download_cut_off_at_every_tenth_goes_on_where_it_stopped(tmp_path, serve):
    tenth = len(big_gzip()) // 10 + 1
    server = serve(big_gzip(), "cut", piece=tenth)
    path = prepare_data.download(server.url, tmp_path)
    assert path.read_bytes() == big_gzip()
    assert server.ranges == [f"bytes={tenth * i}-" for i in range(10)]


@pytest.mark.parametrize("tenth", range(11))
def test_download_goes_on_from_any_part(tmp_path, serve, tenth):
    have = len(big_gzip()) * tenth // 10
    for how in ("", "no ranges"):
        (tmp_path / "reviews.json.gz.part").write_bytes(big_gzip()[:have])
        path = prepare_data.download(serve(big_gzip(), how).url, tmp_path)
        assert raw_folder(tmp_path) == {path.name: big_gzip()}
        path.unlink()


@pytest.mark.parametrize("how", ["html", "404", "503", "no ranges, cut"])
def test_failed_download_keeps_the_good_part(tmp_path, serve, how):
    half = big_gzip()[: len(big_gzip()) // 2]
    (tmp_path / "reviews.json.gz.part").write_bytes(half)
    server = serve(big_gzip(), how, piece=1000)
    message = {"html": "something else", "no ranges, cut": "cut off"}.get(how, how)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        prepare_data.download(server.url, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(server.ranges) == 1
    assert raw_folder(tmp_path) == {"reviews.json.gz.part": half}


def test_html_in_place_of_a_file_leaves_nothing(tmp_path, serve):
    with pytest.raises(ValueError, match="DOCTYPE"):
        prepare_data.download(serve(big_gzip(), "html").url, tmp_path)
    assert not any(raw_folder(tmp_path).values())


def test_download_that_is_whole_but_wrong_is_set_aside(tmp_path, serve):
    content = bytearray(big_gzip())
    content[len(content) // 2] ^= 1
    server = serve(bytes(content))
    with pytest.raises(ValueError, match=r"set aside as .*reviews\.json\.gz\.bad"):
        prepare_data.download(server.url, tmp_path)
    assert raw_folder(tmp_path) == {"reviews.json.gz.bad": bytes(content)}
    server.content = big_gzip()[:-1]
    with pytest.raises(ValueError, match="set aside"):
        prepare_data.download(server.url, tmp_path)
    server.content = b""
    with pytest.raises(ValueError, match="empty"):
        prepare_data.download(server.url, tmp_path)
    server.content, server.how = big_gzip(), "too short"
    with pytest.raises(ValueError, match="set aside"):
        prepare_data.download(server.url, tmp_path)
    server.how = ""
    assert prepare_data.download(server.url, tmp_path).read_bytes() == big_gzip()


def test_download_checks_the_md5(tmp_path, serve):
    server = serve(big_gzip())
    with pytest.raises(ValueError, match="MD5 is not 0123"):
        prepare_data.download(server.url, tmp_path, md5="0123")
    assert list(raw_folder(tmp_path)) == ["reviews.json.gz.bad"]
    path = prepare_data.download(server.url, tmp_path, hashlib.md5(big_gzip()).hexdigest())
    assert path.read_bytes() == big_gzip()


def test_no_network_is_one_line_and_gives_up_in_time(tmp_path, serve, monkeypatch):
    server = serve(big_gzip())
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="refused"):
        prepare_data.download(server.url, tmp_path)
    assert prepare_data.TIMEOUT == 10
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.2)
    slow = serve(big_gzip(), pause=1)
    with pytest.raises(OSError, match="timed out"):
        prepare_data.download(slow.url, tmp_path)


def test_two_downloads_at_once_fetch_it_once(tmp_path, serve):
    server = serve(big_gzip(), pause=0.02)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(prepare_data.download(server.url, tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(server.ranges) == 1
    assert raw_folder(tmp_path) == {"reviews.json.gz": big_gzip()}


def start_download(url, folder, **options):
    """`prepare_data.py beauty` in a process of its own, with another URL for Beauty."""
    code = (
        "import dataclasses, sys, prepare_data as p;"
        f"p.DATASETS['beauty'] = dataclasses.replace(p.DATASETS['beauty'], url={url!r});"
        "sys.exit(p.main(['beauty']))"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "no_proxy": "*"}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for_more(part, size):
    """Wait until the file `part` is longer than size."""
    give_up = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > size):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_killed_download_goes_on_and_frees_the_lock(tmp_path, serve):
    server = serve(big_gzip(), pause=0.1)
    part = tmp_path / "data" / "raw" / "reviews.json.gz.part"
    kept = b""
    for _ in range(20 if THOROUGH else 2):
        process = start_download(server.url, tmp_path)
        wait_for_more(part, len(kept))
        process.kill()
        process.communicate()
        kept = part.read_bytes()
        assert kept == big_gzip()[: len(kept)]
        if len(kept) > len(big_gzip()) * 0.8:
            break
    server.pause = 0
    path = prepare_data.download(server.url, tmp_path / "data" / "raw")
    assert path.read_bytes() == big_gzip()
    assert server.ranges[-1] == f"bytes={len(kept)}-"


def test_ctrl_c_is_status_130_and_keeps_the_part(tmp_path, serve):
    server = serve(big_gzip(), pause=0.2)
    part = tmp_path / "data" / "raw" / "reviews.json.gz.part"
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not so in background
    process = start_download(server.url, tmp_path, preexec_fn=listen)
    wait_for_more(part, 0)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert part.read_bytes() == big_gzip()[: part.stat().st_size]


def limit_file_size(limit):
    """What a full disk does: writing a file fails after so many bytes (a preexec_fn)."""
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))


def test_full_disk_while_downloading_is_one_line_and_keeps_the_part(tmp_path, serve):
    server = serve(big_gzip())
    process = start_download(server.url, tmp_path, preexec_fn=limit_file_size(100_000))
    _, error = process.communicate(timeout=20)
    assert process.returncode == 2
    assert error.startswith(f"downloading {server.url}\nprepare_data.py: error: ")
    assert error.count("\n") == 2
    part = tmp_path / "data" / "raw" / "reviews.json.gz.part"
    assert part.read_bytes() == big_gzip()[:100_000]


# --------------------------------------------------------------------------- the command, and kills


def run_script(*arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_command_prepares_and_reports(tmp_path):
    done = run_script("toy", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{prepare_data.TOY_USERS:,} sequences" in done.stdout
    assert sorted(os.listdir(tmp_path / "data")) == ["toy.items.txt", "toy.txt", "toy.users.txt"]


def test_command_downloads_prepares_and_compares_with_table_1(tmp_path, serve, monkeypatch, capsys):
    actions = five_core()
    server = serve(gzip.compress(amazon_file(actions)))
    fake = prepare_data.Dataset(server.url, prepare_data.parse_amazon)
    monkeypatch.setitem(prepare_data.DATASETS, "beauty", fake)
    assert prepare_data.main(["beauty", "--data-dir", str(tmp_path)]) == 0
    want = plain_prepare(actions, 5)
    assert prepared(tmp_path, "beauty") == want
    counts = len(want), len({i for s in want.values() for i in s}), sum(map(len, want.values()))
    out = capsys.readouterr().out
    assert "{} sequences, {} items, {} actions".format(*counts) in out
    assert "off by {:+,}, {:+,}, {:+,}".format(*np.subtract(counts, (22363, 12101, 198502))) in out
    monkeypatch.setitem(prepare_data.TABLE_1, "beauty", counts)
    assert prepare_data.main(["beauty", "--data-dir", str(tmp_path)]) == 0
    assert "actions: the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown dataset 'nothing'"),
        (["../x", "--raw", "log.csv"], "no name for a dataset"),
        (["x/y", "--raw", "log.csv"], "no name for a dataset"),
        (["..", "--raw", "log.csv"], "no name for a dataset"),
        ([".x", "--raw", "log.csv"], "no name for a dataset"),
        (["", "--raw", "log.csv"], "no name for a dataset"),
        (["x\n", "--raw", "log.csv"], "no name for a dataset"),
        (["beauty.items", "--raw", "log.csv"], "no name for a dataset"),
        (["own", "--raw", "missing.csv"], "missing.csv"),
        (["own", "--raw", "."], "directory"),
        (["own", "beauty", "--raw", "log.csv"], "--raw"),
        (["own", "--raw", "log.csv", "--core", "0"], "--core 0"),
        (["own", "--raw", "log.csv", "--core", "9"], "no user"),
        (["toy", "--raw", "log.csv"], "the toy data"),
        (["toy", "--core", "5"], "the toy data"),
        (["beauty", "--raw", "log.csv"], "log.csv:1: not a line of reviews_Beauty_5.json.gz"),
        (["ml-1m", "--raw", "log.csv"], "log.csv:1: not a line of ml-1m.zip"),
        (["steam", "--raw", "log.csv"], "log.csv:1: not a line of steam_reviews.json.gz"),
        (["own", "--raw", "log.csv", "--data-dir", "log.csv"], "log.csv"),
    ],
)
def test_wrong_command_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.csv").write_text("u,a,1\nu,b,2\nu,c,3\n")
    assert prepare_data.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare_data.py: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert os.listdir(tmp_path) == ["log.csv"]


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare_data.main(["--help"])
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    for word in (*prepare_data.DATASETS, "toy", "--raw", "--core", "--data-dir", "ISO 8601"):
        assert word in page


def many_actions(seed):
    draw = random.Random(seed)
    return "".join(f"u{draw.randrange(500)},i{draw.randrange(300)},{n}\n" for n in range(8000))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("own*.txt")}


def test_killed_preparation_leaves_old_or_new_files_whole(tmp_path):
    states = []
    for version in (0, 1):
        (tmp_path / f"{version}.csv").write_text(many_actions(version))
        started = time.monotonic()
        assert run_script("own", "--raw", f"{version}.csv", cwd=tmp_path).returncode == 0
        states.append(files(tmp_path / "data"))
        takes = time.monotonic() - started
    draw = random.Random(3)
    for attempt in range(30 if THOROUGH else 4):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "own", "--raw", f"{attempt % 2}.csv"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(0.5, 1.05) * takes)
        process.kill()
        process.wait()
        for name, content in files(tmp_path / "data").items():
            assert content in [state[name] for state in states]
        assert len(files(tmp_path / "data")) == 3
    assert run_script("own", "--raw", "1.csv", cwd=tmp_path).returncode == 0
    assert files(tmp_path / "data") == states[1]


def test_files_are_replaced_only_when_whole_and_the_sequences_last(tmp_path, monkeypatch):
    """Stop at each replacement in turn, which is where a kill could show."""
    (tmp_path / "log.csv").write_text(many_actions(0))
    replace, order = os.replace, []

    def stop_at(limit, source, target):
        if len(order) == limit:
            raise KeyboardInterrupt
        order.append(Path(target).name)
        replace(source, target)

    for limit in range(4):
        order.clear()
        monkeypatch.setattr(os, "replace", functools.partial(stop_at, limit))
        arguments = [
            "own",
            "--raw",
            str(tmp_path / "log.csv"),
            "--data-dir",
            str(tmp_path / str(limit)),
        ]
        assert prepare_data.main(arguments) == (0 if limit == 3 else 130)
        assert order == ["own.items.txt", "own.users.txt", "own.txt"][:limit]
        assert sorted(os.listdir(tmp_path / str(limit))) == sorted(order)


def test_two_preparations_at_once_end_with_whole_files(tmp_path):
    (tmp_path / "log.csv").write_text(many_actions(0))
    command = [sys.executable, str(SCRIPT), "own", "--raw", "log.csv", "--data-dir"]
    subprocess.run([*command, "alone"], cwd=tmp_path, check=True, capture_output=True)
    processes = [
        subprocess.Popen([*command, "together"], cwd=tmp_path, stdout=-3, stderr=-3)
        for _ in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert len(os.listdir(tmp_path / "together")) == 3


def test_full_disk_is_one_line_and_leaves_the_old_files(tmp_path):
    """The limits: the names do not fit; they do, the sequences don't."""
    (tmp_path / "log.csv").write_text(many_actions(0))
    assert run_script("own", "--raw", "log.csv", cwd=tmp_path).returncode == 0
    before = files(tmp_path / "data")
    (tmp_path / "log.csv").write_text(many_actions(1))
    for limit in (1000, 10_000):
        done = run_script(
            "own",
            "--raw",
            "log.csv",
            cwd=tmp_path,
            preexec_fn=limit_file_size(limit),
        )
        assert done.returncode == 2
        assert done.stderr.startswith("prepare_data.py: error: ")
        assert done.stderr.count("\n") == 1
        assert files(tmp_path / "data") == before
        assert sorted(os.listdir(tmp_path / "data")) == sorted(before)
