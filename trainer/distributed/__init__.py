"""Processes, devices, silos, and everything that they send to each other."""
