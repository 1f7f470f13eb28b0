"""What runs a training: the loop, its state, the optimiser, devices and processes, the run's folder."""
