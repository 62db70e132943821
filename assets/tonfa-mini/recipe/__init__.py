"""How Tonfa Mini was made: data, training, export. Run from the folder above: `python -m recipe STAGE`."""
