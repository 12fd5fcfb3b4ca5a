"""Independent judges: models computed by their own frameworks, sharing no code with dconv's converter."""
