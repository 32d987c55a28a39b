"""Measures what Marina costs: its part of a request, and its build beside that of torch-model-archiver."""
