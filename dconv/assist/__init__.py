"""Help before a command is run: what a shell completes, and what a sentence means. Nothing here converts anything."""
