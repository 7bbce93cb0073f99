"""One file per command, but that `conversion` has four; the only place that knows how the parts are put together."""
