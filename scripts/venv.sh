# Sourced by the scripts that make environments: how these fail, keep quiet, and make an empty one.
# shellcheck shell=bash
# PYTHON=… chooses the interpreter.

self=$(basename -- "$0" .sh)
# shellcheck disable=SC2034 # of those who source this
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

fail() {
    printf "$self: %s\n" "$@" >&2
    exit 1
}

quietly() { # run; show the output only when it fails
    "$@" >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        fail "this failed: $*"
    }
}

hash_of() { # of files: what an environment's stamp has to be for nothing to be done
    cat -- "$@" | sha256sum | cut -d' ' -f1
}

is_made() { # is_made VENV STAMP HASH
    [[ -x $1/bin/python && -r $2 && $(<"$2") == "$3" ]]
}

make_venv() { # make_venv VENV: an environment with pip alone, unless there is one with pip
    [[ -r $1/pyvenv.cfg ]] && "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
    command -v "$python" >/dev/null || fail "no $python on PATH; dconv needs Python 3.11 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old; dconv needs Python 3.11 or newer" \
            "PYTHON=/path/to/python3.11 bash scripts/$self.sh chooses another one"
    mkdir -p "$(dirname -- "$1")"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        quietly "$python" -m venv "$1"
    else # Debian without python3-venv: its pip can still fill an environment made without one
        "$python" -m pip --version >/dev/null 2>&1 ||
            fail "$python has neither ensurepip nor pip; on Debian: apt-get install python3-pip"
        quietly "$python" -m venv --without-pip "$1"
        quietly "$python" -m pip --python "$1/bin/python" install pip
    fi
}
