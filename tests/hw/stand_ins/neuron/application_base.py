"""The vendor's base class, as far as quantising goes: what it does to the checkpoint that it is given."""

from pathlib import Path


class NeuronApplicationBase:
    @classmethod
    def save_quantized_state_dict(cls, model_path, config):
        """Quantises anew and writes over what is there, as the vendor's does."""
        for path in Path(config.neuron_config.quantized_checkpoints_path).glob("*.safetensors"):
            path.write_bytes(b"quantised once more")
