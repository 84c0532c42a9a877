"""The cost of communication between silos: combination, transports over links of given rates, whole rounds over them."""
