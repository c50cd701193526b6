"""What happens at a call: the step, its session, the cached values, and the statistics."""
