"""Exports in the hands of real engines, each in its own environment: `make test-clients` makes them and runs this.

The environments lie in the folder TRINITY_CLIENTS (by default .clients), one a name of clients/NAME.txt.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from test_export import random_model
from trinity.base.errors import UserError
from trinity.config import ModelConfig
from trinity.export.afmoe import export_afmoe
from trinity.export.gguf import check_gguf, export_gguf
from trinity.export.oracle import oracle_forward
from trinity.infer.engine import Engine
from trinity.infer.load import load_model
from trinity.infer.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("TRINITY_CLIENTS", ROOT / ".clients"))
CONFIG = ModelConfig(
    vocab_size=320,
    num_layers=8,
    num_dense_layers=1,
    dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=256,
    expert_dim=128,
    num_experts=8,
    experts_per_token=2,
    route_scale=2.0,
    window=16,
    max_positions=512,
)
NEW_TOKENS = 24


def python(engine: str) -> Path:
    found = FOLDER / engine / "bin" / "python"
    if not found.exists():
        pytest.skip(f"{engine} has no environment in {FOLDER}; make test-clients makes it")
    return found


def prompts() -> list[list[int]]:
    """Shorter than the window, and 13 windows long."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist() for length in (9, 208)]


def probe(engine: str, model: Path, folder: Path) -> dict[str, Any]:
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps({"prompts": prompts(), "new_tokens": NEW_TOKENS}))
    command = [python(engine), ROOT / "clients" / "probe.py", engine, model, request, answer]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads(answer.read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clients") / "model"
    export_afmoe(random_model(CONFIG), CONFIG, None, out, dtype=torch.float32)
    return out


def compare(found: dict[str, Any], model_dir: Path) -> None:
    model = load_model(model_dir, device="cpu", dtype="float32")
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    worst = 0.0
    for prompt, logprobs, tokens in zip(prompts(), found["logprobs"], found["tokens"], strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([prompt]))[0].log_softmax(-1)
        expected = rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        worst = max(worst, (torch.tensor(logprobs) - expected).abs().max().item())
        assert tokens == Engine(model).generate([prompt], params)[0].tokens
    print(f"{found['version']}: largest difference of a log-probability {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.slow  # a process of another engine, with its own start of up to a minute
@pytest.mark.parametrize("engine", ["transformers", "vllm", "mlx"])
def test_float32_exports_are_computed_alike(engine: str, exported: Path, tmp_path: Path) -> None:
    compare(probe(engine, exported, tmp_path), exported)


@pytest.mark.slow
def test_llama_cpp_computes_a_gguf_alike(exported: Path, tmp_path: Path) -> None:
    python("llama")
    pytest.importorskip("gguf", reason="gguf is not installed")
    export_gguf(exported, tmp_path / "m.gguf", dtype="fp32")
    compare(probe("llama", tmp_path / "m.gguf", tmp_path), exported)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_fp8_exports_are_within_quantisation_noise(engine: str, exported: Path, tmp_path: Path) -> None:
    """transformers computes with the dequantised weights; vLLM rounds activations too, and computes in bfloat16."""
    python(engine)
    out = tmp_path / "fp8"
    export_afmoe(random_model(CONFIG), CONFIG, None, out, dtype="fp8-block")
    found = probe(engine, out, tmp_path)
    if engine == "transformers":
        compare(found, out)
        return
    differences, noises = [], []
    for prompt, logprobs in zip(prompts(), found["logprobs"], strict=True):
        row = torch.tensor([prompt])
        after = torch.tensor(prompt[1:])[:, None]
        exact, rounded = (
            oracle_forward(out, row, quantize_inputs=q).logits_BTV[0].log_softmax(-1)[:-1].gather(1, after)[:, 0]
            for q in (False, True)
        )
        differences.append((torch.tensor(logprobs) - exact).abs())
        noises.append((rounded - exact).abs())
    difference, noise = torch.cat(differences).mean(), torch.cat(noises).mean()
    print(f"{found['version']}: mean difference {difference:.3f}, of rounded activations alone {noise:.3f}")
    assert difference <= 3 * noise + 0.02


def test_what_llama_cpp_computes_differently_is_refused() -> None:
    for changes, words in (
        ({"global_every": 3}, "every fourth"),
        ({"embed_scale": False}, "sqrt"),
        ({"num_shared_experts": 0}, "shared expert"),
    ):
        with pytest.raises(UserError, match=words):
            check_gguf(ModelConfig(**{**CONFIG.model_dump(), **changes}))
