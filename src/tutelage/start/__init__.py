"""Where a newcomer starts: recipes that ship, and one written for the user's own data and models."""

from tutelage.start.found import TASKS, Found, look
from tutelage.start.shipped import recipe_text, shipped
from tutelage.start.written import first_recipe

__all__ = ["TASKS", "Found", "first_recipe", "look", "recipe_text", "shipped"]
