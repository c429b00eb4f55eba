"""What a device can do, and how long a kernel of the dense family takes on it, without running it."""
