"""One task a file: prompt to pixels, a file's inspection, a recipe's verification, a look at the machine."""
