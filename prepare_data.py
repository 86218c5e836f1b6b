"""Prepare data for diffurec.py: four public datasets, a toy one, or a log of your own.

  python prepare_data.py beauty                       # exactly the data of the paper's Table 2
  python prepare_data.py ml-1m --raw ~/Downloads/ml-1m.zip
  python prepare_data.py shop --raw log.csv --core 5  # your own log, under a name of your choice

The names are beauty and toys (the sequences that the authors used, as published; with --reviews
made anew from Amazon's reviews of 2014), ml-1m, steam, toy, or any other for data of your own.

It writes DATA_DIR/NAME.txt: one user a line, that user's item ids, oldest first. Where there are
names, line i of NAME.items.txt names item i, and line i of NAME.users.txt the user of line i.

--raw takes any of these, whatever it is called, gzip or not; times are numbers or ISO 8601:
  table       CSV, TSV or .inter in UTF-8 with a header such as user,item,timestamp, more columns
              in any order; without a header, three columns: user, item, time
  reviews     JSON lines with such keys (Amazon, Yelp, ...), Steam's; MovieLens' :: lines or zip
  sequences   one user a line: the user's number, then the item numbers, oldest first
  pairs       one action a line: user and item (header: user,item), in the order of time
"""

import argparse
import ast
import contextlib
import csv
import difflib
import gzip
import hashlib
import http.client
import itertools
import json
import os
import re
import signal
import sys
import urllib.request
import zipfile
import zlib
from array import array
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("prepare_data.py needs Python 3.11 or newer, this is " + sys.version.split()[0])

# ------------------------------------------------------------------------------------ the datasets

ICLREC = "https://raw.githubusercontent.com/salesforce/ICLRec/master/data"
AMAZON = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
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
REVIEWS = {
    "beauty": (f"{AMAZON}/reviews_Beauty_5.json.gz", None),
    "toys": (f"{AMAZON}/reviews_Toys_and_Games_5.json.gz", None),
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


# ------------------------------------------------------------------------------------ the raw files

FOREIGN_FILES = {  # how files begin that are not read here
    b"BZh": "a bzip2 archive; unpack it: bunzip2 FILE",
    b"\xfd7zXZ": "an xz archive; unpack it: unxz FILE",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive; unpack it: unzstd FILE",
    b"PAR1": "a Parquet table; write it as CSV: pandas.read_parquet(FILE).to_csv(NEW)",
    b"\x80": "a Python pickle, which can run code; write the sequences in it as text, user first",
    b"<": "a web page or XML; download the file itself, or write it as CSV",
    b"[": "a JSON array; write one object a line: jq -c '.[]' FILE > NEW",
}
# What reading a damaged file raises; RuntimeError: a zip archive with a password.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError)


def open_raw(path, member="ratings.dat"):
    """Open a raw file, a gzip file or a member of MovieLens' zip. ValueError for other kinds."""
    with open(path, "rb") as file:
        beginning = file.read(64).lstrip(b"\xef\xbb\xbf \r\n")
    for magic, what in FOREIGN_FILES.items():
        if beginning.startswith(magic):
            raise ValueError(what)
    if beginning.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if not beginning.startswith(b"PK\x03\x04"):
        return open(path, "rb")

    archive = zipfile.ZipFile(path)
    for name in archive.namelist():
        if name.rpartition("/")[2] == member:
            return archive.open(name)
    raise ValueError(f"a zip archive without {member}; unpack it, or save it as CSV")


class RawLines:
    """The lines of a raw file as text; `number` is that of the line read last."""

    def __init__(self, path):
        self.path = path
        self.number = 0

    def __iter__(self):
        with open_raw(self.path) as file:
            for self.number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")

    @contextlib.contextmanager
    def located(self):
        """Put the file and the line read last before the messages of errors inside `with`."""
        try:
            yield
        except (ValueError, csv.Error, *DAMAGED) as error:
            if isinstance(error, DAMAGED):
                error = f"damaged or cut off ({error}); remove it and get it again"
            elif isinstance(error, UnicodeDecodeError):
                error = "not UTF-8 text; save it as UTF-8"
            place = f"{self.path}:{self.number}" if self.number else self.path
            raise ValueError(f"{place}: {error}") from None


def first_lines(path) -> list[str]:
    """The first lines that are not empty. ValueError if the file is of a kind not read here."""
    lines = RawLines(path)
    with lines.located():
        head = [line for line in itertools.islice(lines, 200) if line.strip()]
        if not head:
            raise ValueError("the file is empty")
        if "\0" in head[0]:
            raise ValueError("not text; if it is an archive, unpack it and give the file inside")
    return head


# What a header or a JSON key may call the columns, in lower case and without "_", "-", "." and
# spaces. The names after a "|" count only where none before it is found: a session stands for the
# user if there is none, and Amazon's asin of 2023 is one variant of the product, parent_asin.
COLUMN_NAMES = {
    "user": "user userid uid username reviewer reviewerid customer customerid client clientid "
    "visitor visitorid member memberid account accountid author authorid | session sessionid",
    "item": "parentasin | item itemid iid asin product productid sku stockcode article articleid "
    "movie movieid video videoid book bookid isbn game gameid appid business businessid gmapid "
    "venue venueid poi poiid location locationid recipe recipeid track trackid song songid newsid",
    "timestamp": "timestamp time date datetime ts unixtime unixtimestamp unixreviewtime eventtime "
    "eventdate tdat createdat dateadded ratedat reviewdate purchasedate orderdate utctime",
}
MISSING = {"", "\\N", "NULL", "null", "NaN", "nan", "NA", "None", "none"}


def find_columns(names) -> list[int]:
    """Where a header has the user, the item and the time; ValueError if one lacks or is doubled."""
    plain = [re.sub("[ _.-]", "", name.partition(":")[0].strip(' "')).lower() for name in names]
    columns = []
    for role, known in COLUMN_NAMES.items():
        for group in known.split("|"):
            places = [i for i, name in enumerate(plain) if name in group.split()]
            if places:
                break
        if len(places) != 1:
            what = f"{len(places) or 'no'} columns for the {role} among {', '.join(names)[:300]}"
            raise ValueError(f"{what}; name one each, as in the header user,item,timestamp")
        columns.append(places[0])
    print(f"  columns: {', '.join(names[place].strip() for place in columns)}")
    return columns


def parse_time(text) -> tuple[str, float]:
    """The kind of a time, and a number that sorts as it does. ValueError if it is no time."""
    try:
        number = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text.replace(" UTC", "+00:00"))
        if moment.tzinfo:
            return "a date with a time zone", moment.timestamp()
        return "a date without a time zone", (moment - datetime(1970, 1, 1)).total_seconds()
    if not abs(number) < float("inf"):
        raise ValueError(f"{text} is not finite")
    return "a number", number


# The two readers yield (user, item, time); what a row lacks is one of MISSING.


def split_rows(lines, separator):
    """Yield the fields of each line. Only CSV has quotation marks; in a TSV they are text."""
    if separator in (",", ";", "|"):
        csv.field_size_limit(1 << 30)
        yield from filter(None, csv.reader(lines, delimiter=separator, strict=True))
    else:
        for line in filter(str.strip, lines):
            yield line.rstrip("\r\n").split(separator)


def read_table(lines, head):
    """Yield the rows of a table. ValueError for unclear columns and for a row of another width."""
    separator = next((each for each in ("\t", ",", ";", "|", "::") if each in head[0]), None)
    first = next(split_rows(head[:1], separator))
    rows = split_rows(lines, separator)
    if not any(re.match(r'[\s"]*[-+.]?[0-9]', field) for field in first):
        names = next(rows)
        if len(names) == 2:
            names = [*names, "time: the order of the lines"]
        user, item, time = find_columns(names)
    elif len(first) == 4 and separator == "::":
        user, item, time = 0, 1, 3  # MovieLens: user::item::rating::time
    elif len(first) in (2, 3):
        user, item, time = 0, 1, 2
        print(f"  columns: user, item, {'time' if len(first) == 3 else 'in the order of time'}")
    else:
        what = f"{len(first)} columns and no header; put one first, with the same separators"
        raise ValueError(f"{what} (MovieLens' and Amazon's ratings: user,item,rating,timestamp)")

    for row in rows:
        if len(row) != len(first):
            raise ValueError(f"{len(row)} columns, but {len(first)} in line 1; mend or remove it")
        inside = [text for field in row if "\n" in field for text in field.split("\n")]
        for parts in (text.split(separator) for text in inside):
            if len(parts) == len(first) and parts[time][:1].isdigit():
                raise ValueError("a quotation mark is open before these rows; close or double it")
        if len(row) == 2:
            row = [*row, str(lines.number)]  # pairs: the order of the lines is the time
        yield row[user].strip(), row[item].strip(), row[time].strip()


# A Steam review is a Python literal, {u'username': u'...', 'hours': 1.5, ...}. A text is taken as a
# whole, so nothing inside it passes for a field. Other lines go to literal_eval, which is slow.
STEAM_KEYS = ("username", "product_id", "date")
STRING = r"""u?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")"""
STEAM_FIELD = re.compile(rf"u?'(\w+)': ({STRING}|[\w.-]+)(?:, |\}}\s*$)")


def parse_steam(line) -> dict:
    """A Steam review, or its fields of STEAM_KEYS alone; nothing in it is ever run."""
    fields = list(STEAM_FIELD.finditer(line))
    if line[0] + "".join(field[0] for field in fields) != line or line[0] != "{":
        return ast.literal_eval(line.strip())
    texts = {field[1]: field[2] for field in fields}
    return {key: ast.literal_eval(texts[key]) for key in STEAM_KEYS if key in texts}


def read_objects(lines, head):
    """Yield the rows of a file with a JSON object, or a Python literal as Steam's, on each line."""
    is_json = re.match(r'\s*\{\s*"', head[0])
    keys = None if is_json else STEAM_KEYS
    for line in filter(str.strip, lines):
        try:
            review = dict(json.loads(line) if is_json else parse_steam(line))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ValueError("neither a JSON object nor a review of Steam's") from None
        if keys is None:
            keys = [list(review)[place] for place in find_columns(list(review))]
        yield [str(review.get(key)) for key in keys]  # "None", which is MISSING, for no value


def read_log(path, head):
    """The users, items and times of all rows as numbers, and the users' and items' names.

    Rows that lack one of the three are left out. ValueError if they are more than one in a hundred.
    """
    lines = RawLines(path)
    rows = (read_objects if head[0].lstrip().startswith("{") else read_table)(lines, head)
    user_numbers, item_numbers, kinds = {}, {}, set()
    users, items, times = array("i"), array("i"), array("d")  # so that Steam fits in memory
    unusable = []

    with lines.located():
        for user, item, when in rows:
            if user in MISSING or item in MISSING or when in MISSING:
                unusable.append(lines.number)
                continue
            try:
                kind, value = parse_time(when)
            except ValueError:
                raise ValueError(f"{when[:40]!r} is no number, no date like 2020-02-28") from None
            kinds.add(kind)
            if len(kinds) > 1:
                raise ValueError(f"the time {when} is {kind}, those before it are not")
            users.append(user_numbers.setdefault(user, len(user_numbers)))
            items.append(item_numbers.setdefault(item, len(item_numbers)))
            times.append(value)

    n_rows = len(times) + len(unusable)
    if len(unusable) > n_rows / 100:
        what = f"{len(unusable):,} of {n_rows:,} rows lack a user, an item or a time"
        raise ValueError(f"{path}:{unusable[0]}: {what}; remove those rows if that is right")
    dropped = f"dropped {len(unusable):,} without a user, an item or a time"
    print(f"{path}: read {n_rows:,} rows in {lines.number:,} lines; {dropped}")
    numbers = [np.array(column) for column in (users, items, times)]
    return *numbers, list(user_numbers), list(item_numbers)


def first_of_each(*columns) -> np.ndarray:
    """The rows that repeat no earlier row, in their order."""
    order = np.lexsort(columns)  # stable: of equal rows, the first comes first
    new = np.ones(len(order), bool)
    new[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    return np.sort(order[new])


def k_core(users, items, k) -> np.ndarray:
    """The rows left when users and items with fewer than k rows go, again until all have k."""
    rows = np.arange(len(users))
    while True:
        user, item = users[rows], items[rows]
        kept = (np.bincount(user)[user] >= k) & (np.bincount(item)[item] >= k)
        if kept.all():
            return rows
        rows = rows[kept]


def choose_rows(users, items, times, core, once) -> np.ndarray:
    """The rows that stay, user by user and oldest first; says what is dropped.

    once: of a user's actions with an item, keep the first, after the core (Steam's counts need it).
    """
    rows = np.arange(len(times))
    if not once:
        rows = first_of_each(users, items, times)
        print(f"  dropped {len(times) - len(rows):,} exact repeats (same user, item and time)")

    before = rows
    rows = rows[k_core(users[rows], items[rows], core)]
    gone = [len(np.unique(x[before])) - len(np.unique(x[rows])) for x in (users, items)]
    what = "{:,} users and {:,} items outside the {}-core, {:,} rows in all"
    print("  dropped " + what.format(*gone, core, len(before) - len(rows)))

    # By user, then by time. A stable sort: where times tie, the file's order stays.
    rows = rows[np.lexsort((times[rows], users[rows]))]
    if once:
        first = first_of_each(users[rows], items[rows])
        print(f"  dropped {len(rows) - len(first):,} of {len(rows):,} rows: repeated (user, item)")
        rows = rows[first]
    return rows


def prepare_log(path, head, core, once):
    """The users' sequences and their times, and the items' and users' names."""
    users, items, times, user_names, item_names = read_log(path, head)
    rows = choose_rows(users, items, times, core, once)
    users, items, times = users[rows], items[rows], times[rows]

    neighbours = users[1:] == users[:-1]
    ties = np.count_nonzero(neighbours & (times[1:] == times[:-1]))
    pairs = np.count_nonzero(neighbours)
    print(f"  {ties:,} of {pairs:,} neighbouring actions of a user have the same time")
    if ties > pairs / 2:
        print("  warning: most keep the file's order. Is that column a rating, or rounded times?")

    kept_users, lengths = np.unique(users, return_counts=True)
    kept_items, numbers = np.unique(items, return_inverse=True)  # numbers: in the file's order
    ends = np.cumsum(lengths)[:-1]
    item_names = [item_names[item] for item in kept_items]
    user_names = [user_names[user] for user in kept_users]
    return np.split(numbers + 1, ends), np.split(times, ends), item_names, user_names


def movie_titles(path) -> dict[str, str]:
    """Movie id -> title, from movies.dat in MovieLens' zip or beside its ratings.dat."""
    movies = path if zipfile.is_zipfile(path) else path.with_name("movies.dat")
    if not movies.exists():
        return {}
    with open_raw(movies, "movies.dat") as file:
        rows = [line.split("::") for line in file.read().decode("latin-1").splitlines()]
    return {row[0]: "::".join(row[1:-1]) for row in rows}


def holds_sequences(path, head) -> bool:
    """Whether each line is one user, whose number comes first and rises, and not one action."""
    if any(line.strip("0123456789 \t\r\n") for line in head):
        return False
    rows = [list(map(int, line.split())) for line in head]
    widths = {len(row) for row in rows}
    if widths in ({2}, {3}):  # pairs, or user, item and time
        return False
    rising = all(row[0] < after[0] for row, after in itertools.pairwise(rows))
    if not rising and widths != {4}:
        what = "the first numbers do not rise; if a line is one user's items, use it as it is:"
        way_out = "diffurec.py --data FILE; if users are first, sort it; a table needs a header"
        raise ValueError(f"{path}: {what} {way_out}")
    return rising


def read_sequences(path):
    """The users' numbers, and the sequences, whose item numbers stay as they are."""
    lines = RawLines(path)
    users, sequences = [], []
    with lines.located():
        for line in filter(str.strip, lines):
            user, *items = map(int, line.split())
            if users and user <= users[-1]:
                raise ValueError(f"user {user} after user {users[-1]}; sort the file: sort -n FILE")
            if items and not 1 <= min(items) <= max(items) < 10_000_000:
                raise ValueError("item numbers go from 1 to 9,999,999 (0 is the padding)")
            users.append(user)
            sequences.append(np.array(items, np.int64))
    return users, sequences


def without_numbers(sequences) -> list[list]:
    """The sequences, each item told by the lengths of the sequences with it, not by a number."""
    lengths = defaultdict(list)
    for sequence in sequences:
        for item in sequence.tolist():
            lengths[item].append(len(sequence))
    labels = {item: tuple(sorted(each)) for item, each in lengths.items()}
    return [[labels[item] for item in sequence.tolist()] for sequence in sequences]


def compare(sequences, times, published) -> None:
    """Say how many users' sequences are among the published ones, whatever the items' numbers."""
    if not published.exists():
        return
    theirs = defaultdict(list)
    for sequence in without_numbers(read_sequences(published)[1]):
        theirs[tuple(sorted(sequence))].append(sequence)

    equal = equal_but_ties = 0
    for sequence, when in zip(without_numbers(sequences), times):
        others = theirs[tuple(sorted(sequence))]
        by_time = sorted(zip(when, sequence))
        equal += sequence in others
        equal_but_ties += any(sorted(zip(when, other)) == by_time for other in others)
    what = f"{equal:,} of {len(sequences):,} users' sequences are also in {published}"
    print(f"{what}, whatever the items' numbers; {equal_but_ties:,} up to the order of ties")


# ---------------------------------------------------------------------------- writing, downloading

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def write_files(contents) -> None:
    """Write {path: lines, None to remove it} in this order; each file stays old or new, whole."""
    aside = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, lines in contents.items():
            if lines is not None:
                text = "".join(UNPRINTABLE.sub(" ", line) + "\n" for line in lines)
                aside[path].write_bytes(text.encode(errors="replace"))
        for path, lines in contents.items():
            if lines is not None:
                os.replace(aside[path], path)
            else:
                path.unlink(missing_ok=True)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


def fetch(url, part) -> None:
    """Append to the file `part` what it lacks of url. OSError, with what to do, if that fails."""
    try:
        with open(part, "ab") as file:
            request = urllib.request.Request(url, headers={"Range": f"bytes={file.tell()}-"})
            with urllib.request.urlopen(request, timeout=10) as response:
                if response.status != 206:
                    file.truncate(0)  # the server ignores ranges and sends everything
                while piece := response.read(1 << 16):
                    file.write(piece)
                if response.length:
                    raise OSError(f"cut off, {response.length:,} bytes are missing")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing follows, the file is complete
            way_out = "run again, or get the file and: python prepare_data.py NAME --raw FILE"
            raise OSError(f"{url}: {getattr(error, 'reason', None) or error}; {way_out}") from None


def download(url, digest, folder) -> Path:
    """The file at url, fetched into the folder unless it is there. ValueError: a wrong checksum."""
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        print(f"downloading {url}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        fetch(url, part)

        algorithm = "md5" if digest == ML_1M_MD5 else "sha256"
        if digest and hashlib.new(algorithm, part.read_bytes()).hexdigest() != digest:
            part.unlink()
            raise ValueError(f"{url}: its {algorithm} is wrong, so it was removed; run again")
        part.rename(path)
    return path


# ------------------------------------------------------------------------------------- the command


def check_request(name, raw, core, reviews) -> None:
    """ValueError, with what to type instead, for what cannot be prepared."""
    known = (*DATASETS, "toy")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.items)(?<!\.users)", name):
        raise ValueError(f"{name!r} is no name for a dataset; use letters, digits and . _ -")
    if raw is None and name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)};"
        own = f"or prepare data of your own: python prepare_data.py {name} --raw FILE"
        raise ValueError(f"no dataset {name!r}; {guess} {own}")
    if core is not None and core < 1:
        raise ValueError("--core is 1, which keeps everything, or more")
    if name == "toy" and (raw is not None or core is not None):
        raise ValueError("the toy data are made here; leave out --raw and --core")
    if reviews and (name not in REVIEWS or raw is not None):
        raise ValueError("--reviews goes with beauty or toys, and without --raw")


def read_raw(name, raw, core):
    """Sequences, their times, names of items and users, the last three None if there are none."""
    head = first_lines(raw)
    if holds_sequences(raw, head):
        if core is not None:
            raise ValueError(f"{raw}: finished sequences, which --core cannot change; leave it out")
        users, sequences = read_sequences(raw)
        print(f"{raw}: sequences, the user's number first; nothing dropped, the order kept")
        numbered = users == list(range(1, len(users) + 1))
        return sequences, None, None, None if numbered else [str(user) for user in users]

    core = core or (5 if name in DATASETS else 1)  # §5.1
    sequences, times, item_names, user_names = prepare_log(raw, head, core, name == "steam")
    if re.match("[0-9]+::", head[0]):
        titles = movie_titles(raw)
        item_names = [titles.get(item, item) for item in item_names]
    return sequences, times, item_names, user_names


def prepare(name, data_dir, raw=None, core=None, reviews=False) -> Path:
    """Write <data_dir>/<name>.txt, and .items.txt and .users.txt where there are names.

    Raises ValueError or OSError, one line that says what to do; the files are then as they were.
    """
    check_request(name, raw, core, reviews)
    path = Path(data_dir) / f"{name}.txt"
    if name == "toy":
        sequences, times = make_toy(), None
        item_names = [f"place {place} of the ring" for place in np.argsort(TOY_RING)]
        user_names = [f"walker {number}" for number in range(1, TOY_USERS + 1)]
    else:
        if raw is None:
            raw = download(*(REVIEWS if reviews else DATASETS)[name], path.parent / "raw")
        sequences, times, item_names, user_names = read_raw(name, Path(raw), core)
    if max(map(len, sequences), default=0) < MIN_LENGTH:
        raise ValueError(f"{raw}: no user with {MIN_LENGTH} actions or more is left")

    path.parent.mkdir(parents=True, exist_ok=True)
    names = {path.with_suffix(".items.txt"): item_names, path.with_suffix(".users.txt"): user_names}
    lines = (" ".join(map(str, sequence.tolist())) for sequence in sequences)
    write_files(names | {path: lines})

    counts = (len(sequences), len(np.unique(np.concatenate(sequences))), sum(map(len, sequences)))
    for where, numbers in ((path, counts), ("Table 1", TABLE_1.get(name))):
        if numbers:
            print("{}: {:,} sequences, {:,} items, {:,} actions".format(where, *numbers))
    if name in REVIEWS and times is not None:
        compare(sequences, times, path.parent / "raw" / Path(DATASETS[name][0]).name)
    return path


def run(argv) -> None:
    """Read the command line and prepare what it names."""

    def fail(message):
        raise ValueError(f"{message} (--help tells more)")

    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail  # one line from main, and not a page of usage
    parser.add_argument("names", nargs="+", metavar="NAME", help="which datasets, see above")
    parser.add_argument("--data-dir", default="data", help="where to write (default: data)")
    parser.add_argument("--raw", metavar="FILE", help="read this file instead of downloading one")
    parser.add_argument("--core", metavar="K", type=int, help="K-core (default: 5; own data: 1)")
    parser.add_argument("--reviews", action="store_true", help="beauty, toys: from raw reviews")
    args = parser.parse_args(argv)

    if len(args.names) > 1 and args.raw is not None:
        raise ValueError("--raw is one file for one NAME; give one NAME at a time")
    for name in args.names:
        prepare(name, args.data_dir, args.raw, args.core, args.reviews)


def main(argv=None) -> int:
    """The command: 0, or 2 for bad input, 130 for Ctrl-C."""
    try:
        run(argv)
    except KeyboardInterrupt:
        print("\nstopped; run it again, a download goes on from where it is", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for names that the terminal cannot show
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    sys.exit(main())
