"""The two things that are trained: a masked autoencoder, and a classifier from it. Each as a function of its configuration."""
