"""Makes the environment and the launchers. Standard library only; imported by nothing outside this folder."""
