"""The data of DiffuRec (Li et al.): four public datasets, a toy one and your own log, as text.

names:
  beauty, toys   Amazon reviews of 2014, 5-core
  ml-1m          MovieLens 1M, 5-core
  steam          Steam reviews, 5-core, then each game once a user
  toy            walks around a ring of items, made here without a download
  another name   your own log, with --raw FILE

It writes DATA_DIR/NAME.txt, one user a line, that user's item ids (1, 2, 3, ...) oldest first, and
NAME.items.txt and NAME.users.txt, whose line i names item i and the user of line i. A download
stays in DATA_DIR/raw; one that was interrupted goes on where it stopped.

Your own log is CSV, TSV or RecBole's .inter, gzip or not, in UTF-8. A header such as
user,item,timestamp (or user_id, itemId, timestamp:float, ...) says which columns to take; without
one, there are just these three. Timestamps are numbers or ISO 8601, one kind in one file.

examples:
  python prepare_data.py beauty ml-1m
  python prepare_data.py ml-1m --raw ~/Downloads/ml-1m.zip
  python prepare_data.py shop --raw log.csv --core 5
"""

import argparse
import ast
import contextlib
import csv
import gzip
import hashlib
import http.client
import itertools
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: there, don't start two downloads of one dataset at once
    fcntl = None

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


def print_table(title, rows, name=None) -> None:
    """Rows of metrics, fractions of 1, in %, the first beside Table 2 if `name` is there."""
    if name in TABLE_2:
        paper, first = TABLE_2[name], next(iter(rows.values()))
        rows = rows | {"Table 2": {m: paper[m] / 100 for m in METRICS}}
        rows["ratio to Table 2, in %"] = {m: 100 * first[m] / paper[m] for m in METRICS}
    print(f"\n{title:28}", *(f"{metric:>8}" for metric in METRICS))
    for label, row in rows.items():
        print(f"{label:28}", *(f"{100 * row[metric]:8.4f}" for metric in METRICS))


def print_seeds(results, name) -> None:
    """Mean and standard deviation of the test metrics of several runs (§5.3)."""
    values = np.array([[result[metric] for metric in METRICS] for result in results])
    rows = {"mean": values.mean(0), "standard deviation": values.std(0, ddof=1)}
    rows = {label: dict(zip(METRICS, row)) for label, row in rows.items()}
    print_table(f"test, {len(results)} seeds, in %", rows, name)


# ------------------------------------------------------------------------------- the data format

MIN_LENGTH = 3  # leave-one-out (§5.1) needs an item each to train on, to validate and to test
ITEM_ID = re.compile(rb"0*[1-9][0-9]{0,6}")
LARGEST_ID = 9_999_999  # the embedding table has a row for every id up to the largest in the file;
SPARSE_ID = 100_000  # with a larger one than this, at least 1 row in 100 must be in use


@dataclass(frozen=True)
class Sequences:
    """The users of one file that have three items or more, in the order of the file."""

    items: np.ndarray  # int64, the item ids of all these users, one user after another
    offsets: np.ndarray  # int64, n_users + 1: user u has items[offsets[u] : offsets[u + 1]]
    lines: np.ndarray  # int64, n_users: the line of the file that each user is, from 1
    n_items: int  # the largest id in the file
    skipped: int  # users left out because they have fewer than three items

    @property
    def n_users(self) -> int:
        return len(self.lines)

    @property
    def n_samples(self) -> int:
        """(history, target) pairs to train on: all items but each user's first and last two."""
        return len(self.items) - 3 * self.n_users

    @property
    def fingerprint(self) -> int:
        """Tells these sequences from others: their CRC-32."""
        return zlib.crc32(self.items, zlib.crc32(self.offsets))

    def in_line(self, line) -> np.ndarray:
        """The items of the user in that line of the file. ValueError if none is kept from there."""
        user = np.searchsorted(self.lines, line)
        if user == self.n_users or self.lines[user] != line:
            raise ValueError(f"line {line}: no user with {MIN_LENGTH} items or more stands there")
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def load_sequences(path) -> Sequences:
    """Read a file in the data format.

    Lines end with LF or CRLF (the last one need not), spaces or tabs separate, a UTF-8 byte-order
    mark may come first, an empty line is a user without items. Anything else raises ValueError, one
    line with the file and the line in it; a file that cannot be read raises OSError.
    """
    raw = Path(path).read_bytes().removeprefix(BOM_UTF8).replace(b"\r\n", b"\n")
    if not raw.strip():
        raise ValueError(f"{path}: the file holds no item ids")
    items = np.zeros(1, np.int64)  # 0 is wrong, as some character is unless the next line says so
    if not raw.translate(None, delete=b"0123456789 \t\n"):
        items = np.fromstring(raw, np.int64, sep=" ")  # numbers past 2^63 become 2^63 - 1
    if items.min() < 1 or items.max() > LARGEST_ID:
        for number, line in enumerate(raw.split(b"\n"), 1):  # slow, but only to say where
            for word in re.findall(rb"[^ \t]+", line):
                if not ITEM_ID.fullmatch(word):
                    shown = word[:40].decode(errors="replace")
                    what = f"{shown!r} is not an item id, a whole number from 1 to {LARGEST_ID:,}"
                    raise ValueError(f"{path}:{number}: {what}")

    characters = np.frombuffer(raw, np.uint8)
    in_id = np.append(False, characters >= ord("0"))  # in_id[i + 1]: character i is a digit
    starts = np.flatnonzero(in_id[1:] & ~in_id[:-1])
    newlines = np.flatnonzero(characters == ord("\n"))
    line_of_id = np.searchsorted(newlines, starts)  # from 0
    lengths = np.bincount(line_of_id, minlength=len(newlines) + (not raw.endswith(b"\n")))

    n_items, distinct = int(items.max()), np.count_nonzero(np.bincount(items))
    if n_items > max(SPARSE_ID, 100 * distinct):
        what = f"item id {n_items:,}, but only {distinct:,} different ids: number them from 1"
        raise ValueError(f"{path}:{line_of_id[items.argmax()] + 1}: {what}")
    kept = lengths >= MIN_LENGTH
    if not kept.any():
        raise ValueError(f"{path}: no user has {MIN_LENGTH} items or more")
    return Sequences(
        items=items[kept[line_of_id]],
        offsets=np.append(0, np.cumsum(lengths[kept])),
        lines=np.flatnonzero(kept) + 1,
        n_items=n_items,
        skipped=int(np.count_nonzero(~kept)),
    )


def load_names(path) -> list[str]:
    """The lines of an `.items.txt` or `.users.txt` file: entry i - 1 is the name of i."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def write_files(contents) -> None:
    """Write {path: lines of bytes}, each file at any moment the old or the new one, whole.

    None is replaced before all are written, and they are replaced in the order given.
    """
    temporary = {path: path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp") for path in contents}
    try:
        for path, lines in contents.items():
            with open(temporary[path], "xb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- the toy data

TOY_USERS, TOY_ITEMS, TOY_SEED = 2000, 200, 0
TOY_SHORTEST, TOY_LONGEST = 6, 14  # items of a user, all lengths alike
TOY_STRIDE, TOY_DECAY = 20, 0.8  # a step goes j = 1..TOY_STRIDE places, P(j) ~ TOY_DECAY ** j
TOY_STRIDES = TOY_DECAY ** np.arange(1, TOY_STRIDE + 1)  # P(j), once it is divided by the sum
TOY_STRIDES /= TOY_STRIDES.sum()
TOY_RING = np.random.default_rng(TOY_SEED).permutation(TOY_ITEMS) + 1  # the item at each place


def make_toy() -> list[np.ndarray]:
    """Users who walk around a ring of items, each always in the same direction.

    Steps are less than half the ring, so two items of a history show its direction; who knows the
    ring then knows the exact distribution of the next item, and nobody can know more.
    """
    rng = np.random.default_rng(TOY_SEED + 1)
    steps = rng.choice(TOY_STRIDE, (TOY_USERS, TOY_LONGEST), p=TOY_STRIDES) + 1
    steps[:, 0] = rng.integers(TOY_ITEMS, size=TOY_USERS)  # where the walk starts
    direction = rng.choice((-1, 1), (TOY_USERS, 1))
    walks = TOY_RING[direction * steps.cumsum(axis=1) % TOY_ITEMS]
    lengths = rng.integers(TOY_SHORTEST, TOY_LONGEST + 1, TOY_USERS)
    return [walk[:length] for walk, length in zip(walks, lengths)]


def toy_ceiling() -> dict[str, float]:
    """The best expected metrics on the toy data, fractions of 1: rank the items by probability."""
    strides = np.sort(TOY_STRIDES)[::-1]
    gains = strides / np.log2(np.arange(2, TOY_STRIDE + 2))
    hit_rates = {f"HR@{k}": float(strides[:k].sum()) for k in (5, 10, 20)}
    return hit_rates | {f"NDCG@{k}": float(gains[:k].sum()) for k in (5, 10, 20)}


# ------------------------------------------------------------------------------------ raw files

GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"  # how such files begin
FINITE = 1e300  # timestamps beyond it, infinity and NaN are refused
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, KeyError, RuntimeError)
MAX_LINE = 1 << 24  # bytes in a line of a raw file
MAX_UNPACKED = 1 << 34  # bytes in all of it, unpacked


def begins_with(path, magic) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def live(text) -> None:
    """Show a line that the next call overwrites, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def raw_lines(path, member=None, encoding="utf-8"):
    """Yield (line number, line with its end) of a text file, a gzip file or one member of a zip.

    It is read as a stream and nothing else of an archive is touched. Raises ValueError for damaged
    archives, text in another encoding, and what is larger than the limits above.
    """
    number = total = 0
    try:
        with contextlib.ExitStack() as stack:
            packed = stack.enter_context(open(path, "rb"))
            if begins_with(path, GZIP):
                packed = stack.enter_context(gzip.open(packed))
            elif member and begins_with(path, ZIP):
                archive = stack.enter_context(zipfile.ZipFile(packed))
                if archive.getinfo(member).compress_type not in (0, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile("neither stored nor deflated")
                packed = stack.enter_context(archive.open(member))
            while line := packed.readline(MAX_LINE + 1):
                number, total = number + 1, total + len(line)
                if len(line) > MAX_LINE or total > MAX_UNPACKED:
                    limits = f"{MAX_LINE:,} bytes in this line or {MAX_UNPACKED:,} in all"
                    raise ValueError(f"{path}:{number}: more than {limits}")
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                yield number, line.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(f"{path}:{number}: not {encoding} text") from None
    except DAMAGED as error:  # a KeyError: no such member; a RuntimeError: an encrypted one
        raise ValueError(f"{path}: damaged, or another archive than expected: {error}") from None


def parse_amazon(line):
    """User, item and time of a review: a JSON object (Amazon, 2014)."""
    review = json.loads(line)
    return review["reviewerID"], review["asin"], float(review["unixReviewTime"])


def parse_movielens(line):
    """User, item and time of a rating: UserID::MovieID::Rating::Timestamp."""
    rating = re.fullmatch(r"([0-9]+)::([0-9]+)::[0-9]+::([0-9]+)\s*", line)
    return rating[1], rating[2], float(rating[3])


def movielens_titles(path) -> dict[str, str]:
    """Movie id -> title, from the zip or from a movies.dat beside ratings.dat, both Latin-1."""
    movies = path if begins_with(path, ZIP) else path.with_name("movies.dat")
    titles = {}
    for number, line in raw_lines(movies, "ml-1m/movies.dat", "latin-1") if movies.exists() else ():
        movie = re.fullmatch(r"([0-9]+)::(.*)::.*\s*", line)
        if not movie:
            raise ValueError(f"{movies}:{number}: not MovieID::Title::Genres")
        titles[movie[1]] = movie[2]
    return titles


# A Steam review is a Python literal, {u'username': u'...', 'product_id': '70', 'hours': 1.5, ...}.
# This pattern is a whole line of plain keys and values, so that nothing inside a text is taken for
# a field. Whatever does not match is left to literal_eval, ten times slower.
STEAM_FIELDS = ("username", "product_id", "date")
STRING = r"""u?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")"""
OTHER = rf"(?:{STRING}|-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|True|False|None)"
STEAM_REVIEW = re.compile(
    r"\{(?:(?:"
    + "".join(rf"u?'{field}': ({STRING})|" for field in STEAM_FIELDS)
    + rf"(?!u?'(?:{'|'.join(STEAM_FIELDS)})')u?'[^'\\]*': {OTHER}"
    + r")(?:, |(?=\})))*\}\s*"
)


def parse_steam(line):
    """User, item and day of a Steam review; nothing in it is ever run."""
    review = STEAM_REVIEW.fullmatch(line)
    if review and all(review.groups()):
        strings = review.groups()
        fields = (ast.literal_eval(s) if "\\" in s else s.lstrip("u")[1:-1] for s in strings)
    else:
        review = ast.literal_eval(line)
        fields = (review[field] for field in STEAM_FIELDS)
    user, item, day = fields
    return user, item, date.fromisoformat(day).toordinal()


# What a header may call the columns, in lower case, "_", "-" and spaces left out.
COLUMN_NAMES = (
    {"user", "userid", "uid", "username", "reviewerid", "customer", "customerid"},
    {"item", "itemid", "iid", "asin", "product", "productid", "movie", "movieid"},
    {"timestamp", "time", "date", "datetime", "ts", "unixreviewtime"},
)


def header_columns(row) -> list[int] | None:
    """Where a header has the user, the item and the timestamp; None if the row is no header."""
    names = [re.sub("[ _-]", "", cell.partition(":")[0].lower()) for cell in row]
    columns = [[i for i, name in enumerate(names) if name in known] for known in COLUMN_NAMES]
    if any(columns) and [len(places) for places in columns] != [1, 1, 1]:
        raise ValueError("a header needs one column each for the user, the item and the timestamp")
    return [places[0] for places in columns] if any(columns) else None


def parse_time(text) -> tuple[str, float]:
    """The kind of a timestamp and its value: a number as it is, ISO 8601 as seconds."""
    try:
        return "a number", float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        what = "neither a number nor an ISO 8601 date (or is line 1 a header of unknown names?)"
        raise ValueError(f"{text!r} is {what}") from None
    if moment.tzinfo:
        return "a date with a time zone", moment.timestamp()
    return "a date without a time zone", (moment - datetime(1970, 1, 1)).total_seconds()


def csv_rows(path):
    """Yield (line number, fields) of a table: tabs separate if the first line has one."""
    csv.field_size_limit(MAX_LINE)
    lines = (line for _, line in raw_lines(path))
    first = next(lines, "")
    delimiter = "\t" if "\t" in first else ","
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        for row in filter(None, rows):  # an empty line is nothing
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def read_log(path):
    """Yield (user, item, time) of your own log; ValueError with the line of the first bad row."""
    columns = first_kind = None
    for number, row in csv_rows(path):
        try:
            if columns is None:
                width, columns = len(row), header_columns(row)
                if columns:
                    continue
                width, columns = 3, [0, 1, 2]  # of four, the third might be a rating
            if len(row) != width:
                raise ValueError(f"{len(row)} columns instead of {width}, by commas or tabs")
            user, item, when = (row[column].strip() for column in columns)
            if not (user and item):
                raise ValueError("the user or the item is missing")
            kind, value = parse_time(when)
            first_kind = first_kind or kind
            if kind != first_kind or not abs(value) < FINITE:
                raise ValueError(f"the timestamp {when[:40]!r} is {kind}; {first_kind} expected")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        yield user, item, value


# ---------------------------------------------------------------------------- the four datasets


@dataclass(frozen=True)
class Dataset:
    url: str
    parse: Callable  # a line of the raw file -> (user, item, time)
    member: str | None = None  # the raw file is a zip, and this is the one in it
    md5: str | None = None  # None: not known, gzip's own checksum has to do
    unique: bool = False  # keep only the first of repeated (user, item) pairs


SNAP = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
GROUPLENS = "https://files.grouplens.org/datasets/movielens"
STEAM = "http://cseweb.ucsd.edu/~wckang"
ML_1M = {"member": "ml-1m/ratings.dat", "md5": "c4d9eecfca2ab87c1945afe126590906"}
DATASETS = {
    "beauty": Dataset(f"{SNAP}/reviews_Beauty_5.json.gz", parse_amazon),
    "toys": Dataset(f"{SNAP}/reviews_Toys_and_Games_5.json.gz", parse_amazon),
    "ml-1m": Dataset(f"{GROUPLENS}/ml-1m.zip", parse_movielens, **ML_1M),
    "steam": Dataset(f"{STEAM}/steam_reviews.json.gz", parse_steam, unique=True),
}
# What the parsers raise for a line that is none of theirs.
FOREIGN = (ValueError, KeyError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError)


def read_dataset(path, dataset):
    """Yield (user, item, time) of each line; ValueError with the first line that is not one."""
    for number, line in raw_lines(path, dataset.member):
        try:
            user, item, when = dataset.parse(line)
        except FOREIGN:
            user = item = when = None
        if not (isinstance(user, str) and isinstance(item, str) and abs(when) < FINITE):
            raise ValueError(f"{path}:{number}: not a line of {dataset.url.rpartition('/')[2]}")
        yield user, item, when


# ------------------------------------------------------------------------------------- download

TIMEOUT = 10  # seconds: to connect, and for the next bytes to come
TRIES, PAUSE = 20, 1.0  # seconds between tries; one that brings nothing new is the last


def fetch(url, part, magic) -> None:
    """Append to the file `part` what it lacks of url, again and again while that brings more.

    Raises OSError when it cannot go on, ValueError when the answer is not that file.
    """
    with open(part, "ab") as file:
        for _ in range(TRIES):
            before = file.tell()
            request = urllib.request.Request(url, headers={"Range": f"bytes={before}-"})
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    position = before if response.status == 206 else 0  # 0: it ignores ranges
                    end = None if response.length is None else position + response.length
                    size = f"{end / 1e6:,.1f}" if end else "?"
                    while position != end and (piece := response.read1(1 << 16)):
                        if position == 0 and piece[: len(magic)] != magic[: len(piece)]:
                            raise ValueError(f"{url}: the server sent something else, {piece[:20]}")
                        file.write(piece[file.tell() - position :])  # none of what is there already
                        position += len(piece)
                        live(f"{position / 1e6:,.1f} of {size} MB")
                if end is None or position == end:
                    return
                reason = f"cut off at byte {position:,} of {end:,}"
            except urllib.error.HTTPError as error:
                if error.code == 416:  # nothing comes after `before`, so the file is complete
                    return
                raise OSError(f"{url}: the server says {error.code} {error.reason}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
            if file.tell() == before:
                break
            time.sleep(PAUSE)
        raise OSError(f"{url}: {reason} (run again to go on from byte {file.tell():,})")


def download(url, folder, md5=None) -> Path:
    """Fetch url into the folder unless it is there; go on where an earlier download stopped.

    Until it is whole by its MD5, or by gzip's own checksum, the file is called `.part`; a whole one
    that is wrong is set aside as `.bad`. One process at a time holds the lock, and the system
    frees it however that process ends.
    """
    path = folder / url.rpartition("/")[2]
    part, magic = path.with_name(path.name + ".part"), ZIP if path.suffix == ".zip" else GZIP
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"downloading {url}", file=sys.stderr)
    with open(folder / ".lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        fetch(url, part, magic)
        live("")
        try:
            if not begins_with(part, magic):
                raise ValueError("it is empty")
            if md5 is None:
                for _ in raw_lines(part):
                    pass
            elif hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != md5:
                raise ValueError(f"its MD5 is not {md5}")
        except ValueError as error:
            bad = path.with_name(path.name + ".bad")
            os.replace(part, bad)
            raise ValueError(f"{url}: {error}; set aside as {bad}, run again") from None
        os.replace(part, path)
    return path


# -------------------------------------------------------------------------------------- prepare


def k_core(users, items, k) -> np.ndarray:
    """The rows left when users and items with fewer than k of them go until none is left."""
    rows = np.arange(len(users))
    while True:
        user, item = users[rows], items[rows]
        kept = (np.bincount(user)[user] >= k) & (np.bincount(item)[item] >= k)
        if kept.all():
            return rows
        rows = rows[kept]


UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def write_dataset(data_dir, name, sequences, item_names, user_names) -> Path:
    """Write the three files, the sequences last: where they are, the names are too."""
    path = Path(data_dir) / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        path.with_name(f"{name}.{kind}.txt"): (UNPRINTABLE.sub(" ", each) for each in some)
        for kind, some in (("items", item_names), ("users", user_names))
    }
    contents[path] = (" ".join(map(str, each.tolist())) for each in sequences)
    write_files(
        {
            path: (f"{line}\n".encode(errors="replace") for line in lines)
            for path, lines in contents.items()
        }
    )
    line = "{:,} sequences, {:,} items, {:,} actions"
    counts = len(sequences), len(item_names), sum(map(len, sequences))
    print(f"{path}: {line.format(*counts)}")
    if name in TABLE_1:
        off = "off by {:+,}, {:+,}, {:+,}".format(*np.subtract(counts, TABLE_1[name]))
        equal = "the same" if counts == TABLE_1[name] else off
        print(f"Table 1: {line.format(*TABLE_1[name])}: {equal}")
    return path


def prepare(name, data_dir, raw=None, core=None) -> Path:
    """Write <data_dir>/<name>.txt, .items.txt and .users.txt; return the path of the first.

    The raw file is downloaded unless it is given. Users stand, and items are numbered, in the order
    in which the raw file first names them, those outside the `core` left out. Raises ValueError
    or OSError, and then the three files are as they were.
    """
    dataset = DATASETS.get(name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.items)(?<!\.users)", name):
        raise ValueError(f"{name!r} is no name for a dataset (letters, digits, . _ -)")
    if core is not None and core < 1:
        raise ValueError(f"--core {core}: at least 1")
    if name == "toy":
        if raw is not None or core is not None:
            raise ValueError("the toy data are made here: no --raw and no --core")
        items = [f"place {place} of the ring" for place in np.argsort(TOY_RING)]
        users = [f"walker {number}" for number in range(1, TOY_USERS + 1)]
        return write_dataset(data_dir, name, make_toy(), items, users)
    if raw is None:
        if dataset is None:
            known = ", ".join((*DATASETS, "toy"))
            raise ValueError(f"unknown dataset {name!r}: {known}, or your own log with --raw FILE")
        raw = download(dataset.url, Path(data_dir) / "raw", dataset.md5)
    raw = Path(raw)

    # Number users and items as they appear; 16 bytes an action is what lets Steam fit in memory.
    user_number, item_number = {}, {}
    users, items, times = array("i"), array("i"), array("d")
    for user, item, when in read_dataset(raw, dataset) if dataset else read_log(raw):
        users.append(user_number.setdefault(user, len(user_number)))
        items.append(item_number.setdefault(item, len(item_number)))
        times.append(when)
        if len(times) % 100_000 == 0:
            live(f"{raw}: {len(times):,} actions")
    live("")
    users, items, times = np.array(users), np.array(items), np.array(times)
    rows = k_core(users, items, core or (5 if dataset else 1))
    # Stable: where times tie, the file's order stays (row 18 of the README's table).
    rows = rows[np.lexsort((times[rows], users[rows]))]
    if dataset and dataset.unique:
        pairs = users[rows].astype(np.int64) * len(item_number) + items[rows]
        first = np.sort(np.unique(pairs, return_index=True)[1])
        print(f"{len(rows):,} actions, {len(first):,} without repeated (user, item) pairs")
        rows = rows[first]
    kept_users, lengths = np.unique(users[rows], return_counts=True)
    if not (lengths >= MIN_LENGTH).any():
        raise ValueError(f"{raw}: no user with {MIN_LENGTH} actions or more")
    kept_items, numbers = np.unique(items[rows], return_inverse=True)
    sequences = np.split(numbers + 1, np.cumsum(lengths)[:-1])
    user_names, item_names = (
        np.array(list(number_of), object)[kept]
        for number_of, kept in ((user_number, kept_users), (item_number, kept_items))
    )
    if name == "ml-1m":
        titles = movielens_titles(raw)
        item_names = [titles.get(item, item) for item in item_names]
    return write_dataset(data_dir, name, sequences, item_names, user_names)


def find_data(data, data_dir) -> Path:
    """The file of a dataset, made if it is a known one that is not there yet, or else of a path."""
    path = Path(data_dir) / f"{data}.txt"
    if not path.exists() and (data == "toy" or data in DATASETS):
        print(f"{path} is not there yet: preparing it")
        return prepare(data, data_dir)
    path = path if path.is_file() else Path(data)
    if not path.is_file():
        raise ValueError(f"{data}: neither a file nor one of toy, {', '.join(DATASETS)}")
    return path


class Parser(argparse.ArgumentParser):
    """One line for a wrong command line, from main, not a page of usage."""

    def error(self, message):
        raise ValueError(f"{message} (--help tells more)")


def main(argv=None) -> int:
    what, _, more = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=what, epilog=more, formatter_class=form)
    parser.add_argument("names", nargs="+", metavar="NAME", help="which datasets, see below")
    parser.add_argument("--data-dir", default="data", help="where to write (default: data)")
    parser.add_argument("--raw", metavar="FILE", help="read this file instead of downloading one")
    help_core = "keep users and items with at least K actions (default: 5; your own log: all)"
    parser.add_argument("--core", metavar="K", type=int, help=help_core)
    try:
        args = parser.parse_args(argv)
        if len(args.names) > 1 and args.raw is not None:
            raise ValueError("--raw is one file for one NAME")
        for name in args.names:
            prepare(name, args.data_dir, args.raw, args.core)
    except KeyboardInterrupt:
        print("\nstopped; run it again, a download goes on from where it is", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        live("")
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
