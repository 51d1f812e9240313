"""Chat sessions: the template, the history, streaming, and a context that fills up."""

import pytest
import torch

from test_export import SMALL, random_model
from test_load import TEXT
from trinity.base.errors import UserError
from trinity.config import TokenizerConfig
from trinity.infer.chat import ChatSession
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer, train_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, "<|im_start|>user assistant system"] * 20, TokenizerConfig(vocab_size=290))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SMALL.model_copy(update={"max_positions": 96}))


def test_an_answer_is_what_the_engine_gives_for_the_rendered_conversation(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    session = ChatSession(model, tokenizer, system="the mat", params=GREEDY)
    pieces = list(session.send("the cat"))
    messages = [{"role": "system", "content": "the mat"}, {"role": "user", "content": "the cat"}]
    assert session.messages[:2] == messages
    prompt, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
    params = SamplingParams(temperature=0.0, max_new_tokens=12, stop_ids=tuple(tokenizer.stop_ids))
    (completion,) = Engine(model, tokenizer).generate([prompt], params)
    assert "".join(pieces) == completion.text == session.messages[2]["content"]
    assert session.messages[2]["role"] == "assistant"
    assert session.finish == completion.finish
    assert session.dropped == 0
    session.reset()
    assert session.messages == messages[:1]


def test_the_end_of_the_turn_stops_the_answer_and_is_no_text(model: Transformer, tokenizer: Tokenizer) -> None:
    free = ChatSession(model, tokenizer, params=GREEDY)
    list(free.send("the cat"))
    prompt, _ = tokenizer.encode_chat(free.messages[:1], add_generation_prompt=True)
    (completion,) = Engine(model, tokenizer).generate([prompt], GREEDY)
    place = next(i for i, token in enumerate(completion.tokens) if i > 2 and token not in completion.tokens[:i])
    # With these two rows of the head exchanged, the model ends its turn where it would have said that token.
    talker = Transformer(model.config)
    talker.load_state_dict(model.state_dict())
    pair = [tokenizer.special_id("<|im_end|>"), completion.tokens[place]]
    with torch.no_grad():
        talker.head.weight[pair] = talker.head.weight[pair[::-1]]
    session = ChatSession(talker, tokenizer, params=GREEDY)
    text = "".join(session.send("the cat"))
    assert session.finish == "stop"
    assert text == tokenizer.decode(completion.tokens[:place], skip_special=True)


def test_the_oldest_turns_leave_when_the_context_is_full(model: Transformer, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, tokenizer, system="mat", params=GREEDY)
    for _ in range(6):
        list(session.send("the cat sat"))
    assert len(session.messages) == 13
    assert session.dropped > 0
    assert session.dropped % 2 == 0
    assert session.messages[0] == {"role": "system", "content": "mat"}


def test_a_message_that_cannot_fit_is_taken_back(model: Transformer, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, tokenizer, params=GREEDY)
    with pytest.raises(UserError, match="too long"):
        list(session.send("zq" * 200))
    assert session.messages == []
    list(session.send("the cat"))
    assert len(session.messages) == 2


def test_a_caller_who_stops_listening_keeps_what_came(model: Transformer, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, tokenizer, params=GREEDY)
    stream = session.send("the cat")
    first = next(stream)
    stream.close()
    assert session.finish == "cancelled"
    assert session.messages[-1]["content"].startswith(first)
    list(session.send("sat"))
    assert len(session.messages) == 4


def test_a_turn_reads_only_what_is_new(model: Transformer, tokenizer: Tokenizer) -> None:
    """And answers as if it had read everything."""
    session = ChatSession(model, tokenizer, system="the cat sat on the mat", params=GREEDY)
    fed: list[list[int]] = []
    for turn in range(2):
        seen: list[tuple[int, int]] = []
        answer = "".join(session.send("the mat", lambda done, total, seen=seen: seen.append((done, total))))
        fed.append([done for done, _ in seen])
        assert seen[-1][0] == seen[-1][1]
        assert session._last is not None
        request = session._last.request
        assert session.dropped == 0
        params = SamplingParams(temperature=0.0, max_new_tokens=12, stop_ids=tuple(tokenizer.stop_ids))
        (whole,) = Engine(model, tokenizer).generate([request.prompt], params)
        assert whole.text == answer
        text = tokenizer.render_chat(session.messages[: 2 + 2 * turn], add_generation_prompt=True)
        assert tokenizer.decode(request.prompt) == text
    assert fed[0][0] == 0
    assert fed[1][0] > fed[0][-1]  # the first prompt and most of the answer
    session.reset()
    assert session._engine.cache.used_bytes == 0


def test_a_turn_that_nobody_heard_to_its_end_is_gone_on_from(model: Transformer, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, tokenizer, params=GREEDY)
    first = session.send("the cat")
    next(first)
    list(session.send("the mat"))
    first.close()
    assert session.finish == "cancelled"
    session.reset()
    assert list(session.send("the cat"))


@pytest.mark.parametrize(
    ("answer", "text", "kept"),
    [("the mat", "the mat", True), ("  the mat", "  the mat", True), ("the mat. sat", "the mat", False)],
)
def test_what_was_generated_is_gone_on_from_where_the_template_shows_it(
    model: Transformer, tokenizer: Tokenizer, answer: str, text: str, kept: bool
) -> None:
    """White space before it is left out by the template; a stop string cut it in the last case."""
    session = ChatSession(model, tokenizer, params=GREEDY)
    list(session.send("the cat"))
    assert session._last is not None
    request = session._last.request
    generated = tokenizer.encode(answer)
    request.completion.tokens, request.completion.text = generated, text
    session.messages[-1]["content"] = text
    messages = [*session.messages, {"role": "user", "content": "the dog"}]
    ids = session._encode(messages)
    assert (ids[: len(request.prompt) + len(generated)] == request.prompt + generated) == kept
    whole, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
    assert (ids == whole) == (answer == "the mat" or not kept)
