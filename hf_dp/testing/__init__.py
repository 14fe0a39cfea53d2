"""Checks for layer rules and other parts, for our tests and for yours."""
