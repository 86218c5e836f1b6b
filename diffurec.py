"""DiffuRec, a diffusion model for sequential recommendation (Li et al.), in one file.

You give it sequences of items, one user a line, and it learns which item comes next: a Transformer
reads the history and, step by step, turns noise into the embedding of the next item.

  python diffurec.py                               train on a toy dataset that is made here
  python diffurec.py --data beauty                 download Amazon Beauty, and train on it
  python diffurec.py --data beauty --recommend 1   ten items for the user in line 1

The file follows the paper, whose sections (§), equations (Eq.), algorithms and tables it names.
Where it departs from the paper's text, a comment says why: `grep Departs: diffurec.py`.

Shapes   B users or samples in a batch, L items in a history, d numbers in an embedding, t steps.
Items    have the ids 1..n_items, 0 is padding. history is (B, L), padded on the left; target, the
         item that comes next, is (B,).
Steps    count from 0: index s in the code is the paper's step s + 1.
Vectors  (B, d) stand for the target: x_start is its embedding, the paper's e_{n+1}; x_s is x_start
         after the noise of the steps up to s; x_hat, the paper's x̂_0, is what the approximator
         makes of a history and x_s; x_0 is where a reversal ends, and the items are scored by it.
"""

import argparse
import hashlib
import inspect
import io
import json
import math
import os
import re
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ---- 1. Settings (§5.3) -------------------------------------------------------------------------
@dataclass
class Config:
    """All settings. Each is a flag of the command line, and its comment is the line in --help."""

    # Departs: the paper does not say for how long it trained, nor how its embeddings begin. Epochs,
    # embedding_dropout and embedding_std were chosen on Beauty's validation split.
    epochs: int = 45  # passes over the training data, at most (toy: 12)
    seed: int = 1  # where the random numbers start; each seed gives another run
    eval_every: int = 5  # epochs from one validation to the next
    patience: int = 3  # stop after so many validations without a better NDCG@10
    batch_size: int = 512  # samples that are learnt from at once
    lr: float = 0.001  # learning rate of Adam
    max_len: int = 50  # items of a history that are read, the latest ones (MovieLens-1M: 200)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: what is fast on the machine
    dropout: float = 0.1  # share of each layer's output that training sets to 0
    embedding_dropout: float = 0.5  # the same for the embeddings of the history
    embedding_std: float = 0.25  # standard deviation of the first embeddings (toy: 0.1)
    delta: float = 0.001  # how much of the noisy target goes into the history; 0: nothing
    delta_is: Literal["variance", "std"] = "variance"  # what delta is, besides the mean
    steps: int = 32  # diffusion steps
    schedule: Literal["truncated_linear", "linear", "cosine", "sqrt"] = "truncated_linear"  # noise
    rounding: Literal["inner_product", "r_star"] = "inner_product"  # how items are scored
    approximator: Literal["transformer", "gru"] = "transformer"  # what reads the history
    hidden: int = 128  # numbers in an embedding
    blocks: int = 4  # Transformer blocks
    heads: int = 4  # attention heads of each block

    def __post_init__(self):
        """Raises ValueError on a value of the wrong type or out of range."""
        for field in fields(self):
            value = getattr(self, field.name)
            words = get_args(field.type)  # of a Literal
            lowest = 1 if field.type is int and field.name != "seed" else 0
            highest = 0.99 if "dropout" in field.name else 2**63 - 1
            allowed = ", ".join(words) if words else f"numbers from {lowest} to {highest}"
            number = not words and type(value) in (int, field.type) and lowest <= value <= highest
            if not number and value not in words:
                raise ValueError(
                    f"--{field.name.replace('_', '-')} {value!r}: allowed are {allowed}"
                )
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(f"--hidden {self.hidden}: choose an even multiple of --heads")


# ---- 2. Noise schedule (§4.3, Eq. 14; the others are §5.5's) ------------------------------------
def beta_schedule(name, steps):
    """β_1..β_t, the variance of the noise that each step adds: float64 (steps,), within (0, 1)."""
    s = np.arange(1, steps + 1)
    u = np.arange(steps + 1) / steps
    if name == "truncated_linear":  # Eq. 14
        # Departs: the paper gives neither a nor b; these end where the authors' code does.
        a = 20 / steps
        b = 0.01
        betas = a / steps * s + b / s
        betas = np.where(betas > 1, 0.1 * betas, betas)  # τ = 1
    elif name == "linear":  # DDPM's, scaled to t steps
        betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    else:  # improved-diffusion's and Diffusion-LM's give ᾱ, from which β follows by Eq. 3
        alphas_cumprod = {
            "cosine": np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2,
            "sqrt": 1 - np.sqrt(u + 0.0001),
        }[name]
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    # Departs: the paper has no cap, but nothing would be left to reverse after a β of 1.
    return np.minimum(betas, 0.999)


# ---- 3. Diffusion (§3, Eq. 1-6; Eq. 15) ---------------------------------------------------------
class Diffusion(nn.Module):
    """The process q and its posterior. Every coefficient is (t,), a number for each step."""

    def __init__(self, schedule, steps):
        super().__init__()
        betas = torch.from_numpy(beta_schedule(schedule, steps))  # float64, as all that follows
        alphas = 1 - betas  # Eq. 3
        alphas_cumprod = alphas.cumprod(0)  # ᾱ_s of Eq. 3
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)  # ᾱ_{s-1}
        ratio = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)

        # Departs: Eq. 5 prints √ᾱ_s before x_s. Only with DDPM's √α_s is it the mean of Eq. 4.
        coefficients = {
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "posterior_mean_coef1": alphas_cumprod_prev.sqrt() * betas / (1 - alphas_cumprod),
            "posterior_mean_coef2": alphas.sqrt() * ratio,
            "posterior_variance": ratio * betas,  # Eq. 6
        }
        for name, values in coefficients.items():
            self.register_buffer(name, values.float(), persistent=False)

    def q_sample(self, x_start, s, noise):
        """Eq. 2: x_s ~ q(x_s | x_start). x_start, noise (B, d), s (B,) -> (B, d)."""
        # Departs: Eq. 15 and §4.4 print α for the ᾱ of Eq. 2. §4.3's one step from e_{n+1} to x_0
        # has index 0 here, so that ᾱ_s includes it.
        scale = self.sqrt_alphas_cumprod[s, None]
        return scale * x_start + self.sqrt_one_minus_alphas_cumprod[s, None] * noise

    def q_posterior(self, x_start, x_s, s):
        """Eq. 4-6: mean (B, d) and variance (B, 1) of q(x_{s-1} | x_s, x_start). s (B,)."""
        coef1 = self.posterior_mean_coef1[s, None]
        coef2 = self.posterior_mean_coef2[s, None]
        return coef1 * x_start + coef2 * x_s, self.posterior_variance[s, None]


# ---- 4. Approximator (§4.2, Eq. 12) -------------------------------------------------------------
def step_embedding(s, dim):
    """d of Eq. 13: the sinusoids of "Attention Is All You Need" [37]. s (B,) -> (B, dim)."""
    frequencies = 10_000 ** (-torch.arange(0, dim, 2, device=s.device) / dim)  # (dim/2,)
    angles = s[:, None] * frequencies  # (B, dim/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class TransformerBlock(nn.Module):
    """Multi-head self-attention, then a feed-forward network with ReLU (§4.2)."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden
        self.heads = config.heads
        self.norm = nn.LayerNorm(d)
        self.query_key_value = nn.Linear(d, 3 * d)
        self.output = nn.Sequential(nn.Linear(d, d), Dropout(config.dropout))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(d),
            nn.Linear(d, 4 * d),
            nn.ReLU(),
            nn.Linear(4 * d, d),
            Dropout(config.dropout),
        )
        matrices = (self.output[0].weight, self.feed_forward[1].weight, self.feed_forward[3].weight)
        for matrix in (*self.query_key_value.weight.chunk(3), *matrices):
            nn.init.xavier_normal_(matrix)  # §5.3

    def forward(self, z, mask, last_only=False):
        """z (B, L, d), mask (B, L) -> (B, L, d); with last_only the last position's, (B, 1, d)."""
        # Departs: [37] normalises after each residual. Here, as in the authors' code, it comes
        # before each sublayer, which did no worse in validation.
        qkv = self.query_key_value(self.norm(z)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d/heads)
        if last_only:
            z = z[:, -1:]
            query = query[:, :, -1:]

        mask = mask[:, None, None, :]  # (B, 1, 1, L): no position sees padding
        if z.is_cuda:  # the same as below, in one kernel
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            weights = query @ key.mT / math.sqrt(query.shape[-1])  # QKᵀ / √d: (B, heads, L, L)
            attended = weights.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value

        z = z + self.output(attended.transpose(1, 2).flatten(2))
        return z + self.feed_forward(z)


class Transformer(nn.Module):
    """Eq. 12: f_θ. x_hat is h_n, what the last block makes of the last item."""

    # Departs: [37] adds position embeddings. The authors' code never uses its own, and validation
    # was better without. So only the last item's place counts, not the order of those before it.

    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, z, mask):
        """z (B, L, d), mask (B, L), False at padding -> x_hat (B, d)."""
        for block in self.blocks[:-1]:
            z = block(z, mask)
        return self.norm(self.blocks[-1](z, mask, last_only=True)[:, 0])


class GRU(nn.Module):
    """*w GRU* of Table 3 (§5.5): x_hat is the state after the last item."""

    def __init__(self, config):
        super().__init__()
        self.gru = nn.GRU(config.hidden, config.hidden, batch_first=True)

    def forward(self, z, mask):
        """z (B, L, d), mask (B, L), False at padding -> x_hat (B, d)."""
        # Padding would change the state, so items go to the front and the padding behind them.
        lengths = mask.sum(1)
        index = torch.arange(z.shape[1], device=z.device) + (z.shape[1] - lengths)[:, None]
        index = index.clamp(max=z.shape[1] - 1)  # (B, L)
        states, _ = self.gru(z.gather(1, index[:, :, None].expand_as(z)))  # (B, L, d)
        return states[torch.arange(len(z), device=z.device), lengths - 1]


# ---- 5. DiffuRec (§4): Algorithm 2, Algorithm 1, rounding ---------------------------------------
class DiffuRec(nn.Module):
    """The item embeddings, the diffusion of the target (Eq. 9) and its reversal (Eq. 10)."""

    def __init__(self, n_items, config):
        super().__init__()
        self.n_items = n_items
        self.config = config
        self.item_embeddings = nn.Embedding(n_items + 1, config.hidden, padding_idx=0)
        nn.init.normal_(self.item_embeddings.weight[1:], std=config.embedding_std)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.embedding_norm = nn.LayerNorm(config.hidden)
        self.diffusion = Diffusion(config.schedule, config.steps)
        self.approximator = {"transformer": Transformer, "gru": GRU}[config.approximator](config)

    def embed(self, history):
        """e_1..e_n. history (B, L) -> (B, L, d)."""
        # Departs: the paper takes the embeddings as they are. Dropout and LayerNorm are the
        # authors' code's; x_start goes through neither.
        return self.embedding_norm(self.embedding_dropout(self.item_embeddings(history)))

    def approximate(self, e, mask, x_s, s, generator=None):
        """Eq. 13, then 12. e (B, L, d), mask (B, L), x_s (B, d), s (B,) -> x_hat (B, d)."""
        # N(mean, variance) everywhere in the paper, so λ ~ N(δ, δ) has the standard deviation √δ.
        delta = self.config.delta
        std = math.sqrt(delta) if self.config.delta_is == "variance" else delta
        lambda_ = delta + std * noise_like(e, generator)  # (B, L, d)
        d = step_embedding(s, e.shape[-1]).to(e.dtype)
        z = e + lambda_ * (x_s + d)[:, None, :]  # Eq. 13
        return self.approximator(z, mask)

    def forward(self, history, target):
        """Algorithm 2, lines 10-14 without the update. history (B, L), target (B,) -> the loss."""
        with autocast(self.item_embeddings.weight.device, self.config.precision):
            x_start = self.item_embeddings(target)
            s = torch.randint(self.config.steps, target.shape, device=target.device)
            x_s = self.diffusion.q_sample(x_start, s, noise_like(x_start))  # Eq. 9
            x_hat = self.approximate(self.embed(history), history != 0, x_s, s)
            logits = x_hat @ self.item_embeddings.weight[1:].T  # (B, n_items)
        return F.cross_entropy(logits.float(), target - 1)  # Eq. 18 and 19

    @torch.no_grad()
    def reverse(self, history, generator=None):
        """Algorithm 1: history (B, L) -> x_0 (B, d). Random, in eval mode too."""
        with autocast(self.item_embeddings.weight.device, self.config.precision):
            e = self.embed(history)
            x_s = noise_like(e[:, 0], generator)
            for step in reversed(range(self.config.steps)):
                s = torch.full((len(history),), step, device=history.device)
                x_hat = self.approximate(e, history != 0, x_s, s, generator)  # Eq. 16
                mean, variance = self.diffusion.q_posterior(x_hat, x_s, s)
                # Departs: Eq. 17 multiplies the noise by β̃, which by Eq. 4 is its variance.
                x_s = mean + variance.sqrt() * noise_like(x_s, generator)  # Eq. 17 and 10
        return x_s

    def scores(self, x_0):
        """Rounding (Eq. 11): how well items fit. x_0 (B, d) -> (B, n_items), item j + 1 at j."""
        items = self.item_embeddings.weight[1:]
        if self.config.rounding == "inner_product":
            return x_0 @ items.T  # Eq. 20
        # Departs: Eq. 21 subtracts vectors from a number. Their squared norms, 1 and 1, make it the
        # negative squared distance of [9], but of normalised vectors.
        return 2 * F.normalize(x_0) @ F.normalize(items).T - 2

    @torch.no_grad()
    def recommend(self, history, k):
        """The k best items after each history (B, L), from one reversal: items, scores (B, k).

        The last max_len items are read. The noise follows from the seed, so the answer repeats
        itself. Raises ValueError on what is no history and on too large a k.
        """
        if history.ndim != 2 or history.dtype != torch.int64 or not history.numel():
            raise ValueError("history: give a (B, L) tensor, not empty, of item ids as int64")
        real = history != 0
        if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
            raise ValueError("history: each needs an item, and its padding (0) on the left")
        if not 0 <= history.min() <= history.max() <= self.n_items or not 1 <= k <= self.n_items:
            raise ValueError(f"history, k: give item ids, and a k, from 1 to {self.n_items}")

        training = self.training
        self.eval()
        generator = torch.Generator(history.device).manual_seed(self.config.seed)
        x_0 = self.reverse(history[:, -self.config.max_len :], generator)
        scores, index = self.scores(x_0).topk(k)
        self.train(training)
        return index + 1, scores


def noise_like(x, generator=None):
    """ε ~ N(0, I) in the shape of x; without a generator, from PyTorch's own random numbers."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def autocast(device, precision):
    """For speed: inside, matrix products take bfloat16 numbers where `precision` says so."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        units = torch.cpu.get_capabilities()
        fast = units.get("amx_bf16", False) or units.get("avx512_bf16", False)
    enabled = precision == "bfloat16" or (precision == "auto" and fast)
    return torch.autocast(device.type, torch.bfloat16, enabled)


class Dropout(nn.Dropout):
    """For speed: on a CPU, four elements share one random number of 64 bits."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        random = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        uniform = random.view(torch.int16)[: x.numel()].view(x.shape)  # from -2¹⁵ to 2¹⁵ - 1
        kept = uniform >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype) / (1 - self.p)


# ---- 6. Data (§5.1) -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Sequences:
    """The users of one file who have three items or more, in the order of the file."""

    items: np.ndarray  # int64, the items of all users, one user after another
    offsets: np.ndarray  # int64, n_users + 1: user u has items[offsets[u] : offsets[u + 1]]
    lines: np.ndarray  # int64, n_users: the line of the file that each user is, from 1
    n_items: int  # the largest id in the file

    @property
    def n_users(self):
        return len(self.lines)

    @property
    def fingerprint(self):
        """Tells these sequences from others: the users, the items and their order count."""
        content = self.offsets.tobytes() + self.items.tobytes() + str(self.n_items).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def load_sequences(path):
    """Read the data format: a user a line, that user's item ids oldest first, spaces between.

    Raises OSError, or ValueError with the line of what is not in this format.
    """
    items, lengths, lines, n_items = [], [], [], 0
    content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
    for number, line in enumerate(content.split(b"\n"), 1):
        words = line.split()
        for word in words:
            if not word.isdigit() or not 0 < len(word.lstrip(b"0")) < 8:
                hint = f"make sequences of it: python prepare_data.py NAME --raw {path}"
                hint = "add 1 to every id, since 0 is padding" if word == b"0" else hint
                shown = word[:40].decode(errors="replace")
                raise ValueError(f"{path}:{number}: {shown!r} is not an item id; {hint}")
        sequence = list(map(int, words))
        n_items = max(n_items, 0, *sequence)
        if len(sequence) >= 3:  # leave-one-out needs three
            items.extend(sequence)
            lengths.append(len(sequence))
            lines.append(number)

    if not lines:
        raise ValueError(f"{path}: no user has three items or more; one line holds a user's items")
    if n_items > max(100_000, 100 * len(set(items))):
        raise ValueError(f"{path}: ids go up to {n_items:,} and few occur; number them from 1")
    offsets = np.append(0, np.cumsum(lengths))
    return Sequences(np.array(items), offsets, np.array(lines), n_items)


def train_batches(sequences, max_len, batch_size, rng, device="cpu"):
    """One epoch of samples (history, target) from the training parts i_1..i_{n-2}.

    "7 3 9 4 8" gives 3 after 7, and 9 after 7 3. rng, a NumPy Generator, decides the order.
    """
    # Departs: Eq. 19 has one target a user. As in the authors' code, every item of a training part
    # but the first is a target, with a step and noise of its own.
    offsets = sequences.offsets
    is_target = np.ones(len(sequences.items), dtype=bool)
    for not_a_target in (offsets[:-1], offsets[1:] - 1, offsets[1:] - 2):  # i_1, i_n, i_{n-1}
        is_target[not_a_target] = False
    targets = np.flatnonzero(is_target)
    starts = np.repeat(offsets[:-1], np.diff(offsets))[targets]
    return make_batches(sequences, starts, targets, max_len, batch_size, rng, device)


def eval_batches(sequences, split, max_len, batch_size, device="cpu"):
    """Every user once, as (history, target), the shortest sequences first.

    Of "7 3 9 4 8", "validation" asks for 4 after 7 3 9, and "test" for 8 after 7 3 9 4.
    """
    starts = sequences.offsets[:-1]
    targets = sequences.offsets[1:] - {"validation": 2, "test": 1}[split]
    return make_batches(sequences, starts, targets, max_len, batch_size, None, device)


def make_batches(sequences, starts, targets, max_len, batch_size, rng, device):
    """Yield (history (B, L), target (B,)): the items at the positions `targets`, and what comes
    before each, from `starts` on. Like lengths share a batch, so there is hardly any padding."""
    lengths = np.minimum(targets - starts, max_len)
    order = np.arange(len(targets)) if rng is None else rng.permutation(len(targets))
    order = order[np.argsort(lengths[order], kind="stable")]
    firsts = np.arange(0, len(order), batch_size)
    firsts = firsts if rng is None else rng.permutation(firsts)

    items = torch.from_numpy(sequences.items).to(device)
    starts = torch.from_numpy(starts[order]).to(device)
    targets = torch.from_numpy(targets[order]).to(device)
    for first in firsts:
        batch = slice(first, first + batch_size)
        longest = lengths[order[batch]].max()
        positions = targets[batch, None] + torch.arange(-longest, 0, device=device)  # (B, L)
        history = items[positions.clamp(min=0)].masked_fill(positions < starts[batch, None], 0)
        yield history, items[targets[batch]]


# ---- 7. Evaluation (§5.1) -----------------------------------------------------------------------
METRICS = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")
WITHOUT = " without history"  # ends the names of the second ranking's metrics


def ranks(scores, target):
    """The rank of each target, from 1; ties count against it. scores (B, n_items), target (B,)."""
    if not scores.isfinite().all():
        raise FloatingPointError("a score is not finite; train again with a smaller --lr")
    return (scores >= scores.gather(1, target[:, None] - 1)).sum(1)


def metrics(rank, suffix=""):
    """HR@K and NDCG@K, means over the users, fractions of 1. rank (n_users,)."""
    gains = {"HR": torch.ones(len(rank)).double(), "NDCG": 1 / torch.log2(rank.double() + 1)}
    result = {}
    for metric in METRICS:
        name, k = metric.split("@")
        result[metric + suffix] = gains[name].where(rank <= int(k), 0).mean().item()
    return result


@torch.no_grad()
def evaluate(model, sequences, split, batch_size=512, ranks_file=None):
    """Metrics on the split "validation" or "test", of two rankings by the same scores: of all
    items, and without the items of the history. The noise follows from the seed and batch_size.

    ranks_file gets a line for each user, in the order of the data: the ranks in both.
    """
    device = model.item_embeddings.weight.device
    generator = torch.Generator(device).manual_seed(model.config.seed)
    users = torch.from_numpy(np.argsort(np.diff(sequences.offsets), kind="stable")).to(device)
    rank = torch.empty(sequences.n_users, 2, dtype=torch.int64, device=device)
    training = model.training
    model.eval()

    batches = eval_batches(sequences, split, len(sequences.items), batch_size, device)
    for user, (history, target) in zip(users.split(batch_size), batches, strict=True):
        scores = model.scores(model.reverse(history[:, -model.config.max_len :], generator))
        rank[user, 0] = ranks(scores, target)
        scores = F.pad(scores, (1, 0)).scatter(1, history, -1e30)  # column i: item i, 0: padding
        rank[user, 1] = ranks(scores[:, 1:], target)

    model.train(training)
    rank = rank.cpu()
    if ranks_file:
        np.savetxt(ranks_file, rank, fmt="%d")
    return metrics(rank[:, 0]) | metrics(rank[:, 1], WITHOUT)


def popularity(sequences):
    """The test metrics of ranking all items by how often the training parts have them."""
    held_out = np.append(sequences.offsets[1:] - 1, sequences.offsets[1:] - 2)
    counts = np.bincount(np.delete(sequences.items, held_out), minlength=sequences.n_items + 1)
    at_least = np.bincount(counts[1:])[::-1].cumsum()[::-1]  # [c]: items that occur c times or more
    target = sequences.items[sequences.offsets[1:] - 1]
    return metrics(torch.from_numpy(at_least[counts[target]].copy()))


# ---- 8. Training (Algorithm 2, §5.3) ------------------------------------------------------------
def train_epoch(model, sequences, optimizer, epoch):
    """One pass over all samples, whose random numbers follow from seed and epoch -> mean loss."""
    config = model.config
    device = model.item_embeddings.weight.device
    rng = np.random.default_rng([config.seed, epoch])
    torch.manual_seed(int(rng.integers(2**63)))
    model.train()

    total = torch.zeros((), device=device)
    n_samples = 0
    for history, target in train_batches(sequences, config.max_len, config.batch_size, rng, device):
        optimizer.zero_grad()
        loss = model(history, target)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(target)
        n_samples += len(target)
    return total.item() / n_samples


def train(model, sequences, folder, state):
    """Train up to `epochs`, or until `patience` validations in a row bring no better NDCG@10.

    Saves after each epoch; raises FloatingPointError before it would save numbers not finite.
    """
    config = model.config
    events = state["events"]
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])

    while state["epoch"] < config.epochs and state["waited"] < config.patience:
        epoch = state["epoch"] + 1
        started = time.perf_counter()
        loss = train_epoch(model, sequences, optimizer, epoch)
        if not all(x.isfinite().all() for x in (torch.tensor(loss), *model.parameters())):
            raise FloatingPointError(f"epoch {epoch}: not finite any more; try a smaller --lr")
        seconds = time.perf_counter() - started
        events.append({"event": "epoch", "epoch": epoch, "loss": loss, "seconds": seconds})
        line = f"epoch {epoch}  loss {loss:.4f}"

        if epoch % config.eval_every == 0 or epoch == config.epochs:
            started = time.perf_counter()
            result = evaluate(model, sequences, "validation", config.batch_size)
            result["seconds"] = time.perf_counter() - started
            events.append({"event": "validation", "epoch": epoch} | result)
            line += f"  validation HR@10 {result['HR@10']:.2%}, NDCG@10 {result['NDCG@10']:.2%}"
            state["waited"] += 1
            if result["NDCG@10"] > state["best"]:
                state |= {"best": result["NDCG@10"], "best_epoch": epoch, "waited": 0}
                state["best_weights"] = {k: v.clone() for k, v in model.state_dict().items()}
                line += ", the best so far"

        minutes = sum(event.get("seconds", 0) for event in events) / 60
        print(f"{line}  about {minutes / epoch * (config.epochs - epoch):.0f} min left", flush=True)
        state |= {"epoch": epoch, "weights": model.state_dict()}
        state["optimizer"] = optimizer.state_dict()
        save_run(folder, state)


def save_run(folder, state):
    """Write the checkpoint, then its log. Whenever it is killed, each file is a whole one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checkpoint = buffer.getvalue()
    digest = hashlib.sha256(FORMAT + checkpoint).digest()
    log = "".join(json.dumps(event) + "\n" for event in state["events"])
    for name, content in (("checkpoint.pt", checkpoint + digest), ("log.jsonl", log.encode())):
        with open(folder / "unfinished", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "unfinished", folder / name)


def load_checkpoint(path, weights="best_weights", **changes):
    """(model, state) of a run, on the CPU; `changes` are settings to change. Runs no code in it.

    `weights` may be "weights", those of the last epoch. Raises OSError, or ValueError on what is
    not a whole checkpoint of this program.
    """
    content = Path(path).read_bytes()
    if hashlib.sha256(FORMAT + content[:-32]).digest() != content[-32:]:
        raise ValueError(f"{path}: damaged, or of another program; train a new run")
    state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
    config = Config(**state["config"] | changes)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers as they are
        model = DiffuRec(state["n_items"], config)
    model.load_state_dict(state[weights])
    return model, state


FORMAT = b"DiffuRec checkpoint 2"


# ---- 9. Command line ----------------------------------------------------------------------------
KNOWN = {  # the users, items and actions of Table 1: own settings, and Table 2's row of DiffuRec
    (22_363, 12_101, 198_502): ({}, (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566)),
    (19_412, 11_924, 167_597): ({}, (5.5650, 7.4587, 9.8417, 4.1667, 4.7724, 5.3684)),
    (6_040, 3_416, 999_611): (
        {"max_len": 200},
        (17.9659, 26.2647, 36.787, 12.115, 14.7909, 17.4386),
    ),
    (281_428, 13_044, 3_485_022): ({}, (6.6742, 10.7520, 16.6507, 4.2902, 5.5981, 7.0810)),
    (2_000, 200, 20_001): ({"epochs": 12, "embedding_std": 0.1}, None),  # the toy
}


def find_data(args):
    """The path and the sequences of --data; a dataset that is not there yet is prepared first."""
    path = next(
        (p for p in (args.data_dir / f"{args.data}.txt", Path(args.data)) if p.is_file()), None
    )
    if path is None:
        try:
            import prepare_data
        except ModuleNotFoundError:
            raise ValueError(f"--data {args.data}: no such file, and no prepare_data.py to make it")
        path = prepare_data.prepare(args.data, args.data_dir)

    sequences = load_sequences(path)
    lengths = np.diff(sequences.offsets)
    first = sequences.items[sequences.offsets[:-1]]
    table = lengths.min() == lengths.max() <= 4 or len(np.unique(first)) == len(first)
    if table and len(first) >= 10 and not args.not_a_table:
        hint = f"python prepare_data.py NAME --raw {path} (or add --not-a-table, if it is none)"
        raise ValueError(f"{path}: a table, or the user's number comes first; {hint}")
    return path, sequences


def open_run(args, sequences, weights, changeable):
    """The folder, model and state of --out or of the newest run on these sequences."""
    logs = [args.out / "log.jsonl"] if args.out else Path("runs").glob("*/log.jsonl")
    logs = [log for log in logs if sequences.fingerprint in log.read_text().partition("\n")[0]]
    if not logs:
        raise ValueError(f"no run with --data {args.data} yet: train one, without this flag")
    folder = max(logs, key=lambda log: log.stat().st_mtime).parent
    changes = {name: value for name, value in args.settings.items() if name in changeable}
    model, state = load_checkpoint(folder / "checkpoint.pt", weights, **changes)
    for name in args.settings.keys() - changeable:
        if args.settings[name] != state["config"][name]:
            raise ValueError(f"{folder} has {name} {state['config'][name]}: leave that flag out")
    return folder, model.to(args.device), state


def lock_run(folder):
    """Keep other programs out of a run while the returned object lives; the lock is SQLite's."""
    lock = sqlite3.connect(folder / "lock", timeout=0)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        raise ValueError(f"{folder}: another program works on this run; wait for its end") from None
    return lock


def train_command(args):
    """Train a new run or, with --resume, go on with one; then score the test split."""
    path, sequences = find_data(args)
    counts = (sequences.n_users, sequences.n_items, len(sequences.items))
    settings, paper = KNOWN.get(counts, ({}, None))
    if args.resume:
        folder, model, state = open_run(args, sequences, "weights", {"epochs", "patience"})
        state["config"] = asdict(model.config)
        lock = lock_run(folder)
    else:
        config = Config(**settings | args.settings)
        torch.manual_seed(config.seed)
        model = DiffuRec(sequences.n_items, config).to(args.device)
        start = {"event": "start", "data": path.stem, "path": str(path), "config": asdict(config)}
        state = {"config": asdict(config), "n_items": sequences.n_items, "optimizer": None}
        state |= {"epoch": 0, "best": -1.0, "best_epoch": 0, "waited": 0, "tested": None}
        state |= {"weights": model.state_dict(), "best_weights": model.state_dict()}
        state["events"] = [start | {"fingerprint": sequences.fingerprint}]
        number = 1
        while Path("runs", f"{path.stem}-{number}").exists():
            number += 1
        folder = args.out or Path("runs", f"{path.stem}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run(folder)
        if (folder / "checkpoint.pt").exists():
            raise ValueError(f"--out {folder} holds a run: --resume it, or name another folder")
        save_run(folder, state)

    print(f"data    {path}: {counts[0]:,} users, {counts[1]:,} items, {counts[2]:,} actions")
    print(f"run     {folder}, on {args.device}", flush=True)
    train(model, sequences, folder, state)
    if state["tested"] != state["epoch"]:
        model.load_state_dict(state["best_weights"])
        started = time.perf_counter()
        result = evaluate(model, sequences, "test", model.config.batch_size, folder / "ranks.txt")
        result["seconds"] = time.perf_counter() - started
        state["events"].append({"event": "popularity"} | popularity(sequences))
        state["events"].append({"event": "test", "epoch": state["best_epoch"]} | result)
        state["tested"] = state["epoch"]
        save_run(folder, state)

    events = {event["event"]: event for event in state["events"]}
    print_results("test", events["test"], {"popularity": events["popularity"]}, paper)
    print(f"\nnext: python diffurec.py --data {args.data} --recommend {sequences.lines[0]}")
    lock.close()


def print_results(title, result, rows, paper):
    """Both rankings of a result and more rows, in %, beside Table 2 where it has these data."""
    without = {metric: result[metric + WITHOUT] for metric in METRICS}
    rows = {"all items": result, "without the history's items": without} | rows
    if paper:
        rows["Table 2"] = dict(zip(METRICS, np.array(paper) / 100))
    print(f"\n{title:28}", *(f"{metric:>8}" for metric in METRICS))
    for label, row in rows.items():
        print(f"{label:28}", *(f"{100 * row[metric]:8.2f}" for metric in METRICS))


def evaluate_command(args):
    """Score a run's best epoch on both splits, and add the figures to its log."""
    _, sequences = find_data(args)
    folder, model, state = open_run(args, sequences, "best_weights", CHANGEABLE)
    lock = lock_run(folder)
    for split in ("validation", "test"):
        result = evaluate(model, sequences, split, model.config.batch_size)
        print_results(f"{split}, epoch {state['best_epoch']}", result, {}, None)
        state["events"].append({"event": "evaluate", "split": split} | result)
    save_run(folder, state)
    lock.close()


CHANGEABLE = {"rounding", "batch_size", "precision", "seed"}  # in a run that has been trained


def recommend_command(args):
    """Ten items for a user (--recommend) or after a history (--history), and what §5.8 counts."""
    path, sequences = find_data(args)
    _, model, _ = open_run(args, sequences, "best_weights", CHANGEABLE)
    titles = load_names(path.with_suffix(".items.txt"))
    history = [find_name(word, titles) for word in args.history or ()]
    if args.recommend:
        line = find_name(args.recommend, load_names(path.with_suffix(".users.txt")))
        if line not in sequences.lines:
            raise ValueError(f"--recommend {line}: no user of {path} with three items; try another")
        user = np.flatnonzero(sequences.lines == line)[0]
        history = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
    items, _ = model.recommend(torch.tensor([history], device=args.device), min(10, model.n_items))

    for title, ids in (("the end of the history", history[-10:]), ("next", items[0].tolist())):
        print(f"\n    item  {title}")
        for item in ids:
            print(f"{item:8}  {''.join(titles[item - 1 : item])}")
    latest = torch.tensor([history[-model.config.max_len :]] * 100, device=args.device)
    top = model.scores(model.reverse(latest)).topk(min(20, model.n_items))[1]
    print(f"\n100 reversals of this history: {len(top.unique())} different items in their top 20")


def load_names(path):
    """The lines of an .items.txt or .users.txt file: entry i - 1 is the name of i."""
    return path.read_text("utf-8-sig", errors="replace").split("\n") if path.is_file() else []


def find_name(word, names):
    """The number that `word` is, or that of the only name that is it or begins with it."""
    if word.isdecimal() and len(word) < 8:
        return int(word)
    exact = [i for i, name in enumerate(names, 1) if name == word]
    found = exact or [i for i, name in enumerate(names, 1) if name.startswith(word)]
    if len(found) != 1:
        raise ValueError(f"{word!r}: {len(found)} names begin so; give a number or a longer name")
    return found[0]


def parse_arguments(argv):
    """The command line; args.settings holds the settings of Config that were given."""
    parser = Parser(usage="%(prog)s [FLAG ...]", description=__doc__.partition("\n\nThe file")[0])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", default="toy", help="toy, beauty, toys, ml-1m, steam, or a file of sequences")
    add("--data-dir", type=Path, default="data", help="folder of the datasets")
    add("--out", type=Path, help="folder of the run (default: runs/NAME-1, -2, ...)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--resume", action="store_true", help="go on with the newest run on these data")
    add("--evaluate", action="store_true", help="score its best epoch on both splits")
    add("--recommend", metavar="USER", help="ten items for a user: the line in the file, or a name")
    add("--history", metavar="ITEM", nargs="+", help="ten items after these: ids or titles")
    add(
        "--not-a-table", action="store_true", help="the file holds sequences though it looks not so"
    )
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        text = f"{comments[field.name]} (default: {field.default})"
        kind = str if get_args(field.type) else field.type
        add(flag, type=kind, metavar="X", default=argparse.SUPPRESS, help=text)
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.settings = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    return args


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def main(argv=None):
    """Returns the exit status: 0, or 1 for numbers not finite, 2 for bad input, 130 for Ctrl-C."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # less memory, no slower
    sys.stdout.reconfigure(errors="replace")
    try:
        args = parse_arguments(argv)
        if args.evaluate:
            evaluate_command(args)
        elif args.recommend or args.history:
            recommend_command(args)
        else:
            train_command(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; --resume goes on after the last whole epoch"
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FloatingPointError as error:
        status, message = 1, error
    except (OSError, ValueError) as error:
        status, message = 2, error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        status, message = 2, "out of memory; a smaller --batch-size, --max-len or --hidden helps"
    print(f"diffurec.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
