"""What another engine computes for a model that this project exported: run by that engine's own Python.

    python probe.py ENGINE MODEL REQUEST.json ANSWER.json

REQUEST holds {"prompts": [[id, ...], ...], "new_tokens": n}; ANSWER gets {"version", "logprobs": for each prompt the
log-probability of each of its tokens but the first, "tokens": for each prompt its greedy continuation}.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import os
import sys
from pathlib import Path


def quantized(model: str) -> bool:
    return "quantization_config" in json.loads(Path(model, "config.json").read_text())


def with_transformers(model: str, prompts: list, count: int) -> dict:
    import torch
    import transformers

    extra = {}
    if quantized(model):
        extra["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **extra).eval()
    logprobs, tokens = [], []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            rows = network(ids).logits[0].float().log_softmax(-1)
            logprobs.append([rows[i, token].item() for i, token in enumerate(prompt[1:])])
            found = network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            tokens.append(found[0, len(prompt) :].tolist())
    return {"version": transformers.__version__, "logprobs": logprobs, "tokens": tokens}


def with_vllm(model: str, prompts: list, count: int) -> dict:
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    import vllm

    fp8 = quantized(model)
    if fp8:
        lift_gate()
    # FP8 products give bfloat16; everything else is exact in float32.
    llm = vllm.LLM(
        model, dtype="bfloat16" if fp8 else "float32", enforce_eager=True, max_model_len=512, skip_tokenizer_init=True
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    logprobs, tokens = [], []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False):
        ids = output.prompt_token_ids
        logprobs.append([row[token].logprob for row, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)])
        tokens.append(list(output.outputs[0].token_ids))
    return {"version": vllm.__version__, "logprobs": logprobs, "tokens": tokens}


def lift_gate() -> None:
    """vLLM's FP8 block kernels for CPUs ask for AMX, but run with AVX512-BF16 too."""
    import importlib
    import pkgutil

    import vllm.model_executor as room

    for module in pkgutil.walk_packages(room.__path__, room.__name__ + ".", onerror=lambda _name: None):
        if "cpu" not in module.name.rsplit(".", 1)[-1]:
            continue
        try:
            found = importlib.import_module(module.name)
        except Exception:
            continue
        if hasattr(found, "CPUFp8BlockScaledMMKernel"):
            found.CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda cls, *_, **__: (True, None))
        if hasattr(found, "CPUExpertsFp8"):
            found.CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)


def with_llama(model: str, prompts: list, count: int) -> dict:
    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(
        model, n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2, n_gpu_layers=0,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
    )  # fmt: skip
    logprobs, tokens = [], []
    for prompt in prompts:
        llm.reset()
        llm.eval(prompt)
        rows = np.array(llm.scores[: len(prompt)], dtype=np.float64)
        rows -= rows.max(-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        logprobs.append([float(rows[i, token]) for i, token in enumerate(prompt[1:])])
        found = [int(rows[-1].argmax())]
        while len(found) < count:
            llm.eval([found[-1]])
            found.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        tokens.append(found)
    return {"version": llama_cpp.__version__, "logprobs": logprobs, "tokens": tokens}


def with_mlx(model: str, prompts: list, count: int) -> dict:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    network, _ = load_model(Path(model))
    network.set_dtype(mx.float32)
    logprobs, tokens = [], []
    for prompt in prompts:
        rows = network(mx.array([prompt]))[0]
        rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        logprobs.append([rows[i, token].item() for i, token in enumerate(prompt[1:])])
        cache = make_prompt_cache(network)
        found, fed = [], prompt
        while len(found) < count:
            found.append(int(mx.argmax(network(mx.array([fed]), cache=cache)[0, -1]).item()))
            fed = found[-1:]
        tokens.append(found)
    return {"version": mlx_lm.__version__, "logprobs": logprobs, "tokens": tokens}


ENGINES = {"transformers": with_transformers, "vllm": with_vllm, "llama": with_llama, "mlx": with_mlx}

if __name__ == "__main__":
    engine, model, request, answer = sys.argv[1:]
    wanted = json.loads(Path(request).read_text())
    result = ENGINES[engine](model, wanted["prompts"], wanted["new_tokens"])
    Path(answer).write_text(json.dumps(result))
