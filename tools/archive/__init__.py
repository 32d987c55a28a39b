"""Model archives: built from a recipe, looked into, verified, compared."""
