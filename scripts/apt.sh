# Sourced by the scripts that install what only some tests use, as Debian packages. Without root or apt-get, or where
# apt-get fails, they say so and end well: those tests are skipped with the reason.
# shellcheck shell=bash

# apt_install WHAT PACKAGE…: install them, unless `complete`, a function of the script that sources this, finds it all
apt_install() {
    local what=$1
    shift
    complete && exit
    command -v apt-get >/dev/null || skip "$what" "no apt-get here; install $*"
    ((EUID == 0)) || skip "$what" "not root; apt-get install $*"
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    export DEBIAN_FRONTEND=noninteractive
    from_apt "$@" || { apt-get update >"$log" 2>&1 && from_apt "$@"; } || {
        tail -n 20 "$log"
        skip "$what" "apt-get failed, see above"
    }
    complete || skip "$what" "the packages came without all of their commands"
}

from_apt() {
    apt-get install -y --no-install-recommends "$@" </dev/null >"$log" 2>&1
}

skip() { # skip WHAT WHY
    printf '%s: no %s for the tests: %s\n' "$(basename -- "$0" .sh)" "$@"
    exit 0
}
