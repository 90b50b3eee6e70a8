"""What the authors' code returns, to compare with."""
