"""What the authors' code returns, for comparison."""
