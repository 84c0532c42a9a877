"""Loading: batches of a client's examples, on their way to the device."""
