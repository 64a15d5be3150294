"""Lessons: the synthetic exchanges the demo model learns from, one module per subject."""
