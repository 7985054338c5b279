"""The image: definition, lock, cache, build, verification; and how a rank gets into it on its node (enter, unpack, rank)."""
