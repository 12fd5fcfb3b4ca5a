#!/usr/bin/env bash
# A stand-in for MediaTek's closed repository, models that see; see contract.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/contract.sh"
check multimodal
compile vision decoder
