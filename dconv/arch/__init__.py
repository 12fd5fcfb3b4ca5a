"""Model families: tables of names, and how config.json and Megatron's args say the same model."""
