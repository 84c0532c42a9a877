"""What communication between silos costs: combination, wires over links of given rates, whole rounds over them."""
