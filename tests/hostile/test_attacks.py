"""The corpus of `attacks`: all of it is refused with exit code 4, and nothing is run, read or left outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from attacks import make
from attacks.corpus import Attack
from tests.hostile.conftest import DAMAGED, check_form
from tests.processes import PATIENCE, ROOT

BY_NAME = {attack.name: attack for attack in make.ATTACKS}
#: Kinds that share a process, and the good checkpoints in it.
GROUPS = (("pickles", "zips", "names"), ("safetensors", "gguf"), ("places", "megatron", "configs"))
#: How many of each kind there are at least.
LEAST = {
    "pickles": 60,
    "zips": 24,
    "safetensors": 45,
    "places": 50,
    "gguf": 34,
    "megatron": 30,
    "configs": 40,
    "names": 10,
}
#: Megabytes beside the process's own that the costliest attack takes. An honest header of 100 MB takes as many.
MOST = 2500
#: Seconds that one conversion of an attack computes from which the other two commands are left to ``--long``.
HEAVY = 0.6
#: What the canary's secret is in this run: nothing that lies on a disk by accident.
SECRET = os.urandom(16).hex()
Seen = dict[str, Any]


def watched(
    corpus: Path, attacks: Iterable[Attack] = (), believing: Iterable[str] = (), heavy: float = 1e9
) -> list[Seen]:
    """What `tests.hostile.watched` saw: of the twins first, then of those read by one who believes, then of attacks."""
    attacks = tuple(attacks)
    twins = sorted({attack.twin for attack in attacks})
    asked = {
        "corpus": str(corpus),
        "secret": SECRET,
        "twins": twins,
        "attacks": [attack.name for attack in attacks],
        "believing": list(believing),
        "heavy": heavy,
    }
    # Its time is limited: under a tracer of lines what takes a second takes five.
    untraced = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.watched"],
        input=json.dumps(asked),
        env={**untraced, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DCONV_HISTORY": "off"},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(attack: Attack, seen: Seen) -> list[str]:
    """What is not as it must be."""
    found = [f"{key}: {seen[key]}" for key in ("forbidden", "left", "canary", "signal") if seen[key]]
    said: Mapping[str, tuple[int, str, str]] = seen["said"]
    if "convert" not in said or "fault" in said:
        found.append(f"no end: {said}")
    for command, (code, out, err) in said.items():
        lenient = command == "inspect" or (command == "check" and attack.only)
        if code == 0 and lenient:
            continue
        if code != DAMAGED:
            found.append(f"{command} ends with {code}: {err or out}"[:2000])
            continue
        try:
            check_form(err, DAMAGED)
        except AssertionError as fault:
            found.append(f"{command} says it in another form: {fault}")
        if SECRET in out + err:
            found.append(f"{command} tells the secret")
        if command == "convert" and (attack.says not in err or out):
            found.append(f"another fault than {attack.says!r}: {err or out}")
    if seen["peak"] > MOST:
        found.append(f"{seen['peak']} MB")
    return found


@pytest.mark.parametrize("kinds", GROUPS, ids=" ".join)
def test_attacks_are_refused_and_nothing_happens(
    kinds: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest, counted: Callable[[str, int], None]
) -> None:
    """The twins convert in the same process, with the same words, before the hook is there."""
    attacks = [attack for attack in make.ATTACKS if attack.kind in kinds]
    everything = request.config.getoption("--long")
    seen = watched(tmp_path / "corpus", attacks, heavy=1e9 if everything else HEAVY)
    good = [one for one in seen if one["name"].startswith("good/")]
    assert {one["name"].removeprefix("good/") for one in good} == {attack.twin for attack in attacks}
    for one in good:
        assert {command: code for command, (code, _, _) in one["said"].items() if code} == {}, one
    met = {one["name"]: one for one in seen if one["name"] in BY_NAME}
    assert met.keys() == {attack.name for attack in attacks}
    wrong = {name: found for name, one in met.items() if (found := faults(BY_NAME[name], one))}
    assert wrong == {}, json.dumps(wrong, indent=1)
    counted("attacks refused", len(met))


def test_a_reader_that_believes_is_caught(tmp_path: Path) -> None:
    """Control: the payloads are real, and hook and canary see them."""
    names = [attack.name for attack in make.ATTACKS if attack.runs]
    assert len(names) >= 15
    seen = watched(tmp_path / "corpus", believing=names)
    assert [one["name"] for one in seen] == names
    for one in seen:
        assert any(event.startswith("pickle.find_class") for event in one["forbidden"]), one
        assert any(event.startswith(("os.system", "subprocess.Popen")) for event in one["forbidden"]), one
        assert {"ran", "not alive"} <= set(one["canary"]), one


def test_a_reader_that_follows_is_caught(tmp_path: Path) -> None:
    """Control: whoever opens what an index or a link names is seen, and so is where the contents go."""
    names = ["places/dots-to-secret", "places/absolute", "places/link", "places/readme-linked", "places/pt-linked"]
    for one in watched(tmp_path / "corpus", believing=names):
        assert any(event.startswith("open ") for event in one["forbidden"]), one
    read = {one["name"]: one["canary"] for one in watched(tmp_path / "again", believing=names)}
    assert any("the secret is in" in text for text in read["places/readme-linked"])


def test_faults_are_told() -> None:
    """Control: each thing that may go wrong fails an attack."""
    attack = Attack("x/y", "", "a broken thing", "bin", lambda _at, _canary: None)
    error = "damaged (4)  a broken thing\n  where      x\n"
    good: Seen = {
        "forbidden": [],
        "left": [],
        "canary": [],
        "signal": 0,
        "peak": 1,
        "said": {"convert": (4, "", error)},
    }
    assert faults(attack, good) == []
    for change in (
        {"forbidden": ["os.system"]}, {"left": ["out"]}, {"canary": ["ran"]}, {"signal": 9}, {"peak": MOST + 1},
        {"said": {}}, {"said": {"convert": (3, "", error.replace("4", "3"))}}, {"said": {"convert": (0, "", "")}},
        {"said": {"convert": (4, "", "damaged (4)  something else\n  where      x\n")}},
        {"said": {"convert": (4, "", f"Traceback\n{error}")}},
        {"said": {"convert": (4, "", error + f"  found      {SECRET}\n")}},
        {"said": {"convert": (4, "", error), "check": (0, "", "")}},
        {"said": {"convert": (4, "", error), "inspect": (1, "", "internal error")}},
    ):  # fmt: skip
        assert faults(attack, {**good, **change}), change


def test_the_readme_lists_every_attack() -> None:
    """Run ``python -m attacks.make --readme`` after a change."""
    text = make.README.read_text()
    assert make.renewed(text) == text
    counts = Counter(attack.kind for attack in make.ATTACKS)
    assert {kind: (counts[kind], least) for kind, least in LEAST.items() if counts[kind] < least} == {}
    assert counts.keys() == {kind for kinds in GROUPS for kind in kinds}
    assert len(BY_NAME) == len(make.ATTACKS)
    assert all(attack.idea and attack.says for attack in make.ATTACKS)


def test_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    """But for the canary's place, which is the payloads' aim."""
    sample = [attack for attack in make.ATTACKS if attack.kind in ("gguf", "names")]
    for folder in ("a", "b"):
        make.write(tmp_path / folder, sample)
    for path in (
        path for path in sorted((tmp_path / "a").rglob("*")) if path.is_file() and path.stat().st_size < 1 << 20
    ):
        again = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == again.read_bytes(), path
