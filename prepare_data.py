"""Prepare data for diffurec.py: four public datasets, a toy one, or a log of your own.

  python prepare_data.py beauty                    # exactly the data of the paper's Table 2
  python prepare_data.py ml-1m --raw ml-1m.zip     # a file that you have already
  python prepare_data.py shop --raw log.csv --core 5     # your own log, under any name

It writes DATA_DIR/NAME.txt: one user a line, that user's item ids, oldest first. Line i of
NAME.items.txt names item i, and line i of NAME.users.txt the user of line i.

--raw takes any of these, gzip or not; times are numbers or ISO 8601:
  table      CSV, TSV or .inter in UTF-8 with a header such as user,item,timestamp, more
             columns in any order; or user, item, time; or pairs, in the order of time
  reviews    JSON lines with such keys (Amazon, Yelp), Steam's; MovieLens' :: lines or zip
  sequences  one user a line, items oldest first, with spaces. A first number that rises from
             line to line is the user's. Or a header says it: items, or user items
"""

import argparse
import ast
import csv
import difflib
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("prepare_data.py needs Python 3.11 or newer, this is " + sys.version.split()[0])

# ------------------------------------------------------------------------------------ the datasets
ICLREC = "https://raw.githubusercontent.com/salesforce/ICLRec/master/data"
BEAUTY_SHA256 = "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8"
TOYS_SHA256 = "176c680c688d497598c4a89a03b402c0fe78d795e5db335c2e78dd5f2d778a3f"
ML_1M_MD5 = "c4d9eecfca2ab87c1945afe126590906"

# Where each dataset is, and its checksum. Where none is known, reading checks gzip's own.
DATASETS = {
    "beauty": (f"{ICLREC}/Beauty.txt", BEAUTY_SHA256),
    "toys": (f"{ICLREC}/Toys_and_Games.txt", TOYS_SHA256),
    "ml-1m": ("https://files.grouplens.org/datasets/movielens/ml-1m.zip", ML_1M_MD5),
    "steam": ("http://cseweb.ucsd.edu/~wckang/steam_reviews.json.gz", None),
}
# The paper's Table 1: sequences, items and actions after preprocessing.
TABLE_1 = {
    "beauty": (22_363, 12_101, 198_502),
    "toys": (19_412, 11_924, 167_597),
    "ml-1m": (6_040, 3_416, 999_611),
    "steam": (281_428, 13_044, 3_485_022),
}
MIN_LENGTH = 3  # leave-one-out (§5.1) needs an item each to train on, to validate and to test

TOY_USERS = 2000
TOY_ITEMS = 200
TOY_SEED = 0
TOY_SHORTEST = 6  # items of a user; every length up to the longest is equally likely
TOY_LONGEST = 14
TOY_STRIDE = 20  # a step goes j = 1..TOY_STRIDE places, with P(j) proportional to TOY_DECAY ** j
TOY_DECAY = 0.8
TOY_RING = np.random.default_rng(TOY_SEED).permutation(TOY_ITEMS) + 1  # the item at each place


def make_toy() -> list[np.ndarray]:
    """The item ids of users who walk around a ring of items, each always in one direction.

    Steps are less than half the ring, so two items show the direction. Who knows the ring then
    knows the exact distribution of the next item, and nobody can know more.
    """
    rng = np.random.default_rng(TOY_SEED + 1)
    chances = TOY_DECAY ** np.arange(1, TOY_STRIDE + 1)
    chances /= chances.sum()

    steps = rng.choice(TOY_STRIDE, (TOY_USERS, TOY_LONGEST), p=chances) + 1
    steps[:, 0] = rng.integers(TOY_ITEMS, size=TOY_USERS)  # where the walk starts
    direction = rng.choice((-1, 1), (TOY_USERS, 1))
    walks = TOY_RING[direction * steps.cumsum(axis=1) % TOY_ITEMS]  # %: round the ring

    lengths = rng.integers(TOY_SHORTEST, TOY_LONGEST + 1, TOY_USERS)
    return [walk[:length] for walk, length in zip(walks, lengths)]


# ------------------------------------------------------------------------------------ the raw file
# What messages say to type; RawFile.explain puts the path for FILE, which may be gzipped.
SEQUENCES = """if a line is all items of a user: (printf 'items\\n'; gzip -cdf FILE | \
tr '],[{}:;|"' '\\n ') > NEW ('user items' if it begins with the user; remove another header)"""
PADDING = "{0} is nearly always padding, remove it; if {0} is an item, give it another number"
TO_LINES = """python -c "import json, sys; [print(json.dumps(x)) for x in json.load(sys.stdin)]\""""
FOREIGN_FILES = {  # how files begin that are not read here
    rb"\xff\xfe|\xfe\xff": "UTF-16; rewrite it: gzip -cdf FILE | iconv -f UTF-16 -t UTF-8 > NEW",
    rb"BZh|\xfd|\(\xb5|\x1f\x8b|PK|[^\n]*\0|PAR1|[\x80-\xbf]": "no text; unpack it or write a CSV",
    rb"[^\r\n]*\r[^\n]": r"old line ends; rewrite it: gzip -cdf FILE | tr '\r' '\n' > NEW",
    rb"<": "a web page or XML; remove it, and get the file itself",
    rb"\[\s*\{": f"a JSON array; write an object a line: gzip -cdf FILE | {TO_LINES} > NEW",
    rb"\[": f"lists; {SEQUENCES}",
}
# What reading a damaged file raises; RuntimeError: a zip archive with a password.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError)


class RawFile:
    """The lines of a file that are not empty; `number` is that of the line read last."""

    def __init__(self, path):
        self.path = Path(path)
        self.number = 0
        self.columns = ["user", "item", "time"]  # or what the file calls them
        self.users_first = None  # of sequences: whether each line begins with its user
        self.titles = {}

    def open(self, member="ratings.dat"):
        """The bytes of the file, unpacked, or of a member of MovieLens' zip archive."""
        with open(self.path, "rb") as file:
            magic = file.read(4)
        if magic.startswith(b"\x1f\x8b"):
            return gzip.open(self.path)
        if magic != b"PK\x03\x04":
            return open(self.path, "rb")
        archive = zipfile.ZipFile(self.path)
        for name in archive.namelist():
            if name.rpartition("/")[2] == member:
                return archive.open(name)
        raise ValueError(f"a zip archive without {member}; unpack it, give the file inside")

    def __iter__(self):
        with self.open() as file:
            for self.number, line in enumerate(file, 1):
                text = line.decode().removeprefix("\ufeff")
                if text.strip():
                    yield text

    def explain(self, error) -> str:
        """What is wrong, in which file and in the line read last, and what to type."""
        message = str(error)
        if isinstance(error, DAMAGED):
            message = f"damaged or cut off ({error}); remove it and get it again"
        elif isinstance(error, UnicodeDecodeError):
            message = "not UTF-8; rewrite it: gzip -cdf FILE | iconv -f LATIN1 -t UTF-8 > NEW"
        elif isinstance(error, csv.Error):
            message = "a quotation mark, here or above, is not closed or doubled; mend it"
        place = f"{self.path}:{self.number}" if self.number else self.path
        return f"{place}: {message.replace('FILE', shlex.quote(str(self.path)))}"


# What a header or a JSON key may call the columns, in any case and without "_".
COLUMN_NAMES = {
    "user": "user userid reviewerid username visitorid",
    "item": "item itemid asin parentasin movieid businessid productid videoid",
    "timestamp": "timestamp time datetime date timems unixreviewtime",
}
BETTER = {"asin": "parentasin", "date": "timems"}  # in Amazon's files of 2023 and in KuaiRand's
SEQUENCE_NAMES = {"items", "item_ids", "item_id_list:token_seq", "sequence", "history"}
MISSING = {"", "\\N", "NULL", "null", "NaN", "nan", "NA", "None", "none"}
A_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
A_LIST = re.compile(r"\[.*,.*\]|[0-9]+([\s,;|]+[0-9]+)+")


def find_columns(raw, names) -> list[int]:
    """Where user, item and, but in pairs, time are; ValueError if that is not clear."""
    plain = [re.sub(r":.*|[\W_]", "", name).lower() for name in names]  # RecBole's have a :type
    columns = []
    for role in list(COLUMN_NAMES)[: max(2, len(names))]:
        known = [name for name in COLUMN_NAMES[role].split() if BETTER.get(name) not in plain]
        places = [place for place, name in enumerate(plain) if name in known]
        if len(places) != 1:
            what = f"{len(places) or 'no'} columns for the {role} in {', '.join(names)[:200]}"
            raise ValueError(f"{what}; call the right one {role}, no other {', '.join(known)}")
        columns.append(places[0])

    raw.columns = [names[place].strip() for place in columns]
    print(f"  columns: {', '.join(raw.columns)}")
    return columns


def read_table(raw, head):
    """Yield the rows of a table; ValueError if its columns are unclear or not as many."""
    separator = next(iter(re.findall("::|[\t,;|]", head[0])), None)  # None: spaces
    if separator in (",", ";", "|"):
        rows = csv.reader(raw, delimiter=separator, strict=True)
    else:  # in these, quotation marks are text
        rows = (line.rstrip("\r\n").split(separator) for line in raw)
    first = next(rows)
    width = len(first)
    if not any(re.match(r'[\s"]*[-+.]?[0-9]', field) for field in first):
        columns = find_columns(raw, first)
    elif width in (2, 3) or (width == 4 and separator == "::"):
        columns = [0, 1, width - 1][:width]
        rows = itertools.chain([first], rows)
        if width == 4:  # MovieLens: user::item::rating::time
            raw.titles = movie_titles(raw)
    else:
        padded = any(re.match(r"0\s|.*\s0\s*$", line) for line in head)
        sequences = PADDING.format("0") if padded else SEQUENCES
        header = (separator or " ").join(["user", "item", *["x"] * (width - 3), "timestamp\n"])
        action = f"if a line is one action: (printf {header!r}; gzip -cdf FILE) > NEW"
        raise ValueError(f"{width} columns and no header; {action}; {sequences}")

    for row in rows:
        if len(row) != width:
            raise ValueError(f"{len(row)} columns, but {width} in line 1; mend it, or {SEQUENCES}")
        fields = [row[column].strip() for column in columns]
        yield fields if len(fields) == 3 else [*fields, str(raw.number)]  # pairs are in order


# A Steam review is a Python literal: {u'username': u'...', 'hours': 1.5, ...}. A text is
# taken whole, so that nothing in it passes for a field. literal_eval reads the odd ones.
STEAM_KEYS = ["username", "product_id", "date"]
STRING = r"""u?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")"""
STEAM_FIELD = re.compile(rf"u?'(\w+)': ({STRING}|[\w.-]+)(?:, |\}}$)")
NO_ESCAPES = re.compile(r"""u?(['"])([^\\]*)\1""")


def parse_steam(line) -> dict:
    """A review's fields of STEAM_KEYS, or another literal whole; nothing is ever run."""
    fields = list(STEAM_FIELD.finditer(line))
    texts = {field[1]: field[2] for field in fields}
    found = [NO_ESCAPES.fullmatch(texts.get(key, "")) for key in STEAM_KEYS]
    if None in found or "{" + "".join(field[0] for field in fields) != line:
        return ast.literal_eval(line)
    return {key: text[2] for key, text in zip(STEAM_KEYS, found)}


def read_objects(raw, head):
    """Yield the rows of a file with a JSON object, or a Python literal, on each line."""
    parse = json.loads if re.match(r'\s*\{\s*"', head[0]) else parse_steam
    keys = None
    for line in raw:
        try:
            review = dict(parse(line.strip()))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ValueError("neither a JSON object nor a Python literal; mend it") from None
        if keys is None:
            keys = [list(review)[place] for place in find_columns(raw, list(review))]
        if list in [type(review.get(key)) for key in keys]:
            raise ValueError("a list; write an object for each thing in it")
        yield [str(review.get(key)) for key in keys]  # "None", which is MISSING, for no value


def read_sequences(raw, header):
    """Yield a row for each item of each line; the order of all is their time."""
    print(f"  sequences: a line begins with {'the user' if raw.users_first else 'an item'}")
    lines = itertools.islice(raw, 1 if header else 0, None)
    when = 0
    for number, line in enumerate(lines, 1):
        words = line.split()
        user = words.pop(0) if raw.users_first else str(number)
        for word in words:
            if word in MISSING or re.fullmatch(r"-.*|0+\.?0*", word):
                raise ValueError(PADDING.format(word))
            if not header and not word.isdecimal():
                raise ValueError(f"{word[:40]!r} is no item's number; mend it")
            when += 1
            yield [user, word, str(when)]


def read_rows(raw):
    """The rows of a raw file, read in the way that its first lines ask for."""
    with raw.open() as file:
        beginning = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n")
    for pattern, what in FOREIGN_FILES.items():
        if re.match(pattern, beginning):
            raise ValueError(what)
    head = [*itertools.islice(raw, 200)]
    raw.number = 0
    if not head:
        raise ValueError("the file is empty; give another")

    words = [line.split() for line in head]
    if words[0][0].startswith("{"):
        return read_objects(raw, head)
    if len(words[0]) <= 2 and words[0][-1] in SEQUENCE_NAMES:
        raw.users_first = len(words[0]) == 2
        return read_sequences(raw, header=True)
    if all(re.fullmatch("-?[0-9]+", word) for each in words for word in each):
        rising = all(int(a[0]) < int(b[0]) for a, b in itertools.pairwise(words))
        # Lines of one length are actions, unless their first numbers rise and the others
        # are of one size in all columns, as no ratings and times are.
        tops = [max(map(int, column)) for column in zip(*words)][1:]
        alike = rising and len(tops) > 2 and 2 * min(tops) > max(tops)
        if len({len(each) for each in words}) > 1 or not tops or alike:
            raw.users_first = rising
            return read_sequences(raw, header=False)
    return read_table(raw, head)


@functools.lru_cache(100_000)  # Steam has 7.8 million times, of 2,600 days
def parse_time(text) -> tuple[str, float]:
    """The kind of a time, a number that sorts as it does; ValueError if it is no time."""
    if A_NUMBER.fullmatch(text):
        number = float(text)
        for unit, year_1973 in (("nano", 1e17), ("micro", 1e14), ("milli", 1e11)):
            if number >= year_1973:
                return f"in {unit}seconds", number
        return "in seconds, or a count", number
    try:
        moment = datetime.fromisoformat(text.replace(" UTC", "+00:00"))
    except ValueError:
        raise ValueError(f"write {text[:40]!r} as a number or as 2020-02-28T23:59:59") from None
    kind = "a date with a time zone" if moment.tzinfo else "a date without a time zone"
    return kind, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def read_log(raw):
    """The users, items and times of all rows as numbers; the users' and items' names."""
    user_numbers = {}
    item_numbers = {}
    columns = [array("i"), array("i"), array("d")]  # so that Steam fits in memory
    kinds = set()
    lacking = Counter()
    n_rows = 0
    for n_rows, row in enumerate(read_rows(raw), 1):
        if not MISSING.isdisjoint(row):
            lacking.update(name for name, text in zip(raw.columns, row) if text in MISSING)
            continue
        user, item, when = row
        if not kinds and (A_LIST.fullmatch(user) or A_LIST.fullmatch(item)):
            raise ValueError(f"a list where an item belongs; {SEQUENCES}")
        kind, value = parse_time(when)
        kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError(f"the time {when} is {kind}, not so those before; use one unit")
        columns[0].append(user_numbers.setdefault(user, len(user_numbers)))
        columns[1].append(item_numbers.setdefault(item, len(item_numbers)))
        columns[2].append(value)

    raw.number = 0  # what follows is not about one line
    n_lacking = n_rows - len(columns[0])
    print(f"{raw.path}: read {n_rows:,} rows; left out {n_lacking:,} without user, item or time")
    if 100 * n_lacking > n_rows:
        name = max(lacking, key=lacking.get)
        count = lacking[name]
        way_out = "remove those rows" if 2 * count < n_rows else "drop it, and call another so"
        raise ValueError(f"the column {name} is empty in {count:,} of {n_rows:,} rows; {way_out}")
    return *map(np.array, columns), list(user_numbers), list(item_numbers)


# ---------------------------------------------------------------------------- the users' sequences
def first_of_each(*columns) -> np.ndarray:
    """The rows that repeat no earlier row, in their order."""
    order = np.lexsort(columns)  # stable: of equal rows, the first comes first
    new = np.ones(len(order), bool)
    new[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    return np.sort(order[new])


def k_core(users, items, k) -> np.ndarray:
    """The rows left when users and items with fewer than k go, again until all have k."""
    rows = np.arange(len(users))
    while True:
        of_user = np.bincount(users[rows])[users[rows]]
        of_item = np.bincount(items[rows])[items[rows]]
        kept = (of_user >= k) & (of_item >= k)
        if kept.all():
            return rows
        rows = rows[kept]


def choose_rows(users, items, times, core, once) -> np.ndarray:
    """The rows that stay, by user, oldest first; once: a user has an item only once."""
    rows = np.arange(len(times))
    if not once:
        rows = first_of_each(users, items, times)
        print(f"  dropped {len(times) - len(rows):,} exact repeats (same user, item and time)")
    rows = rows[k_core(users[rows], items[rows], core)]
    print(f"  kept {len(rows):,} rows in the {core}-core")

    # By user, then by time. A stable sort: where times tie, the file's order stays.
    rows = rows[np.lexsort((times[rows], users[rows]))]
    if once:  # after the core, as Table 1's count of Steam's actions needs it
        first = first_of_each(users[rows], items[rows])
        print(f"  dropped {len(rows) - len(first):,} of {len(rows):,} rows: repeated (user, item)")
        rows = rows[first]

    same_user = np.diff(users[rows]) == 0
    ties = np.count_nonzero(same_user & (np.diff(times[rows]) == 0))
    print(f"  {ties:,} of {same_user.sum():,} neighbouring actions of a user have the same time")
    return rows


def make_sequences(raw, name, core):
    """The users' sequences; the items' and users' names, None where just 1, 2, ..."""
    users, items, times, user_names, item_names = read_log(raw)
    if core is None:
        core = 5 if name in DATASETS and raw.users_first is None else 1  # §5.1
    rows = choose_rows(users, items, times, core, once=name == "steam")
    kept_users, lengths = np.unique(users[rows], return_counts=True)
    kept_items, numbers = np.unique(items[rows], return_inverse=True)  # in the file's order
    if max(lengths, default=0) < MIN_LENGTH:
        raise ValueError(f"no user with {MIN_LENGTH} actions or more is left; give a longer log")
    user_names = [user_names[user] for user in kept_users]
    item_names = [item_names[item] for item in kept_items]

    ids = np.arange(1, len(item_names) + 1)
    if raw.users_first and set(item_names) == set(map(str, ids)):
        ids = np.array(item_names, int)  # as published
    ends = np.cumsum(lengths)
    first = ids[numbers[ends - lengths]][lengths >= MIN_LENGTH]
    if len(lengths) >= 10 and (np.diff(first) > 0).all():
        # diffurec.py would take these for users' numbers. Numbered backwards, they fall.
        ids = np.arange(len(ids), 0, -1)

    item_names = [raw.titles.get(item_names[item], item_names[item]) for item in np.argsort(ids)]
    if raw.users_first and item_names == [str(n) for n in range(1, len(item_names) + 1)]:
        item_names = None
    if raw.users_first is not None and user_names == [str(n + 1) for n in range(len(lengths))]:
        user_names = None
    return np.split(ids[numbers], ends[:-1]), item_names, user_names


def movie_titles(raw) -> dict[str, str]:
    """Movie id -> title, from movies.dat in MovieLens' zip or beside its ratings.dat."""
    movies = raw.path if zipfile.is_zipfile(raw.path) else raw.path.with_name("movies.dat")
    if not movies.exists():
        return {}
    with RawFile(movies).open("movies.dat") as file:
        rows = [line.split("::") for line in file.read().decode("latin-1").splitlines()]
    return {row[0]: "::".join(row[1:-1]) for row in rows}


# -------------------------------------------------------------------------- files and the command
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def write_files(path, sequences, item_names, user_names) -> None:
    """Write the sequences to path, the names beside it; each file stays old or is new."""
    lines = (" ".join(map(str, sequence.tolist())) for sequence in sequences)
    names = {path.with_suffix(".items.txt"): item_names, path.with_suffix(".users.txt"): user_names}
    contents = names | {path: lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        for target, lines in contents.items():
            text = "".join(UNPRINTABLE.sub(" ", line) + "\n" for line in lines or ())
            Path(aside, target.name).write_bytes(text.encode(errors="replace"))
        for target, lines in contents.items():
            if lines is None:
                target.unlink(missing_ok=True)
            else:
                os.replace(Path(aside, target.name), target)


def download(url, digest, folder) -> Path:
    """The file at url, fetched into the folder unless it is there and checked."""
    path = folder / url.rpartition("/")[2]
    if path.exists():
        return path
    print(f"downloading {url}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        part = Path(aside, path.name)
        try:
            urllib.request.urlretrieve(url, part)
        except OSError as error:
            way_out = "run again, or get the file and: python prepare_data.py NAME --raw FILE"
            raise OSError(f"{url}: {getattr(error, 'reason', None) or error}; {way_out}") from None
        algorithm = "md5" if digest == ML_1M_MD5 else "sha256"
        if digest and hashlib.new(algorithm, part.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{url}: its {algorithm} is not the one published; run again")
        part.rename(path)
    return path


def prepare(name, data_dir, raw=None, core=None) -> Path:
    """Write <data_dir>/<name>.txt and the names beside it; give its path.

    Raises ValueError or OSError, one line that says what to do; the files are then as they were.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.items)(?<!\.users)", name):
        raise ValueError(f"{name!r}: no such file, and no name (letters, digits and . _ -)")
    if name == "toy" and (raw is not None or core is not None):
        raise ValueError("the toy data are made here; leave out --raw and --core")
    if raw is None and name not in (*DATASETS, "toy"):
        near = difflib.get_close_matches(name.lower(), (*DATASETS, "toy"), n=1)
        own = f"for data of your own: python prepare_data.py {name} --raw FILE"
        raise ValueError(f"no dataset {name!r}; " + (f"did you mean {near[0]}?" if near else own))
    if raw is not None and not Path(raw).is_file():
        raise ValueError(f"--raw {raw}: there is no such file")

    path = Path(data_dir) / f"{name}.txt"
    if name == "toy":
        sequences = make_toy()
        item_names = [f"place {place} of the ring" for place in np.argsort(TOY_RING)]
        user_names = [f"walker {number}" for number in range(1, TOY_USERS + 1)]
    else:
        raw = RawFile(raw or download(*DATASETS[name], path.parent / "raw"))
        try:
            sequences, item_names, user_names = make_sequences(raw, name, core)
        except (ValueError, csv.Error, *DAMAGED) as error:
            raise ValueError(raw.explain(error)) from None

    write_files(path, sequences, item_names, user_names)
    counts = (len(sequences), len(np.unique(np.concatenate(sequences))), sum(map(len, sequences)))
    print("{}: {:,} sequences, {:,} items, {:,} actions".format(path, *counts))
    if name in TABLE_1:
        print("Table 1: {:,} sequences, {:,} items, {:,} actions".format(*TABLE_1[name]))
    return path


def main(argv=None) -> int:
    """The command: 0, or 2 after one line for bad input and for Ctrl-C."""

    def refuse(message):
        raise ValueError(f"{message} (--help tells more)")

    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = refuse  # one line, and not a page of usage
    parser.add_argument("names", nargs="+", metavar="NAME", help="which datasets, see above")
    parser.add_argument("--data-dir", default="data", help="where to write (default: data)")
    parser.add_argument("--raw", metavar="FILE", help="read this file instead of downloading one")
    parser.add_argument("--core", metavar="K", type=int, help="K-core (default: 5; own data: 1)")
    try:
        args = parser.parse_args(argv)
        if len(args.names) > 1 and args.raw is not None:
            raise ValueError("--raw is one file for one NAME; give one NAME at a time")
        for name in args.names:
            prepare(name, args.data_dir, args.raw, args.core)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"prepare_data.py: {str(error) or 'stopped; run it again'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # for names that the terminal cannot show
        sys.stderr.reconfigure(errors="replace")
    sys.exit(main())
