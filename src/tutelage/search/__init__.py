"""Search over the keys of a recipe: each trial is a run without a test split."""
