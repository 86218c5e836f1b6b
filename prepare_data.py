"""The data of DiffuRec (Li et al.): four public datasets, a toy one and your own log, in one text format.

    python prepare_data.py beauty                        # download, filter, write data/beauty.txt
    python prepare_data.py shop --raw log.csv --core 5   # the same from a log of your own

The format: one user a line, that user's item ids (1, 2, 3, ...) oldest first, separated by spaces.
`diffurec.py` reads it with `load_sequences`; nothing else of this file is needed to read the model.
"""

import argparse
import os
import re
import sys
import uuid
from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# ------------------------------------------------------------- what the paper says of each dataset

# Table 1: sequences, items and actions after preprocessing.
TABLE_1 = {
    "beauty": (22_363, 12_101, 198_502),
    "toys": (19_412, 11_924, 167_597),
    "ml-1m": (6_040, 3_416, 999_611),
    "steam": (281_428, 13_044, 3_485_022),
}

# Table 2, DiffuRec's column, in %: the test split, all items ranked, the mean of five runs.
METRICS = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20")
TABLE_2 = {
    "beauty": dict(zip(METRICS, (5.5758, 7.9068, 11.1098, 4.0047, 4.7494, 5.5566))),
    "toys": dict(zip(METRICS, (5.5650, 7.4587, 9.8417, 4.1667, 4.7724, 5.3684))),
    "ml-1m": dict(zip(METRICS, (17.9659, 26.2647, 36.7870, 12.1150, 14.7909, 17.4386))),
    "steam": dict(zip(METRICS, (6.6742, 10.7520, 16.6507, 4.2902, 5.5981, 7.0810))),
}

# ------------------------------------------------------------------------------- the data format

MIN_LENGTH = 3  # leave-one-out (§5.1) needs an item each to train on, to validate and to test
LARGEST_ID = 10_000_000  # the embedding table has a row for every id up to the largest one: ids
SPARSE_ID = 100_000  # above this one are refused when fewer than 1 in 100 of the rows is used


@dataclass(frozen=True)
class Sequences:
    """The users of one file that have three items or more, in the order of the file."""

    items: np.ndarray  # int64, the item ids of all these users, one user after another
    offsets: np.ndarray  # int64, n_users + 1: user u has items[offsets[u] : offsets[u + 1]]
    lines: np.ndarray  # int64, n_users: the line of the file each user stands in, from 1
    n_items: int  # the largest id in the file
    skipped: int  # users left out because they have fewer than three items

    @property
    def n_users(self) -> int:
        return len(self.lines)


def load_sequences(path) -> Sequences:
    """Read a file in the data format.

    Lines end with LF or CRLF (the last one need not), ids are separated by spaces or tabs, a UTF-8
    byte-order mark may stand first; an empty line is a user without items. Anything else raises
    ValueError, one line with the file and the line; a file that cannot be read raises OSError.
    """
    raw = Path(path).read_bytes().removeprefix(BOM_UTF8)
    data = np.frombuffer(raw, np.uint8)
    digit = data - np.uint8(ord("0")) < 10  # bytes below "0" wrap around to large ones
    newline = data == ord("\n")
    carriage_return = data == ord("\r")
    carriage_return[:-1] &= newline[1:]  # only as a part of the line's end
    wrong = ~(digit | newline | carriage_return | (data == ord(" ")) | (data == ord("\t")))
    if wrong.any():
        position = int(wrong.argmax())
        start = 1 + max(raw.rfind(separator, 0, position) for separator in (b" ", b"\t", b"\n"))
        word = re.compile(rb"[^ \t\n]{1,40}").match(raw, start).group().decode(errors="replace")
        line = 1 + raw.count(b"\n", 0, position)
        raise ValueError(f"{path}:{line}: {word!r} is not an item id (a whole number from 1)")
    if not digit.any():
        raise ValueError(f"{path}: the file holds no item ids")

    first_digit = digit.copy()
    first_digit[1:] &= ~digit[:-1]
    line_starts = np.append(0, np.flatnonzero(newline) + 1)
    line_starts = line_starts[line_starts < len(data)]  # no further line after the last newline
    counts = np.add.reduceat(first_digit, line_starts, dtype=np.int64)  # ids in each line
    items = np.fromstring(raw, np.int64, sep=" ")  # any white space; too many digits: 2^63 - 1

    def line_of(index):
        return 1 + int(np.searchsorted(np.cumsum(counts), index, side="right"))

    wrong = (items < 1) | (items > LARGEST_ID)
    if wrong.any():
        first = int(wrong.argmax())
        what = "0 is not an item id, they start at 1"
        if items[first] != 0:
            what = f"an item id above {LARGEST_ID:,}, the largest allowed"
        raise ValueError(f"{path}:{line_of(first)}: {what}")
    n_items, distinct = int(items.max()), np.count_nonzero(np.bincount(items))
    if n_items > max(SPARSE_ID, 100 * distinct):
        raise ValueError(
            f"{path}:{line_of(items.argmax())}: item id {n_items:,} in a file of {distinct:,} "
            f"different ids: the embedding table would be nearly empty, number them from 1"
        )
    kept = counts >= MIN_LENGTH
    if not kept.any():
        raise ValueError(f"{path}: no user has {MIN_LENGTH} items or more")
    return Sequences(
        items=items[np.repeat(kept, counts)],
        offsets=np.append(0, np.cumsum(counts[kept])),
        lines=np.flatnonzero(kept) + 1,
        n_items=n_items,
        skipped=int(np.count_nonzero(~kept)),
    )


def load_names(path) -> list[str]:
    """The lines of an `.items.txt` or `.users.txt` file: entry i - 1 is the name of i."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def write_lines(path, lines) -> None:
    """Write a text file so that at any moment it is the old one or the new one, whole."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- the toy data

TOY_USERS, TOY_ITEMS = 2000, 200
TOY_STRIDE, TOY_DECAY = 20, 0.8  # a step goes j = 1..TOY_STRIDE places, P(j) ~ TOY_DECAY ** j
TOY_SHORTEST, TOY_LONGEST = 6, 14
TOY_SEED = 0


def toy_ring() -> np.ndarray:
    """The item at each place of the ring (TOY_ITEMS): a random order, so that ids tell nothing."""
    return np.random.default_rng(TOY_SEED).permutation(TOY_ITEMS) + 1


def toy_strides() -> np.ndarray:
    """The probability of a step of 1, 2, ..., TOY_STRIDE places (TOY_STRIDE)."""
    weights = TOY_DECAY ** np.arange(1, TOY_STRIDE + 1)
    return weights / weights.sum()


def make_toy() -> list[np.ndarray]:
    """Users who walk around a ring of items, each always in the same direction.

    Steps are less than half the ring, so two items of a history show its direction; who knows the
    ring then knows the exact distribution of the next item, and nobody can know more.
    """
    rng = np.random.default_rng(TOY_SEED + 1)
    steps = rng.choice(TOY_STRIDE, (TOY_USERS, TOY_LONGEST), p=toy_strides()) + 1
    steps[:, 0] = rng.integers(TOY_ITEMS, size=TOY_USERS)  # where the walk starts
    direction = rng.choice((-1, 1), (TOY_USERS, 1))
    walks = toy_ring()[direction * steps.cumsum(axis=1) % TOY_ITEMS]
    lengths = rng.integers(TOY_SHORTEST, TOY_LONGEST + 1, TOY_USERS)
    return [walk[:length] for walk, length in zip(walks, lengths)]


def toy_ceiling() -> dict[str, float]:
    """The best expected metrics on the toy data, fractions of 1: rank items by probability."""
    strides = np.sort(toy_strides())[::-1]
    gains = strides / np.log2(np.arange(2, TOY_STRIDE + 2))
    hit_rates = {f"HR@{k}": float(strides[:k].sum()) for k in (5, 10, 20)}
    return hit_rates | {f"NDCG@{k}": float(gains[:k].sum()) for k in (5, 10, 20)}


def prepare(name, data_dir, raw=None, core=None) -> Path:
    """Write <data_dir>/<name>.txt, .items.txt and .users.txt; return the path of the first."""
    if name != "toy":
        raise ValueError(f"unknown dataset {name!r}")
    data_dir = Path(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    place = np.argsort(toy_ring())
    write_lines(data_dir / "toy.items.txt", (f"place {p} of the ring" for p in place))
    write_lines(data_dir / "toy.users.txt", (f"walker {i + 1}" for i in range(TOY_USERS)))
    write_lines(data_dir / "toy.txt", (" ".join(map(str, walk)) for walk in make_toy()))
    return data_dir / "toy.txt"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            prepare(name, args.data_dir)
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
