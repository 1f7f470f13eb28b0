"""From a list of videos to batches: reading, sampling, augmentation, data sets and their order."""
