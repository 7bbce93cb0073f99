"""From noise and text to pictures."""
