"""Graph in, graph out: one rewrite per file."""
