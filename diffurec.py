"""DiffuRec, a diffusion model for sequential recommendation (Li et al.), in one file.

You give it sequences of items, one line per user, and it learns which item comes next: a
Transformer reads the history and, step by step, turns noise into the embedding of the next item.

  python diffurec.py                               train on a toy dataset of prepare_data.py
  python diffurec.py --data beauty                 download Amazon Beauty, and train on it
  python diffurec.py --data beauty --recommend 1   ten items for the user in line 1

The file follows the paper, whose sections (§), equations (Eq.), algorithms and tables it names.
Where it departs from the paper's text, or fills a gap in it, a comment that begins with "Departs"
says why. "The authors' code" is github.com/WHUIR/DiffuRec.

Shapes   B users or samples in a batch, L items in a history, d the size of an embedding (d of
         Eq. 13 is a vector; see step_embedding), t diffusion steps.
Items    have the ids 1..n_items. history (B, L) is padded on the left with 0; target (B,) holds
         the items that come next.
Steps    have an index s from 0, as in Algorithm 2 (§4.5 counts from 1): index s is step s + 1 of
         Eq. 1-6, 14 and Algorithm 1, so x_s at index 0 has the noise of one step.
Vectors  (B, d) stand for the target: x_start is its embedding e_{n+1}, which Eq. 1-6 call x_0; x_s
         is x_start after the noise of the steps 0..s; x_hat, the paper's x̂_0, is what the
         approximator makes of a history and x_s; x_0 is what a reversal ends with, and scores the
         items (it is not §4.3's x_0, of which q_sample tells).
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("diffurec.py: needs Python 3.11 or newer")

import argparse
import copy
import hashlib
import inspect
import io
import json
import math
import re
import shlex
import signal
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
Schedule = Literal["truncated_linear", "linear", "cosine", "sqrt"]


@dataclass
class Config:
    """All settings. Each is a flag of the command line, and its comment is the line in --help."""

    # Departs: §5.7 sees Beauty's loss converge after 150 epochs; here validation is flat from 30
    # on. Early stopping and the initial embeddings' scale are not in the paper. epochs,
    # embedding_dropout and embedding_std were chosen on Beauty's validation split.
    epochs: int = 45  # passes over the training data, at most (toy: 12)
    seed: int = 1  # seed of the random numbers: another seed gives another run
    eval_every: int = 5  # epochs from one validation to the next
    patience: int = 3  # stop after so many validations without a better NDCG@10
    batch_size: int = 512  # samples in one update of the weights
    lr: float = 0.001  # learning rate of Adam
    max_len: int = 50  # items of a history that are read, the latest ones (MovieLens-1M: 200)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # number format; auto: the faster
    dropout: float = 0.1  # share of each layer's output that training sets to 0
    embedding_dropout: float = 0.5  # dropout of the history's embeddings
    embedding_std: float = 0.25  # standard deviation of the initial embeddings (toy: 0.1)
    delta: float = 0.001  # mean share of the noisy target that goes into the history; 0: none
    delta_is: Literal["variance", "std"] = "variance"  # delta is also that share's variance or std
    steps: int = 32  # diffusion steps
    schedule: Schedule = "truncated_linear"  # how the noise grows from step to step
    rounding: Literal["inner_product", "r_star"] = "inner_product"  # how items are scored
    approximator: Literal["transformer", "gru"] = "transformer"  # what reads the history
    hidden: int = 128  # numbers in an embedding
    blocks: int = 4  # Transformer blocks
    heads: int = 4  # attention heads of each block

    def __post_init__(self):
        """Raises ValueError on a value of the wrong type or out of range."""
        for field in fields(self):
            value = getattr(self, field.name)
            words = get_args(field.type)  # those of a Literal, or ()
            low = 1 if field.type is int and field.name != "seed" else 0
            high = 0.99 if "dropout" in field.name else 10**9
            in_range = type(value) in (int, field.type) and low <= value <= high
            valid = value in words if words else in_range
            if not valid:
                choice = " or ".join(words) or f"{field.type.__name__} from {low} to {high}"
                raise ValueError(f"{field.name} is {value!r}, but must be {choice}")
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(f"hidden is {self.hidden}, but must be even and divisible by heads")


# The settings of a saved run that load_checkpoint() may change. It loads the last epoch's weights
# for --resume, and the best epoch's for --evaluate, --recommend and --history.
CHANGEABLE = {
    "weights": ("epochs", "patience", "precision"),
    "best_weights": ("precision", "rounding"),
}


# ---- 2. Noise schedule (§4.3, Eq. 14; the others are §5.5's) ------------------------------------
def beta_schedule(name, steps):
    """β_1..β_t, the variance of the noise that each step adds: float64 (steps,), within (0, 1)."""
    if name == "truncated_linear":  # Eq. 14
        # Departs: the paper gives no a or b. With these the last β, 20/t + 0.01/t, is close to that
        # of the authors' code, 20/t + 0.01.
        a, b = 20 / steps, 0.01
        s = np.arange(1, steps + 1)  # the paper's s
        betas = a / steps * s + b / s
        betas = np.where(betas > 1, 0.1 * betas, betas)  # τ = 1, exceeded only if t <= 20
    elif name == "linear":  # DDPM's [15], 1000 steps scaled to t; §5.5 cites [25]
        betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    else:  # cosine [25] (§5.5 cites [15]) and sqrt [23] give ᾱ, from which β follows by Eq. 3
        u = np.arange(steps + 1) / steps  # share of the steps that are done
        cosine = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        alphas_cumprod = {"cosine": cosine, "sqrt": 1 - np.sqrt(u + 0.0001)}[name]
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    # Departs: the paper has no cap. But cosine's last β is 1 and sqrt's more than 1, as are those
    # of both linear schedules with few steps. √(1 - β) would be 0 or NaN.
    return np.minimum(betas, 0.999)


# ---- 3. Diffusion (§3, Eq. 1-6; §4.3, Eq. 15) ---------------------------------------------------
class Diffusion(nn.Module):
    """The process q and its posterior. Every coefficient is (steps,), one number for each step."""

    def __init__(self, schedule, steps):
        super().__init__()
        betas = torch.from_numpy(beta_schedule(schedule, steps))  # float64 up to register_buffer
        alphas = 1 - betas  # Eq. 3
        alphas_cumprod = alphas.cumprod(0)  # ᾱ_1..ᾱ_t of Eq. 3
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)  # 1 (ᾱ_0), ᾱ_1..ᾱ_{t-1}
        ratio = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)  # β̃ / β of Eq. 6

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
            self.register_buffer(name, values.float(), persistent=False)  # moves with .to()

    def q_sample(self, x_start, s, noise):
        """Eq. 2, which is Eq. 1 for all steps up to s at once: x_s, drawn from q(x_s | x_start).

        x_start, noise (B, d), s (B,) -> (B, d).
        """
        # Departs: §4.3 and Eq. 15 print α where Eq. 2 has ᾱ. In §4.3 one step goes from e_{n+1} to
        # x_0, and s more from x_0 to x_s. Here index s is these s + 1 steps at once.
        from_start = self.sqrt_alphas_cumprod[s, None] * x_start  # [s, None]: (B, 1)
        return from_start + self.sqrt_one_minus_alphas_cumprod[s, None] * noise

    def q_posterior(self, x_start, x_s, s):
        """Eq. 4-6: mean (B, d) and variance (B, 1) of x_{s-1}, given x_s and x_start. s (B,).

        At index 0 the last noise is removed: the mean is x_start and the variance 0.
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
        self.dropout = nn.Dropout(config.dropout)
        matrices = (self.output.weight, expand.weight, contract.weight)
        for matrix in (*self.query_key_value.weight.chunk(3), *matrices):
            nn.init.xavier_normal_(matrix)  # §5.3; Q, K and V each on its own

    def forward(self, z, mask, last_only=False):
        """z (B, L, d), mask (B, L), False at padding -> (B, L, d), with last_only (B, 1, d)."""
        # Departs: [37] normalises after each residual. Here, as in the authors' code, normalisation
        # comes before each sublayer, which was better in validation.
        qkv = self.query_key_value(self.norm(z))  # (B, L, 3 * d)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, d/heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d/heads)
        if last_only:  # for speed: only the last position of the last block is used
            z = z[:, -1:]
            query = query[:, :, -1:]

        mask = mask[:, None, None, :]  # (B, 1, 1, L): not causal; no position sees padding
        if z.is_cuda:  # softmax(QKᵀ / √d_k) V of [37], d_k = d/heads, in one kernel
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:  # the same step by step, which is faster on a CPU
            scores = query @ key.mT / math.sqrt(query.shape[-1])  # (B, heads, L or 1, L)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
            attended = weights @ value  # (B, heads, L or 1, d/heads)

        z = z + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return z + self.dropout(self.feed_forward(z))


class Transformer(nn.Module):
    """Eq. 12: f_θ. x_hat is h_n, the last block's output at the last item, normalised."""

    def __init__(self, config):
        super().__init__()
        # Departs: [37] adds position embeddings. The authors' code has some, unused, and
        # validation was better without. So the order of the items before the last has no effect.
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.blocks))
        # Departs: a block of [37] ends in a LayerNorm, ours in a sum. So one LayerNorm follows.
        self.norm = nn.LayerNorm(config.hidden)

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
        # Padding would change the state. So items go to the front, and what follows is not used.
        index = mask.int().argsort(dim=1, descending=True, stable=True)  # (B, L)
        states, _ = self.gru(z.take_along_dim(index[:, :, None], dim=1))  # (B, L, d)
        return states[torch.arange(len(z), device=z.device), mask.sum(1) - 1]


# ---- 5. DiffuRec (§4): Algorithm 2, Algorithm 1, rounding ---------------------------------------
class DiffuRec(nn.Module):
    """The item embeddings, the diffusion of the target (Eq. 9) and its reversal (Eq. 10)."""

    def __init__(self, n_items, config):
        super().__init__()
        self.n_items = n_items
        self.config = config
        self.item_embeddings = nn.Embedding(n_items + 1, config.hidden, padding_idx=0)
        nn.init.normal_(self.item_embeddings.weight[1:], std=config.embedding_std)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.embedding_norm = nn.LayerNorm(config.hidden)
        self.diffusion = Diffusion(config.schedule, config.steps)
        self.approximator = {"transformer": Transformer, "gru": GRU}[config.approximator](config)
        # Which devices have units for bfloat16, for precision "auto".
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch has none
        cpu = capabilities.get("avx512_bf16", False)
        cuda = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        self.fast_bfloat16 = {"cpu": cpu, "cuda": cuda}

    def autocast(self, device_type):
        """For speed: in this context matrix products have the number format `precision`."""
        fast = self.fast_bfloat16.get(device_type, False)
        bfloat16 = {"auto": fast, "bfloat16": True, "float32": False}[self.config.precision]
        return torch.autocast(device_type, torch.bfloat16, enabled=bfloat16)

    def embed(self, history):
        """e_1..e_n. history (B, L) -> (B, L, d)."""
        # Departs: the paper takes the embeddings as they are. The authors' code has dropout and
        # LayerNorm here. x_start, the target's embedding, goes through neither.
        return self.embedding_norm(self.embedding_dropout(self.item_embeddings(history)))

    def approximate(self, e, mask, x_s, s, generator=None):
        """Eq. 13, then 12. e (B, L, d), mask (B, L), x_s (B, d), s (B,) -> x_hat (B, d)."""
        # §5.3 says mean and variance, so λ ~ N(δ, δ) has the standard deviation √δ. In the authors'
        # code it is δ: --delta-is std.
        delta = self.config.delta
        std = math.sqrt(delta) if self.config.delta_is == "variance" else delta
        lambda_ = delta + std * torch.empty_like(e).normal_(generator=generator)  # (B, L, d)
        step = step_embedding(s, e.shape[-1]).to(e.dtype)

        z = e + lambda_ * (x_s + step)[:, None, :]  # Eq. 13, where step is called d
        return self.approximator(z, mask)

    def forward(self, history, target):
        """Algorithm 2, lines 10 to 13 and the loss of line 14. history (B, L), target (B,)."""
        with self.autocast(history.device.type):
            x_start = self.item_embeddings(target)
            s = torch.randint(self.config.steps, target.shape, device=target.device)  # line 10
            x_s = self.diffusion.q_sample(x_start, s, torch.randn_like(x_start))  # line 11, Eq. 9
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
            x_s = torch.empty_like(e[:, 0]).normal_(generator=generator)  # pure noise, x_t
            for index in reversed(range(self.config.steps)):
                s = torch.full((len(history),), index, device=history.device)
                x_hat = self.approximate(e, mask, x_s, s, generator)  # Eq. 10 and 16
                mean, variance = self.diffusion.q_posterior(x_hat, x_s, s)
                # Departs: Eq. 17 has β̃ where we have √β̃. By Eq. 4 β̃ is the noise's variance.
                noise = torch.empty_like(x_s).normal_(generator=generator)
                x_s = mean + variance.sqrt() * noise  # Eq. 10 and 17
        self.train(training)
        return x_s  # x_0: at index 0 the mean is x_hat and the variance 0

    def scores(self, x_0):
        """Rounding (Eq. 11): x_0 (B, d) -> scores (B, n_items), of item j + 1 in column j."""
        items = self.item_embeddings.weight[1:]
        if self.config.rounding == "inner_product":
            return x_0 @ items.T  # Eq. 20
        # Departs: Eq. 21 subtracts two vectors from a number. We subtract their squared norms, 1
        # and 1, which gives minus the squared distance of the normalised vectors.
        return 2 * F.normalize(x_0) @ F.normalize(items).T - 2

    @torch.no_grad()
    def recommend(self, history, k):
        """The k best items after each history (B, L), from one reversal: items, scores (B, k).

        Reads the last max_len items. The answer may contain items of the history. The noise follows
        from the seed, so the same call gives the same answer. Raises ValueError if history is
        malformed or k out of range.
        """
        if history.ndim != 2 or history.dtype != torch.int64 or not history.numel():
            raise ValueError("history: give a (B, L) tensor, not empty, of item ids as int64")
        real = history != 0
        padding_after_item = real[:, :-1] & ~real[:, 1:]
        if not real[:, -1].all() or padding_after_item.any():
            raise ValueError("history: each needs an item, and its padding (0) on the left")
        if not 0 <= history.min() <= history.max() <= self.n_items or not 1 <= k <= self.n_items:
            raise ValueError(f"item ids go from 1 to {self.n_items}, and so must k")
        generator = torch.Generator(history.device).manual_seed(self.config.seed)
        x_0 = self.reverse(history[:, -self.config.max_len :], generator)
        scores, index = self.scores(x_0).topk(k)
        return index + 1, scores


# ---- 6. Data (§5.1) -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Sequences:
    """The users of one file who have three items or more, in the order of the file."""

    items: np.ndarray  # int64, the items of all users, one user after another
    offsets: np.ndarray  # int64, n_users + 1: user u has items[offsets[u] : offsets[u + 1]]
    lines: np.ndarray  # int64, n_users: the number of each user's line in the file, from 1
    n_users: int
    n_items: int  # the largest id in the file
    fingerprint: str  # a digest of all this: a run belongs to the data that have its fingerprint


def load_sequences(path):
    """Read the data format: one line per user, that user's item ids oldest first, spaces between.

    Raises OSError, or ValueError that names the first line with anything but ids.
    """
    text = Path(path).read_text("utf-8-sig", errors="replace")
    users = {}  # by the number of their line
    n_items = 0
    for number, line in enumerate(text.split("\n"), 1):
        for word in line.split():
            if not re.fullmatch("0*[1-9][0-9]{0,6}", word):  # at most seven digits after zeros
                hint = f"if these are no sequences: python prepare_data.py NAME --raw {path}"
                if word == "0":
                    hint = "add 1 to every id, since 0 is padding"
                raise ValueError(f"{path}:{number}: {word[:40]!r} is not an item id; {hint}")
        items = [int(word) for word in line.split()]
        n_items = max([n_items, *items])
        if len(items) >= 3:
            users[number] = items

    if not users:
        raise ValueError(f"{path}: no line has three items, but a line holds all items of a user")
    items = np.concatenate(list(users.values()))
    if n_items > max(100_000, 100 * len(np.unique(items))):  # each id has a row of embeddings
        raise ValueError(f"{path}: ids go up to {n_items:,} and few occur; number them from 1")
    offsets = np.cumsum([0, *map(len, users.values())])
    lines = np.array(list(users))
    content = (items.tobytes(), offsets.tobytes(), lines.tobytes(), str(n_items).encode())
    fingerprint = hashlib.sha256(b"|".join(content)).hexdigest()[:16]
    return Sequences(items, offsets, lines, len(users), n_items, fingerprint)


def train_batches(sequences, max_len, batch_size, rng, device="cpu"):
    """One epoch of batches (history, target), in random order; rng is a NumPy Generator.

    A user's training part is i_1..i_{n-2}: "7 3 9 4 8" gives 3 after 7, and 9 after 7 3.
    """
    # Departs: Eq. 19 has one target per user. As in the authors' code, every item of a training
    # part but the first is a target, with its own step and noise.
    first = sequences.offsets[:-1]  # positions of i_1
    last = sequences.offsets[1:] - 1  # of i_n
    targets = np.delete(np.arange(len(sequences.items)), np.concatenate([first, last - 1, last]))
    return make_batches(sequences, rng.permutation(targets), max_len, batch_size, rng, device)


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

    # For each target: the position of its user's i_1, and the length of its history.
    starts = np.repeat(sequences.offsets[:-1], np.diff(sequences.offsets))[targets]
    lengths = np.minimum(targets - starts, max_len)
    order = np.argsort(lengths, kind="stable")  # equal lengths keep the order of targets
    lengths = lengths[order]
    begins = np.arange(0, len(order), batch_size)
    begins = begins if rng is None else rng.permutation(begins)

    items = torch.from_numpy(sequences.items).to(device)
    starts = torch.from_numpy(starts[order]).to(device)
    targets = torch.from_numpy(targets[order]).to(device)
    for begin in begins:
        batch = slice(begin, begin + batch_size)
        # (B, L): the positions before each target, and whether they are before the user's i_1.
        positions = targets[batch, None] + torch.arange(-lengths[batch].max(), 0, device=device)
        padding = positions < starts[batch, None]
        yield items[positions.clamp(min=0)].masked_fill(padding, 0), items[targets[batch]]


# ---- 7. Evaluation (§5.1) -----------------------------------------------------------------------
METRICS = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")
WITHOUT = " without history"  # suffix of metrics in a ranking without the history's items


def ranks(scores, target):
    """The rank of each target, from 1; ties count against it. scores (B, n_items), target (B,).

    Raises FloatingPointError if a score is not finite.
    """
    if not scores.isfinite().all():
        raise FloatingPointError("a score is not finite; train again with a smaller --lr")
    return (scores >= scores.gather(1, target[:, None] - 1)).sum(1)


def metrics(rank, suffix=""):
    """HR@K and NDCG@K, means over the users, from 0 to 1. rank (n_users,)."""
    gain = 1 / torch.log2(rank.double() + 1)
    hits = {k: (rank <= k).double() for k in (5, 10, 20)}
    hr = {f"HR@{k}{suffix}": hit.mean().item() for k, hit in hits.items()}
    return hr | {f"NDCG@{k}{suffix}": (hit * gain).mean().item() for k, hit in hits.items()}


@torch.no_grad()
def evaluate(model, sequences, split, batch_size=None, ranks_file=None):
    """The metrics of two rankings by the same scores: of all items, and without the history's.

    The paper has the first, many others the second. split is "validation" or "test". The noise
    follows from the seed and batch_size. ranks_file gets one line per user, in the order of the
    data: the rank of the target in the first ranking and in the second.
    """
    device = model.item_embeddings.weight.device
    batch_size = batch_size or model.config.batch_size
    generator = torch.Generator(device).manual_seed(model.config.seed)
    rank = torch.empty(sequences.n_users, 2, dtype=torch.int64, device=device)

    # Users in the order of eval_batches, by length. Its max_len here is the number of all actions,
    # which cuts no history: the second ranking needs it whole.
    users = torch.from_numpy(np.argsort(np.diff(sequences.offsets), kind="stable")).to(device)
    batches = eval_batches(sequences, split, len(sequences.items), batch_size, device)
    for user, (history, target) in zip(users.split(batch_size), batches, strict=True):
        scores = model.scores(model.reverse(history[:, -model.config.max_len :], generator))
        rank[user, 0] = ranks(scores, target)
        # The second ranking puts the history's items last, even the target if it is one of them. A
        # column for padding comes first, so that column i is item i. Not -inf: ranks() refuses it.
        scores = F.pad(scores, (1, 0))
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
    """One pass over all samples -> mean loss. Its random numbers follow from seed and epoch."""
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


def train(model, sequences, folder, state):
    """Train up to `epochs`, or until `patience` * `eval_every` epochs bring no better NDCG@10.

    Saves `state` after each epoch: epoch (the last), weights, optimizer, best (an NDCG@10),
    best_epoch, best_weights, events (the log), config, n_items. Raises FloatingPointError if the
    loss or a weight is not finite; that epoch is not saved.
    """
    config = model.config
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)  # fused: faster
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])

    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        if epoch > state["best_epoch"] + config.patience * config.eval_every:
            print("no better validation for some time; a larger --patience would go on")
            break

        started = time.perf_counter()
        loss = train_epoch(model, sequences, optimizer, epoch)
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"epoch {epoch}: numbers are not finite; try a smaller --lr")
        state.update(epoch=epoch, weights=model.state_dict(), optimizer=optimizer.state_dict())
        add_event(state, "epoch", started, {"epoch": epoch, "loss": loss})
        line = f"epoch {epoch}  loss {loss:.4f}"

        if epoch % config.eval_every == 0 or epoch == config.epochs:
            started = time.perf_counter()
            result = evaluate(model, sequences, "validation")
            add_event(state, "validation", started, {"epoch": epoch} | result)
            line += f"  validation HR@10 {result['HR@10']:.2%}, NDCG@10 {result['NDCG@10']:.2%}"
            if result["NDCG@10"] > state["best"]:
                state |= {"best": result["NDCG@10"], "best_epoch": epoch}
                state["best_weights"] = copy.deepcopy(model.state_dict())
                line += ", the best so far"

        kinds = ("epoch", "validation")
        spent = sum(event["seconds"] for event in state["events"] if event["event"] in kinds)
        left = math.ceil(spent / 60 / epoch * (config.epochs - epoch))
        save_run(folder, state)
        print(f"{line}  about {left} min left", flush=True)


def add_event(state, event, started, values):
    """Add an event to the run, with the seconds since `started`."""
    state["events"].append({"event": event, "seconds": time.perf_counter() - started} | values)


def save_run(folder, state):
    """Write the checkpoint, with its SHA-256 at the end, and the log."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checkpoint = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    log = "".join(json.dumps(event) + "\n" for event in state["events"])
    for name, content in (("checkpoint.pt", checkpoint), ("log.jsonl", log.encode())):
        # A program killed here leaves the old file or the new one, whole.
        (folder / "unfinished").write_bytes(content)
        (folder / "unfinished").replace(folder / name)


def load_checkpoint(path, weights="best_weights", **changes):
    """The model of a run, on the CPU, and the state that was saved.

    `weights` is "best_weights" or, for the last epoch's, "weights". `changes` are settings that
    replace the run's. Raises OSError, or ValueError on a file that is not a whole checkpoint, on
    weights that are not there yet and on a change of a setting that is not CHANGEABLE.
    """
    content = Path(path).read_bytes()  # torch.load alone would not notice a changed byte
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError(f"{path}: damaged, or of another program; train a new run")
    state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)

    if not state[weights]:
        raise ValueError(f"{path}: no validation yet; --resume it, with more --epochs if it ended")
    for name, kept in state["config"].items():
        if changes.get(name, kept) != kept and name not in CHANGEABLE[weights]:
            raise ValueError(f"{name} is {kept} in this run; leave it out, or train a new run")
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers as they are
        model = DiffuRec(state["n_items"], Config(**state["config"] | changes))
    model.load_state_dict(state[weights])
    return model, state


# ---- 9. Command line ----------------------------------------------------------------------------
# Datasets are recognised by their numbers of users, items and actions (Table 1), not by file names.
ML_1M = (6_040, 3_416, 999_611)
TOY = (2_000, 200, 20_001)
DATASET_SETTINGS = {ML_1M: {"max_len": 200}, TOY: {"epochs": 12, "embedding_std": 0.1}}
# DiffuRec's column, in %, in the order of METRICS. prepare_data.py makes the toy's sequences by a
# rule: its row is what a ranking by that rule scores, the "ceiling".
TABLE_2 = {
    (22_363, 12_101, 198_502): (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566),  # Beauty
    (19_412, 11_924, 167_597): (5.5650, 7.4587, 9.8417, 4.1667, 4.7724, 5.3684),  # Toys
    ML_1M: (17.9659, 26.2647, 36.7870, 12.1150, 14.7909, 17.4386),
    (281_428, 13_044, 3_485_022): (6.6742, 10.7520, 16.6507, 4.2902, 5.5981, 7.0810),  # Steam
    TOY: (68.0162, 90.3037, 100.0, 44.5882, 51.8633, 54.3801),
}


def train_command(args, sequences, folder):
    """Train a new run, or go on with one (--resume); then score its best epoch.

    args holds the flags; parse_arguments() adds settings; run() adds config, counts, command_line.
    """
    if args.resume:
        model, state = load_checkpoint(folder / "checkpoint.pt", "weights", **args.settings)
        state["config"] = asdict(model.config)
        save_run(folder, state)  # or score() would load the old config, and refuse --epochs
    else:
        torch.manual_seed(args.config.seed)
        model = DiffuRec(sequences.n_items, args.config)
        state = {"config": asdict(args.config), "n_items": model.n_items, "optimizer": None}
        state |= {"epoch": 0, "best": -1, "best_epoch": 0, "best_weights": None}
        start = {"event": "start", "data": args.data, "fingerprint": sequences.fingerprint}
        state["events"] = [start | {"config": state["config"]}]

    train(model.to(args.device), sequences, folder, state)
    score(args, sequences, folder, "test")
    print(f"\nnext: {args.command_line} --recommend {sequences.lines[0]}")


def score(args, sequences, folder, split):
    """Score a run's best epoch, add the figures to its log, and print both rankings in %."""
    model, state = load_checkpoint(folder / "checkpoint.pt", **args.settings)
    ranks_file = None if args.evaluate else folder / "ranks.txt"
    started = time.perf_counter()
    result = evaluate(model.to(args.device), sequences, split, ranks_file=ranks_file)
    others = {"popularity": popularity(sequences)} if split == "test" else {}
    if split == "test" and args.counts in TABLE_2:
        label = "ceiling" if args.counts == TOY else "Table 2"
        others[label] = {name: value / 100 for name, value in zip(METRICS, TABLE_2[args.counts])}

    values = {"epoch": state["best_epoch"]} | result
    if args.evaluate:
        add_event(state, "evaluate", started, {"split": split} | args.settings | values)
    else:  # a resumed run is scored again, in place of the last time
        kept = ("start", "epoch", "validation", "evaluate")
        state["events"] = [event for event in state["events"] if event["event"] in kept]
        state["events"] += [{"event": label} | row for label, row in others.items()]
        add_event(state, "test", started, values)
    save_run(folder, state)

    rows = {"all items": result}
    rows["without the history's items"] = {name: result[name + WITHOUT] for name in METRICS}
    rows |= {f"{label}, all items": row for label, row in others.items()}
    title = f"{split}, epoch {state['best_epoch']}"
    print(f"\n{title:28}", *(f"{name:>8}" for name in METRICS))
    for label, row in rows.items():
        print(f"{label:28}", *(f"{100 * row[name]:8.2f}" for name in METRICS))


def recommend_command(args, sequences, folder, titles_file):
    """Print ten items for a user, or after a history, and §5.8's measure of uncertainty.

    This is the number of different items in the top 20 of 100 reversals, with new noise in each.
    Line i of titles_file, if there is one, is the title of item i.
    """
    model, _ = load_checkpoint(folder / "checkpoint.pt", **args.settings)
    model.to(args.device)
    history = args.history
    if args.recommend is not None:
        if args.recommend not in sequences.lines:
            raise ValueError(f"--recommend {args.recommend}: no such line with three items or more")
        user = sequences.lines.tolist().index(args.recommend)
        history = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
    if not 1 <= min(history) <= max(history) <= model.n_items:
        raise ValueError(f"--history: item ids go from 1 to {model.n_items} in these data")

    history = torch.tensor([history], device=args.device)
    items, _ = model.recommend(history, min(10, model.n_items))
    titles = {}
    if titles_file.is_file():
        titles = dict(enumerate(titles_file.read_text("utf-8-sig", "replace").split("\n"), 1))
    for heading, ids in (("the end of the history", history[0, -10:]), ("next", items[0])):
        print(f"\n    item  {heading}")
        for item in ids.tolist():
            print(f"{item:8}  {titles.get(item, '')}")

    reversals = model.reverse(history[:, -model.config.max_len :].expand(100, -1))
    top = model.scores(reversals).topk(min(20, model.n_items)).indices
    print(f"\n100 reversals of this history: {len(top.unique())} different items in their top 20")


def find_data(args):
    """The path and the sequences of --data; a dataset that is not there yet is prepared first."""
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

    # Signs of a table: every line has three numbers, or every line four (user, item, rating, time),
    # or the first number of a line, in a table the user's, rises from line to line.
    lengths = np.diff(sequences.offsets)
    first_items = sequences.items[sequences.offsets[:-1]]
    table = lengths.min() == lengths.max() <= 4 or (np.diff(first_items) > 0).all()
    if table and len(first_items) >= 10 and not args.not_a_table:
        hint = f"python prepare_data.py NAME --raw {path}, or add --not-a-table if it is none"
        raise ValueError(f"{path} looks like a table, or begins with the users' numbers: {hint}")
    if lengths.max() == 3:
        raise ValueError(f"{path}: no user has four items; training needs some who have")
    return path, sequences


def find_run(args, path, sequences):
    """The folder of a new run or, with --resume and other commands, of the one written last."""
    if args.resume or args.evaluate or args.recommend is not None or args.history:
        logs = (args.out or Path("runs")).rglob("log.jsonl")
        logs = [log for log in logs if sequences.fingerprint in log.read_text(errors="replace")]
        if not logs:
            raise ValueError(f"no run on these data in {args.out or 'runs'}; train one first")
        return max(logs, key=lambda log: log.stat().st_mtime).parent

    number = 1
    while Path("runs", f"{path.stem}-{number}").exists():
        number += 1
    folder = args.out or Path("runs", f"{path.stem}-{number}")
    if (folder.is_symlink() or folder.exists()) and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file or a broken link; name a folder")
    if (folder / "log.jsonl").exists():
        raise ValueError(f"--out {folder} holds a run; --resume it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parse_arguments(argv):
    """The command line; args.settings holds the settings of Config that were given."""

    def refuse(message):
        raise ValueError(f"{message}; --help lists the flags")

    about = __doc__.partition("\n\nThe file")[0]  # what stands above "The file follows"
    parser = argparse.ArgumentParser(usage="%(prog)s ...", description=about, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = refuse  # one line, from main, instead of a page
    add = parser.add_argument
    add("--data", default="toy", help="toy, beauty, toys, ml-1m, steam, or a file of sequences")
    add("--data-dir", type=Path, default="data", help="folder of the datasets (default: data)")
    add("--out", type=Path, help="folder of the run (default: runs/NAME-1, -2, ...)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu or cuda (default: cuda if there is one)")
    add("--not-a-table", action="store_true", help="the file only looks like a table")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run written last on these data")
    add("--evaluate", action="store_true", help="score that run's best epoch on both splits")
    add("--recommend", metavar="LINE", type=int, help="ten items after all those of this line")
    add("--history", metavar="ITEM", type=int, nargs="+", help="ten items after these ids")

    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))  # by setting
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        text = f"{comments[field.name]} (default: {field.default})"
        kind = {"type": type(field.default), "choices": get_args(field.type) or None}
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    args = parser.parse_args(argv)
    args.settings = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    return args


def run(argv):
    """Find the data and the run of a command line, and call its command while the run is locked."""
    args = parse_arguments(argv)
    args.command_line = shlex.join(["python", "diffurec.py", *argv]).replace(" --resume", "")
    try:
        torch.zeros(1, device=args.device)
    except (AssertionError, RuntimeError):
        raise ValueError(f"--device {args.device}: not usable here; leave --device out") from None
    path, sequences = find_data(args)
    args.counts = (sequences.n_users, sequences.n_items, len(sequences.items))
    args.config = Config(**DATASET_SETTINGS.get(args.counts, {}) | args.settings)
    folder = find_run(args, path, sequences)
    print("data   {}: {:,} users, {:,} items, {:,} actions".format(path, *args.counts))
    print(f"run    {folder}, on {args.device}", flush=True)

    with sqlite3.connect(folder / "lock", timeout=0) as lock:
        lock.execute("BEGIN EXCLUSIVE")  # a lock on every system, free again when a program ends
        if args.evaluate:
            score(args, sequences, folder, "validation")
            score(args, sequences, folder, "test")
        elif args.recommend is not None or args.history:
            recommend_command(args, sequences, folder, path.with_suffix(".items.txt"))
        else:
            train_command(args, sequences, folder)


def main(argv=None):
    """Returns 0, or 1 if numbers are not finite, 130 on Ctrl-C, 2 on other errors caught here."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; --resume goes on after the last finished epoch, if any"
    except FloatingPointError as error:
        status, message = 1, str(error)
    except sqlite3.OperationalError as error:
        status, message = 2, f"cannot lock the run ({error}); if another program has it, wait"
    except (OSError, ValueError) as error:
        status, message = 2, str(error)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():
            raise
        status, message = 2, "out of memory; train with smaller --batch-size, --max-len or --hidden"
    print(f"diffurec.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for titles that the terminal cannot show
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    sys.exit(main())
