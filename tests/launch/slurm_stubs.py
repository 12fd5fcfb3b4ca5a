"""SLURM's commands as lines of shell that note how they were called, for what no real cluster can be made to do."""

from __future__ import annotations

from pathlib import Path

#: What each does beside noting its words; STUBS is their folder.
STUBS = {
    "sbatch": 'env >"$STUBS/environment"; echo 7',
    "squeue": (  # a step is there when it is looked for a second time
        'if [[ "$*" == *--steps* ]]; then [[ ! -e $STUBS/seen ]] || echo 7.0; : >"$STUBS/seen"; exit; fi; '
        'state=$(head -n 1 "$STUBS/states"); [[ $(wc -l <"$STUBS/states") == 1 ]] || sed -i 1d "$STUBS/states"; '
        '[[ $state != gone ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }; echo "$state"'
    ),
    "scontrol": (
        'case "$1 ${2:-}" in "show hostnames") echo n0; echo n1;; "show job") '
        '[[ -s $STUBS/facts ]] || exit 1; cat "$STUBS/facts";; esac'
    ),
    "scancel": ': >"$STUBS/cancelled"',
    # The ranks of a step leave the codes that the test says, and the step ends with CODE.
    "srun": (
        'rank=0; for said in $RANKS; do echo "$said" >"$DCONV_EXIT_CODES/$rank"; rank=$((rank + 1)); done; '
        'if [[ ${SIGNAL:-} ]]; then kill "-$SIGNAL" "$PPID"; until [[ -e $STUBS/cancelled ]]; do sleep 0.02; done; fi; '
        'exit "$CODE"'
    ),
}


def write(folder: Path, *, facts: str = "JobId=7 JobState=RUNNING Reason=None", states: str = "gone") -> Path:
    """The commands, in ``folder``.

    Args:
        facts: what scontrol says of any job; "" for one that it has forgotten.
        states: what squeue says, a line each time; the last one for ever.
    """
    folder.mkdir(exist_ok=True)
    for name, body in STUBS.items():
        note = f'printf \'%s\\n\' "{name} $*" >>"$STUBS/calls"'
        (folder / name).write_text(f"#!/usr/bin/env bash\nset -eu\nSTUBS={folder}\n{note}\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "facts").write_text(facts + "\n" if facts else "")
    (folder / "states").write_text(states + "\n")
    return folder


def calls(folder: Path, name: str) -> list[str]:
    """The words of each call of a command."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removeprefix(f"{name} ") for line in lines if line.partition(" ")[0] == name]
