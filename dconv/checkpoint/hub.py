"""MODEL as a name on the HuggingFace hub: ``org/name`` or ``org/name@revision`` becomes a local directory.

Weights, JSON and tokenizer files only, never code, each once: safetensors where there are any. ``huggingface_hub`` (the
extra ``hub``) does the transfer into its own cache; it locks every file there, so of many ranks on a machine
one downloads a file and the others find it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.source import SIDE_FILES
from dconv.coded.beside import BESIDE
from dconv.errors import DconvError, StorageFault, ToolMissing, UsageError

# the hub's own rule for names, less those without an organisation
_PART: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][\w./-]*))?")
#: Seconds until a hub that does not answer counts as unreachable.
_PATIENCE: Final = 10.0
#: Weights, best first. Mistral's ``consolidated.safetensors`` repeats what lies beside it under HuggingFace's names.
_WEIGHTS: Final = (
    (("*.safetensors",), ("consolidated*", "adapter*")),
    (("pytorch_model*.bin",), ()),
    (("consolidated.*.pth",), ()),
)
_BESIDE: Final = (*SIDE_FILES, "*.index.json", "params.json", *(name for names in BESIDE for name in names))


def parse(path: Path) -> tuple[str, str | None] | None:
    """(``org/name``, revision) of what was meant as a hub name; None for what cannot be one."""
    match = _NAME.fullmatch(str(path))
    if match is None or "--" in match[1] or ".." in match[1] or match[1].endswith(".git"):
        return None
    return match[1], match[2]


def choose(files: Iterable[str]) -> list[str]:
    """Of a repository's files those to fetch: one kind of weights and what travels beside them, top level only."""
    top = [name for name in files if "/" not in name and not name.endswith(".py")]
    chosen = [name for name in top if _any(name, _BESIDE)]
    for wanted, unwanted in _WEIGHTS:
        weights = [name for name in top if _any(name, wanted) and not _any(name, unwanted)]
        if weights:
            return sorted({*chosen, *weights})
    return []


def fetch(name: str, revision: str | None = None) -> Path:
    """Bring a repository's checkpoint into the hub's cache; the directory there.

    Without a connection (or with ``HF_HUB_OFFLINE``) what the cache has is taken.

    Raises:
        ToolMissing: ``huggingface_hub`` is not installed.
        UsageError: no such repository or revision, no access, no weights in it; offline and not in the cache.
        StorageFault: the hub cannot be reached, the download failed.
    """
    try:
        import huggingface_hub  # only who asks for a hub name pays for it
        from huggingface_hub import errors
    except ImportError as fault:
        raise ToolMissing(
            "there is no such directory, and looking on the hub needs huggingface_hub",
            where=name,
            do="pip install 'dconv[hub]'",
        ) from fault
    said = name if revision is None else f"{name}@{revision}"
    try:
        found = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_PATIENCE)
    except Exception as fault:  # the HTTP library beneath changes with versions, and its errors with it
        if error := _refusal(said, fault):
            raise error from fault
        cached = _cached(name, revision)
        if cached is None:
            raise _unreachable(said, fault, offline=isinstance(fault, errors.OfflineModeIsEnabled)) from fault
        return cached
    files = choose(sibling.rfilename for sibling in found.siblings or ())
    if not files:
        raise UsageError(
            "the repository has no weights that dconv reads",
            where=said,
            expected="safetensors, pytorch_model*.bin or Meta's consolidated.*.pth, not in a folder",
        )
    hub: Any = huggingface_hub  # which leaves types of its parameters open
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_literal(files)))
    except Exception as fault:
        if error := _refusal(said, fault):
            raise error from fault
        do = "run the same command again: what has arrived is kept"
        raise StorageFault("the download failed", where=said, found=_brief(fault), do=do) from fault


def _cached(name: str, revision: str | None) -> Path | None:
    """The directory of an earlier download. It may be incomplete: whoever opens it says which shards are missing."""
    import huggingface_hub
    from huggingface_hub import errors

    hub: Any = huggingface_hub  # as above
    few = ["config.json", "params.json"]
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=few, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def _refusal(said: str, fault: Exception) -> UsageError | None:
    """What the hub's answer means to a person; None when it gave none."""
    from huggingface_hub import errors

    for kind, what, do in (
        (errors.GatedRepoError, "the repository is gated", "accept its terms on its page, then: hf auth login"),
        (
            errors.RepositoryNotFoundError,
            "there is no such checkpoint, neither a directory nor on the hub",
            "check the name; for a private repository: hf auth login",
        ),
        (errors.RevisionNotFoundError, "the repository has no such revision", "name a branch, a tag or a commit"),
        (errors.HFValidationError, "there is no such directory, and this is no name on the hub", "check the path"),
    ):
        if isinstance(fault, kind):
            return UsageError(what, where=said, do=do)
    return None


def _unreachable(said: str, fault: Exception, *, offline: bool) -> DconvError:
    do = "check the path; where there is a connection, hf download fills the cache"
    if offline:
        what = "there is no such directory, nor is it in the hub's cache"
        return UsageError(what, where=said, found="HF_HUB_OFFLINE is set: the hub is not asked", do=do)
    what = "there is no such directory, and the hub cannot be reached"
    return StorageFault(what, where=said, found=_brief(fault), do=do)


def _brief(fault: Exception) -> str:
    lines = str(fault).strip().splitlines() or [""]
    return f"{type(fault).__name__}: {lines[0][:200]}"


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _literal(names: Iterable[str]) -> list[str]:
    """Names as patterns that match nothing else."""
    return [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
