"""The project's own server as the writer: started beside the run, asked over HTTP, ended with it."""

import re
from pathlib import Path

import pytest
import torch

from curate_helpers import recipe_for, serial, write_documents, written
from serve_helpers import make_tokenizer, slow_model
from trinity.base.errors import UserError
from trinity.config.curate import GenerateConfig
from trinity.curate.embedded import embedded
from trinity.curate.run import curate
from trinity.curate.summary import chain_holds
from trinity.export.afmoe import export_afmoe


def test_a_model_that_is_not_there_or_not_whole_is_named(tmp_path: Path) -> None:
    missing = GenerateConfig(model=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"generate\.model: there is no"), embedded(missing):
        pass
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(UserError, match=r"the embedded server did not start: trinity: .*empty"),
        embedded(GenerateConfig(model=str(tmp_path / "empty"))),
    ):
        pass


@pytest.mark.slow
def test_a_small_model_writes_and_every_answer_is_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trinity.curate.run.cluster", serial)
    model = slow_model(4096)
    export_afmoe(model, model.config, make_tokenizer(), tmp_path / "tiny", dtype=torch.float32)
    inputs = write_documents(tmp_path / "in.jsonl", 8)
    rewrite = [{"recipe": "encyclopaedia", "max_tokens": 12, "passage_chars": 300, "max_passages": 1}]
    settings = {"backend": "embedded", "model": str(tmp_path / "tiny"), "endpoints": [], "concurrency": 4}
    found = curate(recipe_for(inputs, "http://x/v1", rephrase=rewrite, generate=settings), tmp_path / "out")
    assert found["stages"]["rephrase"]["in"] == 8
    assert found["stages"]["rephrase"]["out"] + sum(found["stages"]["rephrase"]["drops"].values()) == 8
    assert found["use"]["completion_tokens"] > 0
    assert chain_holds(found["stages"])
    assert len(written(tmp_path / "out")) == found["documents"]
    assert re.fullmatch(r"[\w ]+", next(iter(found["stages"]["validate"]["drops"])))
