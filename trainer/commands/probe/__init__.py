"""Probe hosts, links and devices with short-lived workers; shared by `plan` and `doctor`."""
