#!/usr/bin/env bash
# Install what the tests of tests/report/test_pictures.py look at the pages with: Chromium, as a Debian package.
#
#   bash scripts/browser.sh
#
# Needs root and apt-get; without them it says so and ends well, and those tests are skipped with the reason. A second
# call with a Chromium there returns at once.
set -euo pipefail

packages=(chromium)

skip() {
    printf 'browser: no Chromium for the tests: %s\n' "$1"
    exit 0
}

complete() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

complete && exit
command -v apt-get >/dev/null || skip "no apt-get here; install ${packages[*]}"
((EUID == 0)) || skip "not root; apt-get install ${packages[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install -y --no-install-recommends "${packages[@]}" </dev/null >"$log" 2>&1
}
install || { apt-get update >"$log" 2>&1 && install; } || {
    tail -n 20 "$log"
    skip "apt-get failed, see above"
}
complete || skip "the package came without its command"
