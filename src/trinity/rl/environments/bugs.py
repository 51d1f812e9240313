"""Small packages with tests, and the mistakes that are put into them.

Each project is a module, its tests, and mistakes as (right text, wrong text) that at least one test notices. Names and
numbers are drawn, so that the same family is another text each time.
"""

from random import Random

from trinity.rl.environments.functions import grid, money, text
from trinity.rl.environments.objects import queue, stock
from trinity.rl.environments.project import Bug, Project

PACKAGES = ("harbor", "ledger", "garden", "atlas", "kitchen", "workshop", "library", "station")


MAKERS = (stock, text, money, queue, grid)
"""Each makes a project of its family with numbers of its own; the last one's are held out."""


def draw(rng: Random, held_out: bool = False) -> tuple[Project, Bug]:
    """A project with names of its own, and one mistake to put into it; held-out ones are of the last family."""
    maker = MAKERS[-1] if held_out else rng.choice(MAKERS[:-1])
    made = maker(rng)
    package = rng.choice(PACKAGES)
    tests = made.tests.replace("PACKAGE", package).replace("MODULE", made.module)
    project = Project(package, made.module, made.source, tests, made.bugs)
    return project, rng.choice(project.bugs)
