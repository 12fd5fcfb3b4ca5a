"""Every command of README.md and docs/ runs as printed, or is parsed by the real parser and has a reason.

A page runs in an empty folder, where the names that it lists are tiny random models, and outputs are compared.
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

import pytest

from dconv.commands import table
from tests.docs import runs
from tests.docs.commands import DOCS, ROOT, Block, Command, Page, matches, pages, words
from tests.docs.models import MODELS

PAGES = pages()
#: Pages of before the convention. Their blocks have neither prompts nor models, and other tests run what they say.
#: Why nothing of them is run here; what is new does not go on this list.
PARSED = {
    "README.md": "names of large models; its block of use runs below, scripts/quickstart.sh and tests/cli run others",
    "docs/guide.md": "names of large models; docs/howto has a page that runs for nearly each part",
    "docs/benchmarks-gptq.md": "measures for an hour; scripts/bench_gptq.py",
    "docs/cluster-ray.md": "needs a Ray cluster; tests/cluster/test_ray.py",
    "docs/cluster-slurm.md": "needs a SLURM cluster; tests/cluster/test_slurm.py",
    "docs/duel.md": "plays other programs; tests/hostile/test_duel.py",
    "docs/exports.md": "a real model in every runtime; scripts/exports.py",
    "docs/graphs.md": "a model of 1.5 GB; tests/formats/test_graphs.py",
    "docs/hardware.md": "needs vendors' compilers; tests/hw",
    "docs/loaders.md": "needs other programs' environments; tests/quant/test_gptqmodel.py",
    "docs/onnx.md": "a real model in onnxruntime; tests/formats/test_onnx_export.py",
    "docs/scale.md": "measures for ten minutes; tests/cluster/test_scale.py",
    "docs/trust.md": "runs tests; tests/crash/test_trust_page.py",
}
RUN = [page for page in PAGES if page.runs and page.name not in PARSED and not page.cluster]
#: A line that is a command, whatever this test makes of its block.
LOOKS = re.compile(r"^(?:\$ )?(?:\S+=\S+ )*(?:dconv|torchrun|srun|sbatch|accelerate|ray)\s+\S", re.MULTILINE)
#: Words that stand for something in older pages.
_PLACEHOLDER = re.compile(r"…|\.\.\.|\[|^[A-Z]$")


def parser_of(command: str) -> argparse.ArgumentParser:
    """The real one."""
    return table.parser_of(command)


def excuse(block: Block) -> str:
    return block.excuse or PARSED.get(block.page, "")


@pytest.mark.parametrize("page", RUN, ids=[page.name for page in RUN])
def test_the_commands_of_a_page_run(page: Page, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if page.long and not request.config.getoption("--long"):
        pytest.skip(f"{page.long}; --long runs it")
    runs.require_as_printed(runs.run_page(page, tmp_path))


@pytest.mark.long
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """Those of *Use*, in their order, with a MODEL of nine heads in three groups; its refusal is as it says."""
    readme = next(page for page in PAGES if page.name == "README.md")
    (use,) = (block for block in readme.blocks if block.text.startswith("dconv inspect MODEL "))
    (refused,) = (block for block in readme.blocks if block.text.startswith("$ dconv convert MODEL megatron --tp 4"))
    page = Page("README.md", (use, refused), ("MODEL",), "", "", "")
    runs.require_as_printed(runs.run_page(page, tmp_path))


def test_no_command_is_left_out() -> None:
    """Each is run, or it has a reason; a line that looks like one and is none of a block's commands fails."""
    run, parsed, total = 0, 0, 0
    for page in PAGES:
        for block in page.blocks:
            taken = "\n".join(command.typed for command in block.commands)
            for found in LOOKS.finditer(block.text):
                if block.language in ("text", "python", "yaml", "json", "toml"):
                    continue  # help, and words in files
                line = block.text[found.start() :].partition("\n")[0].removeprefix("$ ")
                assert line.split()[0] in taken, f"{page.name}:{block.line}: {line}"
            total += len(block.commands)
            if excuse(block):
                parsed += len(block.commands)
            elif page in RUN or page.cluster in ("slurm", "ray"):  # of these tests/cluster/test_pages.py
                run += len(block.commands)
    assert run + parsed == total
    assert run > 100, "the pages have lost their commands"


def test_reasons_are_of_pages_that_are_there() -> None:
    with_commands = {page.name for page in PAGES if page.commands}
    assert with_commands >= PARSED.keys()
    tests = [
        word.rstrip(";,") for why in PARSED.values() for word in why.split() if word.startswith(("tests/", "scripts/"))
    ]
    assert [name for name in tests if not (ROOT / name).exists()] == []


def test_every_name_is_a_model() -> None:
    assert {name for page in PAGES for name in page.models} <= MODELS.keys()


def test_every_how_to_ends_in_something_that_works() -> None:
    """Its last section runs or checks what was made."""
    for page in PAGES:
        if page.name.startswith("docs/howto/") and page.name != "docs/howto/index.md":
            _, found, last = page.text.partition("## It works")
            assert found, page.name
            assert re.search(r"^\$ dconv (check|diff) ", last, re.MULTILINE), page.name


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_command_line_is_one(page: Page) -> None:
    """Options are known, values are such, and what is named of the repository is there."""
    for command in page.commands:
        for said in words(command.typed):
            if not any(_PLACEHOLDER.search(word) for word in said) or said[0] == "dconv":
                _judge(said, command)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_options_in_the_text_are_options(page: Page) -> None:
    """``dconv COMMAND … --option`` in the midst of a sentence or of a table."""
    outside = re.sub(r"^```.*?^```", "", page.text, flags=re.DOTALL | re.MULTILINE)
    for said in re.findall(r"`(dconv [a-z]+ [^`]*)`", outside):
        name = said.split()[1]
        assert name in table.COMMANDS, f"{page.name}: {said}"
        known = parser_of(name)._option_string_actions
        for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", re.sub(r"'[^']*'", "''", said)):
            assert option in known, f"{page.name}: {said}: {option}"


def _judge(said: list[str], command: Command) -> None:
    """Hold the words of a program to the real parser.

    Raises:
        AssertionError: an option that is not known, a value that it cannot have, a path that is not there.
    """
    for word in said:
        if re.match(r"(scripts|slurm|launch|tests|docs|fuzz|attacks)/[\w./-]+$", word) and "…" not in word:
            assert (ROOT / word).exists(), f"{command}: {word} is not in the repository"
    if said[0] == "dconv":
        name, rest = said[1], said[2:]
    elif "dconv.launch" in said:
        name, rest = "convert", said[said.index("dconv.launch") + 1 :]
    elif "dconv" in said and said[said.index("dconv") - 1] == "-m":
        at = said.index("dconv")
        name, rest = said[at + 1], said[at + 2 :]
    elif said[0] in ("launch/torchrun.sh", "slurm/convert.sbatch", "slurm/quantise.sbatch"):
        name, rest = "convert", said[1:]
    else:
        return
    if command.code == 2:  # a wrong command line on purpose
        return
    if "--config" in rest and "convert" in name:  # MODEL and FORMAT are in the file
        rest = [*rest, "MODEL", "FORMAT"]
    parser = parser_of(name)
    try:
        parser.parse_args(list(itertools.takewhile(lambda word: word[0] != "[", rest)))  # [--what may follow]
    except SystemExit as left:
        raise AssertionError(f"{command}: {' '.join(said)}") from left


def test_a_wrong_command_line_fails() -> None:
    """The judge can say no."""
    command = Command("page.md", 1, "")
    for wrong in ("dconv convert a hf --tensor 2", "python -m dconv.launch a hf --nope", "bash scripts/nope.sh"):
        with pytest.raises(AssertionError):
            _judge(wrong.split(), command)


def test_outputs_are_compared() -> None:
    """The comparison can say no, and ``…`` stands for no more than it says."""
    assert matches(["a … c", "…", "z"], "a b c\n1\n2\nz\n")
    assert matches(["a"], "[####----]  50 %\na\n")
    assert matches(["runs         x within …"], "runs         x within\n             1.5\n")
    assert matches(["do         a", "             b"], "do         a\n             b\n")
    assert not matches(["runs         x within …"], "runs         x within\n1.5\n")
    assert not matches(["a … c"], "a b d")
    assert not matches(["a"], "a\nb")
    assert not matches(["a", "b"], "a")


def test_blocks_are_read_as_they_stand(tmp_path: Path) -> None:
    """What a reader types: continued lines, several lines in quotes, comments beside, reasons, exit codes."""
    from tests.docs import commands

    page = DOCS / "nowhere.md"
    text = """<!-- models: llama-8b -->
<!-- not run: no reason -->
```
dconv convert a hf \\
    --dtype bf16            a comment
dconv plan a gptq --quantization-config '{"bits": 4,
   "sym": true}'
```
words
```console
$ dconv plan a hf --tp 3
refused (3)  no
$ true
```
"""
    real = tmp_path / "page.md"
    real.write_text(text)
    old, commands.ROOT = commands.ROOT, tmp_path
    try:
        read = commands.read(real)
    finally:
        commands.ROOT = old
    assert not page.exists()
    first, second = read.blocks
    assert first.excuse == "no reason"
    assert [words(one.typed) for one in first.commands] == [
        [["dconv", "convert", "a", "hf", "--dtype", "bf16"]],
        [["dconv", "plan", "a", "gptq", "--quantization-config", '{"bits": 4,\n   "sym": true}']],
    ]
    assert [(one.code, one.said) for one in second.commands] == [(3, ("refused (3)  no",)), (0, ())]
    assert not second.excuse
    assert read.models == ("llama-8b",)
