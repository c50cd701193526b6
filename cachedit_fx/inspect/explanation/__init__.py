"""What the compiler makes of a model, and why: `explain` and all that it is made of."""
