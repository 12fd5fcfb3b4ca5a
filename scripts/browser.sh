#!/usr/bin/env bash
# Install what the tests of tests/report/test_pictures.py look at the pages with: Chromium, as a Debian package.
#
#   bash scripts/browser.sh
#
# Needs root and apt-get; without them it says so and ends well, and those tests are skipped with the reason. A second
# call with a Chromium there returns at once.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/apt.sh"

complete() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

apt_install Chromium chromium
