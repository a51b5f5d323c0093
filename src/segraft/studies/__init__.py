"""Studies: a grid of trainings (methods × ranks × strategies × folds × seeds) as data, and its report."""
