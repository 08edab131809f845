"""Workflows: anything that trains more than once, or makes data first."""
