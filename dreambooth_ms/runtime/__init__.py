"""Where graphs run: the device, the compiler and its cache, collective operations."""
