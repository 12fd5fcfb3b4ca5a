"""What a company keeps to itself: a family, a format and a compiler, outside of dconv's tree."""
