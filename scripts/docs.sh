#!/usr/bin/env bash
# Build the documentation site in an environment of its own; a warning is an error:
#
#   bash scripts/docs.sh [DIR]         work/site, or DIR; 60 MB in .venvs/docs (ignored by git)
#   python3 -m http.server -d work/site     shows it: search needs a server, and nothing else from anywhere
#
# PYTHON=… chooses the interpreter. Everything that is installed is listed, at the versions of constraints.txt, hence
# --no-deps: docstrings are read and not imported, so that neither torch nor dconv's own packages are needed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"

venv=$root/.venvs/docs
packages=(
    mkdocs mkdocs-material mkdocs-material-extensions mkdocs-autorefs mkdocs-get-deps mkdocstrings mkdocstrings-python
    babel backrefs certifi charset-normalizer click colorama ghp-import griffelib idna Jinja2 Markdown MarkupSafe
    mergedeep packaging paginate pathspec platformdirs Pygments pymdown-extensions python-dateutil PyYAML
    pyyaml_env_tag requests tzdata urllib3 watchdog
)

stamp=$venv/docs-installed
now=$(hash_of scripts/docs.sh constraints.txt)
if ! is_made "$venv" "$stamp" "$now"; then
    make_venv "$venv"
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps \
        -c constraints.txt "${packages[@]}"
    printf '%s\n' "$now" >"$stamp"
fi

# says at each build what its authors think of the next MkDocs
export NO_MKDOCS_2_WARNING=1
# not --quiet: warnings would not be counted then
quietly "$venv/bin/python" -m mkdocs build --strict --site-dir "$(realpath -m -- "${1:-work/site}")"
