"""dconv: move large-language-model checkpoints between where they were trained and where they will run."""

__version__ = "0.1.0"
