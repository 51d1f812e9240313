"""Families of projects made of functions: texts, prices, cells on a board."""

from random import Random

from trinity.rl.environments.project import Bug, Project, suite


def text(rng: Random) -> Project:
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
    return Project("", "text", source, suite("wrap, slug, initials, WIDTH", tests), bugs)


def money(rng: Random) -> Project:
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
    return Project("", "money", source, suite("total, shipping, split_evenly", tests), bugs)


def grid(rng: Random) -> Project:
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
    return Project("", "board", source, suite("neighbours, transpose, reach", tests), bugs)
