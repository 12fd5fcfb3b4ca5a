"""Megatron-Bridge 0.6.2 saves a HuggingFace model as its own checkpoint, and loads one that dconv made.

Not imported by any test, and imports no dconv; run with the python of ``scripts/bridge_env.sh``'s environment:

    .venvs/bridge/bin/python tests/oracles/bridge.py SOURCE MADE BRIDGES BACK

SOURCE is a HuggingFace directory. MADE is an iteration that dconv made of it: Bridge loads it by ``run_config.yaml``
and writes the weights as HuggingFace's to BACK. BRIDGES becomes Bridge's own checkpoint of SOURCE.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import bridge_peer  # the shims without which Megatron-Bridge cannot be imported here


def main() -> None:
    source, made, bridges, back = (Path(word) for word in sys.argv[1:])
    bridge_peer.before_bridge()
    from megatron.bridge import AutoBridge  # pyright: ignore[reportMissingImports]
    from megatron.bridge.models.gpt_provider import GPTModelProvider  # pyright: ignore[reportMissingImports]

    bridge_peer.on_cpu()
    finalize = GPTModelProvider.finalize

    def finalize_for_cpu(self: Any) -> None:
        bridge_peer.local_layers(self)
        finalize(self)

    GPTModelProvider.finalize = finalize_for_cpu
    with tempfile.TemporaryDirectory(prefix="bridge-") as scratch:
        bridge_peer.world_of_one(scratch)
        bridge = AutoBridge.from_hf_pretrained(str(source))
        provider = bridge_peer.provider_for_cpu(bridge)
        model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(model, bridges, low_memory_save=True)
        loaded = bridge.load_megatron_model(made)
        back.mkdir()
        shutil.copy(source / "config.json", back)
        bridge.save_hf_weights(loaded, back, show_progress=False)


if __name__ == "__main__":
    main()
