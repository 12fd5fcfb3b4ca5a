"""Containers, read and written by region; renaming, folding and made-up weights before a plan sees them."""
