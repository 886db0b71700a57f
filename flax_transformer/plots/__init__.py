"""Arrays and logs to pictures."""
