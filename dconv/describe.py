"""A source with its family and its config settled: the first step of every conversion, and all of an inspection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dconv.arch import eagle, registry
from dconv.arch.args import dtype_name, dtype_of
from dconv.arch.family import Family
from dconv.arch.layouts import Facts, size
from dconv.checkpoint.detect import open_source
from dconv.checkpoint.files import read_json
from dconv.checkpoint.huggingface_target import with_dtype
from dconv.checkpoint.rename import renaming_of
from dconv.checkpoint.source import Source, describe, side_files
from dconv.coded.decode import KEY
from dconv.errors import Refused, UsageError
from dconv.request import Request
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.tensor import Logical


@dataclass(frozen=True)
class Described:
    """A source with its family and config settled.

    Attributes:
        config: HuggingFace's config.json, without what the tensors do not bear out.
        rebuilt: it was made of Megatron's args.
        facts: dimensions and switches that the family's table goes by.
        logical: the tensors under HuggingFace's names.
        fixed: tensors of a quantised form, which ``--dtype`` has no say in.
    """

    source: Source
    family: Family
    config: dict[str, object]
    rebuilt: bool
    facts: Facts
    logical: Logical
    fixed: frozenset[str] = frozenset()

    @property
    def keeps(self) -> frozenset[str]:
        """Tensors that ``--dtype`` leaves as they are: those that are ``fixed``, and those whose rows keep theirs."""
        entries = self.family.entries(self.facts)
        return self.fixed | {spec.name for entry in entries if entry.row.keeps for spec in entry.fused.specs}


def described(request: Request, *, config_alone: bool = False) -> Described:
    """The source of a request, as its options say that it is to be read; see `describe_model`."""
    return describe_model(
        request.model,
        source_format=request.source_format,
        model_type=request.model_type,
        hf_config=request.hf_config,
        drop=request.drop,
        rename=request.rename,
        config_alone=config_alone,
        submodel=request.submodel,
        with_eagle=request.with_eagle,
    )


def describe_model(
    path: Path,
    *,
    source_format: str | None = None,
    model_type: str | None = None,
    hf_config: str | Path | None = None,
    drop: str | Sequence[str] = (),
    rename: str | Path | None = None,
    config_alone: bool = False,
    submodel: str | None = None,
    with_eagle: bool = False,
) -> Described:
    """Open a checkpoint, find its family, and lay the family's table over it.

    Args:
        path: a directory, a state dict's file, or a name on the hub.
        source_format: its container; None detects it.
        model_type: its family; None detects it.
        hf_config: a directory whose config.json and tokenizer are used instead of its own.
        drop: a pattern, or several, of tensors to leave out.
        rename: a file of patterns for the tensors' stored names (`dconv.checkpoint.rename`).
        config_alone: be content with a config.json, for a plan.
        submodel: ``student`` or ``teacher`` of a distillation checkpoint.
        with_eagle: keep the tensors of an EAGLE head instead of leaving them out (`dconv.arch.eagle`).

    Raises:
        UsageError: ``hf_config`` is no directory, ``rename`` no such file.
        DconvError: see `dconv.checkpoint.detect.open_source` and `dconv.checkpoint.source.describe`.
    """
    if hf_config is not None:
        _check_directory(Path(hf_config))
    renaming = renaming_of(rename, submodel)
    source = open_source(path, source_format, own_config=hf_config is None, rename=renaming, config_alone=config_alone)
    return settle(
        source,
        model_type=model_type,
        hf_config=hf_config,
        drop=drop,
        with_eagle=with_eagle,
    )


def _check_directory(hf_config: Path) -> None:
    if not hf_config.is_dir():
        raise UsageError(
            "--hf-config names no directory",
            where=str(hf_config),
            expected="a directory with a config.json",
            found="a file" if hf_config.exists() else "nothing of that name",
        )


def settle(
    source: Source,
    *,
    model_type: str | None = None,
    hf_config: str | Path | None = None,
    drop: str | Sequence[str] = (),
    with_eagle: bool = False,
) -> Described:
    """Find the family of a source that has been opened, and lay the family's table over it; see `describe_model`."""
    drop = (drop,) if isinstance(drop, str) else tuple(drop)
    if hf_config is not None:
        hf_config = Path(hf_config)
        _check_directory(hf_config)
        config = read_json(hf_config / "config.json", what="config.json")
        source = replace(source, config=config, side=side_files(hf_config))
    if source.fault:
        raise source.fault
    if source.lacks and source.config is None:
        raise registry.nothing_known(source.lacks)
    family = registry.by_name(model_type) if model_type else registry.detect(source.config, source.args, source.shapes)
    eagle.refuse_alone(source.shapes, str(source.root))
    family = eagle.kept(family) if with_eagle else eagle.left_out(family)
    rebuilt = source.config is None
    if source.config is not None:
        config = source.config
    elif source.args is not None:
        config = family.config.to_hf(source.args)
    else:
        raise registry.nothing_known()
    if source.config is not None and source.args is not None and hf_config is None:
        disagree = family.config.check_pair(source.config, source.args)
        if disagree:
            raise Refused(
                "the config.json inside this Megatron checkpoint is not of its weights, nothing was written",
                where=str(source.root),
                found="\n".join(disagree),
                do="--hf-config DIR supplies the right one",
            )
    settled, absent = family.borne_out(config, source.shapes)
    if KEY in settled:
        settled = {key: value for key, value in settled.items() if key != KEY}
        why = "the weights are decoded" if source.coded else "no weight is in codes"
        absent[f"{KEY} of config.json"] = why
    said, plain = dtype_name(settled.get("dtype") or settled.get("torch_dtype")), TO_TORCH[dtype_of(settled)]
    if source.coded and said not in ("", plain):  # by which transformers would cast the decoded weights
        settled = with_dtype(settled, plain)
        absent[f"{said} of config.json, for the dtype of its weights"] = "the weights are decoded"
    if absent:  # the file is then written anew, not copied
        side = {name: path for name, path in source.side.items() if name != "config.json"}
        source = replace(source, side=side, left_out={**source.left_out, **absent})
    config = dict(settled)
    facts = family.facts(config, source.shapes)
    _check_vocabulary(source, facts)
    return Described(source, family, config, rebuilt, facts, describe(source, family, facts, drop))


def _check_vocabulary(source: Source, facts: Facts) -> None:
    """Rows behind the config's vocabulary count as padding: they must not be tokens that the model was trained with.

    Raises:
        Refused: Megatron's args, which have the two counts, say that some are.
    """
    said = source.args or {}
    tokens, rows = said.get("vocab_size"), said.get("padded_vocab_size")
    if type(tokens) is int and type(rows) is int and size(facts, "vocab") < tokens < rows:
        raise Refused(
            "the config has fewer tokens than the checkpoint, nothing was written",
            where=f"vocab_size of the config for {source.root}",
            expected=f"{tokens}, as Megatron's args say (padded to {rows} rows), or more",
            found=str(facts["vocab"]),
            do="the config belongs to another model; correct it, or name the right one: --hf-config DIR",
        )
