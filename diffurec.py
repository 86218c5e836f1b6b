"""DiffuRec: A Diffusion Model for Sequential Recommendation, in one file.

You give it sequences of items, one user a line, and it learns which item comes next: a Transformer
reads the history while a diffusion model turns noise into the embedding of the next item. Equations
(Eq.), algorithms, sections (§) and tables are the paper's; README.md maps each to its lines here.

Symbols: B users or samples in a batch, L items in a history, d = `hidden`, t = `steps`. Item ids
are 1..n_items, 0 is padding; `history` is (B, L), padded on the left; `target` is (B,). Steps s run
from 0 to t-1, as indices do: the s that §4.3 draws, and the s-1 of §3, Eq. 14 and Algorithm 1.
"""

import argparse
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import prepare_data
from prepare_data import live, load_sequences, write_files

# No result changes. oneDNN would keep compiled products of 1024 shapes: 0.7 GiB, and no faster.
# glibc would return freed memory to the kernel, and get it back slowly, page by page, every batch.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
    ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD

FORMAT = b"DiffuRec checkpoint 1"
DATASET_SETTINGS = {"beauty": {"epochs": 45}, "ml-1m": {"max_len": 200}}
DATASET_SETTINGS["toy"] = {"epochs": 12, "embedding_std": 0.1}


def setting(default, text, *limits):
    """A field of Config, its line in --help, and its limits: lowest and highest, or the words."""
    return field(default=default, metadata={"help": text, "limits": limits})


@dataclass
class Config:
    """The settings, as in §5 where it has them but for embedding_dropout; ValueError off limits."""

    steps: int = setting(32, "diffusion steps t", 1, 1000)
    schedule: str = setting("truncated_linear", "β", "truncated_linear", "linear", "cosine", "sqrt")
    delta: float = setting(0.001, "δ of Eq. 13; 0: no noise at all", 0, 100)
    delta_is: str = setting("variance", "λ's second δ; released code: std", "variance", "std")
    approximator: str = setting("transformer", "f_θ, §4.2 and 5.5", "transformer", "gru")
    rounding: str = setting("inner_product", "of items, Eq. 20 or 21", "inner_product", "r_star")
    hidden: int = setting(128, "embedding size d", 2, 8192)
    blocks: int = setting(4, "Transformer blocks", 1, 100)
    heads: int = setting(4, "attention heads", 1, 1024)
    dropout: float = setting(0.1, "dropout of each sublayer", 0, 0.99)
    embedding_dropout: float = setting(0.5, "dropout of the history's embeddings", 0, 0.99)
    embedding_std: float = setting(0.25, "std of the first embeddings; toy: 0.1", 0, 100)
    max_len: int = setting(50, "items of a history that are read; ml-1m: 200", 1, 100_000)
    batch_size: int = setting(512, "sequences in a batch", 1, 1_000_000)
    lr: float = setting(0.001, "Adam's learning rate", 0, 1000)
    epochs: int = setting(100, "passes over the data, at most; beauty: 45, toy: 12", 1, 1_000_000)
    eval_every: int = setting(5, "epochs from one validation to the next", 1, 1_000_000)
    patience: int = setting(3, "validations without a better NDCG@10, then stop", 1, 1_000_000)
    precision: str = setting("auto", "of matrix products", "auto", "float32", "bfloat16")
    seed: int = setting(1, "of all random numbers", 0, 2**63 - 1)

    def __post_init__(self):
        for f in fields(self):
            value, limits, words = getattr(self, f.name), f.metadata["limits"], f.type is str
            if not (value in limits if words else limits[0] <= value <= limits[1]):
                allowed = (", " if words else " to ").join(map(str, limits))
                raise ValueError(f"--{f.name.replace('_', '-')} {value}: allowed are {allowed}")
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(f"--hidden {self.hidden}: must be even and a multiple of --heads")


# ---- 1. Noise schedule (§4.3, Eq. 14; the others of §5.5) ---------------------------------------
def beta_schedule(name, steps):
    """β_s for s = 1..t, the variance of the noise that each step adds: float64 (steps,), in (0, 1).
    `truncated_linear` is Eq. 14 with τ = 1, and a = 20/t and b = 0.01, which the paper does not
    give; `linear` is DDPM's scaled to t, `cosine` improved diffusion's, `sqrt` Diffusion-LM's.
    """
    s = np.arange(1, steps + 1)
    if name == "truncated_linear":
        betas = (20 / steps) / steps * s + 0.01 / s
        betas = np.where(betas > 1, 0.1 * betas, betas)
    elif name == "linear":
        betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    else:  # defined by ᾱ at u = s/t, hence β_s = 1 - ᾱ_s / ᾱ_{s-1}
        u = np.arange(steps + 1) / steps
        cosine, sqrt = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2, 1 - np.sqrt(u + 0.0001)
        alphas_cumprod = cosine if name == "cosine" else sqrt
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return np.minimum(betas, 0.999)  # a β of 1 or more would leave nothing to reverse


# ---- 2. Diffusion (§3, Eq. 1-6 and 15) ----------------------------------------------------------
class Diffusion(nn.Module):
    """The process q and its posterior; coefficients from float64, kept as float32 buffers (t,)."""

    def __init__(self, schedule, steps):
        super().__init__()
        betas = beta_schedule(schedule, steps)
        alphas_cumprod = np.cumprod(1 - betas)  # Eq. 3
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        left = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        for name, values in (
            ("betas", betas),
            ("alphas_cumprod", alphas_cumprod),
            ("sqrt_alphas_cumprod", np.sqrt(alphas_cumprod)),
            ("sqrt_one_minus_alphas_cumprod", np.sqrt(1 - alphas_cumprod)),
            ("posterior_mean_coef1", np.sqrt(alphas_cumprod_prev) * betas / (1 - alphas_cumprod)),
            ("posterior_mean_coef2", np.sqrt(1 - betas) * left),
            ("posterior_variance", betas * left),
        ):  # not kept in checkpoints: they follow from the settings
            self.register_buffer(name, torch.from_numpy(values).float(), persistent=False)

    def q_sample(self, x_start, s, noise):
        """Eq. 2 and 15: x_s ~ q(x_s | x_start), given standard normal noise.
        x_start = e_{n+1} and noise (B, d), s (B,). §4.3's "one step" from there to x_0 and the s
        steps to x_s are one draw with ᾱ_s."""
        noise = self.sqrt_one_minus_alphas_cumprod[s, None] * noise
        return self.sqrt_alphas_cumprod[s, None] * x_start + noise

    def q_posterior(self, x_start, x_s, s):
        """Eq. 4-6: mean (B, d) and variance (B, 1) of q(x_{s-1} | x_s, x_start); s (B,) in 0..t-1.
        Eq. 5 prints √ᾱ_s before x_s; Bayes' rule gives √α_s. At s = 0: x_start, variance 0."""
        coef1, coef2 = self.posterior_mean_coef1[s, None], self.posterior_mean_coef2[s, None]
        return coef1 * x_start + coef2 * x_s, self.posterior_variance[s, None]


# ---- 3. Approximator (§4.2, Eq. 12-13) ----------------------------------------------------------
def step_embedding(s, dim):
    """d of Eq. 13: sinusoids as in "Attention Is All You Need", §3.5. s (B,) -> (B, dim)."""
    angles = s[:, None] / 10_000 ** (torch.arange(0, dim, 2, device=s.device) / dim)  # (B, dim/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class Dropout(nn.Dropout):
    """Dropout; on a CPU with 16 random bits an element, since drawing them is most of its work."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        uniform = words.view(torch.int16)[: x.numel()].view(x.shape)  # -2¹⁵ to 2¹⁵ - 1
        return x / (1 - self.p) * (uniform >= round(self.p * 2**16) - 2**15).to(x.dtype)


class TransformerBlock(nn.Module):
    """Self-attention, then a ReLU feed-forward network (§4.2), both pre-norm, dropout, residual."""

    def __init__(self, config):
        super().__init__()
        d, self.heads = config.hidden, config.heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.query_key_value, self.output = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.expand, self.contract = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.dropout = Dropout(config.dropout)
        matrices = (*self.query_key_value.weight.chunk(3), self.output.weight)
        for matrix in (*matrices, self.expand.weight, self.contract.weight):
            nn.init.xavier_normal_(matrix)  # §5.3

    def forward(self, z, mask, last_only=False):
        """z (B, L, d), mask (B, L) -> (B, L, d); with last_only the last position's, (B, 1, d)."""
        qkv = self.query_key_value(self.attention_norm(z)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # each (B, heads, L, d/heads)
        z, q = (z[:, -1:], q[:, :, -1:]) if last_only else (z, q)
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # bfloat16, CPU: beats the fused kernel
        weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
        z = z + self.dropout(self.output((weights @ v).transpose(1, 2).flatten(2)))
        return z + self.dropout(self.contract(F.relu(self.expand(self.feed_forward_norm(z)))))


class Transformer(nn.Module):
    """Eq. 12: f_θ, blocks without a causal mask or positions: in which order the items before the
    last stand is not seen. x̂_0 is h_n, what the last block makes of the last item."""

    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, z, mask):
        """z (B, L, d), mask (B, L) -> x̂_0 (B, d). Padded positions are attended to by none."""
        for block in self.blocks[:-1]:
            z = block(z, mask)
        # h_n alone is read, so the last block computes no other position: the same result, sooner.
        return self.norm(self.blocks[-1](z, mask, last_only=True)[:, 0])


class GRU(nn.Module):
    """The *w GRU* row of Table 3 (§5.5): x̂_0 is the state after the last item."""

    def __init__(self, config):
        super().__init__()
        self.gru = nn.GRU(config.hidden, config.hidden, batch_first=True)
        for weight in (*self.gru.weight_ih_l0.chunk(3), *self.gru.weight_hh_l0.chunk(3)):
            nn.init.xavier_normal_(weight)

    def forward(self, z, mask):
        """z (B, L, d), mask (B, L) -> x̂_0 (B, d). Items move to the front, before any padding."""
        length = mask.sum(1)
        index = torch.arange(z.shape[1], device=z.device) + (z.shape[1] - length)[:, None]
        z = z.gather(1, index.clamp(max=z.shape[1] - 1)[:, :, None].expand_as(z))
        return self.gru(z)[0][torch.arange(len(z), device=z.device), length - 1]


# ---- 4. DiffuRec (§4): Algorithm 2's loss, Algorithm 1, and rounding ----------------------------
class DiffuRec(nn.Module):
    """The item embeddings, the diffusion of a target's embedding, and its reversal."""

    def __init__(self, n_items, config):
        super().__init__()
        self.n_items, self.config = n_items, config
        self.item_embeddings = nn.Embedding(n_items + 1, config.hidden, padding_idx=0)  # 0: masked
        nn.init.normal_(self.item_embeddings.weight, std=config.embedding_std)
        self.embedding_norm = nn.LayerNorm(config.hidden)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.diffusion = Diffusion(config.schedule, config.steps)
        self.approximator = {"transformer": Transformer, "gru": GRU}[config.approximator](config)

    def embed(self, history):
        """e_1..e_n after dropout and LayerNorm, which e_{n+1} does not get. (B, L) -> (B, L, d)."""
        return self.embedding_norm(self.embedding_dropout(self.item_embeddings(history)))

    def approximate(self, e, mask, x, s):
        """Eq. 13, then Eq. 12: x̂_0 = f_θ(z_1..z_n), z_i = e_i + λ_i ⊙ (x + d).
        e (B, L, d), mask (B, L), x (B, d), s (B,) -> (B, d). λ ~ N(δ, δ), drawn for each element;
        N(mean, variance) as everywhere in the paper, so its standard deviation is √δ."""
        delta = self.config.delta
        if delta > 0:
            std = math.sqrt(delta) if self.config.delta_is == "variance" else delta
            lambda_ = delta + std * torch.randn_like(e)
            e = e + lambda_ * (x + step_embedding(s, e.shape[-1]))[:, None, :]
        return self.approximator(e, mask)

    @property
    def bfloat16(self):
        """Whether matrix products take and give bfloat16, summing in float32 all the same."""
        device = self.item_embeddings.weight.device.type
        cuda = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amx = device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
        return {"float32": False, "bfloat16": True}.get(self.config.precision, cuda or amx)

    def forward(self, history, target):
        """Algorithm 2, lines 10-14: the loss of a batch, a scalar. history (B, L), target (B,)."""
        with torch.autocast(history.device.type, torch.bfloat16, self.bfloat16):
            x_start = self.item_embeddings(target)
            s = torch.randint(self.config.steps, target.shape, device=target.device)  # ⌊U(0, t)⌋
            x_s = self.diffusion.q_sample(x_start, s, torch.randn_like(x_start))
            x_hat = self.approximate(self.embed(history), history > 0, x_s, s)
            logits = x_hat @ self.item_embeddings.weight[1:].T  # (B, n_items), Eq. 18
        return F.cross_entropy(logits.float(), target - 1)  # Eq. 19

    def reverse(self, history):
        """Algorithm 1, Eq. 16-17, its steps t..1 here t-1..0: from noise to its x_0, an estimate of
        e_{n+1}. (B, L) -> (B, d). x_t, λ and ε' are random in eval mode too."""
        with torch.autocast(history.device.type, torch.bfloat16, self.bfloat16):
            e, mask = self.embed(history), history > 0
            x = torch.randn(len(history), self.config.hidden, device=history.device)
            for step in reversed(range(self.config.steps)):
                s = torch.full((len(history),), step, device=history.device)
                x_hat = self.approximate(e, mask, x, s)
                mean, variance = self.diffusion.q_posterior(x_hat, x, s)
                x = mean + variance.sqrt() * torch.randn_like(x)  # √β̃ (Eq. 4) for Eq. 17's β̃
        return x

    def scores(self, x_0):
        """Rounding: how well each item fits x_0. (B, d) -> (B, n_items), column j for item j+1."""
        items = self.item_embeddings.weight[1:]
        if self.config.rounding == "inner_product":
            return x_0 @ items.T  # Eq. 20
        # Eq. 21 subtracts the vectors x_0/|x_0| and e_i/|e_i| from a number. With their squared
        # norms, 1 and 1, it is 2 cos(x_0, e_i) - 2, their negative squared distance.
        return 2 * F.normalize(x_0) @ F.normalize(items).T - 2

    @torch.no_grad()
    def recommend(self, history, k):
        """The k best items after each history, from one reversal: (items (B, k), scores (B, k)).
        history (B, L), of which the last max_len items are read. Puts the model in eval mode.
        Raises ValueError on ids or k out of range, and on padding that is not on the left."""
        real = history > 0  # (B, L)
        if not real[:, -1:].any(1).all() or (real[:, :-1] > real[:, 1:]).any():
            raise ValueError("a history needs an item, and its padding on the left")
        if not 0 <= history.min() <= history.max() <= self.n_items or not 1 <= k <= self.n_items:
            raise ValueError(f"item ids are 1 to {self.n_items} (0 pads), and so is k")
        self.eval()
        scores, index = self.scores(self.reverse(history[:, -self.config.max_len :])).topk(k)
        return index + 1, scores


# ---- 5. Data (§5.1): leave-one-out, the last item for the test, the one before for validation ----
def gather_batch(sequences, starts, targets, max_len):
    """The items at `targets`, and the history of each, back to `starts` or max_len items long.
    starts, targets (B,), positions in sequences.items -> history (B, L), target (B,), int64."""
    lengths = np.minimum(targets - starts, max_len)
    columns = np.arange(-lengths.max(), 0)
    history = sequences.items.take(targets[:, None] + columns, mode="clip")
    history[columns < -lengths[:, None]] = 0
    return torch.from_numpy(history), torch.from_numpy(sequences.items[targets])


def train_batches(sequences, max_len, batch_size, rng):
    """One epoch of (history, target): every prefix of every user's training part once.
    The training part of i_1..i_n is i_1..i_{n-2}, so its targets are i_2..i_{n-2}. A batch holds
    histories of like length, hence hardly any padding; which, and when, rng (numpy's) decides."""
    samples = np.diff(sequences.offsets) - 3  # of each user
    starts = np.repeat(sequences.offsets[:-1], samples)
    first = np.repeat(np.cumsum(samples) - samples, samples)  # each user's first sample
    targets = starts + 1 + np.arange(len(starts)) - first
    order = rng.permutation(len(starts))
    lengths = np.minimum(targets - starts, max_len)[order]
    order = order[np.argsort(lengths, kind="stable")]
    for i in batch_size * rng.permutation(math.ceil(len(order) / batch_size)):
        batch = order[i : i + batch_size]
        yield gather_batch(sequences, starts[batch], targets[batch], max_len)


def eval_batches(sequences, split, max_len, batch_size):
    """Every user once, as (history, target), shortest histories first.
    split "validation": i_{n-1} after i_1..i_{n-2}; "test": i_n after i_1..i_{n-1}."""
    starts = sequences.offsets[:-1]
    targets = sequences.offsets[1:] - {"validation": 2, "test": 1}[split]
    order = np.argsort(targets - starts, kind="stable")
    for i in range(0, len(order), batch_size):
        batch = order[i : i + batch_size]
        yield gather_batch(sequences, starts[batch], targets[batch], max_len)


# ---- 6. Evaluation (§5.1): HR and NDCG at 5, 10 and 20 over all items ---------------------------
def ranks(scores, target):
    """The rank of each target among all items, from 1; ties count against the model. scores
    (B, n_items), target (B,) -> (B,). FloatingPointError on a score that is not finite."""
    if not scores.isfinite().all():
        raise FloatingPointError("a score is not finite")
    return (scores >= scores.gather(1, target[:, None] - 1)).sum(1)


def metrics(rank):
    """Means over users, fractions of 1: HR@K counts the ranks within K, NDCG@K gives each of them
    1 / log2(rank + 1). rank (n_users,)."""
    result, gain = {}, 1 / torch.log2(rank.double() + 1)
    for k in (5, 10, 20):
        hit = (rank <= k).double()
        result |= {f"HR@{k}": hit.mean().item(), f"NDCG@{k}": (hit * gain).mean().item()}
    return result


@torch.no_grad()
def evaluate(model, sequences, split, batch_size=512, exclude_history=False):
    """Metrics of one reversal for each user; split "validation" or "test".
    Seeded: the same model, seed and batch_size give the same numbers. Leaves it in eval mode.
    All items are ranked; with exclude_history, those of the history come last, the target too."""
    device = model.eval().item_embeddings.weight.device
    rank = torch.empty(sequences.n_users, dtype=torch.int64, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.config.seed)
        batches = eval_batches(sequences, split, model.config.max_len, batch_size)
        for part, (history, target) in zip(rank.split(batch_size), batches, strict=True):
            scores = model.scores(model.reverse(history := history.to(device)))
            if exclude_history:  # column 0 takes what the padding scatters
                scores = F.pad(scores, (1, 0)).scatter(1, history, -1e30)[:, 1:]
            part[:] = ranks(scores, target.to(device))  # kept apart they would fragment the heap
    return metrics(rank.cpu())


def popularity(sequences):
    """The test metrics of ranking items by their count in the training parts, for all alike."""
    held_out = np.concatenate([sequences.offsets[1:] - 1, sequences.offsets[1:] - 2])
    counts = np.bincount(np.delete(sequences.items, held_out), minlength=sequences.n_items + 1)[1:]
    at_least = np.bincount(counts)[::-1].cumsum()[::-1]  # [c]: how many items occur c times or more
    target = sequences.items[sequences.offsets[1:] - 1]
    return metrics(torch.from_numpy(at_least[counts[target - 1]]))


# ---- 7. Training (Algorithm 2, §5.3) ------------------------------------------------------------
def save_checkpoint(path, model, sequences, **state):
    """Write the model and more, so that the file is at any moment the old or the new one, whole."""
    state = {"fingerprint": sequences.fingerprint, "n_items": model.n_items} | state
    state = {"config": asdict(model.config), "model": model.state_dict()} | state
    buffer = io.BytesIO()  # so that a full disk is an OSError of ours, not torch's RuntimeError
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_files({path: [content, hashlib.sha256(FORMAT + content).digest()]})


def load_checkpoint(path, sequences=None):
    """What save_checkpoint wrote, its "model" a DiffuRec in eval mode, all on the CPU.
    Runs no code that the file may hold. Raises OSError, or ValueError on a file that is not a whole
    checkpoint of this program, or was not trained on `sequences` where they are given."""
    content = Path(path).read_bytes()
    try:
        if content[-32:] != hashlib.sha256(FORMAT + content[:-32]).digest():
            raise ValueError
        checkpoint = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        model = DiffuRec(checkpoint["n_items"], Config(**checkpoint["config"])).eval()
        model.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError, TypeError, UnpicklingError, ValueError):
        raise ValueError(f"{path}: not a whole checkpoint of this program") from None
    if sequences and checkpoint["fingerprint"] != sequences.fingerprint:
        raise ValueError(f"{path}: trained on other data than these")
    return checkpoint | {"model": model}


def best_validation(events):
    """The validation with the best NDCG@10 (the first of equals), and how many came after it."""
    validations = [e for e in events if e["event"] == "validation"]
    best = max(validations, key=lambda e: e["NDCG@10"], default=None)
    return best, len(validations) - 1 - validations.index(best) if best else 0


def scored(model, sequences, split, epoch):
    """The event of an evaluation: its metrics and how long it took."""
    begin = time.perf_counter()
    result = evaluate(model, sequences, split, model.config.batch_size)
    return {"event": split, "epoch": epoch, "seconds": time.perf_counter() - begin} | result


def train_epoch(model, sequences, optimizer, epoch):
    """One pass over all samples, an epoch of Algorithm 2. Returns the mean loss (Eq. 19).
    All randomness follows from (seed, epoch), so a resumed run goes on as if never interrupted."""
    config, device, begin = model.config, model.item_embeddings.weight.device, time.perf_counter()
    rng = np.random.default_rng([config.seed, epoch])
    torch.manual_seed(int(rng.integers(2**63)))
    model.train()
    total, seen, shown = torch.zeros((), device=device), 0, begin
    for history, target in train_batches(sequences, config.max_len, config.batch_size, rng):
        optimizer.zero_grad(set_to_none=True)
        loss = model(history.to(device), target.to(device))
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(target)
        seen += len(target)
        if time.perf_counter() > shown + 1:  # seldom: reading the loss makes a GPU wait
            shown = time.perf_counter()
            speed, left = seen / (shown - begin), sequences.n_samples * (config.epochs - epoch + 1)
            left = f"{(left - seen) / speed / 60:.1f} min left at most"
            live(f"epoch {epoch}  loss {total / seen:.4f}  {speed:,.0f} sequences/s  {left}")
    return total.item() / seen


def train(model, sequences, folder, events, optimizer_state=None):
    """Train to `epochs`, or `patience` validations after the best NDCG@10. Keeps best.pt, last.pt,
    log.jsonl in folder; FloatingPointError, before it saves, if loss or weights are not finite."""
    config = model.config
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    epoch = max((e["epoch"] for e in events if e["event"] == "epoch"), default=0)
    while epoch < config.epochs and best_validation(events)[1] < config.patience:
        epoch, begin = epoch + 1, time.perf_counter()
        loss = train_epoch(model, sequences, optimizer, epoch)
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"epoch {epoch}: the loss ({loss}) or a weight is not finite")
        seconds = time.perf_counter() - begin
        events.append({"event": "epoch", "epoch": epoch, "loss": loss, "seconds": seconds})
        line = f"epoch {epoch}  loss {loss:.4f}  {sequences.n_samples / seconds:,.0f} sequences/s"
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            live(f"{line}  validating")
            events.append(scored(model, sequences, "validation", epoch))
            result = events[-1]
            line += f"  validation HR@10 {result['HR@10']:.2%}, NDCG@10 {result['NDCG@10']:.2%}"
            if best_validation(events)[1] == 0:
                save_checkpoint(folder / "best.pt", model, sequences, epoch=epoch)
                line += " *"
        spent = sum(e.get("seconds", 0) for e in events) / 60
        left = spent / epoch * (config.epochs - epoch)
        live("")
        print(f"{line}  {spent:.1f} min, {left:.1f} left at most", flush=True)
        write_log(folder, events)
        state = {"epoch": epoch, "optimizer": optimizer.state_dict()}
        save_checkpoint(folder / "last.pt", model, sequences, **state)


# ---- 8. Command line ----------------------------------------------------------------------------
def parse_arguments(argv):
    """The command line; a setting of Config that is not given is not in the result."""
    parser = prepare_data.Parser(usage="%(prog)s [OPTION ...]", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="toy (default), beauty, toys, ml-1m, steam, or a file in the data format")
    add("--data-dir", type=Path, default="data", help="where prepared files lie (default: data)")
    add("--out", type=Path, help="the run's folder (default: runs/NAME, runs/NAME-2, ...)")
    add("--device", help="any of PyTorch's (default: cuda if there is one, else cpu)")
    group = parser.add_argument_group("with a run that is there, the newest of the data or --out")
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with it")
    add("--evaluate", action="store_true", help="score its best epoch on both splits")
    add("--recommend", type=int, metavar="USER", help="ten items for the user in that line")
    add("--history", type=int, nargs="+", metavar="ID", help="ten items after these, oldest first")
    group = parser.add_argument_group("settings; --seed takes several, for a run each")
    for f in fields(Config):
        words = f": {', '.join(f.metadata['limits'])}" if f.type is str else ""
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            type=f.type,
            nargs="+" if f.name == "seed" else None,
            metavar={int: "N", float: "X", str: "NAME"}[f.type],
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']}{words} (default: {f.default})",
        )
    args = parser.parse_args(argv)
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        args.device = torch.device(name)
        torch.zeros(1, device=args.device).item()
    except (AssertionError, ImportError, RuntimeError):  # unknown to PyTorch, or not here
        raise ValueError(f"--device {name}: PyTorch cannot use it here") from None
    return args


def run_folder(name, out, new):
    """--out or, of runs/NAME, runs/NAME-2, ..., the first that is free, made here, for a new run,
    else the one written to last. Raises ValueError if --out holds a run, or no run is there."""
    logs = Path("runs").glob("*/log.jsonl")
    runs = [(log.parent.stat().st_mtime_ns, len(log.parent.name), log.parent) for log in logs]
    runs = [run for run in runs if re.fullmatch(re.escape(name) + r"(-\d+)?", run[-1].name)]
    last = out or max(runs, default=[Path("runs") / name])[-1]
    if not new and (last / "log.jsonl").exists():
        return last
    for number in itertools.count(1) if new else ():
        folder = out or Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            (folder / "log.jsonl").touch(exist_ok=False)  # of two runs at once, one gets it
            return folder
        except FileExistsError:
            if out:
                raise ValueError(f"{out} holds a run: --resume it, or name another") from None
    raise ValueError(f"{last}: no run is there")


def write_log(folder, events):
    """All events, one JSON object a line; written anew each time, so that the file is whole."""
    write_files({folder / "log.jsonl": [json.dumps(e).encode() + b"\n" for e in events]})


def run_training(model, name, path, sequences, folder, events, checkpoint):
    """Train one seed, from the start or on from `events`; then score the test split, once.
    Returns the test metrics, and prints them beside what there is to compare them with."""
    config, device = model.config, model.item_embeddings.weight.device
    events[:1] = [{"event": "start", "data": name, "path": str(path), "config": asdict(config)}]
    for leftover in folder.glob("*.tmp"):  # a file that was being written when the run was killed
        leftover.unlink()
    write_log(folder, events)
    users, items, actions = sequences.n_users, sequences.n_items, len(sequences.items)
    parameters = sum(p.numel() for p in model.parameters())
    products = "bfloat16" if model.bfloat16 else "float32"
    print(f"data     {path}: {users:,} users, {items:,} items, {actions:,} actions")
    print(f"         {sequences.skipped:,} users skipped, who have fewer than three items")
    print(f"model    {config.approximator}, {parameters:,} parameters, seed {config.seed}")
    print(f"device   {device}, {torch.get_num_threads()} threads, matrix products in {products}")
    print(f"run      {folder}{', finished' * (events[-1]['event'] == 'test')}", flush=True)
    if events[-1]["event"] != "test":
        train(model, sequences, folder, events, checkpoint.get("optimizer"))
        best = load_checkpoint(folder / "best.pt", sequences)
        events.append({"event": "popularity"} | popularity(sequences))
        if np.array_equal(sequences.items, np.concatenate(prepare_data.make_toy())):
            events.append({"event": "ceiling"} | prepare_data.toy_ceiling())
        events.append(scored(best["model"].to(device), sequences, "test", best["epoch"]))
        write_log(folder, events)
    rows = {"DiffuRec": events[-1]}
    rows |= {e["event"]: e for e in events if e["event"] in ("popularity", "ceiling")}
    prepare_data.print_table(f"test, epoch {events[-1]['epoch']}, in %", rows, name)
    print(f"\n{sum(e.get('seconds', 0) for e in events) / 60:.1f} min in all")
    return events[-1]


def print_evaluation(model, sequences, name):
    """Metrics on both splits, and how long the reversal of one user's history takes (§5.7)."""
    for split in ("validation", "test"):
        arguments = model, sequences, split, model.config.batch_size
        rows = {split: evaluate(*arguments)}
        rows["the history's items last"] = evaluate(*arguments, exclude_history=True)
        prepare_data.print_table("in %", rows, name if split == "test" else None)
    history = torch.from_numpy(sequences.items[: sequences.offsets[1]])[None]
    history, begin = history.to(model.item_embeddings.weight.device), time.perf_counter()
    for _ in range(10):
        model.recommend(history, 1)[0].tolist()  # tolist waits for a GPU
    seconds = (time.perf_counter() - begin) / 10
    print(f"\none user's reversal: {1000 * seconds:.1f} ms, {model.config.steps} steps")


@torch.no_grad()
def print_recommendations(model, sequences, history, names):
    """Ten items to follow `history`, a list of ids, and what 100 reversals of it reach (§5.8)."""
    if not 1 <= min(history) <= max(history) <= sequences.n_items:
        raise ValueError(f"--history: item ids are 1 to {sequences.n_items}")
    names = prepare_data.load_names(names) if names.exists() else []
    latest, device = history[-model.config.max_len :], model.item_embeddings.weight.device
    x_0 = model.reverse(torch.tensor([latest] * 100, device=device))
    top = model.scores(x_0).topk(min(20, model.n_items))[1] + 1
    best = top[0, :10].tolist()
    for item, new in [*((item, " ") for item in history[-10:]), *((item, "+") for item in best)]:
        note = "  (in the history)" if new == "+" and item in history else ""
        print(f"{new}{item:>8}  {''.join(names[item - 1 : item])}{note}")
    users = np.random.default_rng(model.config.seed).choice(sequences.n_users, 100)
    starts, ends = sequences.offsets[users], sequences.offsets[users + 1] - 1
    others = gather_batch(sequences, starts, ends, model.config.max_len)[0].to(device)
    near, far = F.pdist(x_0).mean(), F.pdist(model.reverse(others)).mean()
    print(f"100 reversals: {len(top.unique())} different items in their top {top.shape[1]};")
    print(f"mean distance of their x_0 {near:.3g}, of those of 100 random users {far:.3g}")


def run(args):
    """Do what the command line asks for. Raises ValueError or OSError on bad input."""
    using = args.evaluate or args.history or args.recommend is not None
    name, folder, events, start, checkpoint = Path(args.data or "toy").stem, None, [], {}, {}
    if using or args.resume:
        folder = run_folder(name, args.out, new=False)
        try:
            lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            events = [event for event in map(json.loads, lines) if event["event"]]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder}/log.jsonl: not a log of this program") from None
        start = events[0] if events else {}  # none: killed before the first line was written
    name = Path(args.data or start.get("data", name)).stem
    path = prepare_data.find_data(args.data or start.get("path", name), args.data_dir)
    sequences = load_sequences(path)
    if sequences.n_samples == 0:
        raise ValueError(f"{path}: no user has four items or more, there is nothing to train on")
    if using or args.resume and (folder / "last.pt").exists():
        checkpoint = load_checkpoint(folder / ("best.pt" if using else "last.pt"), sequences)
        start["config"] = asdict(checkpoint["model"].config)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    settings = start.get("config", DATASET_SETTINGS.get(name, {}))
    seeds = given.pop("seed", [settings.get("seed", Config.seed)])
    refused = folder or len(set(seeds)) < len(seeds) or args.out and args.out.exists()
    if len(seeds) > 1 and refused:
        raise ValueError("--seed: several make new runs: all different, --out not there yet")
    configs = [Config(**settings | given | {"seed": seed}) for seed in seeds]
    more = () if events and events[-1]["event"] == "test" else ("epochs", "patience")
    free = ("rounding", "batch_size", "precision", "seed") if using else more
    for key, value in start.get("config", {}).items():
        if key not in free and any(getattr(config, key) != value for config in configs):
            raise ValueError(f"--{key.replace('_', '-')}: {folder} was made with {value}")
    results = []
    for config in configs:
        torch.manual_seed(config.seed)
        model = checkpoint.get("model") or DiffuRec(sequences.n_items, config)
        model.to(args.device).config = config
        if args.evaluate:
            return print_evaluation(model, sequences, name)
        if using:
            history = args.history or sequences.in_line(args.recommend).tolist()
            return print_recommendations(model, sequences, history, path.with_suffix(".items.txt"))
        out = args.out / f"seed-{config.seed}" if args.out and len(configs) > 1 else args.out
        here = folder or run_folder(name, out, new=True)
        events = [e for e in events if e.get("epoch", 0) <= checkpoint.get("epoch", 0)]
        results.append(run_training(model, name, path, sequences, here, events[:], checkpoint))
    if len(results) > 1:
        prepare_data.print_seeds(results, name)


def main(argv=None):
    """Returns the exit status: 1 where numbers are not finite, 2 on bad input, 130 on Ctrl-C."""
    try:
        run(parse_arguments(argv))
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; what is saved is kept, --resume goes on from there"
    except (FloatingPointError, OSError, ValueError) as error:
        status, message = 1 if isinstance(error, FloatingPointError) else 2, f"error: {error}"
    live("")
    print(f"diffurec.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
