"""Coverage-guided fuzzing of everything in dconv that reads what somebody else may have written; see README.md."""
