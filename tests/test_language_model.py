"""Log-likelihoods against sums written out, whatever the batch; windows of a long text; an endpoint's answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from stage_fixtures import noise, tiny_config, write_inputs
from trinity.base.errors import UserError
from trinity.evals import endpoint
from trinity.evals.endpoint import Endpoint
from trinity.evals.language_model import Likelihood, NativeModel, Prompt, Scored
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer

POSITIONS = 32
PAIRS = [
    ("The sea was calm.", " A boat came in."),
    ("The sea was calm. ", "A boat came in."),
    ("Q: 3 + 4 =\nA:", " A"),
    ("Q: 3 + 4 =\nA:", " B"),
    ("Q: 3 + 4 =\nA:", " seven, or so"),
    ("", "Nothing stands before this."),
    ("x" * 100, " too long"),
    ("short", "y" * 100),
    ("an end", ""),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return Tokenizer.load(folder / "tokenizer")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    sizes = {"max_positions": POSITIONS, "vocab_size": tokenizer.vocab_size}
    model = Transformer(tiny_config(Path(), model=sizes).model)
    model.init_weights(5)
    return model.eval()


def written_out(model: Transformer, before: list[int], after: list[int]) -> Likelihood:
    """One token at a time, each after all that the model's positions hold."""
    whole = (before + after)[-(POSITIONS + 1) :]
    after = after[-POSITIONS:]
    total, greedy = 0.0, True
    with torch.no_grad():
        for place in range(len(whole) - len(after), len(whole)):
            logits_V = model(torch.tensor([whole[:place]]))[0, -1].double()
            total += float(logits_V.log_softmax(-1)[whole[place]])
            greedy &= int(logits_V.argmax()) == whole[place]
    return Likelihood(total, greedy)


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_likelihoods_are_the_sums_written_out(model: Transformer, tokenizer: Tokenizer, batch_tokens: int) -> None:
    native = NativeModel(model, tokenizer, batch_tokens=batch_tokens)
    found = native.loglikelihood(PAIRS)
    for pair, one in zip(PAIRS, found, strict=True):
        before, after = native.encode_pair(*pair)
        expected = written_out(model, before, after)
        assert one.logprob == pytest.approx(expected.logprob, rel=1e-6, abs=1e-5), pair
        assert one.greedy == expected.greedy
    assert found[0] == pytest.approx(found[1]), "a blank belongs to the continuation wherever it stands"


def test_the_most_probable_continuation_is_greedy(model: Transformer, tokenizer: Tokenizer) -> None:
    native = NativeModel(model, tokenizer)
    before = tokenizer.encode("The sea")
    tokens = list(before)
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    (text,) = native.generate([Prompt("The sea", max_new_tokens=6)])
    assert text == tokenizer.decode(tokens[len(before) :], skip_special=True)
    found = native.score([Scored(tokens[:-1], tokens[-count:]) for count in (1, 3, 6)])
    assert all(one.greedy for one in found)
    wrong = [*tokens[:-2], (tokens[-2] + 1) % 400, tokens[-1]]
    assert not native.score([Scored(wrong[:-1], wrong[-3:])])[0].greedy


@pytest.mark.parametrize("length", [1, POSITIONS - 1, POSITIONS, POSITIONS + 1, 3 * POSITIONS + 5])
def test_windows_predict_every_token_once(model: Transformer, tokenizer: Tokenizer, length: int) -> None:
    tokens = [5 + i % 200 for i in range(length)]
    windows = NativeModel(model, tokenizer).windows(tokens)
    assert [token for window in windows for token in window.targets] == tokens
    assert windows[0].tokens[0] == tokenizer.eos_id
    for window in windows:
        assert len(window.targets) <= len(window.tokens) <= POSITIONS
    if length > POSITIONS:
        assert len(windows[-1].tokens) == POSITIONS, "the last window reads as much as the model holds"


def test_a_text_is_the_sum_of_its_windows(model: Transformer, tokenizer: Tokenizer) -> None:
    native = NativeModel(model, tokenizer, batch_tokens=150)
    texts = ["Short.", noise(1, 6), ""]
    for text, total in zip(texts, native.loglikelihood_rolling(texts), strict=True):
        parts = [
            written_out(model, w.tokens[: len(w.tokens) - len(w.targets) + 1], w.targets)
            for w in native.windows(tokenizer.encode(text))
        ]
        assert total == pytest.approx(sum(part.logprob for part in parts), rel=1e-6, abs=1e-6)


def test_stop_strings_and_long_prompts(model: Transformer, tokenizer: Tokenizer) -> None:
    native = NativeModel(model, tokenizer)
    (free,) = native.generate([Prompt("sea " * 100, max_new_tokens=8)])
    stop = free[1:3]
    (stopped,) = native.generate([Prompt("sea " * 100, (stop,), 8)])
    assert stopped == free[: free.index(stop)]


class _Server(BaseHTTPRequestHandler):
    """Every token is one character; its log-probability is minus its place. The first three requests fail."""

    fails = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).fails:
            type(self).fails -= 1
            self.send_error(503)
            return
        if body["model"] != "m":
            self.send_error(404, "no such model")
            return
        if "messages" in body:
            choice = {"message": {"content": "chat " + body["messages"][-1]["content"]}}
        elif body.get("echo"):
            tokens = [*body["prompt"], "!"]
            logprobs = [None, *(-float(i) for i in range(1, len(tokens)))]
            tops = [None, *({t: -float(i)} if t != "z" else {"q": 0.0} for i, t in enumerate(tokens[1:], start=1))]
            choice = {
                "text": "",
                "logprobs": {
                    "token_logprobs": logprobs,
                    "text_offset": list(range(len(tokens))),
                    "top_logprobs": tops,
                },
            }
        else:
            choice = {"text": " an answer\nQ: more"}
        data = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_answers_as_a_model_does(url: str) -> None:
    model = Endpoint(url, "m", workers=2)
    assert model.loglikelihood([("ab", "cd"), ("ab ", "c"), ("ab", "zd"), ("ab", "")]) == [
        Likelihood(-5.0, True),
        Likelihood(-5.0, True),
        Likelihood(-5.0, False),
        Likelihood(0.0, True),
    ]
    assert model.loglikelihood_rolling(["abcd"]) == [-6.0]
    chat = model.render_chat([{"role": "user", "content": "Hello"}])
    assert model.generate([Prompt("x", ("\nQ:",)), Prompt(chat, chat=True)]) == [" an answer", "chat Hello"]


def test_a_busy_endpoint_is_asked_again_and_mistakes_are_sentences(url: str, monkeypatch) -> None:
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)
    monkeypatch.setattr(_Server, "fails", 3)
    assert Endpoint(url, "m").loglikelihood([("ab", "c")])[0].logprob == -2.0
    with pytest.raises(UserError, match="completions answered 404: "):
        Endpoint(url, "other").generate([Prompt("x")])
    with pytest.raises(UserError, match="the context must not be empty"):
        Endpoint(url, "m").loglikelihood([("", "ab")])
    with pytest.raises(UserError, match="cannot be asked: "):
        Endpoint("http://127.0.0.1:1/v1", "m").generate([Prompt("x")])
