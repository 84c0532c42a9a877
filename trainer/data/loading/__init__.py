"""Loading: batches of a client's examples, and their way to the device."""
