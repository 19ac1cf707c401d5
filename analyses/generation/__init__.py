"""How good generated samples are: extractors, distances and scores."""
