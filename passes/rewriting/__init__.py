"""What a site becomes, and how it gets into the graph."""
