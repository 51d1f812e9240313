"""Supervised fine-tuning of a small model on one device: what it learns, how fast, and beside TRL's SFTTrainer.

    python bench/sft.py --out DIR --shards DIR --tokenizer DIR --conversations FILES --questions FILES

- start: a model pretrained here for `--pretrain-minutes` at most, or `--start RUN`.
- sft: `trinity sft` on the conversations and on `--questions` (jsonl.gz of question and solution), with the loss on
  held-out conversations and the share of sampled answers that keep to the chat template, before and after.
- trl: TRL's SFTTrainer on the export of the same checkpoint and the same tokenised conversations, where `trl` is
  installed: the fastest of its ways to batch.
- loss: peak memory of the loss at a vocabulary of 200 000, ours against full logits (and libraries where installed).
- frozen: the same SFT with the expert biases frozen, for MaxVio.

Each part is a process of its own, so that one that fails or runs out of memory loses nothing else. DIR/sft.json is
written anew after each.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trinity.base.files import read_json, read_jsonl, write_json
from trinity.data.chat import read_conversations

BENCH = Path(__file__).parent
PARTS = ("sft", "trl", "loss", "frozen")


class Bench:
    """The result so far, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.deadline = time.monotonic() + options.minutes * 60
        self.result: dict[str, Any] = {"settings": options.set, "device": options.device_name, "failed": {}}
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def keep(self, name: str, value: Any) -> None:
        self.result[name] = value
        write_json(self.out / "sft.json", self.result)
        print(f"[{self.left:4.0f} s left] {name}: {json.dumps(value)[:600]}", flush=True)

    def process(self, name: str, words: Sequence[str], seconds: float) -> bool:
        """Run to the end, or for `seconds`; then a signal lets training save what it has. Whether it ended well."""
        log = self.out / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
            try:
                code = process.wait(timeout=max(1.0, min(seconds, self.left)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    code = process.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    code = process.wait()
        if code not in (0, 128 + signal.SIGTERM):
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
            self.result["failed"][name] = tail
            self.keep("failed", self.result["failed"])
        return code == 0

    def stage(self, stage: str, folder: Path, more: Sequence[str], seconds: float) -> bool:
        options = self.options
        words = [sys.executable, "-m", "trinity", stage, "demo", f"data.tokenizer={options.tokenizer}"]
        overlays = [word for path in options.overlay for word in ("--overlay", str(path))]
        words += [*more, *options.set, *overlays, "--run-dir", str(folder)]
        return self.process(folder.name, words, seconds)


def main() -> int:
    options = _parse()
    bench = Bench(options)
    files = [*map(str, options.conversations)]
    if options.questions:
        files.append(str(from_questions(options.questions, bench.out / "questions.jsonl")))
    listed = f"sft.conversations={json.dumps(files)}"
    bench.keep("conversations", {"files": [Path(f).name for f in files], "number": sum(1 for _ in _read(files))})
    start = options.start or pretrain(bench)
    for part in options.parts:
        if bench.left < 20:
            print(f"no time for {part}")
            break
        if part in ("sft", "frozen"):
            more = [listed, "--from", str(start), *(["balance.frozen=true"] if part == "frozen" else [])]
            if options.shards:
                more.append(f"data.shards={options.shards}")
            bench.stage("sft", bench.out / part, more, bench.left - 10)
            bench.keep(part, sft_figures(bench.out / part))
        else:
            # An export is what TRL loads: a run that was cut short has none.
            words = [sys.executable, str(BENCH / "sft_parts.py"), part, "--out", str(bench.out / f"{part}.json")]
            if part == "trl":
                words += ["--model", str(start / "model"), "--run", str(bench.out / "sft")]
            words += ["--toy"] if options.toy else []
            bench.process(part, words, bench.left - 5)
            found = bench.out / f"{part}.json"
            bench.keep(part, read_json(found) if found.exists() else None)
    compare(bench)
    return 1 if bench.result["failed"] else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--conversations", type=Path, nargs="+", required=True)
    parser.add_argument("--questions", type=Path, nargs="*", default=[])
    parser.add_argument("--shards", type=Path, help="of the text to pretrain on")
    parser.add_argument("--start", type=Path, help="a run with an export, instead of pretraining")
    parser.add_argument("--pretrain-minutes", type=float, default=3.5)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--overlay", type=Path, nargs="*", default=[BENCH / "small.toml", BENCH / "sft.toml"])
    parser.add_argument("--toy", action="store_true", help="small sizes of the other parts, for tests on a CPU")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every stage")
    options = parser.parse_args()
    if options.start is None and options.shards is None:
        parser.error("name --shards to pretrain on, or --start")
    import torch

    options.device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return options


def _read(files: Sequence[str]) -> Any:
    return read_conversations(files)


def from_questions(files: Sequence[Path], target: Path) -> Path:
    """Records of `question` and `solution` (and perhaps `answer`) as conversations."""
    import gzip

    with target.open("w", encoding="utf-8") as out:
        for path in files:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
            for line in text.split("\n"):
                record = json.loads(line) if line.strip() else {"overlap_test": True}
                if record.get("overlap_test"):
                    continue
                answer = f"{record['solution']}\nThe answer is {record['answer']}."
                turns = [("user", record["question"]), ("assistant", answer)]
                messages = [{"role": role, "content": text} for role, text in turns]
                out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return target


def pretrain(bench: Bench) -> Path:
    """A model to start from; cut short it has no export, so one is made from its checkpoint."""
    folder = bench.out / "pretrain"
    whole = bench.stage(
        "pretrain", folder, [f"data.shards={bench.options.shards}"], 60 * bench.options.pretrain_minutes
    )
    if not (folder / "checkpoints").exists():
        raise SystemExit(f"pretraining failed: {bench.result['failed']}")
    if not whole and not (folder / "model").exists():
        words = [sys.executable, "-m", "trinity", "export", str(folder), "--out", str(folder / "model")]
        bench.process("export", words, 120)
    steps = [r for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "step"]
    evals = [r["loss"] for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "eval"]
    bench.keep(
        "start",
        {
            "steps": len(steps),
            "tokens": steps[-1]["tokens"],
            "seconds": round(sum(r.get("seconds", 0.0) for r in steps), 1),
            "loss": steps[-1]["loss"],
            "held_out_loss": evals[-1] if evals else None,
            "whole": whole,
        },
    )
    return folder


def sft_figures(folder: Path) -> dict[str, Any] | None:
    """What a run of SFT recorded; `tokens_per_second` is the median over the last two thirds of the steps, of row
    positions."""
    records = read_jsonl(folder / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step" and "seconds" in r]  # the others were jumped over
    if len(steps) < 6:
        return None
    late = sorted(r["tokens_per_second"] for r in steps[len(steps) // 3 :] if r.get("tokens_per_second"))
    scores = [r for r in records if r["kind"] == "score" and r["name"] == "template"]
    samples = read_jsonl(folder / "samples.jsonl")
    vio = [r["max_vio"] for r in steps]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "seconds": round(sum(r.get("seconds", 0.0) for r in steps), 1),
        "tokens_per_second": late[len(late) // 2],
        "held_out": [[r["step"], r["loss"], r["standard_error"]] for r in records if r["kind"] == "eval"],
        "template": [[r["step"], r["value"], r["standard_error"], r["wrong"]] for r in scores],
        "max_vio_first": sum(vio[:10]) / len(vio[:10]),
        "max_vio_last": sum(vio[-10:]) / len(vio[-10:]),
        "max_vio_largest": max(vio),
        "max_vio_worst_layer": max(max(r["max_vio_layers"]) for r in steps),
        "dead_experts": max(sum(r.get("dead_experts") or []) for r in steps),
        "curve": [[r["step"], round(r["ce"], 4), round(r["max_vio"], 3)] for r in steps[::5]],
        "skips": sum(bool(r.get("skipped")) for r in steps),
        "samples": samples[-12:],
    }


def compare(bench: Bench) -> None:
    """The ratios that are asked for, of what was measured in this call."""
    sft, trl, loss = (bench.result.get(name) for name in ("sft", "trl", "loss"))
    found: dict[str, Any] = {}
    if sft:
        found["held_out_loss"] = [sft["held_out"][0][1], sft["held_out"][-1][1]] if sft["held_out"] else None
        found["template"] = sft["template"][-1][1] if sft["template"] else None
    if sft and trl and trl.get("best"):
        ours = sft["tokens_per_second"] * trl["fill"]
        found["tokens_per_second"] = {"ours": ours, "trl": trl["best"]["tokens_per_second"]}
        found["speed_against_trl"] = ours / trl["best"]["tokens_per_second"]
    if loss and loss.get("ratio"):
        found["loss_memory_ratio"] = loss["ratio"]
    bench.keep("summary", found)


if __name__ == "__main__":
    sys.exit(main())
