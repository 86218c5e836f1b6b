"""DiffuRec, a diffusion model for sequential recommendation (Li et al.), in one file.

You give it sequences of items, one line per user, and it learns which item comes next: a
Transformer reads the history and, step by step, turns noise into the embedding of the next item.

  python diffurec.py                               train on a toy dataset that is made here
  python diffurec.py --data beauty                 download Amazon Beauty, and train on it
  python diffurec.py --data beauty --recommend 1   ten items for the user in line 1

The file follows the paper, whose sections (§), equations (Eq.), algorithms and tables it names.
Where it departs from the paper's text, a comment says why: `grep -A2 Departs: diffurec.py`.

Shapes   B users or samples in a batch, L items in a history, d the size of an embedding, t steps.
Items    have the ids 1..n_items, 0 is padding. history is (B, L), padded on the left; target, the
         item that comes next, is (B,).
Steps    count from 0: index s in the code is the paper's step s + 1.
Vectors  (B, d) stand for the target: x_start is its embedding, the paper's e_{n+1}; x_s is x_start
         after the noise of the steps up to index s; x_hat, the paper's x̂_0, is what the
         approximator makes of a history and x_s; x_0 is the end of a reversal, that is its last
         x_hat, and the items are scored by it.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("diffurec.py: needs Python 3.11 or newer")

import argparse
import ctypes
import hashlib
import inspect
import io
import json
import math
import os
import re
import shlex
import sqlite3
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

    # Departs: §5.7 sees Beauty's loss converge after 150 epochs, but its validation is flat from 30
    # on. How embeddings begin is not in the paper. epochs, embedding_dropout and embedding_std were
    # chosen on that validation split.
    epochs: int = 45  # passes over the training data, at most (toy: 12)
    seed: int = 1  # seed of the random numbers: another seed gives another run
    eval_every: int = 5  # epochs from one validation to the next
    patience: int = 3  # stop after so many validations without a better NDCG@10
    batch_size: int = 512  # samples in one update of the weights
    lr: float = 0.001  # learning rate of Adam
    max_len: int = 50  # items of a history that are read, the latest ones (MovieLens-1M: 200)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # number format of products
    dropout: float = 0.1  # share of each layer's output that training sets to 0
    embedding_dropout: float = 0.5  # dropout of the history's embeddings
    embedding_std: float = 0.25  # standard deviation of the first embeddings (toy: 0.1)
    delta: float = 0.001  # how much of the noisy target goes into the history; 0: nothing
    delta_is: Literal["variance", "std"] = "variance"  # what delta is of the noise's weight
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
            low = 1 if field.type is int and field.name != "seed" else 0
            high = 0.99 if "dropout" in field.name else 10**9
            in_range = not words and type(value) in (int, field.type) and low <= value <= high
            if not in_range and value not in words:
                kind = "a whole number" if field.type is int else "a number"
                choice = " or ".join(words) or f"{kind} from {low} to {high}"
                raise ValueError(f"{field.name} is {value!r}, but must be {choice}")
        if self.hidden % self.heads or self.hidden % 2:
            heads = f"heads, {self.heads}"
            raise ValueError(f"hidden is {self.hidden}, but must be even and divisible by {heads}")


# ---- 2. Noise schedule (§4.3, Eq. 14; the others are §5.5's) ------------------------------------
def beta_schedule(name, steps):
    """β_1..β_t, the variance of the noise that each step adds: float64 (steps,), within (0, 1)."""
    if name == "truncated_linear":  # Eq. 14
        # Departs: the paper gives neither a nor b. With these β ends nearly as the authors' does.
        a, b = 20 / steps, 0.01
        s = np.arange(1, steps + 1)
        betas = a / steps * s + b / s
        betas = np.where(betas > 1, 0.1 * betas, betas)  # τ = 1
    elif name == "linear":  # DDPM's [15], scaled to t steps; §5.5 swaps its two references
        betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    else:  # the cosine of [25] and the square root of [23] give ᾱ, from which β follows by Eq. 3
        u = np.arange(steps + 1) / steps
        cosine = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        alphas_cumprod = {"cosine": cosine, "sqrt": 1 - np.sqrt(u + 0.0001)}[name]
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    # Departs: the paper has no cap. A β of 1 would remove the target completely.
    return np.minimum(betas, 0.999)


# ---- 3. Diffusion (§3, Eq. 1-6; §4.3, Eq. 15) ---------------------------------------------------
class Diffusion(nn.Module):
    """The process q and its posterior. Every coefficient is (steps,), one number for each step."""

    def __init__(self, schedule, steps):
        super().__init__()
        betas = torch.from_numpy(beta_schedule(schedule, steps))  # float64, as all that follows
        alphas = 1 - betas  # Eq. 3
        alphas_cumprod = alphas.cumprod(0)  # ᾱ_s of Eq. 3
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)  # ᾱ_{s-1}
        ratio = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)

        # Departs: Eq. 5 has √ᾱ_s before x_s, and §4.4 leaves out all bars. The mean of Eq. 4 needs
        # √α_s there, as in DDPM, and ᾱ elsewhere.
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
        """Eq. 2, which is Eq. 1 for all steps up to s at once: x_s, drawn from q(x_s | x_start).

        x_start, noise (B, d), s (B,) -> (B, d).
        """
        # Departs: §4.3 and Eq. 15 print α where Eq. 2 has ᾱ. §4.3 also takes one step from e_{n+1}
        # to x_0 and then s more; here all of them start at e_{n+1}, and index 0 is that first one.
        signal = self.sqrt_alphas_cumprod[s, None] * x_start  # [s, None]: (B, 1)
        return signal + self.sqrt_one_minus_alphas_cumprod[s, None] * noise

    def q_posterior(self, x_start, x_s, s):
        """Eq. 4-6: mean (B, d) and variance (B, 1) of x_{s-1}, given x_s and x_start. s (B,).

        At index 0 the mean is x_start and the variance is 0.
        """
        from_start = self.posterior_mean_coef1[s, None] * x_start
        from_noisy = self.posterior_mean_coef2[s, None] * x_s
        return from_start + from_noisy, self.posterior_variance[s, None]


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
        self.output = nn.Linear(d, d)
        expand = nn.Linear(d, 4 * d)
        contract = nn.Linear(4 * d, d)
        self.feed_forward = nn.Sequential(nn.LayerNorm(d), expand, nn.ReLU(), contract)
        self.dropout = Dropout(config.dropout)
        matrices = (self.output.weight, expand.weight, contract.weight)
        for matrix in (*self.query_key_value.weight.chunk(3), *matrices):
            nn.init.xavier_normal_(matrix)  # §5.3

    def forward(self, z, mask, last_only=False):
        """z (B, L, d), mask (B, L) -> (B, L, d); with last_only the last position's, (B, 1, d)."""
        # Departs: [37] normalises after each residual. Here, as in the authors' code, normalisation
        # comes before each sublayer, which did no worse in validation.
        qkv = self.query_key_value(self.norm(z)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d/heads)
        if last_only:
            z = z[:, -1:]
            query = query[:, :, -1:]

        mask = mask[:, None, None, :]  # (B, 1, 1, L): no position sees padding
        if z.is_cuda:  # softmax(QKᵀ / √d) V of [37] in one kernel
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:  # the same step by step, which is faster on a CPU
            scores = query @ key.mT / math.sqrt(query.shape[-1])  # (B, heads, L or 1, L)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
            attended = weights @ value  # (B, heads, L or 1, d/heads)

        z = z + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return z + self.dropout(self.feed_forward(z))


class Transformer(nn.Module):
    """Eq. 12: f_θ. x_hat is h_n, the output of the last block at the last item."""

    def __init__(self, config):
        super().__init__()
        # Departs: [37] adds position embeddings. The authors' code never uses its own, and
        # validation was better without. So the order of the items before the last has no effect.
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden)  # Departs: normalising first needs a last norm.

    def forward(self, z, mask):
        """z (B, L, d), z_1..z_n, mask (B, L), False at padding -> x_hat (B, d)."""
        # Departs: Eq. 12 starts at z_0; there is none, and the algorithms start at z_1.
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
        units = torch.cpu.get_capabilities()
        self.fast_bfloat16 = {
            "cpu": units.get("amx_bf16", False) or units.get("avx512_bf16", False),
            "cuda": torch.cuda.is_bf16_supported(including_emulation=False),
        }

    def autocast(self, device):
        """For speed: inside, matrix products use bfloat16; "auto" does where that is faster."""
        fast = self.fast_bfloat16.get(device, False)
        bfloat16 = {"auto": fast, "bfloat16": True, "float32": False}[self.config.precision]
        return torch.autocast(device, torch.bfloat16, bfloat16)

    def embed(self, history):
        """e_1..e_n. history (B, L) -> (B, L, d)."""
        # Departs: the paper takes the embeddings as they are. The authors' code has dropout and
        # LayerNorm here. x_start, the target's embedding, goes through neither.
        return self.embedding_norm(self.embedding_dropout(self.item_embeddings(history)))

    def approximate(self, e, mask, x_s, s, generator=None):
        """Eq. 13, then 12. e (B, L, d), mask (B, L), x_s (B, d), s (B,) -> x_hat (B, d)."""
        # The paper writes N(mean, variance), so λ ~ N(δ, δ) has the standard deviation √δ. In the
        # authors' code it is δ: --delta-is std.
        delta = self.config.delta
        std = math.sqrt(delta) if self.config.delta_is == "variance" else delta
        lambda_ = delta + std * noise_like(e, generator)  # (B, L, d)
        step = step_embedding(s, e.shape[-1]).to(e.dtype)

        z = e + lambda_ * (x_s + step)[:, None, :]  # Eq. 13, where step is called d
        return self.approximator(z, mask)

    def forward(self, history, target):
        """Algorithm 2, lines 10 to 13 and the loss of line 14. history (B, L), target (B,)."""
        with self.autocast(history.device.type):
            x_start = self.item_embeddings(target)
            s = torch.randint(self.config.steps, target.shape, device=target.device)  # line 10
            x_s = self.diffusion.q_sample(x_start, s, noise_like(x_start))  # line 11, Eq. 9
            x_hat = self.approximate(self.embed(history), history != 0, x_s, s)  # lines 12, 13
            logits = x_hat @ self.item_embeddings.weight[1:].T  # (B, n_items)
        return F.cross_entropy(logits.float(), target - 1)  # softmax, -log and mean: Eq. 18, 19

    @torch.no_grad()
    def reverse(self, history, generator=None):
        """Algorithm 1, lines 9 to 14: history (B, L) -> x_0 (B, d). With noise, without dropout."""
        training = self.training
        self.eval()
        with self.autocast(history.device.type):
            e = self.embed(history)
            mask = history != 0
            x_s = noise_like(e[:, 0], generator)  # the paper's x_t
            for index in reversed(range(self.config.steps)):
                s = torch.full((len(history),), index, device=history.device)
                x_hat = self.approximate(e, mask, x_s, s, generator)  # Eq. 10 and 16
                mean, variance = self.diffusion.q_posterior(x_hat, x_s, s)
                # Departs: Eq. 17 multiplies the noise by β̃, which by Eq. 4 is its variance.
                x_s = mean + variance.sqrt() * noise_like(x_s, generator)  # Eq. 10 and 17
        self.train(training)
        return x_s

    def scores(self, x_0):
        """Rounding (Eq. 11): how well items fit. x_0 (B, d) -> (B, n_items), item j + 1 at j."""
        items = self.item_embeddings.weight[1:]
        if self.config.rounding == "inner_product":
            return x_0 @ items.T  # Eq. 20
        # Departs: Eq. 21 subtracts two vectors from a number; here, their squared norms, 1 + 1.
        # That is minus the squared distance of the normalised vectors. [9] does not normalise.
        return 2 * F.normalize(x_0) @ F.normalize(items).T - 2

    @torch.no_grad()
    def recommend(self, history, k):
        """The k best items after each history (B, L), from one reversal: items, scores (B, k).

        Reads the last max_len items. The noise follows from the seed, so the same call gives the
        same answer. Raises ValueError on what is no history, or if k is out of range.
        """
        if history.ndim != 2 or history.dtype != torch.int64 or not history.numel():
            raise ValueError("history: give a (B, L) tensor, not empty, of item ids as int64")
        real = history != 0
        if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
            raise ValueError("history: each needs an item, and its padding (0) on the left")
        if not 0 <= history.min() <= history.max() <= self.n_items or not 1 <= k <= self.n_items:
            raise ValueError(f"item ids go from 1 to {self.n_items}, and so must k")
        generator = torch.Generator(history.device).manual_seed(self.config.seed)
        x_0 = self.reverse(history[:, -self.config.max_len :], generator)
        scores, index = self.scores(x_0).topk(k)
        return index + 1, scores


def noise_like(x, generator=None):
    """ε ~ N(0, I) in the shape of x; without a generator, from PyTorch's own random numbers."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


class Dropout(nn.Dropout):
    """Dropout that is faster on a CPU: four elements share one random number of 64 bits."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu" or torch.compiler.is_compiling():
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
        """A digest of all users and items. A run belongs to the data that have its fingerprint."""
        content = self.offsets.tobytes() + self.items.tobytes() + str(self.n_items).encode()
        return hashlib.sha256(content).hexdigest()[:16]


def load_sequences(path):
    """Read the data format: one line per user, that user's item ids oldest first, spaces between.

    Raises OSError, or ValueError that names the first wrong line.
    """
    lines = Path(path).read_text("utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        for word in line.split():
            if not re.fullmatch("0*[1-9][0-9]{0,6}", word):  # at most seven digits
                hint = f"if these are no sequences: python prepare_data.py NAME --raw {path}"
                hint = "add 1 to every id, since 0 is padding" if word == "0" else hint
                raise ValueError(f"{path}:{number}: {word[:40]!r} is not an item id; {hint}")

    users = {number: list(map(int, line.split())) for number, line in enumerate(lines, 1)}
    n_items = max(max(items, default=0) for items in users.values())
    users = {number: items for number, items in users.items() if len(items) >= 3}
    if not users:
        raise ValueError(f"{path}: no line has three items, but a line holds all items of a user")
    items = np.concatenate(list(users.values()))
    if n_items > max(100_000, 100 * len(np.unique(items))):  # each id has a row of embeddings
        raise ValueError(f"{path}: ids go up to {n_items:,} and few occur; number them from 1")
    offsets = np.append(0, np.cumsum(list(map(len, users.values()))))
    return Sequences(items, offsets, np.array(list(users)), n_items)


def train_batches(sequences, max_len, batch_size, rng, device="cpu"):
    """One epoch of (history, target), in random order; rng is a NumPy Generator.

    A user's training part is i_1..i_{n-2}: "7 3 9 4 8" gives 3 after 7, and 9 after 7 3.
    """
    # Departs: Eq. 19 has one target per user. As in the authors' code, every item of a training
    # part but the first is a target, with its own step and noise.
    first = sequences.offsets[:-1]
    last = sequences.offsets[1:] - 1
    targets = np.delete(np.arange(len(sequences.items)), np.concatenate([first, last - 1, last]))
    return make_batches(sequences, targets, max_len, batch_size, rng, device)


def eval_batches(sequences, split, max_len, batch_size, device="cpu"):
    """Every user once, as (history, target), the shortest histories first.

    Of "7 3 9 4 8", "validation" asks for 4 after 7 3 9, and "test" for 8 after 7 3 9 4.
    """
    targets = sequences.offsets[1:] - {"validation": 2, "test": 1}[split]
    return make_batches(sequences, targets, max_len, batch_size, None, device)


def make_batches(sequences, targets, max_len, batch_size, rng, device):
    """Yield (history (B, L), target (B,)) for `targets`, positions in sequences.items.

    With rng the batches come in random order, without it the shortest first.
    """
    # Departs: the paper does not say which samples share a batch. Here it is histories of like
    # length, so that there is hardly any padding.
    starts = np.repeat(sequences.offsets[:-1], np.diff(sequences.offsets))[targets]
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
        before = positions < starts[batch, None]  # the first item of the user: padding
        yield items[positions.clamp(min=0)].masked_fill(before, 0), items[targets[batch]]


# ---- 7. Evaluation (§5.1) -----------------------------------------------------------------------
METRICS = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")
WITHOUT = " without history"  # ends the names of the second ranking's metrics


def ranks(scores, target):
    """The rank of each target, from 1; ties count against it. scores (B, n_items), target (B,).

    Raises FloatingPointError if a score is not finite.
    """
    if not scores.isfinite().all():
        raise FloatingPointError("a score is not finite; train again with a smaller --lr")
    return (scores >= scores.gather(1, target[:, None] - 1)).sum(1)


def metrics(rank, suffix=""):
    """HR@K and NDCG@K, means over the users between 0 and 1. rank (n_users,)."""
    gain = 1 / torch.log2(rank.double() + 1)
    result = {}
    for k in (5, 10, 20):
        hit = (rank <= k).double()
        result[f"HR@{k}{suffix}"] = hit.mean().item()
        result[f"NDCG@{k}{suffix}"] = (hit * gain).mean().item()
    return result


@torch.no_grad()
def evaluate(model, sequences, split, batch_size=512, ranks_file=None):
    """The metrics of two rankings by the same scores: of all items, and without the history's.

    split is "validation" or "test". The noise follows from the seed and batch_size. ranks_file
    gets one line per user, in the order of the data, with the ranks in both.
    """
    device = model.item_embeddings.weight.device
    generator = torch.Generator(device).manual_seed(model.config.seed)
    rank = torch.empty(sequences.n_users, 2, dtype=torch.int64, device=device)

    # Whole histories, since the second ranking needs them; sorted by length, as eval_batches does.
    users = torch.from_numpy(np.argsort(np.diff(sequences.offsets), kind="stable")).to(device)
    batches = eval_batches(sequences, split, len(sequences.items), batch_size, device)
    for user, (history, target) in zip(users.split(batch_size), batches, strict=True):
        scores = model.scores(model.reverse(history[:, -model.config.max_len :], generator))
        rank[user, 0] = ranks(scores, target)
        scores = F.pad(scores, (1, 0))  # column i is item i, and column 0 is padding
        rank[user, 1] = ranks(scores.scatter(1, history, -1e30)[:, 1:], target)

    rank = rank.cpu()
    if ranks_file:
        np.savetxt(ranks_file, rank, fmt="%d")
    return metrics(rank[:, 0]) | metrics(rank[:, 1], WITHOUT)


def popularity(sequences):
    """The test metrics of ranking all items by their frequency in the training parts."""
    held_out = np.append(sequences.offsets[1:] - 1, sequences.offsets[1:] - 2)
    counts = np.bincount(np.delete(sequences.items, held_out), minlength=sequences.n_items + 1)[1:]
    target = sequences.items[sequences.offsets[1:] - 1]
    rarer = np.searchsorted(np.sort(counts), counts[target - 1])  # how many items are rarer
    return metrics(torch.from_numpy(len(counts) - rarer))


# ---- 8. Training (Algorithm 2, §5.3) ------------------------------------------------------------
def train_epoch(model, sequences, optimizer, epoch):
    """One pass over all samples, whose random numbers follow from seed and epoch -> mean loss."""
    config = model.config
    device = model.item_embeddings.weight.device
    rng = np.random.default_rng([config.seed, epoch])
    torch.manual_seed(int(rng.integers(2**63)))
    model.train()

    total = torch.zeros((), device=device)
    for history, target in train_batches(sequences, config.max_len, config.batch_size, rng, device):
        optimizer.zero_grad()
        loss = model(history, target)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(target)
    n_samples = len(sequences.items) - 3 * sequences.n_users  # all but i_1, i_{n-1} and i_n
    return total.item() / n_samples


def train(model, sequences, folder, state, eval_batch_size=512):
    """Train up to `epochs`, or until `patience` validations in a row bring no better NDCG@10.

    Saves after each epoch. Raises FloatingPointError, without saving, if the loss or a weight is
    not finite.
    """
    config = model.config
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])

    while state["epoch"] < config.epochs and state["waited"] < config.patience:
        epoch = state["epoch"] + 1
        started = time.perf_counter()
        loss = train_epoch(model, sequences, optimizer, epoch)
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"epoch {epoch}: the loss is not finite; try a smaller --lr")
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        add_event(state, "epoch", started, {"epoch": epoch, "loss": loss})
        line = f"epoch {epoch}  loss {loss:.4f}"

        if epoch % config.eval_every == 0 or epoch == config.epochs:
            started = time.perf_counter()
            result = evaluate(model, sequences, "validation", eval_batch_size)
            add_event(state, "validation", started, {"epoch": epoch} | result)
            line += f"  validation HR@10 {result['HR@10']:.2%}, NDCG@10 {result['NDCG@10']:.2%}"
            state["waited"] += 1
            if result["NDCG@10"] > state["best"]:
                state |= {"best": result["NDCG@10"], "best_epoch": epoch, "waited": 0}
                state["best_weights"] = weights
                line += ", the best so far"

        spent = sum(event.get("seconds", 0) for event in state["events"]) / 60
        left = spent / epoch * (config.epochs - epoch)
        left = f"about {left:.0f} min" if left >= 1 else "less than a minute"
        print(f"{line}  {left} left", flush=True)
        state |= {"epoch": epoch, "weights": weights, "optimizer": optimizer.state_dict()}
        save_run(folder, state)


def add_event(state, event, started, values):
    """Add an event to the run, with the seconds since `started`."""
    state["events"].append({"event": event, "seconds": time.perf_counter() - started} | values)


def save_run(folder, state):
    """Write the checkpoint, with its SHA-256 at the end, and the log.

    Each is written aside and renamed, so a killed program leaves the old file or the new one.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checkpoint = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    log = "".join(json.dumps(event) + "\n" for event in state["events"])
    for name, content in (("checkpoint.pt", checkpoint), ("log.jsonl", log.encode())):
        (folder / "unfinished").write_bytes(content)
        os.replace(folder / "unfinished", folder / name)


def load_checkpoint(path, weights="best_weights", **changes):
    """The model of a run, on the CPU, and the state that was saved.

    `weights` is "best_weights" or, for the last epoch's, "weights". `changes` are settings that
    replace those of the run. Raises OSError, or ValueError if the file is not a whole checkpoint.
    """
    content = Path(path).read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError(f"{path}: damaged, or of another program; train a new run")
    state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers as they are
        model = DiffuRec(state["n_items"], Config(**state["config"] | changes))
    model.load_state_dict(state[weights])
    return model, state


# ---- 9. Command line ----------------------------------------------------------------------------
# A dataset is recognised by its users, items and actions, as in Table 1, whatever its file's name.
ML_1M = (6_040, 3_416, 999_611)
TOY = (2_000, 200, 20_001)
DATASET_SETTINGS = {ML_1M: {"max_len": 200}, TOY: {"epochs": 12, "embedding_std": 0.1}}
TABLE_2 = {  # DiffuRec's row, in %, in the order of METRICS
    (22_363, 12_101, 198_502): (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566),  # Beauty
    (19_412, 11_924, 167_597): (5.5650, 7.4587, 9.8417, 4.1667, 4.7724, 5.3684),  # Toys
    ML_1M: (17.9659, 26.2647, 36.7870, 12.1150, 14.7909, 17.4386),
    (281_428, 13_044, 3_485_022): (6.6742, 10.7520, 16.6507, 4.2902, 5.5981, 7.0810),  # Steam
    TOY: (68.0162, 90.3037, 100.0, 44.5882, 51.8633, 54.3801),  # the best that anybody can reach
}
CHANGEABLE = ("rounding", "precision", "seed")  # the settings that may change after training


def train_command(args, path, sequences):
    """Train a new run or, with --resume, go on with one; then score the test split."""
    counts = (sequences.n_users, sequences.n_items, len(sequences.items))
    if args.resume:
        folder, model, state = open_run(args, sequences, "weights", ("epochs", "patience"))
        state["config"] = asdict(model.config)
    else:
        config = Config(**DATASET_SETTINGS.get(counts, {}) | args.settings)
        folder, model, state = new_run(args, path, sequences, config)
    print("data   {}: {:,} users, {:,} items, {:,} actions".format(path, *counts))
    print(f"run    {folder}, on {args.device}", flush=True)
    if state["tested"] == state["epoch"]:
        print("finished; larger --epochs, or --patience if that ended it, let it go on")
    train(model, sequences, folder, state, args.eval_batch_size)

    others = {"popularity": popularity(sequences)}
    if counts in TABLE_2:
        label = "ceiling" if counts == TOY else "Table 2"
        others[label] = {name: value / 100 for name, value in zip(METRICS, TABLE_2[counts])}
    if state["tested"] != state["epoch"]:  # not if a finished run is resumed
        model.load_state_dict(state["best_weights"])
        started = time.perf_counter()
        result = evaluate(model, sequences, "test", args.eval_batch_size, folder / "ranks.txt")
        state["events"] += [{"event": label} | row for label, row in others.items()]
        add_event(state, "test", started, {"epoch": state["best_epoch"]} | result)
        state["tested"] = state["epoch"]
    save_run(folder, state)

    result = [event for event in state["events"] if event["event"] == "test"][-1]
    print_results(f"test, epoch {result['epoch']}", result, others)
    print(f"\nnext: {args.same} --recommend {sequences.lines[0]}")


def evaluate_command(args, sequences):
    """Score a run's best epoch on both splits, and add the figures to its log."""
    folder, model, state = open_run(args, sequences, "best_weights", CHANGEABLE)
    print(f"run    {folder}, on {args.device}")
    for split in ("validation", "test"):
        started = time.perf_counter()
        result = evaluate(model, sequences, split, args.eval_batch_size)
        add_event(state, "evaluate", started, {"split": split} | result)
        print_results(f"{split}, epoch {state['best_epoch']}", result, {})
    save_run(folder, state)


def print_results(title, result, others):
    """Print both rankings of a result in %, then other rows, which rank all items."""
    without = {metric: result[metric + WITHOUT] for metric in METRICS}
    rows = {"all items": result, "without the history's items": without}
    rows |= {f"{label}, all items": row for label, row in others.items()}
    print(f"\n{title:28}", *(f"{metric:>8}" for metric in METRICS))
    for label, row in rows.items():
        print(f"{label:28}", *(f"{100 * row[metric]:8.2f}" for metric in METRICS))


def recommend_command(args, path, sequences):
    """Ten items for a user (--recommend) or after a history (--history).

    Also §5.8: how many different items 100 reversals have in their top 20.
    """
    folder, model, state = open_run(args, sequences, "best_weights", CHANGEABLE)
    print(f"run    {folder}, epoch {state['best_epoch']}")
    titles = load_names(path.with_suffix(".items.txt"))
    history = [find_name(word, titles) for word in args.history or ()]
    if args.recommend is not None:
        line = find_name(args.recommend, load_names(path.with_suffix(".users.txt")))
        user = np.searchsorted(sequences.lines, line)
        if line not in sequences.lines:
            raise ValueError(f"--recommend {args.recommend}: no user with three items in that line")
        history = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
    items, _ = model.recommend(torch.tensor([history], device=args.device), min(10, model.n_items))

    for heading, ids in (("the end of the history", history[-10:]), ("next", items[0].tolist())):
        print(f"\n    item  {heading}")
        for item in ids:
            print(f"{item:8}  {''.join(titles[item - 1 : item])}")
    latest = torch.tensor([history[-model.config.max_len :]] * 100, device=args.device)
    top = model.scores(model.reverse(latest)).topk(min(20, model.n_items)).indices
    print(f"\n100 reversals of this history: {len(top.unique())} different items in their top 20")


def load_names(path):
    """The lines of an .items.txt or .users.txt file: entry i - 1 is the name of i."""
    if not path.is_file():
        return []
    return path.read_text("utf-8-sig", errors="replace").removesuffix("\n").split("\n")


def find_name(word, names):
    """`word` as a number or, if it is none, the number of the only name that begins with it."""
    if word.isdecimal() and len(word) < 8:
        return int(word)
    found = [i for i, name in enumerate(names, 1) if name.startswith(word)]
    found = [i for i in found if names[i - 1] == word] or found
    if len(found) != 1:
        hint = "give a number or more of the name, and spaces between items"
        raise ValueError(f"{len(found)} names begin with {word!r}; {hint}")
    return found[0]


def find_data(args):
    """The path and the sequences of --data; a dataset that is not there yet is prepared first.

    Raises OSError or ValueError.
    """
    path = args.data_dir / f"{args.data}.txt"
    path = path if path.is_file() else Path(args.data)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise ValueError(f"--data {args.data}: no such file")
        try:
            import prepare_data
        except ModuleNotFoundError:
            raise ValueError(f"{path}: no such file, and no prepare_data.py to make it") from None
        path = prepare_data.prepare(args.data, args.data_dir)

    sequences = load_sequences(path)
    # A table has few numbers in every line; where users' numbers come first, they rise.
    lengths = np.diff(sequences.offsets)
    first = sequences.items[sequences.offsets[:-1]]
    table = lengths.min() == lengths.max() <= 4 or (np.diff(first) > 0).all()
    if table and len(first) >= 10 and not args.not_a_table:
        hint = f"python prepare_data.py NAME --raw {path}, or add --not-a-table if it is none"
        raise ValueError(f"{path} looks like a table, or begins with the users' numbers: {hint}")
    if lengths.max() == 3:
        raise ValueError(f"{path}: no user has four items; training needs some who have")
    return path, sequences


def new_run(args, path, sequences, config):
    """Folder, model and state of a new run, in --out or in the next one of runs/NAME-1, -2, ..."""
    number = 1
    while Path("runs", f"{path.stem}-{number}").exists():
        number += 1
    folder = args.out or Path("runs", f"{path.stem}-{number}")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file or a broken link; name a folder")
    if (folder / "log.jsonl").exists():
        raise ValueError(f"--out {folder} holds a run; --resume it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    args.lock = lock_run(folder)

    torch.manual_seed(config.seed)
    model = DiffuRec(sequences.n_items, config).to(args.device)
    state = {"config": asdict(config), "n_items": model.n_items, "optimizer": None}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {"weights": weights, "best_weights": weights}
    state |= {"epoch": 0, "best": -1.0, "best_epoch": 0, "waited": 0, "tested": -1}
    start = {"event": "start", "data": path.stem, "fingerprint": sequences.fingerprint}
    state["events"] = [start | {"config": state["config"]}]
    save_run(folder, state)
    return folder, model, state


def open_run(args, sequences, weights, changeable):
    """Folder, model and state of the run in --out, or of the newest run on these sequences.

    Raises ValueError if there is none, or if another setting than the `changeable` ones differs.
    """
    logs = args.out.glob("log.jsonl") if args.out else Path("runs").glob("*/log.jsonl")
    starts = {log: log.read_text(errors="replace").partition("\n")[0] for log in logs}
    logs = [log for log, start in starts.items() if sequences.fingerprint in start]
    if not logs:
        raise ValueError(f"no run on these data yet; train one first: {args.same}")
    folder = max(logs, key=lambda log: log.stat().st_mtime).parent
    args.lock = lock_run(folder)

    changes = {name: value for name, value in args.settings.items() if name in changeable}
    model, state = load_checkpoint(folder / "checkpoint.pt", weights, **changes)
    for name, value in args.settings.items():
        kept = getattr(model.config, name)
        if value != kept:
            raise ValueError(f"{name} is {kept} in this run; leave it out, or train a new run")
    return folder, model.to(args.device), state


def lock_run(folder):
    """Keep other programs out of a run until the result is closed, or this program ends.

    The lock is SQLite's, which works on every system.
    """
    lock = sqlite3.connect(folder / "lock", timeout=0)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        raise ValueError(f"{folder}: another program works on this run; wait for its end") from None
    return lock


def parse_arguments(argv):
    """The command line; args.settings holds the settings of Config that were given."""
    form = argparse.RawDescriptionHelpFormatter
    about = __doc__.partition("\n\nThe file")[0]
    parser = argparse.ArgumentParser(usage="%(prog)s ...", description=about, formatter_class=form)
    parser.error = refuse_arguments  # one line, from main, instead of a page
    add = parser.add_argument
    add("--data", default="toy", help="toy, beauty, toys, ml-1m, steam, or a file of sequences")
    add("--data-dir", type=Path, default="data", help="folder of the datasets (default: data)")
    add("--out", type=Path, help="folder of the run (default: runs/NAME-1, -2, ...)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--not-a-table", action="store_true", help="the file only looks like a table")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the newest run on these data")
    add("--evaluate", action="store_true", help="score its best epoch on both splits")
    add("--recommend", metavar="USER", help="ten items for the user in this line, or of this name")
    add("--history", metavar="ITEM", nargs="+", help="ten items after these, ids or titles")
    add_settings(parser)

    args = parser.parse_args(argv)
    args.settings = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    same = ["python", "diffurec.py", "--data", args.data]
    same += ["--data-dir", args.data_dir] if args.data_dir != Path("data") else []
    same += ["--out", args.out] if args.out else []
    args.same = shlex.join(map(str, same))
    args.lock = None  # that of the run, from when it is open
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.eval_batch_size = 4096 if args.device.startswith("cuda") else 512
    try:
        torch.zeros(1, device=args.device)
    except (AssertionError, RuntimeError):
        raise ValueError(f"--device {args.device}: not usable here; leave --device out") from None
    return args


def add_settings(parser):
    """A flag for each setting, whose help is its comment in Config."""
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        words = get_args(field.type) or None
        kind = str if words else field.type
        text = f"{comments[field.name]} (default: {field.default})"
        parser.add_argument(flag, type=kind, choices=words, default=argparse.SUPPRESS, help=text)


def refuse_arguments(message):
    raise ValueError(f"{message}; --help lists the flags")


def run(argv):
    """Read the command line and call the command that it asks for."""
    args = parse_arguments(argv)
    path, sequences = find_data(args)
    try:
        if args.evaluate:
            evaluate_command(args, sequences)
        elif args.recommend is not None or args.history:
            recommend_command(args, path, sequences)
        else:
            train_command(args, path, sequences)
    finally:
        if args.lock:
            args.lock.close()


def main(argv=None):
    """Returns the exit status: 0, or 1 for numbers not finite, 2 for bad input, 130 for Ctrl-C."""
    # For speed, a tenth of training on some machines: the C library keeps memory that was freed.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and mallopt(-3, 2**30):  # M_MMAP_THRESHOLD, which some versions refuse
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    # For memory: oneDNN keeps fewer of its compiled products.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook
            stream.reconfigure(errors="replace")  # names that the terminal cannot show

    try:
        try:
            run(argv)
        finally:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; --resume goes on after the last finished epoch"
    except FloatingPointError as error:
        status, message = 1, str(error)
    except (OSError, ValueError) as error:
        status, message = 2, str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        status, message = 2, "out of memory; a smaller --batch-size, --max-len or --hidden helps"
    print(f"diffurec.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
