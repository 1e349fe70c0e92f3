"""What several passes need to know about a graph: statistics, activations, shapes."""
