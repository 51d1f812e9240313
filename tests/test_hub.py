"""Exports in the hands of `transformers`: the automatic classes, without custom code, agree with ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_export import SMALL, configs, random_model
from test_load import TEXT
from trinity.config import ModelConfig, TokenizerConfig
from trinity.export.afmoe import export_afmoe
from trinity.export.balance_state import STATE
from trinity.infer.engine import Engine
from trinity.infer.load import load, load_model
from trinity.infer.sampling import SamplingParams
from trinity.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, "user assistant system"] * 20, TokenizerConfig(vocab_size=290))


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SMALL.model_copy(update={"vocab_size": tokenizer.vocab_size})
    out = tmp_path_factory.mktemp("hub") / "model"
    export_afmoe(random_model(config), config, tokenizer, out, dtype=torch.float32)
    return out


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens that transformers generates with its cache, whatever the stop tokens."""
    ids = torch.tensor([prompt])
    # The mask is given because transformers would take a padding token inside the prompt for padding.
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def test_the_automatic_classes_give_our_logits_and_our_greedy_text(exported: Path, tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(exported)
    assert type(theirs).__module__.startswith("transformers.")
    assert (exported / STATE).exists(), "a file of ours is in no one's way"
    assert theirs.generation_config.eos_token_id == tokenizer.stop_ids
    ours, own_words = load(exported, device="cpu")
    text = "the cat sat on the mat. 12 + 30 = 42"
    ids = own_words.encode(text)
    assert words(text)["input_ids"] == ids
    assert words.decode(ids) == text
    assert len(ids) > SMALL.window
    with torch.no_grad():
        assert (theirs(torch.tensor([ids])).logits - ours(torch.tensor([ids]))).abs().max() < 1e-4
    params = SamplingParams(temperature=0.0, max_new_tokens=30)
    (completion,) = Engine(ours, own_words, prefill_chunk=5).generate([ids], params)
    assert completion.tokens == greedy(theirs, ids, 30)
    assert completion.text == words.decode(completion.tokens, skip_special_tokens=True)


def test_the_chat_template_renders_the_same(exported: Path, tokenizer: Tokenizer) -> None:
    words = transformers.AutoTokenizer.from_pretrained(exported)
    messages = [
        {"role": "system", "content": "sat"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "on the mat"},
        {"role": "user", "content": "12 + 30"},
    ]
    rendered = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.render_chat(messages, add_generation_prompt=True)
    ids, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
    assert words(rendered)["input_ids"] == ids


def computable(config: ModelConfig) -> bool:
    """What transformers computes too: it normalises always, warns about absent experts, and with a window of one token
    its cache drops nothing (a slice from -W + 1 = 0), so that it disagrees with its own forward pass."""
    return config.route_norm and config.num_shared_experts > 0 and config.window > 1


@settings(max_examples=4, deadline=None)
@given(config=configs().filter(computable), seed=st.integers(0, 99))
def test_models_made_by_transformers_are_read_and_agree(
    config: ModelConfig, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The other direction: their random weights, their files, our logits and our cached greedy tokens."""
    from trinity.export.config import config_to_public

    folder = tmp_path_factory.mktemp("theirs")
    public = config_to_public(config, dtype="float32")
    torch.manual_seed(seed)
    theirs = transformers.AfmoeForCausalLM(transformers.AfmoeConfig(**public)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
            )
    theirs.save_pretrained(folder)
    ours = load_model(folder, device="cpu")
    assert ours.config.layers == config.layers
    prompt = torch.randint(config.vocab_size, (20,)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits
        found = ours(torch.tensor([prompt]))
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())
    (completion,) = Engine(ours, block=4, prefill_chunk=6).generate(
        [prompt], SamplingParams(temperature=0.0, max_new_tokens=4)
    )
    assert completion.tokens == greedy(theirs, prompt, 4)
