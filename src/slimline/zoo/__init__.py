"""Networks that are small to begin with: each described once, built in either framework (docs/zoo.md)."""
