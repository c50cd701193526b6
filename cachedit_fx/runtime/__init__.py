"""What happens at a call: the step, its session, what is cached between two steps, and the statistics."""
