"""What users and sites write, validated at the edge: presets, hardware, sites and stacks."""
