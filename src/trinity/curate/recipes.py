"""Recipes: readable files that say how a passage is to be rewritten and how the answer is judged."""

import hashlib
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from trinity.base.errors import UsageError, nearest
from trinity.config.base import Frozen
from trinity.config.curate import CurateConfig, Share

Form = Literal["prose", "pairs", "dialogue", "table", "list", "json", "code", "mathematics", "retrieval"]


class Checks(Frozen):
    """What an answer must fulfil beside its form."""

    max_copied: Share = 1.0
    """Words of the answer that lie in runs of eight words of the passage."""
    min_length: Annotated[float, Field(ge=0.0)] = 0.1
    """Characters of the answer for each of the passage."""
    max_length: Annotated[float, Field(gt=0.0)] = 4.0
    """Characters of the answer for each of the passage."""
    min_chars: Annotated[int, Field(ge=1)] = 80
    """Of an answer; the ratio alone means little for a short passage."""
    language: Literal["kept", "asked", "any"] = "kept"
    """kept: the passage's; asked: the one that the recipe's user asked for."""
    min_numbers_known: Share = 0.0
    """Numbers of the answer that stand in the passage: others are made up."""
    min_numbers_kept: Share = 0.0
    """Numbers of the passage that stand in the answer."""
    max_repeated: Share = 0.3
    """Runs of six words of the answer that stood in it before."""
    min_items: Annotated[int, Field(ge=1)] = 2
    """Pairs, turns, rows or entries of the form."""


class Recipe(Frozen):
    """A file of the folder `prompts`, or of a user."""

    summary: str
    version: Annotated[int, Field(ge=1)] = 1
    """Goes up whenever the wording changes; the fingerprint tells in any case."""
    form: Form
    """How the answer is read and checked."""
    system: str
    user: str
    """{text} is replaced by the passage, {style} by one of the styles, {language} by the language asked for."""
    styles: tuple[str, ...] = ()
    """One is picked for each passage, by hash."""
    needs_language: bool = False
    """Whether `language` must be set where the recipe is used."""
    checks: Checks = Checks()

    @model_validator(mode="after")
    def _placeholders(self) -> Self:
        if "{text}" not in self.user:
            raise ValueError("user must hold {text}, where the passage goes")
        both = self.system + self.user
        if ("{style}" in both) != bool(self.styles):
            raise ValueError("{style} and styles belong together")
        if ("{language}" in both) != self.needs_language:
            raise ValueError("{language} and needs_language belong together")
        return self

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of a SHA-256 over the recipe's content."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def messages(self, text: str, style: str, language: str) -> list[dict[str, str]]:
        """The conversation that asks for a rewrite."""
        found = []
        for role, words in (("system", self.system), ("user", self.user)):
            words = words.replace("{style}", style).replace("{language}", language)
            found.append({"role": role, "content": words.strip().replace("{text}", text)})  # the passage last
        return found


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("trinity.curate") / "prompts"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


@cache
def load_recipe(name: str) -> Recipe:
    """A recipe of the package by its name, or the file of a user. Raises UsageError that says what is wrong."""
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the recipe {name} cannot be read: {error}") from None
    elif name in list_recipes():
        text = (resources.files("trinity.curate") / "prompts" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        names = list_recipes()
        raise UsageError(
            f"there is no recipe {name!r}: use one of {', '.join(names)} or the path of a .toml file"
            + nearest(name, names)
        )
    try:
        return Recipe.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the recipe {name} is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "recipe"
        known = Checks.model_fields if first["loc"][:1] == ("checks",) else Recipe.model_fields
        if first["type"] == "extra_forbidden":
            wrong = str(first["loc"][-1])
            raise UsageError(
                f"the recipe {name} has no key {key!r}; there are {', '.join(known)}{nearest(wrong, known)}"
            ) from None
        raise UsageError(f"the recipe {name}: {key}: {first['msg'].removeprefix('Value error, ')}") from None


def recipe_name(name: str) -> str:
    """As it stands in identifiers and domains: a file's name without folder and suffix."""
    return Path(name).stem if name.endswith(".toml") else name


def check_recipes(config: CurateConfig) -> None:
    """Raises UsageError when a rewrite's recipe is unknown, wrong, or lacks or has a language in vain."""
    if not config.has("rephrase"):
        return
    for number, rewrite in enumerate(config.rephrase):
        recipe = load_recipe(rewrite.recipe)
        if recipe.needs_language and rewrite.language is None:
            raise UsageError(f"rephrase.{number}.language is not set; the recipe {rewrite.recipe} needs it, such as fr")
        if rewrite.language is not None and not recipe.needs_language:
            raise UsageError(f"rephrase.{number}.language is set, but the recipe {rewrite.recipe} asks for none")
