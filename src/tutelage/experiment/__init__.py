"""One comparison: a student without and with its teacher, over seeds, from a recipe or from the caller's modules."""
