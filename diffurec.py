"""DiffuRec, a diffusion model for sequential recommendation (Li et al.), in one file.

You give it sequences of items, one line per user, and it learns which item comes next: a
Transformer reads the history and turns noise, step by step, into a vector for that item.

  python diffurec.py                                 train on a toy dataset, for a minute
  python diffurec.py --data beauty                   get Amazon Beauty, and train on it
  python diffurec.py --data beauty --recommend 12 7  ten items that may follow 12 and 7

The file follows the paper, arXiv:2304.00686: its sections (§), equations (Eq.) and
references [37]. Where the code departs from its text, or fills a gap in it, a comment
that begins with "Departs" says why. "The authors' code" is github.com/WHUIR/DiffuRec.

Shapes   B samples in a batch, L items in a history, d numbers in an embedding, t steps.
Items    have the ids 1..n_items. history (B, L) is padded on the left with 0; mask (B, L)
         is True at items, False at padding; target (B,) holds the items that come next.
Steps    count from 0, as in Algorithm 2, in the step embedding too. Departs: index s is
         step s + 1 of Eq. 1-8, 10, 14, 16, 17, Algorithm 1, §4.2 and §4.5.
Order    of the items before the last has no effect with the Transformer: no positions.

Four vectors (B, d) stand for the target:
  here      the paper                     what it is
  x_start   e_{n+1}; x_0 of Eq. 1-8       the target's embedding, without noise
  x_s       x_s, x_t; x_0 of §4.3, Eq. 9  noisy x_start; pure noise as a reversal begins
  x_hat     x̂_0                           what the approximator makes of history and x_s
  x_0       x_0 of Alg. 1, Eq. 11, 20-21  what the reversal ends with; it scores the items
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if sys.version_info < (3, 11) or torch.__version__ < (2, 4):
    sys.exit("diffurec.py: needs Python 3.11 or newer and PyTorch 2.4 or newer")


# ---- 1. Settings (§5.1, 5.3, 5.7) ---------------------------------------------------------------
def setting(default, description, *others):
    """A field of Config, and a flag of the command line. others: the other choices."""
    choices = (default, *others) if others else None
    text = f"{description} (default: {default})"
    return field(default=default, metadata={"choices": choices, "help": text})


@dataclass
class Config:
    """All settings: the paper's values, where it has any; the comment's four are ours."""

    # Departs: epochs (§5.7: 150 or so), lr_decay_epoch (§5.3: "initial" rate, no more),
    # embedding_dropout (one dropout) and embedding_std (nothing): by Beauty's validation.
    epochs: int = setting(35, "passes over the training data, at most")
    seed: int = setting(1, "seed of the random numbers; another seed gives another run")
    eval_every: int = setting(5, "epochs from one validation to the next")
    patience: int = setting(3, "stop after this many validations without a best NDCG@10")
    batch_size: int = setting(512, "samples in one update of the weights; users in evaluation")
    lr: float = setting(0.001, "learning rate of Adam")
    lr_decay_epoch: int = setting(30, "epoch after which the learning rate is a tenth of lr")
    max_len: int = setting(50, "items of a history that are read, the latest")
    precision: str = setting("auto", "number format; auto: bfloat16 where it is faster", "float32")
    dropout: float = setting(0.1, "share of a layer's outputs that training sets to 0")
    embedding_dropout: float = setting(0.5, "the same of the history's embeddings")
    embedding_std: float = setting(0.25, "standard deviation of the initial embeddings")
    delta: float = setting(0.001, "mean and variance of λ, which mixes the noisy target in")
    steps: int = setting(32, "diffusion steps")
    schedule: str = setting("truncated_linear", "growth of the noise", "linear", "cosine", "sqrt")
    approximator: str = setting("transformer", "what reads the history", "gru")
    rounding: str = setting("inner_product", "how items are scored; r_star: Eq. 21", "r_star")
    hidden: int = setting(128, "numbers in an embedding")
    blocks: int = setting(4, "Transformer blocks")
    heads: int = setting(4, "attention heads of each block")

    def __post_init__(self):
        """Raises ValueError on a value that is out of range."""
        for each in fields(self):
            value = getattr(self, each.name)
            choices = each.metadata["choices"]
            low = 1 if each.type is int and each.name != "seed" else 0
            high = 0.99 if "dropout" in each.name else 10**9
            if not (value in choices if choices else low <= value <= high):
                raise ValueError(f"{each.name}: {value} is not in {choices or [low, high]}")
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(f"hidden: {self.hidden} is odd or no multiple of heads, {self.heads}")


# ---- 2. Noise schedule (§4.3, Eq. 14; the others are §5.5's) ------------------------------------
def beta_schedule(name, steps):
    """β_1..β_t, the variance of the noise of each step: float64 (t,), within (0, 1)."""
    if name == "truncated_linear":  # Eq. 14; the algorithms call it Linear
        # Departs: the paper gives no a or b. If t > 20, the last β is 20/t + 0.01/t with
        # these, close to that of the authors' code, 20/t + 0.01.
        a, b = 20 / steps, 0.01
        s = np.arange(1, steps + 1)  # the paper's s
        betas = a / steps * s + b / s
        betas = np.where(betas > 1, 0.1 * betas, betas)  # τ = 1, exceeded only if t <= 20
    elif name == "linear":  # DDPM's [15]; §5.5 cites [25]
        # Departs: the paper has no values. DDPM's: 0.0001 to 0.02 for t = 1000, × 1000/t.
        betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    else:  # cosine [25] (§5.5: [15]), offset 0.008, and sqrt [23], 0.0001, give ᾱ; β by Eq. 3
        u = np.arange(steps + 1) / steps  # share of steps done, from 0: ᾱ_0 is the curve's
        cosine = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        alphas_cumprod = {"cosine": cosine, "sqrt": 1 - np.sqrt(u + 0.0001)}[name]
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    # Departs: the cap, 0.999. Cosine's last β would be 1 and sqrt's above 1; with few
    # steps those of both linear schedules, too. √(1 - β) would be 0 or NaN.
    return np.minimum(betas, 0.999)


# ---- 3. Diffusion (§3, Eq. 1-6; §4.3, Eq. 15) ---------------------------------------------------
class Diffusion(nn.Module):
    """The process q and its posterior. Each coefficient is (t,), one number per step."""

    def __init__(self, schedule, steps):
        super().__init__()
        betas = torch.from_numpy(beta_schedule(schedule, steps))  # float64 up to .float()
        alphas = 1 - betas  # Eq. 3
        alphas_cumprod = alphas.cumprod(0)  # ᾱ_1..ᾱ_t of Eq. 3
        alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)  # 1 (ᾱ_0), ᾱ_1..ᾱ_{t-1}
        ratio = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)  # Eq. 6, divided by β

        # Departs: Eq. 5 has √ᾱ_s before x_s, and §4.4 leaves out all bars. The mean of
        # Eq. 4 needs √α_s there, as in DDPM, and ᾱ elsewhere.
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
        """Eq. 2, all steps of Eq. 1 at once: x_start, noise (B, d), s (B,) -> x_s."""
        # Departs: §4.3 and Eq. 15 print α where Eq. 2 has ᾱ. In §4.3 one step goes from
        # e_{n+1} to x_0, and s more to x_s. Index s is these s + 1 steps at once.
        from_start = self.sqrt_alphas_cumprod[s, None] * x_start  # [s, None]: (B, 1)
        return from_start + self.sqrt_one_minus_alphas_cumprod[s, None] * noise

    def q_posterior(self, x_start, x_s, s):
        """Eq. 4-6: mean (B, d), variance (B, 1) of x_{s-1}. x_start may be x_hat."""
        # At index 0 the last noise is removed: the mean is x_start and the variance 0.
        from_start = self.posterior_mean_coef1[s, None] * x_start
        from_noisy = self.posterior_mean_coef2[s, None] * x_s
        return from_start + from_noisy, self.posterior_variance[s, None]


# ---- 4. Approximator (§4.2, Eq. 12) -------------------------------------------------------------
def step_embedding(s, dim):
    """The vector d of Eq. 13: the sinusoids of [37]. s (B,) -> (B, dim)."""
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
        # Departs: the paper gives no width and no initial biases: [37]'s 4d, PyTorch's.
        expand = nn.Linear(d, 4 * d)
        contract = nn.Linear(4 * d, d)
        self.feed_forward = nn.Sequential(nn.LayerNorm(d), expand, nn.ReLU(), contract)
        self.dropout = nn.Dropout(config.dropout)
        matrices = (self.output.weight, expand.weight, contract.weight)
        for matrix in (*self.query_key_value.weight.chunk(3), *matrices):
            nn.init.xavier_normal_(matrix)  # §5.3; Q, K and V each on its own

    def forward(self, z, mask, last_only=False):
        """z (B, L, d), mask (B, L) -> (B, L, d), or with last_only (B, 1, d)."""
        # Departs: [37] normalises after each residual; here, as in the authors' code,
        # before each sublayer: 1.4 points of validation NDCG@10 more (Beauty, 5 epochs).
        qkv = self.query_key_value(self.norm(z))  # (B, L, 3 * d)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, d/heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d/heads)
        if last_only:  # for speed: of the last block's output only h_n is used
            z = z[:, -1:]
            query = query[:, :, -1:]

        # Departs: the paper has no padding. Here no position sees any; in the authors'
        # code each sees all, so that a result depends on how much there is.
        mask = mask[:, None, None, :]  # (B, 1, 1, L): not causal, like the encoder of [37]
        if z.is_cuda:  # softmax(QKᵀ / √d_k) V of [37], d_k = d/heads, in one kernel
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:  # the same step by step, which is faster on a CPU
            scores = query @ key.mT / math.sqrt(query.shape[-1])  # (B, heads, L or 1, L)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
            attended = weights @ value  # (B, heads, L or 1, d/heads)

        z = z + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))  # (B, L or 1, d)
        return z + self.dropout(self.feed_forward(z))


class Transformer(nn.Module):
    """Eq. 12: f_θ. x_hat is h_n, the last block's output at the last item, normalised."""

    def __init__(self, config):
        super().__init__()
        # Departs: [37] adds position embeddings. The authors' code has some, unused, and
        # validation NDCG@10 was 0.3 points better without (Beauty, 5 epochs).
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.blocks))
        # Departs: a block of [37] ends in a LayerNorm, ours in a sum. So one follows h_n.
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, z, mask):
        """z (B, L, d), z_1..z_n, mask (B, L) -> x_hat (B, d)."""
        # Departs: Eq. 12 starts at z_0; there is none, and the algorithms start at z_1.
        for block in self.blocks[:-1]:
            z = block(z, mask)
        return self.norm(self.blocks[-1](z, mask, last_only=True)[:, 0])


class GRU(nn.Module):
    """*w GRU* of Table 3 (§5.5): x_hat is the state after the last item."""

    def __init__(self, config):
        super().__init__()
        # Departs: the paper gives no depth and no initial values: one layer, PyTorch's.
        self.gru = nn.GRU(config.hidden, config.hidden, batch_first=True)

    def forward(self, z, mask):
        """z (B, L, d), mask (B, L) -> x_hat (B, d)."""
        # Padding would change the state. So items go to the front; the rest is not used.
        index = mask.int().argsort(dim=1, descending=True, stable=True)  # (B, L)
        states, _ = self.gru(z.take_along_dim(index[:, :, None], dim=1))  # (B, L, d)
        return states[torch.arange(len(z), device=z.device), mask.sum(1) - 1]


# ---- 5. DiffuRec (§4): Algorithm 2, Algorithm 1, rounding ---------------------------------------
def split_batch(history, *others):
    """For speed: a batch in five parts, [(history, *others), ...], with less padding."""
    if history.device.type != "cpu" or len(history) < 64:  # a GPU's any() is waited for
        return [(history, *others)]
    cuts = [len(history) * n // 16 for n in (8, 12, 14, 15)]  # first the half that is shorter
    parts = zip(*(x.tensor_split(cuts) for x in (history, *others)), strict=True)
    return [(h[:, h.any(0)], *rest) for h, *rest in parts]  # no columns of padding alone


class DiffuRec(nn.Module):
    """The item embeddings, the target's diffusion (Eq. 9) and its reversal (Eq. 10)."""

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

    def autocast(self, device_type):
        """Departs: for speed, products of matrices in bfloat16, where that is faster."""
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.4 has none
        fast = capabilities.get("avx512_bf16", False)
        if device_type == "cuda":
            fast = torch.cuda.get_device_capability() >= (8, 0)
        enabled = fast and self.config.precision == "auto"
        return torch.autocast(device_type, torch.bfloat16, enabled=enabled)

    def embed(self, history):
        """e_1..e_n. history (B, L) -> (B, L, d)."""
        # Departs: the paper takes the embeddings as they are. The authors' code has
        # dropout and LayerNorm here. x_start, of the target, goes through neither.
        return self.embedding_norm(self.embedding_dropout(self.item_embeddings(history)))

    def approximate(self, e, mask, x_s, s, generator=None):
        """Eq. 13, 12. e (B, L, d), mask (B, L), x_s (B, d), s (B,) -> x_hat (B, d)."""
        # Departs: the algorithms write λ_i as a number, Eq. 13 as a vector, as here. δ is
        # the variance (§5.3); in the authors' code it is the standard deviation.
        delta = self.config.delta
        lambda_ = delta + math.sqrt(delta) * torch.empty_like(e).normal_(generator=generator)
        step = step_embedding(s, e.shape[-1]).to(e.dtype)  # float64 if the model is
        z = e + lambda_ * (x_s + step)[:, None, :]  # Eq. 13, where step is called d; (B, L, d)
        return self.approximator(z, mask)

    def forward(self, history, target):
        """Algorithm 2, lines 10-13, and the loss of line 14. history (B, L), target (B,).

        Draws s (torch.randint), ε, λ. §4.5 has Eq. 18-19 in place of diffusion's usual
        loss, Eq. 7-8. f_θ does not predict ε, which failed in the paper (§5.5).
        """
        with self.autocast(history.device.type):
            x_start = self.item_embeddings(target)  # e_{n+1}; x_s passes gradients to it, too
            s = torch.randint(self.config.steps, target.shape, device=target.device)  # line 10
            x_s = self.diffusion.q_sample(x_start, s, torch.randn_like(x_start))  # line 11, Eq. 9
            parts = split_batch(history, x_s, s)  # lines 12, 13 for one part after another
            x_hat = [self.approximate(self.embed(h), h != 0, x, s) for h, x, s in parts]
            logits = torch.cat(x_hat) @ self.item_embeddings.weight[1:].T  # (B, n_items)
        return F.cross_entropy(logits.float(), target - 1)  # softmax, -log and mean: Eq. 18, 19

    @torch.no_grad()
    def reverse(self, history, generator=None):
        """Algorithm 1, lines 9-14; no dropout; mode kept. (B, L) -> x_0 (B, d)."""
        history = history[:, -self.config.max_len :]  # Departs: the latest; §5.1 is silent
        training = self.training
        self.eval()
        with self.autocast(history.device.type):
            e = self.embed(history)
            x_s = torch.empty_like(e[:, 0]).normal_(generator=generator)  # the paper's x_t
            for index in reversed(range(self.config.steps)):
                s = torch.full((len(history),), index, device=history.device)
                x_hat = self.approximate(e, history != 0, x_s, s, generator)  # Eq. 10, 16
                mean, variance = self.diffusion.q_posterior(x_hat, x_s, s)
                # Departs: Eq. 17 and Algorithm 1 have β̃. It is a variance (Eq. 4): √β̃.
                noise = torch.empty_like(x_s).normal_(generator=generator)
                x_s = mean + variance.sqrt() * noise  # Eq. 10 and 17
        self.train(training)
        return x_s  # x_0: at index 0 the mean is x_hat and the variance 0

    def scores(self, x_0):
        """Rounding (Eq. 11): x_0 (B, d) -> (B, n_items); column j is for item j + 1."""
        items = self.item_embeddings.weight[1:]
        if self.config.rounding == "inner_product":
            return x_0 @ items.T  # Eq. 20
        # Departs: Eq. 21 subtracts two vectors from a number; we subtract their squared
        # norms, 1 + 1: minus their squared distance. [9] does not normalise.
        return 2 * F.normalize(x_0) @ F.normalize(items).T - 2

    @torch.no_grad()
    def recommend(self, history, k):
        """The k best items after each history (B, L), best first: items, scores (B, k).

        Items of a history may be among them. Raises ValueError on wrong ids or padding.
        """
        real = history > 0
        padded_left = (real[:, :-1] <= real[:, 1:]).all() and real[:, -1].all()
        if not padded_left or history.min() < 0 or history.max() > self.n_items:
            raise ValueError(f"history: give item ids from 1 to {self.n_items}, 0 only in front")
        generator = torch.Generator(history.device).manual_seed(self.config.seed)  # repeatable
        scores, index = self.scores(self.reverse(history, generator)).topk(k)
        return index + 1, scores


# ---- 6. Data (§5.1) -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Sequences:
    """The users of one file who have three items or more, in the file's order."""

    items: np.ndarray  # int64, the items of all users, one user after another
    offsets: np.ndarray  # int64, n_users + 1: user u has items[offsets[u] : offsets[u + 1]]
    lines: np.ndarray  # int64, n_users: the number of each user's line in the file, from 1
    n_users: int
    n_items: int
    n_left_out: int  # lines with fewer than three items
    digest: str  # SHA-256 of the file, by which a run knows its data


def load_sequences(path):
    """Read the data format: a user a line, item ids oldest first, with spaces between.

    The ids are 1, 2, ... n, and each occurs. Raises OSError or ValueError.
    """
    content = Path(path).read_bytes()
    hint = f"to convert it: python prepare_data.py NAME --raw {path}"
    rows = []
    for number, line in enumerate(content.decode(errors="replace").rstrip().split("\n"), 1):
        if not re.fullmatch(r" *[1-9][0-9]{0,8}( +[1-9][0-9]{0,8})* *\r?", line):
            raise ValueError(f"{path}:{number}: not numbers from 1 with spaces between; {hint}")
        rows.append([int(word) for word in line.split()])
    n_items = len(set().union(*rows))
    for number, row in enumerate(rows, 1):
        if max(row) > n_items:  # then a smaller id occurs nowhere, and could be recommended
            raise ValueError(f"{path}:{number}: id {max(row)}, but only {n_items} ids; {hint}")
    if len(rows) >= 10 and [row[0] for row in rows] == sorted({row[0] for row in rows}):
        raise ValueError(f"{path}:1: first numbers rise, like user ids; {hint}")
    lengths = np.array([len(row) for row in rows])
    if lengths.max() < 4:
        raise ValueError(f"{path}: no line has four items; give more or, if a table, {hint}")

    kept = np.flatnonzero(lengths >= 3)  # a history, a target to validate, one to test
    items = np.concatenate([rows[index] for index in kept])
    offsets = np.append(0, lengths[kept].cumsum())
    digest = hashlib.sha256(content).hexdigest()
    return Sequences(items, offsets, kept + 1, len(kept), n_items, len(rows) - len(kept), digest)


def train_batches(sequences, max_len, batch_size, rng, device="cpu"):
    """Yield an epoch's (history, target), random batches, each with the shortest first.

    Of "7 3 9 4 8" the training part is 7 3 9: 3 after 7, and 9 after 7 3. rng: NumPy's.
    """
    # Departs: Eq. 19 has one target per user. As in the authors' code, every item of a
    # training part but the first is a target, with its own step and noise.
    last = sequences.offsets[1:] - 1  # position 4, item 8, if "7 3 9 4 8" is the first line
    others = np.concatenate([sequences.offsets[:-1], last - 1, last])  # items 7, 4 and 8
    targets = np.delete(np.arange(len(sequences.items)), others)  # positions 1 and 2
    return make_batches(sequences, rng.permutation(targets), max_len, batch_size, device)


def eval_batches(sequences, split, batch_size, device="cpu"):
    """Yield each user's (history, target), uncut, by length, then by place in the file.

    Of "7 3 9 4 8", "validation" asks for 4 after 7 3 9, and "test" for 8 after 7 3 9 4.
    """
    targets = sequences.offsets[1:] - {"validation": 2, "test": 1}[split]
    targets = targets[np.argsort(np.diff(sequences.offsets), kind="stable")]
    return make_batches(sequences, targets, len(sequences.items), batch_size, device)


def make_batches(sequences, targets, max_len, batch_size, device):
    """Yield (history (B, L), target (B,)) for `targets`, positions in sequences.items."""
    # For each target the position of its user's first item, then its history's length.
    starts = np.repeat(sequences.offsets[:-1], np.diff(sequences.offsets))[targets]
    lengths = np.minimum(targets - starts, max_len)
    # Within a batch the shortest history comes first, which split_batch makes use of.
    batch_number = np.arange(len(targets)) // batch_size
    order = np.lexsort((lengths, batch_number))  # by batch, then by length; a stable sort
    lengths = lengths[order]

    items = torch.from_numpy(sequences.items).to(device)
    starts = torch.from_numpy(starts[order]).to(device)
    targets = torch.from_numpy(targets[order]).to(device)
    for begin in range(0, len(order), batch_size):
        batch = slice(begin, begin + batch_size)
        # The target 9, at position 2 of "7 3 9 4 8", in a batch with L = 3: positions
        # -1 0 1, padding yes no no, history 0 7 3.
        positions = targets[batch, None] + torch.arange(-lengths[batch].max(), 0, device=device)
        padding = positions < starts[batch, None]  # (B, L), as positions
        yield items[positions.clamp(min=0)].masked_fill(padding, 0), items[targets[batch]]


# ---- 7. Evaluation (§5.1) -----------------------------------------------------------------------
def ranks(scores, target):
    """The rank of each target (B,), from 1; equal ones go before it. scores (B, n_items).

    Raises FloatingPointError if a score is not finite.
    """
    if not scores.isfinite().all():
        raise FloatingPointError("a score is not finite; train again with a smaller --lr")
    return (scores >= scores.gather(1, target[:, None] - 1)).sum(1)


def metrics(rank):
    """HR@K, NDCG@K (1 / log2(rank + 1)): means over users, float64. rank (n_users,)."""
    gain = 1 / torch.log2(rank.double() + 1)
    hits = {k: (rank <= k).double() for k in (5, 10, 20)}
    hr = {f"HR@{k}": hit.mean().item() for k, hit in hits.items()}
    return hr | {f"NDCG@{k}": (hit * gain).mean().item() for k, hit in hits.items()}


@torch.no_grad()
def evaluate(model, sequences, split, batch_size=None, ranks_file=None):
    """The metrics of two rankings by the same scores: {"all items": {"HR@5": ...}, ...}.

    "without the history's items" gives these the lowest finite score. split: as for
    eval_batches. One generator, of seed. ranks_file: line and two ranks, in file order.
    """
    # Departs: §5.1 ranks "all candidate items". It does not say whether the history's are
    # candidates. In the authors' code they are, in many other papers they are not.
    device = model.item_embeddings.weight.device
    batch_size = batch_size or model.config.batch_size
    generator = torch.Generator(device).manual_seed(model.config.seed)
    rank = torch.empty(sequences.n_users, 2, dtype=torch.int64, device=device)
    # The users in the order of eval_batches: by length, then by their place in the file.
    users = torch.from_numpy(np.argsort(np.diff(sequences.offsets), kind="stable")).to(device)
    batches = eval_batches(sequences, split, batch_size, device)
    for user, (history, target) in zip(users.split(batch_size), batches, strict=True):
        scores = model.scores(model.reverse(history, generator))
        rank[user, 0] = ranks(scores, target)
        seen = torch.zeros(len(target), model.n_items + 1, dtype=torch.bool, device=device)
        seen = seen.scatter(1, history, True)[:, 1:]  # without the column of the padding
        rank[user, 1] = ranks(scores.masked_fill(seen, torch.finfo(scores.dtype).min), target)

    if ranks_file:
        np.savetxt(ranks_file, np.column_stack([sequences.lines, rank.cpu()]), fmt="%d")
    return {"all items": metrics(rank[:, 0]), "without the history's items": metrics(rank[:, 1])}


# ---- 8. Training (Algorithm 2, §5.3) ------------------------------------------------------------
def train_epoch(model, sequences, optimizer, epoch):
    """One pass over all samples -> mean loss. Its noise follows from seed and epoch."""
    config = model.config
    device = model.item_embeddings.weight.device
    rng = np.random.default_rng([config.seed, epoch])
    torch.manual_seed(int(rng.integers(2**63)))
    model.train()

    n_samples = len(sequences.items) - 3 * sequences.n_users  # all but i_1, i_{n-1} and i_n
    total = torch.zeros((), device=device)
    batches = train_batches(sequences, config.max_len, config.batch_size, rng, device)
    for done, (history, target) in enumerate(batches):
        if sys.stdout.isatty():
            print(end=f"epoch {epoch}: {done * config.batch_size / n_samples:.0%}\r", flush=True)
        optimizer.zero_grad()
        loss = model(history, target)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(target)  # on the device, since .item() would wait for it
    return total.item() / n_samples


def train(model, sequences, folder, state):
    """Train; save `state` (keys: see run) after each epoch. Raises FloatingPointError."""
    config = model.config
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)  # fused: faster
    model.load_state_dict(state["weights"])  # the last epoch's, not the best
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    save_checkpoint(folder, state)

    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        if epoch > state["best_epoch"] + config.patience * config.eval_every:
            print("no better validation for some time; --resume with more --patience goes on")
            break

        optimizer.param_groups[0]["lr"] = config.lr / (10 if epoch > config.lr_decay_epoch else 1)
        loss = train_epoch(model, sequences, optimizer, epoch)
        if not all(weights.isfinite().all() for weights in model.parameters()):
            raise FloatingPointError(f"epoch {epoch}: weights are not finite; try a smaller --lr")
        state.update(epoch=epoch, weights=model.state_dict(), optimizer=optimizer.state_dict())
        event = {"epoch": epoch, "loss": loss}
        line = f"epoch {epoch} of {config.epochs}  loss {loss:.4f}"
        # Departs: the epoch to test is not given; here the best by validation NDCG@10.
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            event |= evaluate(model, sequences, "validation")
            ndcg = event["all items"]["NDCG@10"]
            line += f"  validation NDCG@10 {ndcg:.2%}"
            if ndcg > state["best"]:
                best_weights = {name: weight.clone() for name, weight in state["weights"].items()}
                state.update(best=ndcg, best_epoch=epoch, best_weights=best_weights)

        with open(folder / "log.jsonl", "a") as log:  # for people and plots: nothing here reads it
            log.write(json.dumps(event) + "\n")
        save_checkpoint(folder, state)
        print(line, flush=True)


def save_checkpoint(folder, state):
    """Replace checkpoint.pt. A kill leaves the old one or the new one, whole."""
    torch.save(state, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")


def load_checkpoint(path, **settings):
    """The model of a run, on the CPU, and the run's state; `settings` replace the run's.

    The weights are those of the best epoch or, before the first validation, of the last.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # compares the checksums; None if all are right
            raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"] |= settings
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
            model = DiffuRec(state["n_items"], Config(**state["config"]))
        model.load_state_dict(state["best_weights"] or state["weights"])
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, TypeError, RuntimeError):
        raise ValueError(f"{path}: damaged, no checkpoint, or not one for {settings}") from None
    return model, state


# ---- 9. Command line ----------------------------------------------------------------------------
# Datasets are known by their numbers of users, items and actions, not by their names.
ML_1M = (6_040, 3_416, 999_611)
TOY = (2_000, 200, 20_001)
DATASET_SETTINGS = {ML_1M: {"max_len": 200}, TOY: {"epochs": 12, "embedding_std": 0.1}}
TABLE_2 = {  # DiffuRec's column, in %: HR@5, 10 and 20, NDCG@5, 10 and 20
    (22_363, 12_101, 198_502): (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566),  # Beauty
    (19_412, 11_924, 167_597): (5.5650, 7.4587, 9.8417, 4.1667, 4.7724, 5.3684),  # Toys
    ML_1M: (17.9659, 26.2647, 36.7870, 12.1150, 14.7909, 17.4386),
    (281_428, 13_044, 3_485_022): (6.6742, 10.7520, 16.6507, 4.2902, 5.5981, 7.0810),  # Steam
}


def parse_arguments(argv):
    """The command line; args.settings holds the settings that were given."""

    def refuse(message):
        raise ValueError(f"{message}; --help lists the flags")

    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", allow_abbrev=False)
    parser.description = __doc__.partition("\n\nThe file")[0]  # the docstring up to "The file"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = refuse  # one line from main, in place of a page
    add = parser.add_argument
    add("--data", default="toy", help="toy, beauty, toys, ml-1m, steam, or a file of sequences")
    add("--data-dir", type=Path, default="data", help="folder of the datasets (default: data)")
    add("--out", type=Path, help="folder of the run (default: runs/ and the name of the data)")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    add("--device", choices=devices, default=devices[0], help="cuda is a GPU that PyTorch sees")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--resume", action="store_true", help="go on with the run in that folder")
    one("--evaluate", action="store_true", help="score that run on the validation and test splits")
    one("--recommend", metavar="ITEM", type=int, nargs="+", help="ten items to follow these ids")
    parser.epilog = "A saved run keeps its settings, except those given. toy and ml-1m have others."
    for each in fields(Config):
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, type=each.type, **each.metadata)
    args = parser.parse_args(argv)
    args.settings = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    return args


def find_data(name, folder):
    """The path of --data, a name or a file. A dataset that is not there is prepared."""
    for path in (folder / f"{name}.txt", Path(name)):
        if path.is_file():
            return path
    try:
        import prepare_data
    except ModuleNotFoundError:
        raise ValueError(f"--data {name}: no such file, and no prepare_data.py here") from None
    return prepare_data.prepare(name, folder)


def score(model, sequences, folder, state, split, ranks_file=None):
    """Evaluate; print both rankings in %, and Table 2 below the test's; then log them."""
    epoch = state["best_epoch"] or state["epoch"]
    results = evaluate(model, sequences, split, ranks_file=ranks_file)
    rows = {label: [100 * value for value in row.values()] for label, row in results.items()}
    counts = (sequences.n_users, sequences.n_items, len(sequences.items))
    if split == "test" and counts in TABLE_2:
        rows["Table 2, mean of 5 runs"] = TABLE_2[counts]
    print(f"\n{split:10}  epoch {epoch:<10}", *(f"{name:>8}" for name in results["all items"]))
    for label, row in rows.items():
        print(f"{label:28}", *(f"{value:8.2f}" for value in row))
    try:
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps({"split": split, "epoch": epoch} | results) + "\n")
    except OSError as error:  # the answer is on the screen all the same
        print(f"diffurec.py: not logged: {error}", file=sys.stderr)


def run(args, path, sequences):
    """Train, or do with a run what the flags say. sequences are those of `path`."""
    counts = (sequences.n_users, sequences.n_items, len(sequences.items))
    print("data   {}: {:,} users, {:,} items, {:,} actions".format(path, *counts), end="; ")
    print(f"{sequences.n_left_out:,} lines with fewer than three items left out")
    folder = args.out or Path("runs", path.stem)
    if args.resume or args.evaluate or args.recommend:
        if not (folder / "checkpoint.pt").is_file():
            raise ValueError(f"no run in {folder}; train one first, or name its folder with --out")
        model, state = load_checkpoint(folder / "checkpoint.pt", **args.settings)
        if state["digest"] != sequences.digest:
            raise ValueError(f"the run in {folder} is on other data than {path}; name its --data")
    else:
        if (folder / "checkpoint.pt").is_file() or folder.is_file():
            raise ValueError(f"{folder} is taken; --resume the run, or name another --out")
        config = Config(**DATASET_SETTINGS.get(counts, {}) | args.settings)
        torch.manual_seed(config.seed)
        model = DiffuRec(sequences.n_items, config)
        state = {"config": asdict(config), "n_items": model.n_items, "digest": sequences.digest}
        state |= {"epoch": 0, "weights": model.state_dict(), "optimizer": None}
        state |= {"best": -1, "best_epoch": 0, "best_weights": None}
        folder.mkdir(parents=True, exist_ok=True)
    model.to(args.device)
    print(f"run    {folder}, {state['epoch']} epochs trained, on {args.device}", flush=True)

    if args.evaluate:
        score(model, sequences, folder, state, "validation")
        score(model, sequences, folder, state, "test")
    elif args.recommend:
        history = torch.tensor([args.recommend], device=args.device)
        items, _ = model.recommend(history, min(10, model.n_items))
        titles = path.with_suffix(".items.txt")
        names = titles.read_text("utf-8", "replace").split("\n") if titles.is_file() else []
        for item in items[0].tolist():
            print(f"{item:8}", *names[item - 1 : item])
    else:
        train(model, sequences, folder, state)
        model.load_state_dict(state["best_weights"] or state["weights"])
        score(model, sequences, folder, state, "test", folder / "ranks.txt")


def main(argv=None):
    """Run a command line. Returns 0, or 2 after one line on standard error."""
    try:
        args = parse_arguments(argv)
        path = find_data(args.data, args.data_dir)
        run(args, path, load_sequences(path))
        return 0
    except (KeyboardInterrupt, OSError, ValueError, FloatingPointError) as error:
        message = str(error) or "stopped; a run goes on with --resume"  # Ctrl-C
        print(f"diffurec.py: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # for titles that the terminal cannot show
    sys.exit(main())
