"""Choosing the numbers of a quantised model: calibration, layer by layer, over ranks."""
