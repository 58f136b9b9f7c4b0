"""MoPPA, as a method: heat, wave and Poisson operators before attention; it folds into no weight."""
