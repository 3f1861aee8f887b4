"""Instructions and constraints that a program can check."""
