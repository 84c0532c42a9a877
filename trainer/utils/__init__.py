"""Small helpers without a home of their own: seeding, timing, hardware, text."""
