"""The cost of communication between silos: the combination, transports over shaped links, whole rounds over them."""
