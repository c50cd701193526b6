"""What `torch.compile` and `enable_cache` call: capture, compilation, and calls without Dynamo.

Knows Dynamo and Inductor.
"""
