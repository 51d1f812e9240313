"""The gate of every export: what was written must compute what the model in memory computes.

Key and shape checks pass a model whose gate and up projections are swapped. So the files are read back and compared in
three ways: our reader must return every tensor bit for bit; a model built from them must give the same logits; and an
independent forward pass over the public names (`oracle`), and `transformers` where it is installed, must give the same
logits, the same experts and the same greedy tokens. All in float32 on the CPU, on prompts longer than the window, with
the weights rounded to the format of the files, so that rounding is no excuse for a difference. Rounding itself must
stay within what the format can hold, and what FP8 costs is measured (`quality`).
"""

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trinity.base.errors import UserError
from trinity.config import ModelConfig
from trinity.export.balance_state import is_momentum
from trinity.export.formats import FORMATS, Format, partial_blocks
from trinity.export.keys import pieces
from trinity.export.oracle import oracle_forward
from trinity.export.quality import Quality, compare_quality
from trinity.export.reading import import_afmoe
from trinity.model.router import Router
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Allowed difference of a logit, relative to the largest logit (at least 1)."""
TIE = 1e-5
"""Scores closer than this may be ranked either way."""
GREEDY_TOKENS = 16
FIXED_TEXT = (
    "The quick brown fox jumps over the lazy dog. 1 + 1 = 2; 12345678 / 9 = 1371742. Zażółć gęślą jaźń, 你好世界。\n"
)


class ParityError(UserError):
    """What was written does not compute what the model in memory computes."""


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """What an export was compared with."""

    num_tokens: int
    max_error: dict[str, float]
    """Largest logit difference, relative to max(1, largest logit), by what was compared."""
    skipped: dict[str, str]
    """Comparisons that were not possible, and why."""
    quality: Quality | None = None
    """Of a quantised export, what that cost."""

    def lines(self) -> list[str]:
        """For people, one comparison a line."""
        made = [f"{name}: largest logit difference {error:.1e} (relative)" for name, error in self.max_error.items()]
        left = [f"{name}: not compared, {reason}" for name, reason in self.skipped.items()]
        cost = [self.quality.line()] if self.quality is not None else []
        return [f"{self.num_tokens} tokens, float32, equal experts and greedy tokens", *made, *left, *cost]


class Sample(NamedTuple):
    """Text on which a quantised model is judged."""

    what: str
    tokens_BT: torch.Tensor


class _Run(NamedTuple):
    logits_BTV: torch.Tensor
    indices_LNk: torch.Tensor


def check_parity(
    model: Transformer,
    directory: Path,
    *,
    stored_as: Format,
    tokenizer: Tokenizer | None = None,
    with_transformers: bool = True,
    sample: Sample | None = None,
) -> ParityReport:
    """Compare the model directory with `model`, whose weights were stored in a format. Raises ParityError.

    `sample` is the text on which a quantised model is judged, by default the prompts of the comparison.
    """
    state = _rounded(model, stored_as)
    config, stored = import_afmoe(directory, torch.float32)
    _compare_tensors(state, stored, directory)
    if stored_as.scale is not None:
        _check_rounding(model, state, directory)
    expected = _build(model.config, state)
    rows_BT = prompts(model.config, tokenizer)
    greedy_1T = _greedy(expected, rows_BT[:1, : min(16, rows_BT.shape[1])])
    batches = (rows_BT, greedy_1T)
    runs = [_run(expected, batch) for batch in batches]
    del expected, state

    errors: dict[str, float] = {}
    reread = _build(config, stored)
    errors["our reader"] = max(
        compare_logits("our reader", run.logits_BTV, _run(reread, batch).logits_BTV, directory)
        for run, batch in zip(runs, batches, strict=True)
    )
    del reread, stored
    for run, batch in zip(runs, batches, strict=True):
        output = oracle_forward(directory, batch, run.indices_LNk)
        name = "independent forward pass"
        if output.regret_LN.numel() and output.regret_LN.max() > TIE:
            layer, token = divmod(int(output.regret_LN.argmax()), output.regret_LN.shape[1])
            raise ParityError(
                f"{directory}: {name}: MoE layer {layer} sends token {token} to other experts than the model in memory"
            )
        errors[name] = max(errors.get(name, 0.0), compare_logits(name, run.logits_BTV, output.logits_BTV, directory))
    skipped: dict[str, str] = {}
    reason = _why_not_transformers(config, stored_as, with_transformers)
    if reason is None:
        with _transformers_model(directory, stored_as.scale is not None) as other:
            errors["transformers"] = max(
                compare_logits(
                    "transformers", run.logits_BTV, _run_transformers(other, batch, run, directory), directory
                )
                for run, batch in zip(runs, batches, strict=True)
            )
    else:
        skipped["transformers"] = reason
    quality = None
    if stored_as.scale is not None:
        sample = sample or Sample("the gate's prompts, mostly random tokens", rows_BT)
        before = _run(_build(model.config, _rounded(model, FORMATS["bfloat16"])), sample.tokens_BT)
        quality = compare_quality(before.logits_BTV, directory, sample.tokens_BT, sample.what)
    return ParityReport(sum(batch.numel() for batch in batches), errors, skipped, quality)


def _rounded(model: Transformer, stored_as: Format) -> dict[str, torch.Tensor]:
    """The model's state in float32 on the CPU, as rounded by the format."""
    given = model.state_dict()
    state = {name: torch.empty(tensor.shape, device="cpu") for name, tensor in given.items()}
    for piece in pieces(model.config):
        value = piece.of(given[piece.ours].detach()).cpu()
        piece.of(state[piece.ours]).copy_(stored_as.rounded(piece.public, value))
    for name, tensor in given.items():
        if is_momentum(name):
            state[name].copy_(tensor)
    return state


def _check_rounding(model: Transformer, state: dict[str, torch.Tensor], directory: Path) -> None:
    """No value may move by more than e4m3 does: 3 bits of mantissa, and below the smallest normal a fixed step."""
    for name, tensor in model.state_dict().items():
        exact = tensor.detach().cpu().float()
        step = exact.abs().max() * 2.0**-9 / 448
        if (state[name] - exact).abs().gt(exact.abs() / 15 + step).any():
            raise ParityError(f"{directory}: {name} is further from the model's values than FP8 is coarse")


def _compare_tensors(state: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], directory: Path) -> None:
    for name, tensor in state.items():
        if name not in stored or not torch.equal(stored[name], tensor):
            raise ParityError(f"{directory}: {name} comes back from the files with other values than the model's")


def _build(config: ModelConfig, state: dict[str, torch.Tensor]) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def prompts(config: ModelConfig, tokenizer: Tokenizer | None) -> torch.Tensor:
    """Three rows, longer than the window where the model has the positions: a fixed text and two of random tokens."""
    length = min(config.window + max(16, config.window // 8), config.max_positions)
    vocab = config.vocab_size if tokenizer is None else tokenizer.vocab_size
    fixed = list(range(vocab)) if tokenizer is None else tokenizer.encode(FIXED_TEXT)
    fixed = (fixed * (length // len(fixed) + 1))[:length]
    random = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0))
    return torch.cat((torch.tensor([fixed]), random))


@torch.no_grad()
def _greedy(model: Transformer, tokens_1T: torch.Tensor) -> torch.Tensor:
    """The prompt and the tokens that follow it greedily, each from a full forward pass."""
    room = model.config.max_positions - tokens_1T.shape[1]
    for _ in range(min(GREEDY_TOKENS, room)):
        following = model(tokens_1T)[:, -1].argmax(-1, keepdim=True)
        tokens_1T = torch.cat((tokens_1T, following), dim=1)
    return tokens_1T


@torch.no_grad()
def _run(model: Transformer, tokens_BT: torch.Tensor) -> _Run:
    indices: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _args, routing: indices.append(routing.indices_Nk))
        for router in model.modules()
        if isinstance(router, Router)
    ]
    try:
        logits_BTV = model(tokens_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return _Run(logits_BTV, torch.stack(indices) if indices else torch.zeros(0, tokens_BT.numel(), 1))


def compare_logits(name: str, expected_BTV: torch.Tensor, logits_BTV: torch.Tensor, directory: Path) -> float:
    """Largest difference relative to the largest logit; greedy choices must agree where the best two are not tied."""
    scale = max(1.0, expected_BTV.abs().max().item())
    error_BT = (logits_BTV - expected_BTV).abs().amax(-1) / scale
    error = error_BT.max().item()
    if not error <= TOLERANCE:  # also when it is NaN
        row, position = divmod(int(error_BT.nan_to_num(torch.inf).argmax()), error_BT.shape[1])
        raise ParityError(
            f"{directory}: {name}: logits differ from those of the model in memory by {error:.1e} of the largest "
            f"(row {row}, position {position}; allowed {TOLERANCE:.0e})"
        )
    best_BT2 = expected_BTV.topk(min(2, expected_BTV.shape[-1]), dim=-1).values
    clear_BT = best_BT2[..., 0] - best_BT2[..., -1] > 2 * TOLERANCE * scale
    if (clear_BT & (logits_BTV.argmax(-1) != expected_BTV.argmax(-1))).any():
        raise ParityError(f"{directory}: {name}: another token is the most probable than in memory")
    return error


def _why_not_transformers(config: ModelConfig, stored_as: Format, wanted: bool) -> str | None:
    if not wanted:
        return "not asked for"
    if stored_as.name == "compressed-tensors":
        return "it does not load compressed-tensors blocks of this architecture"
    if stored_as.scale is not None and (odd := partial_blocks(config)) is not None:
        return f"it wants whole blocks, but {odd}"
    if stored_as.scale is not None and importlib.util.find_spec("accelerate") is None:
        return "it reads FP8 with the accelerate package only, which is not installed"
    if importlib.util.find_spec("transformers") is None:
        return "not installed"
    if importlib.util.find_spec("transformers.models.afmoe") is None:
        return "the installed version has no afmoe"
    return None if config.route_norm else "it normalises routing weights always, and this model has route_norm off"


@contextmanager
def _transformers_model(directory: Path, quantized: bool) -> Iterator[Any]:
    """The directory as transformers loads it, without its progress bars."""
    import transformers  # heavy and optional

    extra = {}
    if quantized:  # its FP8 kernels need a GPU and round activations; the weights are what is compared here
        extra["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as about the empty matrices it makes when nothing is shared
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, trust_remote_code=False, local_files_only=True, **extra
            )
        yield model.eval()
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def _run_transformers(model: Any, tokens_BT: torch.Tensor, run: _Run, directory: Path) -> torch.Tensor:
    """Its logits; where it breaks a tie between experts the other way, it is made to follow the model in memory."""
    routers = [layer.mlp.router for layer in model.model.layers if layer.moe_enabled]

    def follow(layer: int) -> Any:
        wanted_Nk = run.indices_LNk[layer]

        def hook(router: Any, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits_NE, weights_Nk, indices_Nk = output
            other_N = (indices_Nk.sort(-1).values != wanted_Nk.sort(-1).values).any(-1)
            scores_NE = logits_NE.float().sigmoid()
            biased_NE = scores_NE + args[1]
            regret_N = biased_NE.gather(1, indices_Nk).amin(-1) - biased_NE.gather(1, wanted_Nk).amin(-1)
            if (other_N & (regret_N > TIE)).any():
                raise ParityError(f"{directory}: transformers: MoE layer {layer} sends a token to other experts")
            mine_Nk = scores_NE.gather(1, wanted_Nk)
            mine_Nk = mine_Nk / mine_Nk.sum(-1, keepdim=True) * router.route_scale
            rows_N1 = other_N[:, None]
            return (
                logits_NE,
                torch.where(rows_N1, mine_Nk, weights_Nk),
                torch.where(rows_N1, wanted_Nk, indices_Nk),
            )

        return hook

    hooks = [router.register_forward_hook(follow(i)) for i, router in enumerate(routers)]
    try:
        return model(input_ids=tokens_BT).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
