"""One file per command; the only place that knows how the parts are put together."""
