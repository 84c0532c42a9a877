"""Sites: silos that are launches of their own, and a coordinator that they all dial."""
