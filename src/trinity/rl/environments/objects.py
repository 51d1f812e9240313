"""Families of projects whose classes keep state: a store, a waiting line."""

from random import Random

from trinity.rl.environments.project import Bug, Project, suite


def stock(rng: Random) -> Project:
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
    return Project("", "stock", source, suite("Stock", tests), bugs)


def queue(rng: Random) -> Project:
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
    return Project("", "waiting", source, suite("Line, Recent", tests), bugs)
