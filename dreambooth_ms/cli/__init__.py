"""One file per command, but that `conversion` has three; the only place that knows how the parts are put together."""
