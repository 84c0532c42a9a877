"""The cost of communication between silos: combination, transports over shaped links, whole rounds over them."""
