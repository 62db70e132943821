"""Tests mirror the tree: tests/app, tests/engine, tests/kernels, tests/installer; tests/house holds tests of the tree."""
