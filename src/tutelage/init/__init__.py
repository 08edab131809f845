"""Where a newcomer starts: recipes that ship, and one written for the user's own data and models."""

from tutelage.init.detect_data import TASKS, Found, look
from tutelage.init.recipe_template import first_recipe
from tutelage.init.shipped_recipes import recipe_text, shipped

__all__ = ["TASKS", "Found", "first_recipe", "look", "recipe_text", "shipped"]
