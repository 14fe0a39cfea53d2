"""A private run on a real model and real text, both out of PyPI packages."""
