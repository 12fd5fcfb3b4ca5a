"""What the tab key offers: asked as shells ask, held against what ``plan`` accepts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dconv.arch.family import Family
from dconv.arch.registry import families
from dconv.assist.completers import attach
from dconv.assist.glance import glance
from dconv.assist.sizes import SIZES, permitted
from dconv.commands.table import COMMANDS, parser_of
from dconv.errors import DconvError
from dconv.hw.registry import adapter
from dconv.launch.arguments import arguments_of
from dconv.launch.options import to_request
from dconv.matrix import outputs
from dconv.pipeline import prepare
from dconv.targets import GRAPHS
from tests.cli.conftest import Dconv
from tests.models import config_of, write_random

_LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def ask(line: str, cwd: Path, env: Mapping[str, str] | None = None) -> list[str]:
    """What a shell is told about the end of a line, as argcomplete's scripts ask: on descriptor 8."""
    read, write = os.pipe()
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SHELL": "bash",
             "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}  # fmt: skip
    code = f"import os; os.dup2({write}, 8); import dconv.cli; dconv.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked, **(env or {})}, cwd=cwd, pass_fds=[write],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    assert done.stdout == done.stderr == "", "a shell's line is no place for words of ours"
    return said.split("\013") if said else []


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A directory with the config.json of a 70B model, and nothing else."""
    model = tmp_path / "big"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(_LLAMA_70B))
    return model


@pytest.fixture
def on_path(tmp_path: Path) -> str:
    """PATH with a ``dconv`` that is this one."""
    here = tmp_path / "bin"
    here.mkdir()
    (here / "dconv").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dconv "$@"\n')
    (here / "dconv").chmod(0o755)
    return f"{here}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dconv con", ["config", "convert"]),
        ("dconv convert bi", ["big/"]),
        ("dconv convert big megat", ["megatron"]),
        ("dconv convert big megatron --tp ", ["1", "2", "4", "8", "16", "32", "64"]),
        ("dconv convert big megatron --tp=3", ["32"]),
        ("dconv plan big megatron --pp 4 --vpp ", ["1", "2", "4", "5", "10", "20"]),
        ("dconv plan big megatron --tp 4 --ep ", ["1"]),
        ("dconv convert big gguf --quant q4_k", ["q4_k_s", "q4_k_m"]),
        ("dconv convert big mlx --quant 4", ["4bit"]),
        ("dconv convert big rk --platform ", ["RK3588", "RK3576", "RK3562"]),
        ("dconv convert big hf --tp ", []),
        ("dconv convert --model-type qwen3_", ["qwen3_moe"]),
        ("dconv convert big megatron --from torch_d", ["torch_dist"]),
        ("dconv convert big megatron --megatron-format leg", ["legacy"]),
        ("dconv convert nowhere megatron --tp ", []),
        ("dconv history ", ["show", "rerun"]),
        ("dconv batch jo", ["jobs.yaml"]),
        ("dconv inspect --html ", ["big/"]),
        ("dconv --install-completion f", ["fish", "formats"]),
        ("dconv nonsense --tp ", []),
    ],
)
def test_what_is_offered(big: Path, line: str, offered: list[str]) -> None:
    (big.parent / "jobs.yaml").write_text("{}")
    assert sorted(ask(line, big.parent)) == sorted(offered)


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_sizes_that_are_offered_are_accepted_and_others_are_refused(
    tmp_path: Path, family: Family, pytestconfig: pytest.Config
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(family)))
    parser = parser_of("plan")
    few = (1, 2, 3, 4, 6, 8, 16)
    tried = (
        range(1, 17) if pytestconfig.getoption("--long") else few
    )  # of which 1 to 4 divide something of each family, and 3, 6, 16 of few
    for name, beside in (*((name, []) for name in SIZES), ("vpp", ["--pp", "2"]), ("etp", ["--tp", "2"]),
                         ("ep", ["--tp", "2", "--etp", "1"])):  # fmt: skip
        words = [str(tmp_path), "megatron", *beside]
        offered = permitted(parser.parse_args(words), name, glance(tmp_path))
        assert [n for n in tried if _accepts([*words, f"--{name}", str(n)])] == [n for n in tried if n in offered]


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_files_that_a_state_dict_is_cut_into(tmp_path: Path, family: Family) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(family)))
    words, few = [str(tmp_path), "pt"], (1, 2, 3, 4, 8)
    offered = permitted(parser_of("plan").parse_args(words), "tp", glance(tmp_path))
    assert [n for n in few if _accepts([*words, "--tp", str(n)])] == [n for n in few if n in offered]


def _accepts(words: list[str]) -> bool:
    try:
        prepare(to_request(parser_of("plan").parse_args(words)), config_alone=True)
    except DconvError:
        return False
    return True


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_a_format_that_is_not_offered_is_refused(tmp_path: Path, family: Family) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(family)))
    offered = glance(tmp_path).formats()
    assert {"huggingface", "megatron", "pt"} <= set(offered)
    for format in set(outputs()) - set(offered) - set(GRAPHS):
        assert not _accepts([str(tmp_path), format]), format


@pytest.mark.parametrize("made_as", ["torch_dist", "legacy"])
def test_a_megatron_checkpoint_is_known_too(made: object, made_as: str) -> None:
    path = made(made_as)  # type: ignore[operator]
    assert glance(path).kind == made_as
    assert ask(f"dconv convert {path} megatron --tp ", path.parent) == ["1", "2", "4"]


def test_no_weight_is_read(tmp_path: Path) -> None:
    family = families()["llama"]
    model = write_random(tmp_path / "model", family, config_of(family))
    weights = model / "model.safetensors"
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[: 8 + length])  # a header and nothing behind it
    for number in range(1, 4):
        (model / f"model-{number:05d}.safetensors").write_bytes(b"")
    assert ask("dconv convert model megatron --tp ", tmp_path) == ["1", "2", "4"]


def test_hostile_names_and_files(tmp_path: Path) -> None:
    for name in ("good", "ev\nil", "e\x1b[31mvil", "with space"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{" * 100_000)
    os.mkfifo(tmp_path / "good" / "tokenizer.json")
    assert ask("dconv convert ", tmp_path) == ["good/", "with\\ space/"]
    assert ask("dconv convert good megatron --tp ", tmp_path) == []
    assert "megatron" in ask("dconv convert good ", tmp_path)


def test_every_argument_has_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No completer raises, whatever stands before it."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        parser = parser_of(command)
        attach(parser)
        for action in arguments_of(parser):
            completer = getattr(action, "completer", None)
            for typed in ("", "x", "~", "/", "//nowhere/", "\0"):
                if completer is not None:
                    assert all(word.startswith(typed) for word in completer(typed, parsed_args=None))


def test_of_a_model_its_config_its_index_and_one_header_are_opened(hf: Path) -> None:
    """However large it is: a shell waits, and a cluster's file system is slow."""
    code = f"""if True:
        import sys
        from dconv.assist.completers import COMPLETERS
        from dconv.commands.table import parser_of
        opened = set()
        def hear(event, args):
            if event == "open" and isinstance(args[0], str) and args[0].startswith({str(hf)!r}):
                opened.add(args[0].rpartition("/")[2])
        sys.addaudithook(hear)
        args = parser_of("plan").parse_args([{str(hf)!r}, "megatron"])
        for name in ("format", "tp", "pp", "ep"):
            assert list(COMPLETERS[name]("", args)), name
        print(sorted(opened))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # the first file's header says whether it is MLX's
    assert done.stdout.strip() == "['config.json', 'model-00001-of-00004.safetensors', 'model.safetensors.index.json']"


def test_completion_does_not_wait_for_torch(big: Path) -> None:
    code = (
        "import os, sys; import dconv.assist.sizes, dconv.assist.completers;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_chips_are_those_of_the_compiler(tmp_path: Path) -> None:
    for target in ("mtk", "qnn", "ax", "neuron"):
        assert set(ask(f"dconv convert m {target} --platform ", tmp_path)) == set(adapter(target).platforms)


def test_run_numbers(dconv: Dconv, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCONV_HISTORY", str(tmp_path / "history.sqlite"))
    assert ask("dconv history show ", tmp_path) == []
    assert dconv("convert", hf, "hf", "-o", tmp_path / "out").code == 0
    assert ask("dconv history show ", tmp_path) == ["1"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_installing_twice_changes_nothing_and_undo_undoes(
    dconv: Dconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    home = _home(tmp_path, monkeypatch)
    rc = home / f".{shell}rc"
    rc.write_text("export MINE=1")  # without a newline, as some editors leave it
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    first = dconv("--install-completion")
    assert first.code == 0, first.err
    wrote = _files(home)
    again = dconv("--install-completion", shell)
    assert _files(home) == wrote and "was there" in again.out
    assert rc.read_text().startswith("export MINE=1\n" if shell != "fish" else "export MINE=1")
    shown = dconv("--show-completion", shell).out
    assert any(text == shown for text in wrote.values())
    undo = next(line for line in first.out.splitlines() if line.startswith("undo")).removeprefix("undo").strip()
    subprocess.run(["sh", "-c", undo], check=True)
    assert {name: text.strip() for name, text in _files(home).items()} == {rc.name: "export MINE=1"}


def test_an_installation_that_fails_leaves_nothing(
    dconv: Dconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _home(tmp_path, monkeypatch)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    ran = dconv("--install-completion", "zsh")
    assert ran.code == 5 and "No space left" in ran.err
    assert _files(home) == {}


def test_what_is_not_ours_stays(dconv: Dconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = _home(tmp_path, monkeypatch)
    theirs = home / ".config/fish/completions/dconv.fish"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("# mine")
    assert dconv("--install-completion", "fish").code == 2
    assert theirs.read_text() == "# mine"
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    ran = dconv("--install-completion")
    assert ran.code == 2 and "bash, zsh, fish" in ran.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_real_shell(
    dconv: Dconv, big: Path, tmp_path: Path, on_path: str, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    home = _home(tmp_path, monkeypatch)
    assert dconv("--install-completion", shell).code == 0
    line = "dconv convert big megatron --tp 3"
    bash = f'. {home}/.bashrc; COMP_LINE="{line}" COMP_POINT={len(line)} COMP_TYPE=9; '
    bash += 'compopt() { :; }; f=$(complete -p dconv); f=${f##*-F }; ${f% *} dconv 3 --tp; echo "${COMPREPLY[@]}"'
    zsh = f". {home}/.zshrc; autoload +X _dconv; _describe() {{ print -- ${{(P)2}} }}; words=(dconv); "
    zsh += f'BUFFER="{line}" CURSOR={len(line)}; _dconv; _python_argcomplete'
    scripts = {"bash": bash, "zsh": zsh, "fish": f'complete -C "{line}"'}
    env = {**os.environ, "PATH": on_path, "HOME": str(home)}
    done = subprocess.run([shell, "-c", scripts[shell]], env=env, cwd=tmp_path, capture_output=True, text=True,
                          check=False, timeout=60, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.stdout.split()[-1:] in (["32"], ["32:None"], ["32:"]), done.stdout + done.stderr


def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    return home


def _files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
