"""A package of its own: radgraph 0.1.18 installs a `tests` package beside itself, which a folder
without this file loses to.
"""
