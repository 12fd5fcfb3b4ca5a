"""Hardware compilers: what each is told, where it is found, and what must have come out of it."""
