"""Workflows of several runs, each a stage: born-again generations and chains of assistants."""
