"""Vendors' toolchains that are not public, played by scripts that hold a caller to the contract."""
