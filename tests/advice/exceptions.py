"""Messages with advice that no row of the table follows, each with the reason."""

EXCEPTIONS: dict[str, str] = {}
