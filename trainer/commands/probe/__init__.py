"""Workers that measure instead of training, and their measurements.

Shared by `plan` and `doctor`.
"""
