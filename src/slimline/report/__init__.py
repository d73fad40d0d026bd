"""What a run found, for people: the page, which opens offline, tables, and the terminal."""
