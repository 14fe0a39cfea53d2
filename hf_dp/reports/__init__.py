"""What a run guarantees, in words and numbers."""
