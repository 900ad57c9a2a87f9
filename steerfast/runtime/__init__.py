"""Steps, independent of an engine: profiles on a device, who steers which rows, and what gates decide."""
