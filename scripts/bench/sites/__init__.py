"""The cost of links between sites and a coordinator: the share of a link, a combination, memory, many sites."""
