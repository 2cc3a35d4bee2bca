"""What leaves the program: merged models and trained states."""
