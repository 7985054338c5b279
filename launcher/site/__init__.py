"""What a cluster and a machine say of themselves: asked in bounded time, parsed, made into a site file and into findings."""
