"""Where cache-dit's users look for patch functors: `cache_factory.patch_functors`."""
