"""How a number is stored and changed: casts, scaling, packings and blocks, as pure functions of arrays."""
