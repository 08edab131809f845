"""A recipe for the user's own data, and the recipes of the package."""

from tutelage.init.detect_data import TASKS, DataDescription, describe_data
from tutelage.init.recipe_template import draft_recipe, teacher_kind
from tutelage.init.shipped_recipes import list_recipes, read_recipe

__all__ = ["TASKS", "DataDescription", "describe_data", "draft_recipe", "list_recipes", "read_recipe", "teacher_kind"]
