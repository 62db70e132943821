"""Other projects' names for our layers. File spellings live here and nowhere else."""
