"""On a real Ray cluster: the same bytes as one rank's, whichever actor or node is lost on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from dconv.pipeline import prepare, run
from dconv.sharding.commit import Settings
from dconv.sharding.coords import Parallel
from tests.cluster.held import journals
from tests.cluster.ray_cluster import LOOPBACK, RayCluster, is_alive, until
from tests.launched import by_one_rank, small_llama
from tests.models import tree_digest
from tests.processes import call, ended


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 60 tasks, so that each of four ranks has work left when it is held."""
    return small_llama(tmp_path_factory.mktemp("source"), shard_size=400_000, num_hidden_layers=6)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, str]:
    """What one rank makes of `model` with `OPTIONS`."""
    return by_one_rank(model, parallel=Parallel(tp=2, pp=2, etp=2), divisor=8)


#: Of a calibrated result; what else it has names its settings.
WEIGHTS = (".safetensors", "config.json")
OPTIONS = ["--tp", "2", "--pp", "2", "--make-vocab-size-divisible-by", "8"]


@pytest.fixture
def four(model: Path, tmp_path: Path) -> list[str]:
    """The words of a conversion by four ranks."""
    return [str(model), "megatron", "-o", str(tmp_path / "out"), *OPTIONS, "--nproc", "4"]


def check(tmp_path: Path, expected: dict[str, str]) -> None:
    """The bytes, and nothing beside them."""
    assert tree_digest(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_two_nodes_of_two_ranks(
    ray_cluster: RayCluster, four: list[str], expected: dict[str, str], tmp_path: Path
) -> None:
    """All four ranks are there at once, two on each node; their progress and one summary arrive, and the history."""
    history = tmp_path / "history.sqlite"
    ray_cluster.hold(0, 1, 2, 3)
    driver = ray_cluster.driver(*four, DCONV_HISTORY=str(history))
    ray_cluster.until_held(driver, 0, 1, 2, 3)
    places = [_environment(ray_cluster.rank(number)[0]) for number in range(4)]
    assert [(place["RANK"], place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]) for place in places] == [
        ("0", "0", "2"), ("1", "1", "2"), ("2", "0", "2"), ("3", "1", "2"),
    ]  # fmt: skip
    assert {place["CUDA_VISIBLE_DEVICES"] for place in places} == {""}  # none was asked for
    assert driver.stderr is not None
    line = driver.stderr.readline()
    assert line.startswith("[") and "4 ranks" in line
    ray_cluster.release()
    code, out, err = ended(driver)
    assert code == 0, err
    assert out.count("wrote ") == 1 and "with 4 ranks, bit-exact" in out
    assert "lost" not in err
    check(tmp_path, expected)
    with contextlib.closing(sqlite3.connect(history)) as file:
        ((code, ranks, plan, words),) = file.execute("SELECT code, ranks, plan, words FROM runs").fetchall()
    assert (code, ranks, plan) == (0, 4, json.loads((tmp_path / "out" / "dconv.json").read_text())["plan"])
    assert "ray" in json.loads(words)


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.mark.parametrize("lost", ["actor", pytest.param("rank", marks=pytest.mark.long)])
def test_a_lost_rank_is_done_again(
    ray_cluster: RayCluster, four: list[str], expected: dict[str, str], tmp_path: Path, lost: str
) -> None:
    """The actor, with which its process goes, or this alone: the others do what it had left."""
    ray_cluster.hold(0, 1, 2, 3)
    driver = ray_cluster.driver(*four, "--json")
    ray_cluster.until_held(driver, 0, 1, 2, 3)
    child, actor = ray_cluster.rank(1)
    os.kill(actor if lost == "actor" else child, signal.SIGKILL)
    until(lambda: not is_alive(child), driver)  # also where only its actor was killed: it leaves nobody behind
    ray_cluster.release()
    code, out, err = ended(driver)
    assert code == 0, err
    assert err.count("rank 1 was lost") == 1 and err.count("was lost") == 1, err
    assert json.loads(out)["bytes_written"] > 100_000
    check(tmp_path, expected)


@pytest.mark.parametrize("most", [3, pytest.param(0, marks=pytest.mark.long)])
def test_with_the_last_rank_lost_another_start_does_the_rest(
    ray_cluster: RayCluster, four: list[str], expected: dict[str, str], tmp_path: Path, most: int
) -> None:
    """As often as is allowed; else what is left waits for the next run."""
    ray_cluster.hold(0)
    driver = ray_cluster.driver(*four, "--nproc", "1", "--max-restarts", str(most))
    ray_cluster.until_held(driver, 0)
    until(lambda: bool(journals(tmp_path / "out")), driver)  # what it did is flushed beside its work
    child = ray_cluster.rank(0)[0]
    os.kill(child, signal.SIGKILL)
    ray_cluster.release()
    code, out, err = ended(driver)
    assert "rank 0 was lost (signal 9)" in err
    if not most:
        assert (code, err.count("preempted (75)"), out) == (75, 1, ""), err
        code, out, err = call(sys.executable, "-m", "dconv", "convert", *four)
    assert code == 0, err
    assert "of an earlier run (checked)" in out
    check(tmp_path, expected)


def test_a_lost_node(ray_cluster: RayCluster, four: list[str], expected: dict[str, str], tmp_path: Path) -> None:
    """The ranks of the other node go on; what is left is done by as many as have room, which are two."""
    ray_cluster.hold(0, 1, 2, 3)
    driver = ray_cluster.driver(*four)
    ray_cluster.until_held(driver, 0, 1, 2, 3)
    children = [ray_cluster.rank(number)[0] for number in range(4)]
    ray_cluster.tell("remove")
    try:
        until(lambda: sum(map(is_alive, children)) == 2, driver)
        ray_cluster.release()
        code, out, err = ended(driver)
    finally:
        ray_cluster.tell("add")
    assert code == 0, err
    assert err.count("was lost") == 2, err
    assert out.count("wrote ") == 1
    check(tmp_path, expected)


@pytest.mark.long  # the driver's part; ranks that are told to leave are everyone's test
def test_told_to_stop_it_stops_all_ranks_and_goes_on_later(
    ray_cluster: RayCluster, four: list[str], expected: dict[str, str], tmp_path: Path
) -> None:
    ray_cluster.hold(0, 1, 2, 3)
    driver = ray_cluster.driver(*four)
    ray_cluster.until_held(driver, 0, 1, 2, 3)
    children = [ray_cluster.rank(number)[0] for number in range(4)]
    driver.send_signal(signal.SIGTERM)
    code, out, err = ended(driver)
    assert code == 75, err
    assert (out + err).count("preempted (75)") == 1 and "Traceback" not in err, err
    assert not any(map(is_alive, children))
    assert not (tmp_path / "out").exists()
    ray_cluster.release()
    code, out, err = call(sys.executable, "-m", "dconv", "convert", *four)  # whoever starts the ranks
    assert code == 0, err
    assert "of an earlier run (checked)" in out
    check(tmp_path, expected)


def test_a_refusal_is_said_once(ray_cluster: RayCluster, four: list[str], tmp_path: Path) -> None:
    """Before an actor is started where this process sees the source; else by the ranks, which all meet it."""
    ray_cluster.hold()
    code, out, err = ray_cluster.call(*four, "--tp", "3")
    assert (code, (out + err).count("refused (3)")) == (3, 1), err
    assert not list(ray_cluster.control.glob("rank.*"))
    elsewhere = [word.replace("model", "elsewhere") for word in four]
    code, out, err = ray_cluster.call(*elsewhere, "--nproc", "2", "--json")
    assert code == 2, err
    assert json.loads(out)["error"] == "usage"  # one line
    assert len(list(ray_cluster.control.glob("rank.*"))) == 2
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("lose", [False, pytest.param(True, marks=pytest.mark.long)])
def test_gptq_on_two_ranks(ray_cluster: RayCluster, tmp_path: Path, lose: bool) -> None:
    """Ranks that talk, on two nodes: the bytes of one alone. Without one the other is not left waiting for it."""
    torch = pytest.importorskip("torch")
    np = pytest.importorskip("numpy")
    pytest.importorskip("transformers")
    from tests.quant.calibrated import model_of, request_for

    model = model_of("llama", tmp_path / "model")
    ids = tmp_path / "ids.npy"
    np.save(ids, torch.randint(0, 61, (4, 128), generator=torch.Generator().manual_seed(1)).numpy())
    request = request_for(model, ids, tmp_path / "one", nsamples=4, seqlen=128)
    run(prepare(request), Settings())
    words = [model, "gptq", "-o", tmp_path / "two", "--calibration", ids, "--nproc", 2, "--cpus-per-rank", 2,
             "--quantization-config", request.quantization_config]  # fmt: skip
    ray_cluster.hold(*([1] if lose else []))
    driver = ray_cluster.driver(*words)
    if lose:
        ray_cluster.until_held(driver, 1)
        os.kill(ray_cluster.rank(1)[1], signal.SIGKILL)
        until(lambda: not is_alive(ray_cluster.rank(1)[0]), driver)
        ray_cluster.release()
    code, out, err = ended(driver)
    assert code == 0, err
    assert ("all start again" in err) == lose, err
    assert "with 2 ranks" in out
    weights = [
        {name: digest for name, digest in tree_digest(tmp_path / one).items() if name.endswith(WEIGHTS)}
        for one in ("one", "two")
    ]
    assert weights[0] == weights[1]


@pytest.mark.long  # a batch of local conversions stands for it
def test_a_batch(ray_cluster: RayCluster, model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Each on a node that has room for its ranks; one that fails is the batch's code; again, what is done is found."""
    (tmp_path / "jobs.yaml").write_text(
        f"model: {model}\nformat: megatron\ntp: 2\npp: 2\nmake-vocab-size-divisible-by: 8\nmodels:\n"
        f"  - {{out: {tmp_path}/one}}\n  - {{out: {tmp_path}/two, nproc: 2}}\n  - {{out: {tmp_path}/three, tp: 3}}\n"
    )
    ray_cluster.hold()
    first = ray_cluster.call(tmp_path / "jobs.yaml", "--json", command="batch")
    again = call(sys.executable, "-m", "dconv", "batch", str(tmp_path / "jobs.yaml"), "--json")
    for (code, out, err), found in ((first, False), (again, True)):
        said = json.loads(out)
        assert [one["state"] for one in said] == ["done", "done", "failed"], (said, err)
        assert code == said[2]["code"] == 3
        assert [bool(one["said"].get("already_done")) for one in said[:2]] == [found] * 2
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two") == expected


# ----------------------------------------------------------------------------------------------- without a cluster


def test_no_cluster_is_said_at_once(model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dconv", "convert", str(model), "hf", "-o", str(tmp_path / "out")]
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        code, _, err = call(*words, "--launcher", "ray", "--address", address, **LOOPBACK)
        assert (code, err.count("tool (7)")) == (7, 1), err
        assert address in err
    assert list(tmp_path.iterdir()) == []


def test_without_ray(model: Path, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['ray'] = None; from dconv.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["convert", str(model), "hf", "-o", str(tmp_path / "out"), "--launcher", "ray"]
    code, _, err = call(sys.executable, "-c", hide, *words)
    assert (code, "pip install" in err) == (7, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_comes_to_nothing(model: Path, tmp_path: Path) -> None:
    """Ray tries for ever where a cluster's nodes name themselves by addresses that lead nowhere from here."""
    code = (
        "import sys, time, types; ray = sys.modules['ray'] = types.ModuleType('ray')\n"
        "ray.init = lambda *_, **more: time.sleep(600)\n"
        "from dconv.launch import ray_cluster; ray_cluster._CONNECTING = 0.2\n"
        "from dconv.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["convert", str(model), "hf", "-o", str(tmp_path / "out"), "--launcher", "ray"]
    history = tmp_path / "history.sqlite"
    code, _, err = call(sys.executable, "-c", code, *words, DCONV_HISTORY=str(history))
    assert (code, err.count("tool (7)")) == (7, 1), err
    with contextlib.closing(sqlite3.connect(history)) as file:
        assert file.execute("SELECT code FROM runs").fetchall() == [(7,)]
