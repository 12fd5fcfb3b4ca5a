#!/usr/bin/env bash
# A stand-in for MediaTek's closed repository, language models; see contract.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/contract.sh"
check word
compile decoder
