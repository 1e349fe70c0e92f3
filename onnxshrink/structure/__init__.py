"""Structure: what a graph means: layers, channels, blocks, shapes."""
