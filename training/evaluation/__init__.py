"""What a model is worth: features, probes, classification, losses and pictures."""
