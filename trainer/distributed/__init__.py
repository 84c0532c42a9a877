"""Process groups, collectives, gradient and update compression, and the launch of workers."""
