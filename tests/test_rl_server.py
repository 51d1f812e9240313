"""Rollouts from a server: what is asked, what must come back, and how it learns of new weights."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError

import trinity
from stage_fixtures import tiny_config, write_inputs
from trinity.base.errors import UserError
from trinity.base.rundir import RunDir
from trinity.config import RLConfig
from trinity.infer.engine import Engine
from trinity.infer.sampling import SamplingParams
from trinity.rl import server as rl_server
from trinity.rl.server import ServerSampler
from trinity.stages import pretrain, rl
from trinity.tokenizer import Tokenizer


class FakeServer:
    """vLLM's and SGLang's routes over the native engine, on the weights that it was told to load last."""

    def __init__(self):
        self.requests, self.loaded, self.model, self.tokenizer, self.answer = [], [], None, None, self.sample
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.requests.append((self.path, body))
                    found = fake.respond(self.path, body)
                data = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def respond(self, path, body):
        if path == "/v1/completions":
            return self.answer(body)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            return {"results": [None]}
        assert path == "/update_weights_from_disk"
        self.load(body["model_path"])
        return {"success": True}

    def load(self, path):
        self.loaded.append(path)
        self.model, self.tokenizer = trinity.load(path)

    def sample(self, body):
        assert self.model is not None
        params = SamplingParams(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            stop_ids=tuple(body["stop_token_ids"]),
        )
        (done,) = Engine(self.model, self.tokenizer).generate([body["prompt"]], [params])
        names = [f"token_id:{token}" for token in done.tokens]
        return {
            "choices": [
                {
                    "text": done.text,
                    "finish_reason": done.finish,
                    "logprobs": {"tokens": names, "token_logprobs": done.logprobs},
                }
            ]
        }


@pytest.fixture
def fake():
    fake = FakeServer()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("base") / "pretrain"
    pretrain.run(tiny_config(folder), run)
    return run


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_run_samples_from_the_server_on_the_weights_of_each_step(folder, base, tmp_path, fake, kind):
    settings = {"server": fake.url, "server_kind": kind, "replay": False, "steps": 3, "gap_every": 1}
    config = tiny_config(folder, rl={**settings, "prompts_per_step": 2, "group": 4})
    assert rl.run(config, tmp_path / "run", start_from=base).train.finished
    steps = RunDir(tmp_path / "run").read_metrics("step")
    assert len(fake.loaded) == 3
    assert len(set(fake.loaded)) == 2
    # The server's log-probabilities are those of the weights that the trainer had: no step is behind.
    assert all(step["gap_free_max"] < 1e-4 for step in steps)
    assert not any("gap_replayed" in step for step in steps)
    completions = [body for path, body in fake.requests if path == "/v1/completions"]
    assert len(completions) == 3 * 2 * 4
    assert all(isinstance(token, int) for body in completions for token in body["prompt"])


def sampler(folder, fake, tmp_path):
    settings = RLConfig.model_validate({"seq_len": 32, "server": fake.url, "replay": False})
    return ServerSampler(settings, Tokenizer.load(folder / "tokenizer"), tmp_path, lambda target: target.mkdir())


def test_token_ids_are_taken_where_they_are_given(folder, fake, tmp_path):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    end = tokenizer.special_id("<|im_end|>")
    ids = [*tokenizer.encode("12"), end]
    logprobs = {"tokens": ["1", "2", ""][: len(ids)], "token_logprobs": [-0.5] * len(ids)}
    choice = {"text": "12", "finish_reason": "stop", "token_ids": ids, "logprobs": logprobs}
    fake.answer = lambda body: {"choices": [choice]}
    (found,) = sampler(folder, fake, tmp_path)([[1, 2]], [7])
    assert (found.text, found.tokens, found.finished) == ("12", ids, True)


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": [{"text": "12", "finish_reason": "stop", "logprobs": None}]},
        {"choices": [{"text": "1", "finish_reason": "stop", "logprobs": {"tokens": ["1"], "token_logprobs": [-1.0]}}]}
        | {
            "choices": [{"text": "x", "finish_reason": "stop", "logprobs": {"tokens": ["x"], "token_logprobs": [-1.0]}}]
        },
    ],
)
def test_answers_without_token_ids_are_refused(folder, fake, tmp_path, answer):
    fake.answer = lambda body: answer
    with pytest.raises(UserError, match="without token ids"):
        sampler(folder, fake, tmp_path)([[1, 2]], [7])


def test_a_server_that_is_not_there_and_one_that_does_not_load(folder, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_server.time, "sleep", lambda seconds: None)
    asked = sampler(folder, fake, tmp_path)
    monkeypatch.setattr(asked, "_url", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="cannot be asked"):
        asked([[1]], [0])
    settings = RLConfig.model_validate({"seq_len": 32, "server": fake.url, "replay": False, "server_kind": "sglang"})
    fake.load = lambda path: None
    fake.respond = lambda path, body: {"success": False, "message": "no such model"}
    other = ServerSampler(settings, asked._tokenizer, tmp_path / "b", lambda target: target.mkdir(parents=True))
    with pytest.raises(UserError, match="no such model"):
        other.sync()


def test_a_temperature_needs_a_server_that_tempers_its_log_probabilities():
    values = {"seq_len": 32, "server": "http://localhost/v1", "replay": False, "temperature": 0.7}
    with pytest.raises(ValidationError, match="server_tempers = true"):
        RLConfig.model_validate(values)
    assert RLConfig.model_validate({**values, "server_tempers": True}).temperature == 0.7


def test_replay_from_a_server_is_refused():
    with pytest.raises(ValidationError, match="replay = false"):
        RLConfig.model_validate({"seq_len": 32, "server": "http://localhost/v1"})
