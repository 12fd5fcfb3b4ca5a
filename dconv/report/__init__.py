"""What `inspect` says of a model's numbers: dtypes, scales and what the config claims of them, as text and a page."""
