"""What stands on a Flow: the HTTP service and its page, its replicas, and the repository for Triton."""
