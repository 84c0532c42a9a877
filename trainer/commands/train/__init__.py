"""Start the workers of a run on this node, and run one of them."""
