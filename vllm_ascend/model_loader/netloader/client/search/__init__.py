"""Which sources are asked, in which order, and when a fetch is over."""
