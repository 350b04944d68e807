"""Answers by a server: `transformers serve` as it is, and one with vLLM's route for adapters."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pm_llm.cli import main
from pm_llm.evaluation.engine import as_sent
from tests.conftest import ROOT
from tests.test_launchers import arguments


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


ENGINE = ["--evaluation.engine", "openai", "--evaluation.parallel", "4", "--evaluation.url"]


@pytest.fixture(scope="module")
def run(pico_folders, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run, and its arguments."""
    folder = tmp_path_factory.mktemp("engine") / "run"
    given = [*arguments(pico_folders["llama"], 8), "--train.max_steps", "60"]
    assert main(["run", *given, "--output_dir", str(folder)]) == 0
    return folder, given


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[str]:
    """The address of `transformers serve` in a process of its own."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            cwd=ROOT,
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_here(serve, run, tmp_path, capsys) -> None:
    """`pm-llm evaluate` of the base and of an adapter that has a tokenizer and a page beside it: the same predictions,
    scored the same."""
    folder, given = run
    pushed = tmp_path / "adapter"
    shutil.copytree(folder / "adapter", pushed)
    shutil.copy(Path(given[given.index("--model") + 1]) / "tokenizer.json", pushed)
    (pushed / "README.md").write_text("mine")
    for adapter in ([], ["--adapter", str(pushed)]):
        files = [tmp_path / f"{len(adapter)}-{i}.jsonl" for i in range(2)]
        said = []
        for file, more in zip(files, ([], [*ENGINE, serve]), strict=True):
            assert main(["evaluate", *adapter, *given, *more, "--predictions", str(file)]) == 0
            said.append(capsys.readouterr().out)
        assert files[0].read_text() == files[1].read_text()
        assert said[0] == said[1]


@pytest.mark.slow
def test_a_run_is_scored_by_a_server(serve, run, tmp_path) -> None:
    folder, given = run
    assert main(["run", *given, *ENGINE, serve, "--output_dir", str(tmp_path)]) == 0
    ours, theirs = (json.loads((x / "results.json").read_text()) for x in (tmp_path, folder))
    assert ours["matrix"] == theirs["matrix"]
    files = list(folder.glob("stages/*/predictions/*"))
    assert len(files) == 3
    assert all(file.read_text() == (tmp_path / file.relative_to(folder)).read_text() for file in files)
    assert any(json.loads(line)["prediction"] for file in files for line in file.read_text().splitlines())


LOCK = threading.Lock()


class _Dynamic(BaseHTTPRequestHandler):
    """Completions of a model whose adapters come and go by name; the first request for each prompt is turned away."""

    base, tokenizer, loaded, seen, log, keeps = None, None, {}, set(), [], False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        route = self.path.rpartition("/")[2]
        if route == "completions" and str(body["prompt"]) not in self.seen:
            self.seen.add(str(body["prompt"]))
            return self._say(503, {"error": "busy"})
        if route == "completions" and body["model"] not in self.loaded:
            return self._say(404, {"error": f"no model {body['model']}"})
        if route == "load_lora_adapter" and body["lora_name"] in self.loaded:
            return self._say(400, {"error": f"{body['lora_name']} has already been loaded"})
        if route == "unload_lora_adapter" and self.keeps:
            return self._say(500, {"error": "not now"})
        self.log.append(route)
        if route == "load_lora_adapter":
            self.loaded[body["lora_name"]] = body["lora_path"]
        elif route == "unload_lora_adapter":
            del self.loaded[body["lora_name"]]
        else:
            return self._say(200, self._completion(body))
        return self._say(200, "ok")

    def _completion(self, body: dict) -> dict:
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.tokenizer(body["prompt"])["input_ids"]
        with LOCK, torch.no_grad():  # transformers is not loaded with in several threads at once
            base = AutoModelForCausalLM.from_pretrained(self.base)
            model = PeftModel.from_pretrained(base, self.loaded[body["model"]]).eval()
            found = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False)[
                0, len(ids) :
            ]
        text = self.tokenizer.decode(found, skip_special_tokens=True)
        return {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [
            {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        ]}  # fmt: skip

    def _say(self, status: int, what: object) -> None:
        found = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def dynamic(pico_folders) -> Iterator[str]:
    _Dynamic.base, _Dynamic.tokenizer = pico_folders["llama"], AutoTokenizer.from_pretrained(pico_folders["llama"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Dynamic)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_adapters_are_loaded_by_name_and_busy_servers_asked_again(run, dynamic, tmp_path) -> None:
    folder, given = run
    files = [tmp_path / f"{i}.jsonl" for i in range(2)]
    words = ["evaluate", "--adapter", str(folder / "adapter"), *given, "--order", "topic", "--predictions"]
    assert main([*words, str(files[0])]) == 0
    assert main([*words, str(files[1]), *ENGINE, dynamic]) == 0
    assert files[0].read_text() == files[1].read_text()
    assert _Dynamic.log[0] == "load_lora_adapter"
    assert _Dynamic.log[-1] == "unload_lora_adapter"
    assert not _Dynamic.loaded


def test_a_server_that_keeps_an_adapter_has_it_the_next_time(run, dynamic, monkeypatch, tmp_path, capsys) -> None:
    folder, given = run
    monkeypatch.setattr(_Dynamic, "keeps", True)
    words = ["evaluate", "--adapter", str(folder / "adapter"), *given, "--order", "topic", *ENGINE, dynamic]
    said = []
    for _ in range(2):
        assert main([*words, "--evaluation.retries", "1"]) == 0
        said.append(capsys.readouterr().out)
        assert "keeps adapter pm-llm-" in said[-1]
    assert said[0] == said[1]
    assert len(_Dynamic.loaded) == 1
    _Dynamic.loaded.clear()


def test_a_server_that_is_not_there(run, capsys) -> None:
    _, given = run
    words = ["evaluate", *given, *ENGINE, f"http://127.0.0.1:{free_port()}/v1", "--evaluation.retries", "0"]
    assert main(words) == 2
    assert "did not answer (APIConnectionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--evaluation.mode", "labels"], "asks for likelihoods. Give one of them"),
        (["--model", "embedded:t5"], "is for decoders"),
        (["--evaluation.parallel", "0"], "evaluation.parallel"),
    ],
)
def test_what_a_server_cannot_do_is_refused(more: list[str], said: str, run, capsys) -> None:
    assert main(["evaluate", *run[1], *ENGINE, "http://127.0.0.1:9/v1", *more]) == 2
    assert said in capsys.readouterr().err


def test_prompts_are_sent_as_text_where_that_gives_the_same_tokens(pico_folders) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_folders["llama"])
    ids = tokenizer("is it good ?")["input_ids"]
    sent = as_sent(tokenizer, ids)
    assert isinstance(sent, str)
    assert tokenizer(sent)["input_ids"] == ids
    unsaid = tokenizer("it")["input_ids"][-1:] + tokenizer("s")["input_ids"][-1:]
    for other in (ids[::-1], [*unsaid, *unsaid]):  # no text is tokenized like this
        sent = as_sent(tokenizer, other)
        assert sent == other if isinstance(sent, list) else tokenizer(sent)["input_ids"] == other
    assert isinstance(as_sent(tokenizer, [tokenizer.pad_token_id, *ids]), list)
