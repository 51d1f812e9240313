"""Parts of `bench/sft.py` that run in processes of their own: TRL's SFTTrainer, and the memory of the loss.

python bench/sft_parts.py trl --model DIR --run RUN --out FILE
python bench/sft_parts.py loss --out FILE
"""

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.base.files import write_json

Keep = Callable[[dict[str, Any]], None]
WARM_UP = 5
"""Steps before the measured ones."""
WAYS = {
    "packed": {"packing": True, "packing_strategy": "bfd"},
    "padded": {"packing": False, "train_sampling_strategy": "group_by_length"},
}
"""How TRL may batch: conversations packed without padding, or alike in length and padded."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["trl", "loss"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a way to batch")
    parser.add_argument("--seconds", type=float, default=60.0, help="most that a way to batch may take")
    options = parser.parse_args()
    result: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        result.update(found)
        write_json(options.out, result)

    {"trl": measure_trl, "loss": measure_loss}[options.part](options, keep)


# TRL


def measure_trl(options: argparse.Namespace, keep: Keep) -> None:
    """Real tokens per second of SFTTrainer on the conversations of RUN, with its micro-batches of as many tokens."""
    from trinity.config import resolve
    from trinity.data.chat import ChatRows, is_held_out, read_conversations
    from trinity.tokenizer import Tokenizer

    config, _ = resolve(str(options.run / "run.toml"))
    settings = config.sft
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    training = [c for c in read_conversations(settings.conversations) if not is_held_out(c, settings.held_out)]
    rows = ChatRows(training, tokenizer, settings.seq_len, config.runtime.seed)
    plan = rows.plan(0)
    keep({"fill": sum(c.length for row in plan for c in row) / (len(plan) * settings.seq_len)})
    if importlib.util.find_spec("trl") is None:
        keep({"skipped": "trl is not installed"})
        return
    examples = []
    for conversation in training[: 20 * settings.batch_rows * (options.steps + WARM_UP)]:
        ids, mask = tokenizer.encode_chat(conversation.messages, conversation.tools)
        ids, mask = ids[: settings.seq_len], mask[: settings.seq_len]
        if any(mask):
            examples.append({"input_ids": ids, "assistant_masks": [int(m) for m in mask]})
    ways: dict[str, Any] = {}
    for name, way in WAYS.items():
        try:
            ways[name] = _trl(way, examples, config, options)
        except Exception as error:  # one way that does not run must not lose the other
            ways[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        keep({"ways": ways})
        gc.collect()
    ran = {name: found for name, found in ways.items() if "tokens_per_second" in found}
    if ran:
        best = max(ran, key=lambda name: ran[name]["tokens_per_second"])
        keep({"best": {"way": best, **ran[best]}})


def _trl(way: dict[str, Any], examples: list[dict[str, Any]], config: Any, options: argparse.Namespace) -> Any:
    import transformers
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    cuda, settings = torch.cuda.is_available(), config.sft
    dtype = torch.bfloat16 if cuda else torch.float32
    model, experts = _load(options.model, dtype, cuda)
    per_device = settings.micro_rows
    total = WARM_UP + options.steps
    arguments = trl.SFTConfig(
        output_dir=str(options.out.with_suffix("")),
        max_length=settings.seq_len,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=max(1, settings.batch_rows // per_device),
        max_steps=total,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        dataset_num_proc=None,
        dataloader_num_workers=0,
        include_num_input_tokens_seen="non_padding" if way["packing"] is False else "all",
        **way,
    )
    watch = _watch(time.monotonic() + options.seconds)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=transformers.AutoTokenizer.from_pretrained(options.model),
        callbacks=[watch],
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    (first, tokens_before), (last, tokens_after) = watch.marks[0], watch.marks[-1]
    return {
        "tokens_per_second": (tokens_after - tokens_before) / (last - first),
        "steps": len(watch.marks) - 1,
        "experts": experts,
        "attention": model.config._attn_implementation,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
    }


def _load(path: Path, dtype: torch.dtype, cuda: bool) -> tuple[Any, str]:
    """The exported model with the fastest experts that transformers has for it."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if cuda else "cpu"
    for experts in ("grouped_mm", "eager"):
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
            )
            return model.to(device), experts
        except (TypeError, ValueError) as error:
            print(f"experts {experts}: {error}")
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return plain.to(device), "default"


def _watch(deadline: float) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Marks (time, tokens seen) after each step from the WARM_UP-th on."""

        def __init__(self) -> None:
            self.marks: list[tuple[float, int]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step < WARM_UP:
                return
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.monotonic(), state.num_input_tokens_seen))
            if time.monotonic() > deadline and len(self.marks) > 1:
                control.should_training_stop = True

    return Watch()


# The loss


def measure_loss(options: argparse.Namespace, keep: Keep) -> None:
    """Peak memory of forward and backward pass of the loss, beyond its inputs; on a GPU, else only that it runs."""
    from trinity.ops.borrowed_cross_entropy import cross_entropy

    cuda = torch.cuda.is_available()
    tokens, dim, vocab = (256, 64, 2000) if options.toy else (16384, 1024, 200_000)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    keep(
        {"tokens": tokens, "dim": dim, "vocab": vocab, "gradients_gib": (tokens + vocab) * dim * dtype.itemsize / 2**30}
    )

    def library(kind: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, head, targets: cross_entropy(kind, x, head, targets, z_loss=0.0, chunk_tokens=2048).loss_sum

    def ours(chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, head, targets: (
            cross_entropy("chunked", x, head, targets, z_loss=0.0, chunk_tokens=chunk).loss_sum
        )

    def full(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((x @ head.t()).float(), targets, reduction="sum")

    losses = {"full": full, **{f"chunked_{chunk}": ours(chunk) for chunk in (2048, 1024, 512)}}
    for kind, module in (("liger", "liger_kernel"), ("cce", "cut_cross_entropy")):
        if cuda and importlib.util.find_spec(module) is not None:
            losses[kind] = library(kind)
    found: dict[str, Any] = {}
    for name, loss in losses.items():
        try:
            found[name] = _peak(loss, tokens, dim, vocab, device, dtype)
        except torch.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
        keep({"losses": found})
        if cuda:
            torch.cuda.empty_cache()
    peaks = {name: f["peak_gib"] for name, f in found.items() if f.get("peak_gib")}
    if "full" in peaks:
        keep({"ratio": {name: peaks["full"] / peak for name, peak in peaks.items() if name != "full"}})


def _peak(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, dim: int, vocab: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    draws = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, dim, device=device, dtype=dtype, generator=draws, requires_grad=True)
    head = (torch.randn(vocab, dim, device=device, dtype=dtype, generator=draws) * dim**-0.5).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=device, generator=draws)
    cuda = device == "cuda"
    seconds: list[float] = []
    peak, before, value = 0.0, 0, x.new_zeros(())
    for _ in range(3):
        x.grad = head.grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        value = loss(x, head, targets)
        value.backward()
        if cuda:
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        seconds.append(time.perf_counter() - started)
    return {"peak_gib": peak or None, "seconds": min(seconds), "loss": float(value.detach()) / tokens}


if __name__ == "__main__":
    sys.exit(main())
