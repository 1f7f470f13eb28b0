"""What is trained: a masked autoencoder, and a classifier or an action detector from it, each a function of its configuration."""
