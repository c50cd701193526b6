"""What `torch.compile` and `enable_cache` call: capture, compilation, and fast dispatch.

Only this package knows how Dynamo captures and guards. The private names of torch are in `torch_internals.py`.
"""
