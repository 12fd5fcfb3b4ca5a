#!/usr/bin/env bash
# Make .venv at the repository root and install dconv with the named extras at the versions of constraints.txt:
#
#   bash scripts/install.sh [EXTRA…]        e.g.  bash scripts/install.sh megatron test
#
# Needs Python >= 3.11 and pip (PYTHON=… chooses the interpreter). A second call with nothing changed returns at once;
# extras add up over calls. Quiet unless something fails; pip's own settings (index, proxy, wheels) apply.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"

venv=$root/.venv
stamp=$venv/dconv-installed # first line: a hash of what the install depends on; second line: the extras

fingerprint() {
    { echo "$root"; cat pyproject.toml constraints.txt; } | sha256sum | cut -d' ' -f1
}

extras=$(printf '%s\n' "$@" | sed 's/[, ]/\n/g; s/[][]//g')
if [[ -r $stamp ]]; then
    { read -r was || true; read -r had || true; } <"$stamp"
    extras=$(printf '%s\n' "$extras" "${had//,/$'\n'}")
else
    was=
    had=
fi
extras=$(sort -u <<<"$extras" | sed '/^$/d' | paste -sd,)
now=$(fingerprint)
if [[ $was == "$now" && ${had:-} == "$extras" && -x $venv/bin/python ]]; then
    exit 0
fi

make_venv "$venv"

"$venv/bin/python" - "$extras" <<'EOF' || exit 1
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    known = tomllib.load(file)["project"]["optional-dependencies"]
if unknown := [extra for extra in sys.argv[1].split(",") if extra and extra not in known]:
    sys.exit(f"install: no extra is called {', '.join(unknown)}; there are {', '.join(known)}")
EOF

quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
    -c constraints.txt -e ".${extras:+[$extras]}"
printf '%s\n' "$now" "$extras" >"$stamp"
