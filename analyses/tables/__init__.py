"""From representations to tables: quality of layers, similarity and evidence of pairs."""
