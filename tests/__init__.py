"""Tests mirror the tree: tests/app, tests/engine, tests/kernels, tests/installer; tests/house tests the tree."""
