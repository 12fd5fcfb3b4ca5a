"""MODEL as a name on the hub: what is fetched, what is said when nothing can be. The hub is one on this machine."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import errors
from safetensors.torch import load_file

from dconv.checkpoint import hub
from dconv.errors import DconvError, StorageFault, ToolMissing, UsageError
from dconv.pipeline import Request, convert
from tests.oracles import hf


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("meta-llama/Llama-3.2-1B", ("meta-llama/Llama-3.2-1B", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("org/name@0123abc", ("org/name", "0123abc")),
        ("name", None),
        ("/org/name", None),
        ("../name", None),
        ("a/b/c", None),
        ("org/..", None),
        ("org/na--me", None),
        ("org/name.git", None),
        ("org/name@", None),
        ("org/na me", None),
        ("~/name", None),
        ("org/$(x)", None),
    ],
)
def test_names(text: str, meant: tuple[str, str | None] | None) -> None:
    assert hub.parse(Path(text)) == meant


def test_what_is_chosen() -> None:
    beside = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "LICENSE", "README.md"]
    beside += ["quantize_config.json", "hf_quant_config.json"]
    never = ["modeling.py", "tokenizer_own.py", "original/consolidated.00.pth", "onnx/model.onnx", ".gitattributes"]
    never += [
        "onnx/config.json",
        "run.sh",
        "model.gguf",
        "training_args.bin",
        "tf_model.h5",
        "adapter_model.safetensors",
    ]
    single = ["model.safetensors"]
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    torch = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    meta = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]

    def chosen(*kinds: list[str]) -> set[str]:
        return set(hub.choose([*beside, *never, *(name for kind in kinds for name in kind)]))

    assert chosen(single) == {*beside, *single}
    assert chosen(parts, ["consolidated.safetensors"]) == {*beside, *parts}
    assert chosen(parts, torch) == {*beside, *parts, "pytorch_model.bin.index.json"}
    assert chosen(torch) == {*beside, *torch}
    assert chosen(meta) == {*beside, *meta}
    assert chosen() == set()


def answer(*names: str) -> SimpleNamespace:
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


def test_names_are_no_patterns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: answer("a*.safetensors", "config.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch("org/name", "main") == tmp_path
    assert asked == {"name": "org/name", "revision": "main", "allow_patterns": ["a[*].safetensors", "config.json"]}


def http_error(kind: type[Exception]) -> Exception:
    return kind("no", response=SimpleNamespace(headers={}, request=None))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("where", ["asking", "fetching"])
@pytest.mark.parametrize(
    ("fault", "kind", "word"),
    [
        (http_error(errors.RepositoryNotFoundError), UsageError, "no such checkpoint"),
        (http_error(errors.GatedRepoError), UsageError, "gated"),
        (http_error(errors.RevisionNotFoundError), UsageError, "revision"),
        (errors.HFValidationError("no"), UsageError, "no name"),
        (http_error(errors.HfHubHTTPError), StorageFault, "hub cannot be reached|download failed"),
        (ConnectionError("reset"), StorageFault, "hub cannot be reached|download failed"),
        (OSError(28, "No space left on device"), StorageFault, "No space|hub cannot be reached"),
    ],
)
def test_faults(
    monkeypatch: pytest.MonkeyPatch, where: str, fault: Exception, kind: type[DconvError], word: str
) -> None:
    def fail(*_: object, local_files_only: bool = False, **__: object) -> Any:
        raise errors.LocalEntryNotFoundError("not there") if local_files_only else fault

    info = fail if where == "asking" else lambda *_, **__: answer("model.safetensors")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=word) as caught:
        hub.fetch("org/name", "v1")
    assert caught.value.where == "org/name@v1"
    assert caught.value.do


def test_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: answer("config.json", "model.gguf"))
    with pytest.raises(UsageError, match="no weights"):
        hub.fetch("org/name")


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ToolMissing) as caught:
        convert(Request(Path("org/name"), "hf"))
    assert caught.value.exit_code == 7
    assert "pip install 'dconv[hub]'" in caught.value.do


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download takes: a repository's state, its tree, its files."""

    commit = "a" * 40

    def __init__(self, files: dict[str, bytes], log: list[str], *rest: Any) -> None:
        self.files, self.log = files, log
        super().__init__(*rest)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = None
        if path.startswith("/api/models/org/tiny/tree/"):
            content = json.dumps([
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                for name, data in self.files.items()
            ]).encode()  # fmt: skip
        elif path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": siblings}).encode()
        elif path.startswith("/org/tiny/resolve/"):
            name = path.split("/", 5)[5]
            content = self.files.get(name)
            if self.command == "GET":
                self.log.append(name)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound")
            content = b""
        else:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')  # noqa: S324
            self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str], Path]]:
    """The address of a hub with one repository, what was fetched from it, and the same repository as a directory."""
    _, model = hf.tiny("llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=64)
    local = hf.save(model, tmp_path / "local", shard_size="20KB")
    (local / "tokenizer.json").write_text("{}")
    files = {path.name: path.read_bytes() for path in local.iterdir()}
    assert "model.safetensors.index.json" in files
    files |= {"modeling_tiny.py": b"print('hello')", "pytorch_model.bin": b"again", "onnx/model.onnx": b"no"}
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, files, log))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", log, local
    server.shutdown()
    server.server_close()
    thread.join()


def start(folder: Path, endpoint: str, name: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    """A conversion in a process of its own: huggingface_hub reads its environment once, when imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "RANK", "WORLD", "LOCAL_"))}
    kept |= {"HF_HOME": str(folder / "cache"), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-m", "dconv.launch", name, "hf", "--quiet", *options]
    kept["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(command, cwd=folder, env=kept, stdout=-1, stderr=-1, text=True)


def test_from_a_hub(tmp_path: Path, served: tuple[str, list[str], Path]) -> None:
    endpoint, log, local = served
    ranks = [
        start(tmp_path, endpoint, "org/tiny@main", "-o", "out", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=60)
        assert rank.returncode == 0, said
    expected = {path.name for path in local.iterdir()}
    assert set(log) == expected
    assert len(log) == len(expected), "two ranks fetched one file"
    weights = {name: w for path in local.glob("*.safetensors") for name, w in load_file(path).items()}
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == weights.keys()
    assert all(got[name].equal(weight) for name, weight in weights.items())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    # later, without the hub: from the cache
    for number, environment in enumerate(({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"})):
        again = start(tmp_path, endpoint, "org/tiny@main", "-o", f"again{number}", **environment)
        _, said = again.communicate(timeout=60)
        assert again.returncode == 0, said


def test_not_on_the_hub(tmp_path: Path, served: tuple[str, list[str], Path]) -> None:
    process = start(tmp_path, served[0], "org/huge")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "no such checkpoint" in said


@pytest.mark.parametrize(
    ("environment", "code", "found"),
    [({"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 5, "Connect")],
)
def test_offline(tmp_path: Path, environment: dict[str, str], code: int, found: str) -> None:
    began = time.monotonic()
    process = start(tmp_path, "http://127.0.0.1:9", "org/tiny", **environment)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert found in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 15
    assert not list(tmp_path.glob("tiny*"))
