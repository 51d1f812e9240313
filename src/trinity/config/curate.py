"""Settings of data curation: what a recipe file may say."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trinity.config.base import Frozen
from trinity.config.resolve import read_settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Stage = Literal["normalise", "filter", "deduplicate", "rephrase", "validate", "label"]


class InputConfig(Frozen):
    """Where documents come from."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, folders or `hf://owner/name`, each as path or path=domain; relative to where the command runs."""
    text_column: str = "text"
    """Column of the text in jsonl and parquet."""
    domain_column: str = "domain"
    """Column of the domain in jsonl and parquet."""
    share: Share = 1.0
    """Part of the documents that is taken, by the hash of their text."""
    val_fraction: Share = 0.0
    """Leaves out what `data prepare` holds out of the same inputs at this fraction, so that no rewrite of it is trained
    on."""
    block_bytes: PositiveInt = 1 << 20
    """Text of one block, the unit of work and of commitment; stretches that cannot be cut make larger ones."""


class FilterConfig(Frozen):
    """Which documents are worth a rewrite. A share is of the words, lines or characters of a document."""

    languages: tuple[str, ...] = ()
    """ISO 639-1 codes that are kept; empty: all. Needs the package py3langid."""
    min_language_probability: Share = 0.5
    """Below it a document counts as of no language."""
    min_chars: PositiveInt = 200
    """Shorter documents are dropped."""
    max_chars: PositiveInt = 2_000_000
    """Longer documents are dropped."""
    min_mean_word: PositiveFloat = 2.0
    """Characters of the mean word, where words are divided by blanks."""
    max_mean_word: PositiveFloat = 15.0
    """Characters of the mean word, where words are divided by blanks."""
    max_symbol_share: Share = 0.3
    """Characters that are no letter, mark, digit or blank."""
    max_repeated_lines: Share = 0.4
    """Characters in lines that stood before."""
    max_top_ngram: Share = 0.3
    """Words that the most frequent sequence of three words covers."""


class DuplicatesConfig(Frozen):
    """Exact duplicates by hash, near ones by MinHash: same signatures in one band make candidates."""

    near: bool = True
    """Whether near duplicates are looked for at all."""
    ngram: Annotated[int, Field(ge=1, le=32)] = 5
    """Words of a shingle; a character counts as a word in scripts without blanks."""
    permutations: Annotated[int, Field(ge=8, le=1024)] = 128
    """Values of a signature."""
    bands: PositiveInt = 16
    """Bands of permutations / bands values; candidates are likely above (1 / bands) ** (bands / permutations)."""
    threshold: Share = 0.75
    """Estimated Jaccard similarity from which documents are near duplicates."""
    seed: int = 0
    """Of the hash functions."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.permutations % self.bands:
            raise ValueError(f"permutations = {self.permutations} is no multiple of bands = {self.bands}")
        return self


class RephraseConfig(Frozen):
    """One kind of rewrite; a document may go through several."""

    recipe: str
    """Name of a recipe of the package, or the path of a recipe file (.toml)."""
    share: Share = 1.0
    """Part of the kept documents that goes through it, by hash."""
    domains: tuple[str, ...] = ()
    """Only documents of these domains; empty: all."""
    language: str | None = None
    """ISO 639-1 code that a multilingual recipe writes in."""
    passage_chars: PositiveInt = 6000
    """Longer documents are cut into passages of about this size, at paragraphs."""
    max_passages: PositiveInt = 4
    """Of one document at most."""
    max_tokens: PositiveInt = 1024
    """Of one answer."""
    temperature: NonNegativeFloat = 0.7
    """0: the most probable token each time."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Least set of tokens with this probability that is sampled from."""


class EndpointConfig(Frozen):
    """A server in OpenAI's protocol."""

    url: str
    """Up to and with /v1."""
    model: str
    """Its name in requests."""
    key_variable: str | None = None
    """Environment variable that holds the API key; no recipe holds one."""
    concurrency: PositiveInt = 8
    """Requests under way at a time, over all workers."""
    input_price: NonNegativeFloat = 0.0
    """Money for a million prompt tokens."""
    output_price: NonNegativeFloat = 0.0
    """Money for a million tokens of answers."""

    @model_validator(mode="after")
    def _has_scheme(self) -> Self:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url!r} is no address; it must begin with http:// or https://")
        return self


class GenerateConfig(Frozen):
    """Who writes: `endpoint` asks servers, `embedded` starts `trinity serve` on `model`, `vllm` runs engines in Ray."""

    backend: Literal["embedded", "endpoint", "vllm"] = "embedded"
    """One of embedded, endpoint, vllm."""
    endpoints: tuple[EndpointConfig, ...] = ()
    """For the backend endpoint; requests go to whichever has room."""
    model: str | None = None
    """Run or model directory, for the backends embedded and vllm."""
    concurrency: PositiveInt = 8
    """Requests under way at a time, for embedded; sequences of one engine, for vllm."""
    workers: PositiveInt = 2
    """Actors that ask endpoints, a block each, so that the last answers of one block leave no endpoint idle; or vLLM
    engines."""
    on_gpu: bool = True
    """Whether vLLM engines claim GPUs of the cluster, as many as tensor_parallel_size; false for vLLM's CPU build."""
    engine_batch: PositiveInt = 64
    """Requests that go to a vLLM engine at a time; several batches overlap."""
    engine: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further arguments of the vLLM engine, such as max_model_len."""
    timeout: PositiveFloat = 300.0
    """Seconds for one request, first byte to last."""
    retries: NonNegativeInt = 4
    """Further attempts after an error, a stall, rubbish or an empty answer."""
    backoff: PositiveFloat = 0.5
    """Seconds before the first further attempt; each next one waits twice as long, at most a minute."""
    patience: PositiveFloat = 120.0
    """Seconds for which no server may be reachable before the run stops with an error."""
    seed: int = 0
    """Goes into the seed of every request."""


class BudgetConfig(Frozen):
    """What generation may use. When it is used up the run ends in good order; a larger one goes on."""

    tokens: PositiveInt | None = None
    """Prompt and answer tokens together."""
    money: PositiveFloat | None = None
    """In the currency of the endpoints' prices."""


class ChecksConfig(Frozen):
    """Of the stage validate, beside the checks that each recipe brings."""

    tests: tuple[str, ...] = ()
    """Files of benchmark questions (jsonl, .gz); texts that share a sequence of `ngram` words are dropped."""
    ngram: Annotated[int, Field(ge=5, le=64)] = 13
    """Words of a sequence."""
    code_seconds: PositiveFloat = 10.0
    """For the tests of a written program."""


class LabelConfig(Frozen):
    """Domain and quality of what is written."""

    examples: str | None = None
    """jsonl with `text` and `good` (true or false): a quality model is trained from them."""
    tiers: tuple[Share, ...] = (0.33, 0.67)
    """Ascending borders of the quality score: below the first is tier 0."""
    drop_below: Share = 0.0
    """Texts of a lower score are dropped."""
    domain: Literal["source", "recipe", "tier"] = "recipe"
    """Domain written: the source's, or followed by -RECIPE or -tierN."""
    keep_sources: bool = False
    """Write the kept source documents too, as recipe `source`."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.tiers) != sorted(set(self.tiers)):
            raise ValueError(f"tiers = {list(self.tiers)} must ascend")
        return self


class ClusterConfig(Frozen):
    """Where the graph runs, and within which limits."""

    ray: str = "local"
    """Address of a Ray cluster, auto, or local for one on this machine that ends with the run."""
    workers: PositiveInt | None = None
    """CPUs of a local cluster, and tasks at a time; by default all."""
    object_store_mib: Annotated[int, Field(ge=80)] = 256
    """Shared memory of a local cluster."""
    task_mib: PositiveInt = 1024
    """Memory that a task claims, so that no more run on a node than fit."""


class CurateConfig(Frozen):
    """A recipe of data curation."""

    stages: tuple[Stage, ...] = ("normalise", "filter", "deduplicate", "rephrase", "validate", "label")
    """Those that run; their order is fixed. Reading comes before them, writing after."""
    tokenizer: str | None = None
    """Tokenizer directory to count with; without one, four bytes count as a token."""
    input: InputConfig
    filter: FilterConfig = FilterConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    rephrase: tuple[RephraseConfig, ...] = ()
    generate: GenerateConfig = GenerateConfig()
    budget: BudgetConfig = BudgetConfig()
    checks: ChecksConfig = ChecksConfig()
    label: LabelConfig = LabelConfig()
    run: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.stages)) != len(self.stages):
            raise ValueError("stages names a stage twice")
        if "rephrase" in self.stages:
            if not self.rephrase:
                raise ValueError("the stage rephrase needs at least one [[rephrase]]")
            if self.generate.backend == "endpoint" and not self.generate.endpoints:
                raise ValueError("generate.backend endpoint needs at least one [[generate.endpoints]]")
            if self.generate.backend != "endpoint" and self.generate.model is None:
                raise ValueError(f"generate.backend {self.generate.backend} needs generate.model")
        elif "validate" in self.stages:
            raise ValueError("the stage validate judges rewrites: it needs the stage rephrase")
        return self

    def has(self, stage: Stage) -> bool:
        return stage in self.stages


def read_recipe(path: Path, overrides: tuple[str, ...] = ()) -> CurateConfig:
    """Settings of a recipe file with key=value on top. Raises UsageError with the key and what is allowed."""
    return read_settings(CurateConfig, path, overrides)
