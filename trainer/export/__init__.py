"""Exporting a trained model: one graph with its preprocessing, in the layout that model servers watch."""
