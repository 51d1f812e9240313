"""Small packages with tests, and the mistakes that are put into them.

Each project is a module, its tests, and mistakes as (right text, wrong text) that at least one test notices. Names and
numbers are drawn, so that the same family is another text each time.
"""

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Bug:
    kind: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Project:
    package: str
    module: str
    source: str
    tests: str
    bugs: tuple[Bug, ...]

    def with_bug(self, bug: Bug) -> str:
        assert self.source.count(bug.right) == 1, (self.module, bug)
        return self.source.replace(bug.right, bug.wrong)


PACKAGES = ("harbor", "ledger", "garden", "atlas", "kitchen", "workshop", "library", "station")


def _stock(rng: Random) -> Project:
    item, limit = rng.choice(("apple", "nail", "seed", "coin")), rng.randint(3, 9)
    source = f'''"""A store of things, counted by name."""

LOW = {limit}


class Stock:
    def __init__(self, counts=None):
        self.counts = dict(counts or {{}})

    def add(self, name, count=1):
        if count < 0:
            raise ValueError("count must not be negative")
        self.counts[name] = self.counts.get(name, 0) + count

    def take(self, name, count=1):
        if count > self.counts.get(name, 0):
            raise ValueError(f"not enough of {{name}}")
        self.counts[name] -= count
        return self.counts[name]

    def low(self):
        return sorted(name for name, count in self.counts.items() if count <= LOW)
'''
    tests = f'''
    def test_add(self):
        stock = Stock()
        stock.add("{item}", 2)
        stock.add("{item}", 3)
        self.assertEqual(stock.counts["{item}"], 5)

    def test_counts_are_its_own(self):
        given = {{"{item}": 1}}
        Stock(given).add("{item}")
        self.assertEqual(given, {{"{item}": 1}})

    def test_take(self):
        stock = Stock({{"{item}": 4}})
        self.assertEqual(stock.take("{item}", 4), 0)
        with self.assertRaises(ValueError):
            stock.take("{item}")

    def test_no_negative_count(self):
        Stock().add("{item}", 0)
        with self.assertRaises(ValueError):
            Stock().add("{item}", -1)

    def test_low(self):
        stock = Stock({{"{item}": {limit}, "b": {limit + 1}, "a": 0}})
        self.assertEqual(stock.low(), sorted(["{item}", "a"]))
'''
    bugs = (
        Bug("boundary", "if count > self.counts.get(name, 0)", "if count >= self.counts.get(name, 0)"),
        Bug("operator", "self.counts.get(name, 0) + count", "self.counts.get(name, 0) - count"),
        Bug("aliasing", "self.counts = dict(counts or {})", "self.counts = counts if counts is not None else {}"),
        Bug("boundary", "if count <= LOW", "if count < LOW"),
        Bug("missing check", "if count < 0:", "if count < -1:"),
    )
    return Project("", "stock", source, _suite("Stock", tests), bugs)


def _text(rng: Random) -> Project:
    width = rng.randint(8, 14)
    source = f'''"""Texts cut and joined."""

WIDTH = {width}


def wrap(text, width=WIDTH):
    """Lines of at most `width` letters, cut at spaces; longer words stay whole."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{{line}} {{word}}" if line else word
    if line:
        lines.append(line)
    return lines


def slug(title):
    """Lower case, words joined by hyphens, nothing else."""
    kept = "".join(c if c.isalnum() else " " for c in title.lower())
    return "-".join(kept.split())


def initials(name):
    return "".join(part[0].upper() for part in name.split())
'''
    words = " ".join(rng.choice(("sea", "boat", "wind", "old", "rope", "gull")) for _ in range(9))
    exact = "a" * (width - 3) + " bc"
    tests = f'''
    def test_no_line_is_too_long(self):
        lines = wrap("{words}")
        self.assertTrue(all(len(line) <= WIDTH for line in lines))
        self.assertEqual(" ".join(lines), "{words}")

    def test_a_line_that_just_fits(self):
        self.assertEqual(wrap("{exact}"), ["{exact}"])

    def test_long_words_stay_whole(self):
        self.assertEqual(wrap("x" * 30 + " y", 10), ["x" * 30, "y"])

    def test_slug(self):
        self.assertEqual(slug("The  Old Boat, No. 3!"), "the-old-boat-no-3")

    def test_initials(self):
        self.assertEqual(initials("ada lovelace king"), "ALK")
'''
    bugs = (
        Bug("boundary", "len(line) + 1 + len(word) > width", "len(line) + 1 + len(word) >= width"),
        Bug("off by one", "len(line) + 1 + len(word) > width", "len(line) + len(word) > width + 1 + 1"),
        Bug("lost remainder", "    if line:\n        lines.append(line)\n    return lines", "    return lines"),
        Bug("wrong method", "title.lower()", "title.title()"),
        Bug("wrong index", "part[0].upper()", "part[-1].upper()"),
        Bug("wrong separator", 'return "-".join(kept.split())', 'return "-".join(kept.split(" "))'),
    )
    return Project("", "text", source, _suite("wrap, slug, initials, WIDTH", tests), bugs)


def _money(rng: Random) -> Project:
    percent, free = rng.choice((5, 10, 20, 25)), rng.choice((30, 50, 80))
    source = f'''"""Prices in whole cents."""

DISCOUNT = {percent}  # percent, from three things on
FREE_SHIPPING = {free}00
SHIPPING = 490


def total(lines):
    """Cents of (price, count) pairs; three or more of one thing are cheaper."""
    cents = 0
    for price, count in lines:
        part = price * count
        if count >= 3:
            part -= part * DISCOUNT // 100
        cents += part
    return cents


def shipping(cents):
    return 0 if cents >= FREE_SHIPPING else SHIPPING


def split_evenly(cents, people):
    """Shares that add up to `cents` and differ by one cent at most, larger ones first."""
    share, rest = divmod(cents, people)
    return [share + 1] * rest + [share] * (people - rest)
'''
    three = 300 - 300 * percent // 100
    tests = f"""
    def test_discount(self):
        self.assertEqual(total([(100, 3)]), {three})
        self.assertEqual(total([(100, 2), (50, 1)]), 250)

    def test_several_lines(self):
        self.assertEqual(total([(100, 3), (100, 3)]), {2 * three})
        self.assertEqual(total([]), 0)

    def test_shipping(self):
        self.assertEqual(shipping({free}00), 0)
        self.assertEqual(shipping({free}00 - 1), 490)

    def test_shares(self):
        self.assertEqual(split_evenly(100, 3), [34, 33, 33])
        self.assertEqual(split_evenly(9, 3), [3, 3, 3])
        self.assertEqual(sum(split_evenly({rng.randint(1000, 9999)}, 7)) % 1, 0)
"""
    bugs = (
        Bug("boundary", "if count >= 3:", "if count > 3:"),
        Bug("boundary", "if cents >= FREE_SHIPPING", "if cents > FREE_SHIPPING"),
        Bug("wrong operand", "part -= part * DISCOUNT // 100", "part -= price * DISCOUNT // 100"),
        Bug("lost accumulation", "cents += part", "cents = part"),
        Bug("lost remainder", "[share + 1] * rest + [share] * (people - rest)", "[share] * people"),
        Bug("swapped values", "share, rest = divmod(cents, people)", "rest, share = divmod(cents, people)"),
    )
    return Project("", "money", source, _suite("total, shipping, split_evenly", tests), bugs)


def _queue(rng: Random) -> Project:
    size = rng.randint(2, 5)
    source = f'''"""A waiting line with priorities and a cache of what was used last."""

SIZE = {size}


class Line:
    """Higher priority first, then who came first."""

    def __init__(self):
        self._waiting = []
        self._count = 0

    def join(self, name, priority=0):
        self._waiting.append((-priority, self._count, name))
        self._count += 1

    def next(self):
        if not self._waiting:
            return None
        first = min(self._waiting)
        self._waiting.remove(first)
        return first[2]

    def __len__(self):
        return len(self._waiting)


class Recent:
    """The last SIZE names that were seen, each once, the newest first."""

    def __init__(self):
        self.names = []

    def see(self, name):
        if name in self.names:
            self.names.remove(name)
        self.names.insert(0, name)
        del self.names[SIZE:]
'''
    tests = f"""
    def test_priorities(self):
        line = Line()
        for name, priority in (("a", 0), ("b", 2), ("c", 2)):
            line.join(name, priority)
        self.assertEqual([line.next() for _ in range(3)], ["b", "c", "a"])
        self.assertIsNone(line.next())

    def test_length(self):
        line = Line()
        line.join("a")
        line.join("b")
        line.next()
        self.assertEqual(len(line), 1)

    def test_recent(self):
        recent = Recent()
        for number in range({size + 2}):
            recent.see(number)
        self.assertEqual(recent.names, list(range({size + 1}, 1, -1)))

    def test_seen_again(self):
        recent = Recent()
        for name in ("b", "a", "a"):
            recent.see(name)
        self.assertEqual(recent.names, ["a", "b"])
"""
    bugs = (
        Bug(
            "sign",
            "self._waiting.append((-priority, self._count, name))",
            "self._waiting.append((priority, self._count, name))",
        ),
        Bug("order", "(-priority, self._count, name)", "(-priority, -self._count, name)"),
        Bug("not removed", "        self._waiting.remove(first)\n", ""),
        Bug("wrong index", "return first[2]", "return first[1]"),
        Bug("off by one", "del self.names[SIZE:]", "del self.names[SIZE - 1 :]"),
        Bug("wrong end", "self.names.insert(0, name)", "self.names.append(name)"),
        Bug("missing check", "        if name in self.names:\n            self.names.remove(name)\n", ""),
    )
    return Project("", "waiting", source, _suite("Line, Recent", tests), bugs)


def _grid(rng: Random) -> Project:
    width, height = rng.randint(3, 5), rng.randint(2, 4)
    source = '''"""Cells on a board."""


def neighbours(x, y, width, height):
    """Cells that share a side with (x, y), inside the board, sorted."""
    found = []
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        if 0 <= x + dx < width and 0 <= y + dy < height:
            found.append((x + dx, y + dy))
    return sorted(found)


def transpose(rows):
    return [list(column) for column in zip(*rows)]


def reach(start, walls, width, height):
    """How many cells can be reached from `start` without a wall."""
    seen, edge = {start}, [start]
    while edge:
        cell = edge.pop()
        for other in neighbours(*cell, width, height):
            if other not in seen and other not in walls:
                seen.add(other)
                edge.append(other)
    return len(seen)
'''
    tests = f"""
    def test_corners(self):
        self.assertEqual(neighbours(0, 0, {width}, {height}), [(0, 1), (1, 0)])
        last = [({width - 2}, {height - 1}), ({width - 1}, {height - 2})]
        self.assertEqual(neighbours({width - 1}, {height - 1}, {width}, {height}), last)

    def test_inside(self):
        self.assertEqual(len(neighbours(1, 1, 3, 3)), 4)

    def test_transpose(self):
        self.assertEqual(transpose([[1, 2, 3], [4, 5, 6]]), [[1, 4], [2, 5], [3, 6]])

    def test_reach(self):
        self.assertEqual(reach((0, 0), set(), {width}, {height}), {width * height})
        wall = {{(1, y) for y in range({height})}}
        self.assertEqual(reach((0, 0), wall, {width}, {height}), {height})
"""
    bugs = (
        Bug("boundary", "0 <= x + dx < width", "0 < x + dx < width"),
        Bug("boundary", "0 <= y + dy < height", "0 <= y + dy <= height"),
        Bug(
            "swapped values",
            "0 <= x + dx < width and 0 <= y + dy < height",
            "0 <= x + dx < height and 0 <= y + dy < width",
        ),
        Bug("wrong constant", "(0, 1), (0, -1)):", "(0, 1), (0, 1)):"),
        Bug("missing check", "if other not in seen and other not in walls:", "if other not in seen:"),
        Bug("wrong value", "return [list(column) for column in zip(*rows)]", "return [list(row) for row in rows]"),
    )
    if width == height:  # a square board would not notice
        bugs = tuple(bug for bug in bugs if bug.kind != "swapped values")
    return Project("", "board", source, _suite("neighbours, transpose, reach", tests), bugs)


MAKERS = (_stock, _text, _money, _queue, _grid)


def _suite(names: str, tests: str) -> str:
    return f"import unittest\n\nfrom PACKAGE.MODULE import {names}\n\n\nclass Tests(unittest.TestCase):{tests}"


def draw(rng: Random, held_out: bool = False) -> tuple[Project, Bug]:
    """A project with names of its own, and one mistake to put into it; held-out ones are of the last family."""
    maker = MAKERS[-1] if held_out else rng.choice(MAKERS[:-1])
    made = maker(rng)
    package = rng.choice(PACKAGES)
    tests = made.tests.replace("PACKAGE", package).replace("MODULE", made.module)
    project = Project(package, made.module, made.source, tests, made.bugs)
    return project, rng.choice(project.bugs)
