"""Arrays in, arrays out: the reference of each operation, its faster forms, and the choice between them by platform."""
