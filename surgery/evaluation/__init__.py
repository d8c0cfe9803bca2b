"""What a surgery cost and gained: perplexity and distance to the base, needles, speed and cache bytes."""
