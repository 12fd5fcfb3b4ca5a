"""The geometry and the engine: boxes, plans, and moving bytes. Knows no model and no file format."""
